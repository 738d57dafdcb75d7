"""What a recording was made from, and whether it still is what it was.

Files count by size, time and inode, and by content where these differ: a checkout or a copy changes no task. Nothing
here decides what a task reads; a source says so (`catalog.lm_eval.reads`, `catalog.native`), or says that it does not
know, and then its recordings are made anew each time.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from proctor.records import Json, digest

FORMAT: Final = 1
COPIED: Final = 256 << 20
"""Bytes: files above count by size, time and inode alone, since reading them would cost more than recording."""
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")

Stamp = tuple[int, int, int]
"""Size in bytes, time of the last change in nanoseconds, inode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInput:
    """One file that was read."""

    path: str
    """Absolute."""
    stamp: Stamp
    sha256: str
    """Of the content; empty for a file above `COPIED` bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderInput:
    """A directory whose listing was asked for, or in which names are looked up."""

    path: str
    suffix: str
    """With one, the files below it at any depth with this ending, and their contents; without, the names in it."""
    stamps: str
    """Digest of names, sizes and times."""
    contents: str
    """Digest of names and contents; without a suffix, of the names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubInput:
    """A data set of a hub, at the commit that was read."""

    repo: str
    commit: str
    pinned: bool
    """The task itself names the commit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything that a recording was made from, beyond the configuration and the versions in its key."""

    files: tuple[FileInput, ...] = ()
    folders: tuple[FolderInput, ...] = ()
    hubs: tuple[HubInput, ...] = ()

    def to_json(self) -> dict[str, Json]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Inputs:
        """The inverse of `to_json`. Raises KeyError or TypeError for anything else."""
        return cls(
            files=tuple(FileInput(**f | {"stamp": _stamp(f["stamp"])}) for f in value["files"]),
            folders=tuple(FolderInput(**f) for f in value["folders"]),
            hubs=tuple(HubInput(**h) for h in value["hubs"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What is not as it was."""

    what: str
    """In words that name the file, folder or data set."""
    gone: bool
    """It cannot be seen from here; it may be the same elsewhere."""


def file_input(path: str | Path, seen: Stamp | None = None) -> FileInput | None:
    """The file as it is now; None if it cannot be read, or is not (or, while being read, no longer) what was `seen`."""
    try:
        with open(path, "rb") as file:
            before = _of(os.fstat(file.fileno()))
            if seen is not None and before != seen:
                return None
            sha256 = "" if before[0] > COPIED else hashlib.file_digest(file, "sha256").hexdigest()
            after = _of(os.fstat(file.fileno()))
    except OSError:
        return None
    return FileInput(path=os.path.abspath(path), stamp=before, sha256=sha256) if before == after else None


def untouched(file: FileInput) -> bool:
    """Whether the file is there with the stamp that it had."""
    try:
        return _of(os.stat(file.path)) == file.stamp
    except OSError:
        return False


def folder_input(path: str | Path, suffix: str = "") -> FolderInput:
    """The folder as it is now; one that is not there has nothing in it."""
    return FolderInput(
        path=os.path.abspath(path), suffix=suffix, stamps=_stamps(path, suffix), contents=_contents(path, suffix)
    )


def differences(inputs: Inputs, caches: Sequence[Path] = ()) -> Difference | None:
    """The first thing that is not as it was; None if everything is. `caches`: see `known_commits`."""
    for folder in inputs.folders:
        if _stamps(folder.path, folder.suffix) != folder.stamps and (
            _contents(folder.path, folder.suffix) != folder.contents
        ):
            return Difference(what=f"the files in {folder.path!r}", gone=not os.path.isdir(folder.path))
    for file in inputs.files:
        try:
            found = _of(os.stat(file.path))
        except OSError:
            return Difference(what=repr(file.path), gone=True)
        if found != file.stamp and not _same_content(file, found):
            return Difference(what=repr(file.path), gone=False)
    for hub in inputs.hubs:
        known = known_commits(hub.repo, caches)
        if known and not hub.pinned and hub.commit not in known:
            return Difference(what=f"the data set {hub.repo!r} (commit {hub.commit[:12]})", gone=False)
    return None


def renewed(inputs: Inputs) -> Inputs:
    """The same inputs with the stamps that the same contents have now, so that these need not be read again."""
    return replace(
        inputs,
        files=tuple(_renewed_file(f) for f in inputs.files),
        folders=tuple(_renewed_folder(f) for f in inputs.folders),
    )


def _renewed_file(file: FileInput) -> FileInput:
    if untouched(file):
        return file
    now = file_input(file.path)
    return now if now is not None and now.sha256 and now.sha256 == file.sha256 else file


def _renewed_folder(folder: FolderInput) -> FolderInput:
    stamps = _stamps(folder.path, folder.suffix)
    if stamps == folder.stamps:
        return folder
    same = _contents(folder.path, folder.suffix) == folder.contents
    return replace(folder, stamps=stamps) if same and _stamps(folder.path, folder.suffix) == stamps else folder


def hub_caches(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Where the hub's libraries keep commits that they have seen: their file cache, and that of prepared data."""
    home = environ.get("HF_HOME") or os.path.join(
        environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    files = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    prepared = environ.get("HF_DATASETS_CACHE") or os.path.join(home, "datasets")
    return Path(files).expanduser(), Path(prepared).expanduser()


def known_commits(repo: str, caches: Sequence[Path]) -> set[str]:
    """The commits that this machine would take for the newest of a data set's main branch; none if it has none.

    The branch as the file cache last saw it, and what was prepared last, which is what `datasets` takes offline.
    """
    found: set[str] = set()
    for cache in caches:
        ref = cache / f"datasets--{repo.replace('/', '--')}" / "refs" / "main"
        if ref.is_file():
            found.add(ref.read_text(encoding="ascii", errors="replace").strip())
        prepared = [p for p in cache.glob(f"{repo.replace('/', '___').lower()}/*/*/*") if _COMMIT.fullmatch(p.name)]
        if prepared:
            found.add(max(prepared, key=lambda p: p.stat().st_mtime_ns).name)
    return found


def hub_files(hub: HubInput, caches: Sequence[Path]) -> list[Path]:
    """The files of that commit in the caches: as they were fetched, and as `datasets` has prepared them."""
    found: list[Path] = []
    for cache in caches:
        places = [cache / f"datasets--{hub.repo.replace('/', '--')}" / "snapshots" / hub.commit]
        places += cache.glob(f"{hub.repo.replace('/', '___').lower()}/*/*/{hub.commit}")
        found += [file for place in places for file in sorted(place.rglob("*")) if file.is_file()]
    return found


def code_digest(paths: Iterable[Path]) -> str:
    """Of the source files of ours that decide what is recorded."""
    return digest([[p.name, hashlib.sha256(p.read_bytes()).hexdigest()] for p in sorted(paths)])


def _same_content(file: FileInput, found: Stamp) -> bool:
    if not file.sha256 or found[0] != file.stamp[0]:
        return False
    now = file_input(file.path)
    return now is not None and now.sha256 == file.sha256


def _of(stat: os.stat_result) -> Stamp:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _stamp(value: Sequence[int]) -> Stamp:
    size, mtime_ns, inode = value
    return size, mtime_ns, inode


def _names(path: str | Path) -> list[str]:
    try:
        return sorted(n for n in os.listdir(path) if n != "__pycache__" and not n.startswith("."))
    except OSError:
        return []


def _below(path: str | Path, suffix: str) -> list[Path]:
    return sorted(p for p in Path(path).rglob(f"*{suffix}") if p.is_file())


def _stamps(path: str | Path, suffix: str) -> str:
    if not suffix:
        return digest(_names(path))
    found: list[Json] = []
    for file in _below(path, suffix):
        try:
            found.append([str(file.relative_to(path)), *_of(file.stat())])
        except OSError:
            found.append([str(file.relative_to(path)), "unreadable"])
    return digest(found)


def _contents(path: str | Path, suffix: str) -> str:
    if not suffix:
        return digest(_names(path))
    found: list[Json] = []
    for file in _below(path, suffix):
        one = file_input(file)
        content = "unreadable" if one is None else one.sha256 or list(one.stamp)
        found.append([str(file.relative_to(path)), content])
    return digest(found)
