"""Hugging Face hub ids, read from the local cache; the network is used by `fetch_hub` alone."""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proctor.errors import MissingTool, ModelError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".tar")
"""How the names of files end that no tokenizer needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One commit of a hub repository as it lies in the cache."""

    path: Path
    commit: str


def hub_cache() -> Path:
    """Where huggingface_hub keeps its files: HF_HUB_CACHE, HF_HOME/hub, or ~/.cache/huggingface/hub."""
    explicit = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if explicit:
        return Path(os.path.expanduser(explicit))
    home = os.environ.get("HF_HOME")
    if home:
        return Path(os.path.expanduser(home)) / "hub"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "huggingface" / "hub"


def find_snapshot(hub_id: str, revision: str | None = None) -> Snapshot | None:
    """The cached snapshot of a branch, tag or commit (None: main); None if it is not there. No network.

    A commit may be shortened to seven or more digits where the cache has only one that fits.
    """
    repository = hub_cache() / f"models--{hub_id.replace('/', '--')}"
    wanted = revision or "main"
    reference = repository / "refs" / wanted
    try:
        commits = [reference.read_text(encoding="utf-8").strip()]
    except (OSError, ValueError):
        commits = _matching(repository / "snapshots", wanted)
    if len(commits) != 1:
        return None
    path = repository / "snapshots" / commits[0]
    return Snapshot(path=path, commit=commits[0]) if path.is_dir() else None


def _matching(snapshots: Path, revision: str) -> list[str]:
    if not re.fullmatch(r"[0-9a-f]{7,40}", revision) or not snapshots.is_dir():
        return []
    return [p.name for p in snapshots.iterdir() if p.name.startswith(revision) and _COMMIT.fullmatch(p.name)]


def cached_revisions(hub_id: str) -> list[str]:
    """The branches, tags and commits of `hub_id` that the cache has, sorted."""
    repository = hub_cache() / f"models--{hub_id.replace('/', '--')}"
    refs = repository / "refs"
    named = [str(p.relative_to(refs)) for p in refs.rglob("*") if p.is_file()] if refs.is_dir() else []
    snapshots = repository / "snapshots"
    commits = [p.name for p in snapshots.iterdir()] if snapshots.is_dir() else []
    return sorted(named) + sorted(commits)


def cached_ids() -> list[str]:
    """Every model repository that the cache has, sorted."""
    root = hub_cache()
    if not root.is_dir():
        return []
    return sorted(p.name.removeprefix("models--").replace("--", "/", 1) for p in root.glob("models--*"))


def source_of(path: Path) -> str | None:
    """`ORG/NAME@COMMIT` of a file or directory in a hub cache; None for any other."""
    parts = path.parts
    for n in range(len(parts) - 2):
        name = re.fullmatch(r"(?:models|datasets)--(.+)", parts[n])
        if name is not None and parts[n + 1] == "snapshots":
            return f"{name[1].replace('--', '/', 1)}@{parts[n + 2]}"
    return None


def fetch_hub(hub_id: str, revision: str | None = None, *, tokenizer: bool = False) -> Path:
    """Download a snapshot into the hub cache; its path. The only function here that uses the network.

    `tokenizer`: without the weights.

    Raises MissingTool without huggingface_hub, ModelError if the hub cannot be reached or refuses.
    """
    try:
        library: Any = importlib.import_module("huggingface_hub")
        faults: Any = importlib.import_module("huggingface_hub.errors")
    except ImportError as error:
        raise MissingTool(
            "downloading from the hub needs the package huggingface-hub", hint="pip install 'proctor-evals[hub]'"
        ) from error
    left_out = [f"*{suffix}" for suffix in _WEIGHTS] if tokenizer else None
    try:
        return Path(
            str(library.snapshot_download(hub_id, revision=revision, cache_dir=hub_cache(), ignore_patterns=left_out))
        )
    except (faults.HfHubHTTPError, faults.HFValidationError, OSError, ValueError) as fault:
        error: BaseException = fault
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(f"could not download {hub_id!r}{at} from the hub: {first}") from error
