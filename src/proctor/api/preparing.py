"""Everything that a run needs, brought and proven where there is a network, and listed for where there is none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from proctor.api.bundling import write_bundle
from proctor.api.context import RunContext
from proctor.api.images import bring_images, run_settings, with_local_image
from proctor.api.recording import Recorded, harness, prove, record_all
from proctor.api.targets import resolve_targets
from proctor.catalog.models import fetch_missing
from proctor.config.clusters.settings import SlurmSettings
from proctor.errors import ProctorError, UnknownName, together
from proctor.store import Store

__all__ = ["PreparedTask", "prepare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedTask:
    """One recording and what marking it needs."""

    task: str
    num_fewshot: int
    requests: int
    fingerprint: str
    labels: tuple[str, ...]


def prepare(
    config: str | Path, overrides: Sequence[str] = (), *, full_checksums: bool | None = None
) -> list[PreparedTask]:
    """Bring what is not here (models, tokenizers, container images), record every task anew, prove each on fake answers
    with sockets blocked, and list the files that the nodes need.

    `full_checksums`: whether the workers compare every byte of these files; None: as before. Raises, as one, what is
    wrong with any task, model or image: nothing is listed then.
    """
    context = RunContext.open(config, overrides)
    store = context.store(create=True)
    settings = _settings(context)
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="bring") as pool:
        # They wait for the network; recording takes the cores.
        models = pool.submit(fetch_missing, context.spec)
        images = pool.submit(bring_images, context, settings)
        found, labels, errors = _tasks(context, store)
        errors += [*models.result(), *images.result()]
    if errors:
        raise together(errors)
    context.directory.create()
    containers = [with_local_image(context, one).container for one in settings]
    targets = resolve_targets(context, store)
    write_bundle(context, store, targets, list(found.recordings), containers, full=full_checksums)
    return [
        PreparedTask(
            task=r.task,
            num_fewshot=r.num_fewshot,
            requests=len(r.instances),
            fingerprint=r.fingerprint,
            labels=labels.get(r.fingerprint, r.labels),
        )
        for r in found.recordings.values()
    ]


def _tasks(context: RunContext, store: Store) -> tuple[Recorded, dict[str, tuple[str, ...]], list[ProctorError]]:
    errors: list[ProctorError] = []
    with harness() as residents:
        found = record_all(context, store, run=residents.run, errors=errors)
        labels = prove(found, store, run=residents.run, errors=errors)
    return found, labels, errors


def _settings(context: RunContext) -> list[SlurmSettings]:
    """Of the cluster that the run is for; none where this machine belongs to no cluster that is known."""
    try:
        return list(run_settings(context, os.environ).values())
    except UnknownName:
        return []
