"""The list of files that a run needs on nodes without a network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from proctor.api.context import RunContext
from proctor.api.recording import read_before
from proctor.api.targets import Target
from proctor.catalog.digests import file_digests
from proctor.catalog.hub import source_of
from proctor.catalog.needed import needed_files
from proctor.processes.container import Container
from proctor.processes.images import image_file
from proctor.store import Store
from proctor.worker.bundle import DATA, Bundle, Piece


def write_bundle(
    context: RunContext,
    store: Store,
    targets: Sequence[Target],
    fingerprints: Sequence[str],
    containers: Iterable[Container | None] = (),
    *,
    full: bool | None = None,
) -> Bundle:
    """Look at every file that the targets and their recordings need, and keep the list in the run's directory.

    Reads three mebibytes of each file at most; with `full`, all of each whose SHA-256 is not known yet, and the workers
    compare all of it. None: as the list that is there. Raises ModelError for a file that cannot be read, StoreError
    where the list cannot be read or written.
    """
    if full is None:
        before = Bundle.read(context.directory.bundle)
        full = before is not None and before.full
    needed: dict[tuple[str, Path], set[str]] = {}
    for target in targets:
        for kind, path in needed_files(target.entry):
            needed.setdefault((kind, path), set()).add(target.id)
    everybody = [("recording", store.recording_path(fp)) for fp in fingerprints]
    # A directory (a rootfs) has no bytes to compare.
    images = [image_file(c) for c in containers if c is not None]
    everybody += [("container", i) for i in images if i is not None and i.is_file()]
    if any("dataset" in store.recording_labels(fp) for fp in fingerprints):
        everybody += [(DATA, path) for path in read_before(context, store)]
    for key in everybody:
        needed.setdefault(key, set())
    known = file_digests(path for _, path in needed) if full else {}
    pieces = [
        Piece.of(path, kind=kind, models=sorted(models), source=source_of(path), sha256=known.get(path))
        for (kind, path), models in needed.items()
    ]
    bundle = Bundle(pieces=tuple(pieces), full=full)
    context.directory.write(context.directory.bundle, bundle.to_json())
    return bundle
