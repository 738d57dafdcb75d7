"""Child: notices what building a task reads, so that the same reads later prove that the task is still the same.

An audit hook sees every file and folder that Python opens; data sets say which files or which commit they are made of,
since prepared data is read in their place. What cannot be seen is named: a task with such a thing is recorded anew each
time.
"""

# lm-eval is not in the environment that the types are checked in.
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_HUB_FILE: Final = re.compile(r"hf://datasets/([^/@]+/[^/@]+|[^/@]+)@([0-9a-f]{40})/")
_SYSTEM: Final = ("/proc", "/sys", "/dev", "/etc", "/usr/share", "/usr/lib")
_PACKAGES: Final = ("lm_eval", "datasets", "numpy", "jinja2", "pandas", "pyarrow")
"""What turns data into requests: another version of one of these, and everything is recorded again."""
_UNSEEN: Final = frozenset(
    {
        *("environ", "getenv", "expandvars"),
        *("now", "today", "time", "time_ns", "urandom", "SystemRandom", "secrets", "uuid1", "uuid4"),
        *("exists", "isfile", "isdir", "is_file", "is_dir", "stat", "getmtime"),
        *("memory_map", "mmap", "ctypes", "sqlite3", "subprocess", "system", "popen", "load_from_disk"),
        *("socket", "requests", "urllib", "urlopen", "httpx", "aiohttp", "transformers", "AutoTokenizer"),
    }
)
"""Names in a task's own Python behind which inputs hide that no audit hook sees."""
_HIDDEN_EVENTS: Final = frozenset({"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "sqlite3.connect"})


class Reads:
    """What this process reads from now on, and, after a fork, what the child reads as well."""

    def __init__(self, ignored: Iterable[Path]) -> None:
        """`ignored`: directories whose files are accounted for otherwise."""
        self._ignored = tuple(f"{os.path.abspath(p)}{os.sep}" for p in (*_roots(), *_hub_caches(), *ignored))
        self._kept = f"{_package('lm_eval')}{os.sep}"
        self.files: dict[str, list[int] | None] = {}
        """[size, mtime_ns, inode] when it was opened; None: it was not there."""
        self.folders: set[str] = set()
        self.hubs: set[tuple[str, str]] = set()
        self.unknown: set[str] = set()
        self._network = False
        self._loaded = frozenset(sys.modules)
        sys.addaudithook(self._hook)
        _watch_builders(self)

    def report(self, task: Any = None) -> dict[str, Any]:
        """As JSON: {files, folders, hubs, unknown}. `task`: the leaf that was built here."""
        unknown = set(self.unknown)
        if task is not None:
            unknown |= _hidden_in(task)
        for path in self.files:
            if path.endswith(".py"):
                unknown |= _hidden_names(path)
        if self._network and not self.hubs:
            unknown.add("the network")
        if "transformers" in sys.modules.keys() - self._loaded:
            unknown.add("a tokenizer or model")
        kwargs = getattr(getattr(task, "config", None), "dataset_kwargs", None)
        revision = kwargs.get("revision") if isinstance(kwargs, dict) else None
        return {
            "files": sorted([path, stamp] for path, stamp in self.files.items()),
            "folders": sorted(self.folders),
            "hubs": sorted([repo, commit, commit == revision] for repo, commit in self.hubs),
            "unknown": sorted(unknown),
        }

    def builder(self, builder: Any) -> None:
        """Note what a data set is made of."""
        files = builder.config.data_files
        names = [str(name) for split in files.values() for name in split] if isinstance(files, Mapping) else []
        for name in names:
            hub = _HUB_FILE.match(name)
            if hub:
                self.hubs.add((hub.group(1), hub.group(2)))
            elif "://" in name.removeprefix("file://"):
                self.unknown.add(name)
            else:
                self._file(name.removeprefix("file://"))
        if not names:
            if builder.repo_id and _COMMIT.fullmatch(str(builder.hash)):
                self.hubs.add((str(builder.repo_id), str(builder.hash)))
            else:
                self.unknown.add(f"where the data of {builder.dataset_name!r} is from")

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if not isinstance(path, int) and not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
                self._file(path)
        elif event in ("os.listdir", "os.scandir"):
            path = os.path.abspath(os.fsdecode(args[0])) if args[0] and not isinstance(args[0], int) else os.getcwd()
            if os.path.isdir(path) and not self._elsewhere(path + os.sep):
                self.folders.add(path)
        elif event == "socket.connect":
            self._network = self._network or not isinstance(args[1], str | bytes)
        elif event in _HIDDEN_EVENTS:
            self.unknown.add(f"another program ({event})")

    def _file(self, name: Any) -> None:
        path = os.path.abspath(os.fsdecode(name))
        if path.endswith(".pyc"):
            with contextlib.suppress(ValueError):
                path = importlib.util.source_from_cache(path)
        if path in self.files or path in sys.path or self._elsewhere(path):
            return  # Of the search path only an archive is opened, and what is in it is Python's own.
        try:
            found = os.stat(path)
        except OSError:
            self.files[path] = None
            return
        self.files[path] = [found.st_size, found.st_mtime_ns, found.st_ino]

    def _elsewhere(self, path: str) -> bool:
        return path.startswith(self._ignored) and not path.startswith(self._kept)


def code_files() -> list[str]:
    """The files that stand for lm-eval and for the packages under it: each differs for another version."""
    inside = f"{_package('lm_eval')}{os.sep}"
    loaded = {str(getattr(m, "__file__", None) or "") for m in list(sys.modules.values())}
    found = {path for path in loaded if path.startswith(inside)}
    for name in _PACKAGES:
        try:
            files = importlib.metadata.distribution(name).files or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.update(str(f.locate()) for f in files if f.name == "METADATA" and f.parent.suffix == ".dist-info")
    return sorted(found)


def _watch_builders(reads: Reads) -> None:
    from datasets import DatasetBuilder  # noqa: PLC0415

    original = DatasetBuilder.__init__

    def noticed(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        reads.builder(self)

    DatasetBuilder.__init__ = noticed


def _hidden_in(task: Any) -> set[str]:
    """What a task does by itself to get its data."""
    from lm_eval.api.task import ConfigurableTask  # noqa: PLC0415

    found: set[str] = set()
    if getattr(task.config, "custom_dataset", None) is not None:
        found.add("custom_dataset")
    if type(task).download is not ConfigurableTask.download:
        found.add(f"the class {type(task).__name__}, which gets its data itself")
    return found


def _hidden_names(path: str) -> set[str]:
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return {path}
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.Import):
            used.update(part for a in node.names for part in a.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            used.update((node.module or "").split("."), (a.name for a in node.names))
    return {f"{name} in {path}" for name in used & _UNSEEN}


def _roots() -> list[Path]:
    """Where Python and installed packages are; their versions count, not their files."""
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= {*site.getsitepackages(), site.getusersitepackages(), *_SYSTEM}
    base = f"{sys.base_prefix}/lib/python{sys.version_info.major}.{sys.version_info.minor}"
    ours = Path(__file__).parents[2]
    return [Path(p) for p in (*paths, base, ours, ours.resolve(), *(p for p in sys.path if p.endswith("/lib-dynload")))]


def _hub_caches() -> list[Path]:
    """Data sets are accounted for by their files or commits, whatever of them is kept here."""
    import datasets  # noqa: PLC0415
    import huggingface_hub.constants as constants  # noqa: PLC0415

    places = (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_MODULES_CACHE, constants.HF_HUB_CACHE)
    return [Path(str(p)) for p in places]


def _package(name: str) -> str:
    return os.path.dirname(str(sys.modules[name].__file__))
