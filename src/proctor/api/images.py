"""Container images of registries: brought by `prepare` to where all nodes see them, found there by `submit`."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from proctor.api.cluster_profiles import settings_by_model
from proctor.api.context import RunContext
from proctor.config.clusters.settings import SlurmSettings
from proctor.config.engines import launch_for
from proctor.config.spec import SlurmLaunch
from proctor.errors import ModelError, ProctorError
from proctor.processes.container import Container
from proctor.processes.images import bring_commands, file_name, from_file, in_registry

_BELOW: Final = "proctor-images"
_SAID: Final = 2000
"""Characters of a failed program's last words that are passed on."""


def run_settings(context: RunContext, environ: Mapping[str, str]) -> dict[str, SlurmSettings]:
    """What the jobs of each entry of `models:` are, of those that are meant for a cluster. Raises ConfigError."""
    names = [n for n in context.spec.models if isinstance(launch_for(context.spec, n), SlurmLaunch)]
    return settings_by_model(context, environ, only=names)


def bring_images(context: RunContext, settings: Iterable[SlurmSettings]) -> list[ProctorError]:
    """Bring every image that is not here and that nodes could not; what went wrong, image by image."""
    errors: list[ProctorError] = []
    done: set[str] = set()
    for one in settings:
        container = one.container
        if container is None or not one.offline or not in_registry(container) or file_name(container) in done:
            continue
        done.add(file_name(container))
        places = _places(context, one)
        if _found(container, places) is None:
            try:
                _bring(container, places)
            except ProctorError as error:
                errors.append(error)
    return errors


def with_local_image(context: RunContext, settings: SlurmSettings) -> SlurmSettings:
    """The settings with the file in place of a registry's name, where nodes have no network to look there.

    Raises ModelError if nobody has brought the image.
    """
    container = settings.container
    if container is None or not settings.offline or not in_registry(container):
        return settings
    file = _found(container, _places(context, settings))
    if file is None:
        raise ModelError(
            f"the container image {container.image!r} is a name in a registry, which the nodes cannot reach",
            hint=f"`proctor prepare {shlex.quote(str(context.config))}` brings it; `launch.offline: false` says that "
            "nodes have a network",
        )
    return replace(settings, container=from_file(container, file))


def _places(context: RunContext, settings: SlurmSettings) -> list[Path]:
    """Where brought images may lie: below a directory of the cluster that all nodes see, else beside the store."""
    return [*(Path(p) / _BELOW for p in settings.shared if Path(p).is_absolute()), Path(context.spec.store) / "images"]


def _found(container: Container, places: Iterable[Path]) -> Path | None:
    return next((p for place in places if (p := place / file_name(container)).exists()), None)


def _bring(container: Container, places: Iterable[Path]) -> Path:
    """Raises ModelError."""
    typed = " && ".join(map(shlex.join, bring_commands(container, next(iter(places)) / file_name(container))))
    place = next((p for p in places if _writable(p)), None)
    if place is None:
        raise ModelError(
            f"the container image {container.image!r} cannot be kept: not writable: {', '.join(map(str, places))}",
            hint=f"bring it yourself and name the file: {typed}",
        )
    target = place / file_name(container)
    # The name of the suffix stays: apptainer and enroot look at it.
    fresh = place / f".{secrets.token_hex(4)}-{file_name(container)}"
    try:
        for argv in bring_commands(container, fresh):
            _call(argv, container, typed)
        if not fresh.exists():
            raise ModelError(f"there is no image at {str(fresh)!r} after {typed}", hint="type it yourself")
        fresh.rename(target)
    finally:
        if fresh.is_dir() and not fresh.is_symlink():
            shutil.rmtree(fresh, ignore_errors=True)
        else:
            fresh.unlink(missing_ok=True)
    return target


def _writable(place: Path) -> bool:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(place, os.W_OK | os.X_OK)


def _call(argv: list[str], container: Container, typed: str) -> None:
    if shutil.which(argv[0]) is None:
        raise ModelError(
            f"the container image {container.image!r} is a name in a registry, and {argv[0]} is not here to bring it",
            hint=f"where it is: {typed}",
        )
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-_SAID:]
        raise ModelError(
            f"{shlex.join(argv[:2])} could not bring the container image {container.image!r} (status "
            f"{done.returncode}): {said}",
            hint=f"type yourself: {typed}",
        )
