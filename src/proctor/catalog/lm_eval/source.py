"""lm-evaluation-harness as a task source: names, and the recordings that stand for them."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from proctor.catalog.lm_eval.location import Location, check_version, install_hint, locate, recall
from proctor.catalog.source import TaskInfo
from proctor.config.spec import LmEvalTask, TaskSpec
from proctor.errors import HarnessError, MissingTool, TaskError
from proctor.interpreters import cache_directory
from proctor.processes.exchange import run_module
from proctor.records import Instance, Json, Recording, Request, Suite, canonical_json, digest

_CHILD: Final = "proctor.catalog.lm_eval"
_ENVIRONMENT: Final = {
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

    def __init__(self, python: str | None = None) -> None:
        """`python` is for `list` and `search`; None: this interpreter. `record` takes the entry's own, else this."""
        self._python = python

    def list(self, *, include: Sequence[str] = ()) -> Sequence[TaskInfo]:
        """Every task, group and tag: lm-eval's and those in the directories of `include`. Cached.

        Raises MissingTool without lm-eval, TaskError for a directory that does not exist.
        """
        rows = json.loads(_index(self._python, list(include)).read_text(encoding="utf-8"))
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
        if not isinstance(spec, LmEvalTask):
            raise TaskError(f"this is no lm_eval entry: {spec!r}")
        python = spec.python or self._python
        settings = entry_settings(spec)
        shots = list(spec.num_fewshot) if isinstance(spec.num_fewshot, tuple) else [spec.num_fewshot]
        with tempfile.TemporaryDirectory(prefix="proctor-record-") as name:
            directory = Path(name)
            job = {
                "names": list(spec.lm_eval),
                "num_fewshot": shots,
                "settings": settings,
                "index": str(_index(python, settings["include_path"])),
                "workers": len(os.sched_getaffinity(0)),
            }
            result = run_module(python, f"{_CHILD}.record", directory, job, env=_ENVIRONMENT)
            check_version(result["version"], python)
            leaves = {
                leaf: _recording(
                    json.loads((directory / f"{leaf}.json").read_text(encoding="utf-8")), result["version"]
                )
                for suite in result["suites"]
                for leaf in suite["leaves"]
            }
        suites = [_suite(suite, settings, python, leaves) for suite in result["suites"]]
        # A file and a name, or two globs, may mean the same.
        unique = {suite.id: suite for suite in suites}
        return list(unique.values()), list({r.fingerprint: r for r in leaves.values()}.values())


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


def _index(python: str | None, include_path: list[str]) -> Path:
    """The file with all names; made by a child when lm-eval or a file of `include_path` has changed."""
    paths = [os.path.abspath(os.path.expanduser(path)) for path in include_path]
    stamps = [[path, _yaml_stamps(path)] for path in paths]
    home = cache_directory() / "lm_eval"
    remembered = home / f"place-{digest([python])[:32]}.json"
    place = locate(python) or recall(remembered)
    if place is not None:
        file = home / f"index-{digest([python, list(place.stamp), stamps])[:32]}.json"
        if file.exists():
            return file
    with tempfile.TemporaryDirectory(prefix="proctor-index-") as name:
        try:
            result = run_module(python, f"{_CHILD}.index", Path(name), {"include_path": paths}, env=_ENVIRONMENT)
        except HarnessError as error:
            if "No module named 'lm_eval'" in error.message:
                raise MissingTool(f"{python} has no lm-eval", hint=install_hint(python)) from error
            raise
    check_version(result["version"], python)
    found = Location(version=result["version"], metadata=Path(result["metadata"]))
    _write(remembered, [found.version, str(found.metadata)])
    place = place or found
    file = home / f"index-{digest([python, list(place.stamp), stamps])[:32]}.json"
    _write(file, result["rows"])
    return file


def _write(file: Path, value: Json) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(value), encoding="utf-8")
    partial.replace(file)


def _yaml_stamps(path: str) -> list[list[Json]]:
    """[relative path, mtime, size] of every YAML file below `path`. Raises TaskError if it is no directory."""
    root = Path(path)
    if not root.is_dir():
        raise TaskError(f"include_path {path!r} is no directory")
    found = sorted(p for p in root.rglob("*.yaml") if p.is_file())
    return [[str(p.relative_to(root)), (s := p.stat()).st_mtime_ns, s.st_size] for p in found]
