"""lm-evaluation-harness as a task source: names, and the recordings that stand for them."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from proctor.catalog.inputs import FolderInput, HubInput, Inputs, code_digest, file_input, folder_input
from proctor.catalog.lm_eval.location import Location, check_version, install_hint, locate, recall
from proctor.catalog.source import Made, TaskInfo
from proctor.config.spec import LmEvalTask, TaskSpec
from proctor.errors import HarnessError, MissingTool, TaskError
from proctor.interpreters import PACKAGE, cache_directory
from proctor.processes.exchange import RunModule, run_module
from proctor.records import Instance, Json, Recording, Request, Suite, canonical_json, digest

_CHILD: Final = "proctor.catalog.lm_eval"
HOST: Final = f"{_CHILD}.host"
"""The module of a host that stays: see `processes.resident`."""
ENVIRONMENT: Final = {
    "PYTHONHASHSEED": "0",
    "PYTHONSAFEPATH": "1",
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""For the child: the same order of sets every time, no module from the working directory, no progress bars."""
_MACHINE: Final = ("python", "include_path", "index", "spec")
"""Settings of a suite that say where things are on this machine; no part of its id."""


class LmEvalSource:
    """Lists and records lm-eval's tasks with the lm-eval of one interpreter."""

    def __init__(self, python: str | None = None, *, run: RunModule = run_module) -> None:
        """`python` is for `list` and `search`; None: this interpreter. `record` takes the entry's own, else this.

        `run`: how a job gets to the interpreter.
        """
        self._python = python
        self._run = run

    def list(self, *, include: Sequence[str] = ()) -> Sequence[TaskInfo]:
        """Every task, group and tag: lm-eval's and those in the directories of `include`. Cached.

        Raises MissingTool without lm-eval, TaskError for a directory that does not exist.
        """
        rows = json.loads(_index(self._run, self._python, list(include)).read_text(encoding="utf-8"))
        return [
            TaskInfo(
                name=name,
                source="lm_eval",
                kind="task" if kind == "python" else kind,
                path=path,
                members=tuple(members),
            )
            for name, kind, path, _, members in rows
        ]

    def search(self, pattern: str, *, include: Sequence[str] = ()) -> Sequence[TaskInfo]:
        """Names that match a glob as lm-eval takes it (`mmlu_*`); without wildcards, names that contain it."""
        wild = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
        return [info for info in self.list(include=include) if fnmatch.fnmatch(info.name, wild)]

    def record(self, spec: TaskSpec) -> tuple[list[Suite], list[Recording]]:
        """One suite for each name of the entry and number of shots; a leaf that several share is recorded once.

        See `catalog.source.TaskSource.record`.
        """
        made = self.make(spec)
        return list(made.suites), list(made.recordings)

    def make(self, spec: TaskSpec) -> Made:
        """`record`, with what was read for it."""
        if not isinstance(spec, LmEvalTask):
            raise TaskError(f"this is no lm_eval entry: {spec!r}")
        python = spec.python or self._python
        settings = entry_settings(spec)
        shots = list(spec.num_fewshot) if isinstance(spec.num_fewshot, tuple) else [spec.num_fewshot]
        with tempfile.TemporaryDirectory(prefix="proctor-record-") as name:
            directory = Path(name)
            index = str(_index(self._run, python, settings["include_path"]))
            # As they are before they are read: what changes meanwhile is seen.
            folders = [folder_input(path, ".yaml") for path in settings["include_path"]]
            job = {
                "names": list(spec.lm_eval),
                "num_fewshot": shots,
                "settings": settings,
                "index": index,
                "workers": len(os.sched_getaffinity(0)),
            }
            result = self._run(python, f"{_CHILD}.record", directory, job, env=ENVIRONMENT)
            check_version(result["version"], python)
            found = {
                leaf: json.loads((directory / f"{leaf}.json").read_text(encoding="utf-8"))
                for suite in result["suites"]
                for leaf in suite["leaves"]
            }
        leaves = {name: _recording(leaf, result["version"]) for name, leaf in found.items()}
        suites = [_suite(suite, settings, python, leaves) for suite in result["suites"]]
        inputs, unknown = _inputs([leaf["reads"] for leaf in found.values()], folders, result["code"])
        # A file and a name, or two globs, may mean the same.
        return Made(
            suites=tuple({suite.id: suite for suite in suites}.values()),
            recordings=tuple({r.fingerprint: r for r in leaves.values()}.values()),
            inputs=inputs,
            unknown=unknown,
        )

    def input_key(self, spec: LmEvalTask) -> str | None:
        """A digest of everything but files that decides what `make` makes; None if it cannot be told beforehand.

        Raises MissingTool where lm-eval is not, or is another version.
        """
        python = spec.python or self._python
        place = _place(python)
        if place is None:
            return None
        code = [*Path(__file__).parent.glob("*.py"), PACKAGE / "records.py"]
        program = sys.executable if python is None else shutil.which(os.path.expanduser(python)) or python
        # Names may be files of the working directory, and data files of overrides are looked for there.
        where = [os.path.abspath(program), *(str(part) for part in place.stamp), os.getcwd()]
        return digest(["lm_eval", code_digest(code), where, spec.model_dump(mode="json"), entry_settings(spec)])


def entry_settings(spec: LmEvalTask) -> dict[str, Json]:
    """What of a configuration entry shapes recording and replay, except names and shots; JSON."""
    if spec.limit is not None and not isinstance(spec.limit, str | tuple) and spec.limit <= 0:
        raise TaskError(f"limit {spec.limit!r} leaves no document")
    if "task" in spec.overrides:
        raise TaskError("overrides cannot rename a task: leave `task` out")
    return {
        "include_path": [os.path.abspath(os.path.expanduser(path)) for path in spec.include_path],
        "metadata": spec.metadata,
        "overrides": spec.overrides,
        "repeats": spec.repeats,
        "replicate": spec.replicate,
        "gen_kwargs": spec.gen_kwargs,
        "limit": list(spec.limit) if isinstance(spec.limit, tuple) else spec.limit,
        "seeds": list(spec.seeds),
        "fewshot_seed": spec.fewshot_seed,
        "system_instruction": spec.system_instruction,
        "apply_chat_template": spec.apply_chat_template,
        "fewshot_as_multiturn": spec.fewshot_as_multiturn,
        "trust_remote_code": spec.trust_remote_code,
        "confirm_unsafe_code": spec.confirm_unsafe_code,
        "bootstrap_iters": spec.bootstrap_iters,
    }


def _recording(leaf: Mapping[str, Any], version: str) -> Recording:
    instances: list[Instance] = []
    for fields, doc_id, index, repeat in leaf["instances"]:
        request = Request.from_json(fields)
        instances.append(Instance(request=request, key=request.key, doc_id=doc_id, index=index, repeat=repeat))
    documents = json.dumps(leaf["documents"], ensure_ascii=True, separators=(",", ":"))
    bound = "".join(f"{i.doc_id} {i.index} {i.repeat};" for i in instances)
    kept = {
        "documents": hashlib.sha256(documents.encode("ascii")).hexdigest(),
        "binding": hashlib.sha256(bound.encode("ascii")).hexdigest(),
    }
    settings = canonical_json(leaf["settings"] | kept)
    fingerprint = Recording.compute_fingerprint(
        source="lm_eval",
        source_version=version,
        task=leaf["task"],
        task_version=leaf["version"],
        settings=settings,
        keys=[instance.key for instance in instances],
    )
    return Recording(
        fingerprint=fingerprint,
        source="lm_eval",
        source_version=version,
        task=leaf["task"],
        task_version=leaf["version"],
        num_fewshot=leaf["num_fewshot"],
        settings=settings,
        instances=tuple(instances),
        documents=documents,
    )


def _inputs(
    reads: Sequence[Mapping[str, Any]], folders: Iterable[FolderInput], code: Iterable[str]
) -> tuple[Inputs | None, tuple[str, ...]]:
    """What the leaves' children read; None, and why, if that is not all known or has changed since."""
    unknown = {text for read in reads for text in read["unknown"]}
    stamps: dict[str, set[tuple[int, ...] | None]] = {}
    for read in reads:
        for path, stamp in read["files"]:
            stamps.setdefault(path, set()).add(None if stamp is None else tuple(stamp))
    files = [file_input(path) for path in code]
    for path, seen in stamps.items():
        (first, *others) = seen
        one = file_input(path, (first[0], first[1], first[2])) if first is not None and not others else None
        if one is None:
            unknown.add(f"{path}, which was not there or has changed meanwhile")
        files.append(one)
    listed = [folder_input(path) for path in sorted({p for read in reads for p in read["folders"]})]
    hubs = {(repo, commit): pinned for read in reads for repo, commit, pinned in read["hubs"]}
    inputs = Inputs(
        files=tuple(f for f in files if f is not None),
        folders=(*folders, *listed),
        hubs=tuple(HubInput(repo=r, commit=c, pinned=pinned) for (r, c), pinned in sorted(hubs.items())),
    )
    return (None, tuple(sorted(unknown))) if unknown else (inputs, ())


def _suite(
    found: Mapping[str, Any], settings: Mapping[str, Json], python: str | None, leaves: Mapping[str, Recording]
) -> Suite:
    fingerprints = tuple(leaves[leaf].fingerprint for leaf in found["leaves"])
    full = dict(settings) | {
        "spec": found["spec"],
        "name": found["name"],
        "num_fewshot": found["num_fewshot"],
        "groups": found["groups"],
        "index": found["index"],
        "python": python,
    }
    identity = {key: value for key, value in full.items() if key not in _MACHINE}
    return Suite(
        id=digest([identity, list(fingerprints)]),
        source="lm_eval",
        names=(found["name"],),
        num_fewshot=found["num_fewshot"],
        recordings=fingerprints,
        settings=canonical_json(full),
    )


def _remembered(python: str | None) -> Path:
    return cache_directory() / "lm_eval" / f"place-{digest([python])[:32]}.json"


def _place(python: str | None) -> Location | None:
    """Where lm-eval is, as far as that can be said without starting its interpreter."""
    return locate(python) or recall(_remembered(python))


def _index(run: RunModule, python: str | None, include_path: list[str]) -> Path:
    """The file with all names. A child lists what has changed: lm-eval's own tasks, or those of `include_path`."""
    paths = [os.path.abspath(os.path.expanduser(path)) for path in include_path]
    stamps: list[Json] = [[path, _yaml_stamps(path)] for path in paths]
    place = _place(python)
    if place is not None and (file := _index_file(python, place, stamps)).exists():
        return file
    # Reading lm-eval's thousands of files takes it many seconds; those of `include_path` are read without them.
    own = place is None or not _index_file(python, place, []).exists()
    with tempfile.TemporaryDirectory(prefix="proctor-index-") as name:
        try:
            result = run(python, f"{_CHILD}.index", Path(name), {"include_path": paths, "own": own}, env=ENVIRONMENT)
        except HarnessError as error:
            if "No module named 'lm_eval'" in error.message:
                raise MissingTool(f"{python} has no lm-eval", hint=install_hint(python)) from error
            raise
    check_version(result["version"], python)
    found = Location(version=result["version"], metadata=Path(result["metadata"]))
    _write(_remembered(python), [found.version, str(found.metadata)])
    place = place or found
    file = _index_file(python, place, [])
    if own:
        _write(file, result["own"])
    if paths:
        rows = json.loads(file.read_text(encoding="utf-8"))
        file = _index_file(python, place, stamps)
        _write(file, merged(rows, result["added"]))
    return file


def merged(own: list[list[Json]], added: list[list[Json]]) -> list[list[Json]]:
    """Rows of names as lm-eval puts them together: what is added takes the place of what has the same name."""
    return list({row[0]: row for row in [*own, *added]}.values())


def _index_file(python: str | None, place: Location, stamps: list[Json]) -> Path:
    return cache_directory() / "lm_eval" / f"index-{digest([python, list(place.stamp), stamps])[:32]}.json"


def _write(file: Path, value: Json) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Entries are recorded in threads of one process, and two may write the same file.
    partial = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
    partial.write_text(json.dumps(value), encoding="utf-8")
    partial.replace(file)


def _yaml_stamps(path: str) -> list[list[Json]]:
    """[relative path, mtime, size] of every YAML file below `path`. Raises TaskError if it is no directory."""
    root = Path(path)
    if not root.is_dir():
        raise TaskError(f"include_path {path!r} is no directory")
    found = sorted(p for p in root.rglob("*.yaml") if p.is_file())
    return [[str(p.relative_to(root)), (s := p.stat()).st_mtime_ns, s.st_size] for p in found]
