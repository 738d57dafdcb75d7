"""Weights on a disk of the node: one copy, shared by the jobs there, removed when the last one that uses it ends.

Below the staging directory each set of files has a key made of their contents: `<key>/` holds the copy, `<key>.json`
says that it is whole, `<key>.lock` is held while somebody copies, checks or removes it, `<key>.use` is shared by those
who serve it. The directory is the node's own, so the kernel's locks hold, and go with whoever is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import shutil
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proctor.config.clusters.settings import Staging
from proctor.records import digest
from proctor.worker.bundle import sampled_digest

SPARE: Final = 1 << 30
"""Bytes that stay free: servers and libraries write temporary files."""
_CHUNK: Final = 16 << 20
_POLL_S: Final = 0.2
_RELEASE_S: Final = 60.0
"""How long the end waits for somebody who checks the copy; then the next one who comes removes it."""
_VARIABLE: Final = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_UNREAD: Final = re.compile(r"optimizer|scheduler|rng_state|trainer_state|training_args")
"""How the names of files begin that only training reads: they are linked, not copied."""
_SPLIT: Final = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<parts>\d{5})\.gguf")

Say = Callable[[str], None]


@contextlib.asynccontextmanager
async def staged_weights(
    staging: Staging, path: str, *, say: Say, environ: Mapping[str, str] = os.environ
) -> AsyncGenerator[str | None]:
    """The path of a copy of `path` on this node's disk for as long as it is needed; None where there is none.

    Never an error: what keeps the weights from being copied (an unset variable, too little room, a disk that fails)
    is told to `say`, and they are read from where they are.
    """
    stop = threading.Event()
    copy: NodeCopy | None = None
    work = asyncio.ensure_future(asyncio.to_thread(hold, staging, path, environ, stop))
    try:
        held = await asyncio.shield(work)
        say(f"the weights are read from {held.path}")
        copy = held
    except asyncio.CancelledError:
        stop.set()
        with contextlib.suppress(OSError):
            (await work).release()
        raise
    except OSError as error:
        say(f"the weights are read from {path}: {error}")
    try:
        yield None if copy is None else str(copy.path)
    finally:
        if copy is not None:
            await asyncio.to_thread(copy.release)


def hold(staging: Staging, path: str, environ: Mapping[str, str], stop: threading.Event) -> NodeCopy:
    root = Path(_expanded(staging.directory, environ)) / f"proctor-weights-{os.getuid()}"
    if not root.is_absolute():
        raise OSError(f"launch.staging.directory {staging.directory!r} is no absolute path")
    copy = NodeCopy.of(Path(path), root)
    copy.hold(check_space=staging.check_space, stop=stop)
    return copy


def _expanded(text: str, environ: Mapping[str, str]) -> str:
    """`$NAME` and `${NAME}` replaced. Raises OSError for a variable that the job does not have."""

    def value(found: re.Match[str]) -> str:
        name = found.group(1) or found.group(2)
        if not environ.get(name):
            raise OSError(f"launch.staging.directory names ${name}, which is not set in the job")
        return environ[name]

    return _VARIABLE.sub(value, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    name: str
    size: int
    digest: str

    @classmethod
    def of(cls, path: Path) -> _File:
        return cls(name=path.name, size=path.stat().st_size, digest=sampled_digest(path))

    def is_at(self, path: Path) -> bool:
        try:
            return path.stat().st_size == self.size and sampled_digest(path) == self.digest
        except OSError:
            return False


class NodeCopy:
    """One set of files on this node. All methods block; they raise OSError."""

    def __init__(self, source: Path, root: Path, files: list[_File], links: list[str]) -> None:
        self._source = source
        self._root = root
        self._files = files
        self._links = links
        contents = [str(source), [[f.name, f.size, f.digest] for f in files], links]
        self._key = digest(contents)[:24]
        self._use: int | None = None

    @classmethod
    def of(cls, source: Path, root: Path) -> NodeCopy:
        """What is to be copied of a model's directory or GGUF file: its own files, but none of its directories."""
        source = source.absolute()
        if source.is_dir():
            inside = sorted(source.iterdir())
            wanted = [p for p in inside if p.is_file() and not _UNREAD.match(p.name)]
            return cls(source, root, [_File.of(p) for p in wanted], [p.name for p in inside if p not in wanted])
        if not source.is_file():
            raise OSError("it is no local file or directory")
        split = _SPLIT.fullmatch(source.name)
        parts = [source]
        if split is not None:
            count = split.group("parts")
            names = [f"{split.group('stem')}-{n:05d}-of-{count}.gguf" for n in range(1, int(count) + 1)]
            parts = [source.with_name(name) for name in names]
        return cls(source, root, [_File.of(p) for p in parts], [])

    @property
    def path(self) -> Path:
        """What a server is given in place of the source."""
        return self._root / self._key / self._source.name

    @property
    def _home(self) -> Path:
        return self.path if self._source.is_dir() else self.path.parent

    def hold(self, *, check_space: bool, stop: threading.Event) -> None:
        """Return when the copy is whole and ours to use until `release`; others wait meanwhile, or find it done."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(self._root, keep=self._key)
        with _locked(self._root / f"{self._key}.lock", stop=stop) as lock:
            use = os.open(self._root / f"{self._key}.use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(use, fcntl.LOCK_SH)
                if not self._is_whole():
                    self._copy(check_space=check_space, stop=stop)
            except BaseException:
                os.close(use)
                _remove_unused(self._root, self._key, lock)
                raise
            self._use = use

    def release(self) -> None:
        """Use it no longer; whoever is the last to do so removes it."""
        use, self._use = self._use, None
        if use is None:
            return
        try:
            with _locked(self._root / f"{self._key}.lock", wait_s=_RELEASE_S) as lock:
                os.close(use)
                use = None
                _remove_unused(self._root, self._key, lock)
        except OSError:
            return  # a copy that stays is trusted, or removed, by the next job on the node
        finally:
            if use is not None:
                os.close(use)

    def _is_whole(self) -> bool:
        marker = self._root / f"{self._key}.json"
        return marker.exists() and all(file.is_at(self._home / file.name) for file in self._files)

    def _copy(self, *, check_space: bool, stop: threading.Event) -> None:
        _remove(self._root, self._key)
        need, free = sum(file.size for file in self._files), shutil.disk_usage(self._root).free
        if check_space and free < need + SPARE:
            raise OSError(f"{self._root} has {free / 1e9:.1f} GB free, and the weights are {need / 1e9:.1f} GB")
        self._home.mkdir(parents=True)
        for file in self._files:
            source = self._source / file.name if self._source.is_dir() else self._source.with_name(file.name)
            _copy_file(source, self._home / file.name, stop)
            if not file.is_at(self._home / file.name):
                raise OSError(f"the copy of {file.name} has other contents than the file")
        for name in self._links:
            (self._home / name).symlink_to(self._source / name)
        fresh = self._root / f".{self._key}.json"
        fresh.write_text(json.dumps({"source": str(self._source), "time": time.time()}), encoding="utf-8")
        fresh.replace(self._root / f"{self._key}.json")


def _copy_file(source: Path, target: Path, stop: threading.Event) -> None:
    with source.open("rb") as reading, target.open("xb") as writing:
        while chunk := reading.read(_CHUNK):
            if stop.is_set():
                raise InterruptedError("stopped while the weights were copied")
            writing.write(chunk)


@contextlib.contextmanager
def _locked(path: Path, *, stop: threading.Event | None = None, wait_s: float | None = None) -> Generator[int]:
    """Hold the lock file alone. Raises InterruptedError, and TimeoutError after `wait_s`."""
    deadline = None if wait_s is None else time.monotonic() + wait_s
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if _taken(lock) and _is_current(lock, path):
                yield lock
                return
        finally:
            os.close(lock)
        if stop is not None and stop.is_set():
            raise InterruptedError("stopped while another job copied the weights")
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError(f"{path} is held by another job")
        time.sleep(_POLL_S)


def _taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_current(lock: int, path: Path) -> bool:
    """Whether the path still names the locked file: whoever held it before may have removed it."""
    try:
        return path.stat().st_ino == os.fstat(lock).st_ino
    except FileNotFoundError:
        return False


def _remove_unused(root: Path, key: str, lock: int) -> None:
    """Remove the copy, and at last its lock, which the caller holds, unless somebody uses it."""
    use = os.open(root / f"{key}.use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if _taken(use):
            _remove(root, key)
            (root / f"{key}.use").unlink(missing_ok=True)
            if _is_current(lock, root / f"{key}.lock"):
                (root / f"{key}.lock").unlink()
    finally:
        os.close(use)


def _remove(root: Path, key: str) -> None:
    (root / f"{key}.json").unlink(missing_ok=True)
    shutil.rmtree(root / key, ignore_errors=True)


def _sweep(root: Path, *, keep: str) -> None:
    """Remove the copies that killed jobs have left."""
    for path in root.glob("*.use"):
        key = path.stem
        if key == keep:
            continue
        with contextlib.suppress(OSError), _locked(root / f"{key}.lock", wait_s=0.0) as lock:
            _remove_unused(root, key, lock)
