"""Container images that are names in a registry: how to tell them, and the commands that bring one into a file.

Nodes without a network can use files only. A name is brought once, where there is a network.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Final

from proctor.processes.container import Container, ContainerType
from proctor.records import digest

_SUFFIXES: Final[dict[ContainerType, str]] = {
    "apptainer": ".sif",
    "singularity": ".sif",
    "pyxis": ".sqsh",
    "enroot": ".sqsh",
    "charliecloud": "",
    "podman": ".tar",
}
_PATH: Final = re.compile(r"[/.~]")
_SCHEME: Final = re.compile(r"[a-z][a-z0-9+-]*://")
_ARCHIVE: Final = "oci-archive:"


def in_registry(container: Container) -> bool:
    """Whether the image is a name that its kind would look for in a registry.

    A name without a scheme is a file's for apptainer, that of a created container for enroot, and a registry's for the
    others.
    """
    image = container.image
    match container.type:
        case "apptainer" | "singularity":
            return _SCHEME.match(image) is not None
        case "enroot":
            return _SCHEME.match(image) is not None or "#" in image
        case "podman":
            return not (_PATH.match(image) or image.startswith(("localhost/", _ARCHIVE, "oci:", "dir:")))
        case "pyxis" | "charliecloud":
            return not _PATH.match(image)


def file_name(container: Container) -> str:
    """What the image is called once it is here; equal names mean the same image and kind of file."""
    shown = re.sub(r"[^A-Za-z0-9._-]+", "-", _SCHEME.sub("", container.image)).strip("-.")[-60:]
    suffix = _SUFFIXES[container.type]
    return f"{shown}-{digest([suffix, container.image])[:8]}{suffix}"


def bring_commands(container: Container, target: Path) -> list[list[str]]:
    """What brings the image to `target`, which is not there yet; one after the other."""
    image = container.image
    match container.type:
        case "apptainer" | "singularity":
            return [[container.type, "pull", str(target), image]]
        case "pyxis" | "enroot":
            name = image if _SCHEME.match(image) else f"docker://{image}"
            return [["enroot", "import", "--output", str(target), name]]
        case "podman":
            # What podman pulls goes into a storage of this machine, which no node sees.
            save = ["podman", "save", "--format", "oci-archive", "--output", str(target), image]
            return [["podman", "pull", image], save]
        case "charliecloud":
            return [["ch-image", "pull", image], ["ch-convert", "-o", "dir", image, str(target)]]


def from_file(container: Container, file: Path) -> Container:
    """The same container, from the file that `bring_commands` made."""
    prefix = _ARCHIVE if container.type == "podman" else ""
    return replace(container, image=f"{prefix}{file}")


def image_file(container: Container) -> Path | None:
    """The image's place where it is one on this machine; None for names."""
    path = Path(container.image.removeprefix(_ARCHIVE))
    return path if path.is_absolute() else None
