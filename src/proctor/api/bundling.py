"""The list of files that a run needs on nodes without a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from proctor.api.context import RunContext
from proctor.api.targets import Target
from proctor.store import Store
from proctor.worker.bundle import Bundle, Piece

_NOT_NEEDED: Final = frozenset({".md", ".log", ".lock", ".tmp", ".png", ".jpg"})


def write_bundle(
    context: RunContext,
    store: Store,
    targets: Sequence[Target],
    fingerprints: Sequence[str],
    images: Sequence[str] = (),
) -> Bundle:
    """Look at every file that the targets and their recordings need, and keep the list in the run's directory.

    Reads three mebibytes of each file at most. Raises ModelError for one that cannot be read, StoreError where the
    list cannot be written.
    """
    needed: dict[tuple[str, Path], list[str]] = {}
    for target in targets:
        for kind, path in _files(target):
            needed.setdefault((kind, path), []).append(target.id)
    pieces = [Piece.of(path, kind=kind, models=sorted(set(models))) for (kind, path), models in needed.items()]
    pieces += [Piece.of(store.recording_path(fp), kind="recording") for fp in dict.fromkeys(fingerprints)]
    # A directory (a rootfs) or a name in a registry has no bytes to compare.
    pieces += [Piece.of(Path(i), kind="container") for i in dict.fromkeys(images) if Path(i).is_file()]
    bundle = Bundle(pieces=tuple(pieces))
    context.directory.write(context.directory.bundle, bundle.to_json())
    return bundle


def _files(target: Target) -> Iterator[tuple[str, Path]]:
    for kind, place in (("weights", target.entry.path), ("tokenizer", target.entry.tokenizer)):
        path = Path(place) if place else None
        if path is None:
            continue
        if path.is_file():
            yield kind, path.absolute()
        elif path.is_dir():
            for file in sorted(path.iterdir()):
                if file.is_file() and not file.name.startswith(".") and file.suffix not in _NOT_NEEDED:
                    yield kind, file.absolute()
