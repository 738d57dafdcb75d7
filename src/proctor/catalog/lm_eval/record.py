"""Child: turn the names of a configuration entry into recordings, each leaf task in a fresh process of its own.

Job: {names, num_fewshot: [..], settings, index: file or null, workers}. Result: {version, suites, code}; each leaf is a
file of its own: what `source` makes a Recording from, and what was read for it.
"""

# lm-eval is not in the environment that the types are checked in.
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask

from proctor.catalog.lm_eval import chat, documents
from proctor.catalog.lm_eval.forks import in_processes, raise_all
from proctor.catalog.lm_eval.reads import Reads, code_files
from proctor.catalog.lm_eval.session import Model, Prepared, config_digest, evaluate, multiturn, own_map_cache, version
from proctor.catalog.lm_eval.tasks import Leaf, Plan, anchored, build, open_manager, plan, resolve
from proctor.catalog.lm_eval.wire import read_json, serve
from proctor.errors import ProctorError, TaskError
from proctor.records import Kind, Request, canonical_json


class Asked(BaseException):
    """Raised at the first question: by then lm-eval has built all of them. No task can mistake it for an error."""


def main(directory: Path, job: Mapping[str, Any]) -> Any:
    """Record everything the job names."""
    reads = Reads([directory, Path(job["index"] or directory).parent])
    rows = read_json(Path(job["index"])) if job["index"] else None
    manager = open_manager(job["settings"], rows)
    plans = _plans(manager, job["names"])
    suites: list[dict[str, Any]] = []
    work: dict[str, Callable[[Path], Any]] = {}
    for shots in job["num_fewshot"]:
        settings = dict(job["settings"], num_fewshot=shots)
        for spec, planned in plans:
            files: list[str] = []
            for leaf in planned.leaves.values():
                name = _work_name(leaf, shots)
                work[name] = _recorder(manager, leaf, settings, directory / f"{name}.cache", reads)
                files.append(name)
            suites.append(_suite(spec, planned, settings, files))
    raise_all(in_processes(work, directory, job["workers"]))
    return {"version": version(), "suites": suites, "code": code_files()}


def _plans(manager: Any, names: list[str]) -> list[tuple[str, Plan]]:
    """What the names stand for. Raises, as one, what is wrong with any of them."""
    found: dict[str, Plan] = {}
    errors: dict[str, ProctorError] = {}
    for name in names:
        try:
            for spec in resolve(manager, [name]):
                if spec not in found:
                    found[spec] = plan(manager, spec)
        except ProctorError as error:
            errors[name] = error
    raise_all(errors)
    return list(found.items())


def _suite(spec: str, planned: Plan, settings: Mapping[str, Any], files: list[str]) -> dict[str, Any]:
    return {
        "spec": spec,
        "name": planned.name,
        "num_fewshot": settings["num_fewshot"],
        "leaves": files,
        "groups": {name: group.child_names for name, group in planned.groups.items()},
        "index": anchored(planned.index, settings["include_path"]),
    }


def _work_name(leaf: Leaf, shots: int | None) -> str:
    # The same leaf in two suites is one recording, unless a group gives it another configuration.
    text = repr((leaf.name, shots, leaf.entry and (leaf.entry.name, str(leaf.entry.yaml_path)), leaf.config))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _recorder(
    manager: Any, leaf: Leaf, settings: Mapping[str, Any], cache: Path, reads: Reads
) -> Callable[[Path], Any]:
    def run(_directory: Path) -> Any:
        own_map_cache(cache)
        try:
            task, recorded = record_leaf(manager, leaf, settings)
            return recorded | {"reads": reads.report(task)}
        finally:
            shutil.rmtree(cache, ignore_errors=True)

    return run


def record_leaf(manager: Any, leaf: Leaf, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One leaf and its record, made by running lm-eval up to its first question. Call it in a fresh process.

    Raises TaskError, naming the task, for what cannot be built or cannot be expressed.
    """
    holder: dict[str, Any] = {}

    def answer(_kind: str, _requests: list[Any]) -> list[Any]:
        raise Asked

    def load() -> dict[str, Any]:
        task = build_leaf(manager, leaf, settings)
        holder["task"] = task
        if samples is not None:
            samples[leaf.name] = selection(settings["limit"], len(task.eval_docs), leaf.name)
        return {leaf.name: task}

    samples: dict[str, list[int]] | None = {} if isinstance(settings["limit"], str | list) else None
    limit = None if samples is not None else settings["limit"]
    try:
        evaluate(Model(answer), Prepared(load, {}), settings, limit=limit, samples=samples, bootstrap_iters=0)
    except Asked:
        pass
    except TaskError as error:
        raise named(error, leaf.name) from error
    except ProctorError:
        raise
    except Exception as error:  # Task code may raise anything; it is reported under the task's name.
        raise explained(error, leaf, holder.get("task")) from error
    try:
        task = holder["task"]
        return task, leaf_record(task, leaf.name, settings, samples[leaf.name] if samples else None)
    except TaskError as error:
        raise named(error, leaf.name) from error


def named(error: TaskError, name: str) -> TaskError:
    """`error`, saying which task it is about."""
    known = error.message.startswith(f"task {name!r}")
    return error if known else TaskError(f"task {name!r}: {error.message}", hint=error.hint)


def build_leaf(manager: Any, leaf: Leaf, settings: Mapping[str, Any], cls: Any = None) -> Any:
    """The task, with the entry's overrides; refused if it cannot be recorded at all."""
    overrides = dict(settings["overrides"])
    if settings["repeats"] is not None:
        overrides["repeats"] = settings["repeats"]
    task = build(manager, leaf, overrides, cls)
    if getattr(task, "UNSAFE_CODE", False) and not settings["confirm_unsafe_code"]:
        raise TaskError(
            f"task {leaf.name!r} runs code that the model wrote", hint="if you accept that: confirm_unsafe_code: true"
        )
    if not isinstance(task, ConfigurableTask):
        raise TaskError(f"task {leaf.name!r} is a {type(task).__name__}, not a kind of lm-eval's ConfigurableTask")
    if getattr(task, "MULTIMODAL", False):
        raise TaskError(f"task {leaf.name!r} asks with images or audio, which record and replay cannot express")
    return task


def selection(limit: str | list[int], total: int, name: str) -> list[int]:
    """Document ids of a slice text or id list, ascending. Raises TaskError if empty or out of range."""
    if isinstance(limit, str):
        chosen = list(range(total)[slice(*(int(part) if part else None for part in limit.split(":")))])
    else:
        chosen = list(limit)
    if not chosen or min(chosen) < 0 or max(chosen) >= total:
        raise TaskError(f"task {name!r} has {total} documents: limit {limit!r} selects nothing or goes beyond them")
    return sorted(set(chosen))


def leaf_record(task: Any, name: str, settings: Mapping[str, Any], chosen: list[int] | None) -> dict[str, Any]:
    """What `source` makes a Recording from: instances, documents, settings."""
    docs: dict[int, Any] = {}
    instances: list[list[Any]] = []
    for instance in task.instances:
        doc_id = chosen[instance.doc_id] if chosen else instance.doc_id
        known = docs.setdefault(doc_id, instance.doc)
        if known is not instance.doc and known != instance.doc:
            raise TaskError(f"task {name!r} asks about several documents under one id")
        for repeat in range(instance.repeats or 1):
            request = request_of(instance, name, settings, repeat)
            instances.append([request.to_json(), doc_id, instance.idx, repeat])
    kept = {
        "docs": {doc_id: kept_document(doc, name) for doc_id, doc in docs.items()},
        "total": len(task.eval_docs),
        "features": list(task.features),
        "multiple_input": task.multiple_input,
        "multiple_target": task.multiple_target,
    }
    config = task.config
    return {
        "task": name,
        "version": str(task.VERSION),
        "num_fewshot": int(config.num_fewshot or 0),
        "instances": instances,
        "documents": kept,
        "settings": {
            "seeds": list(settings["seeds"]),
            "fewshot_seed": settings["fewshot_seed"],
            "limit": settings["limit"],
            "apply_chat_template": settings["apply_chat_template"],
            "fewshot_as_multiturn": multiturn(settings),
            "system_instruction": settings["system_instruction"],
            "gen_kwargs": settings["gen_kwargs"],
            "repeats": int(config.repeats or 1),
            "overrides": settings["overrides"],
            "metadata": settings["metadata"],
            "output_type": str(task.OUTPUT_TYPE),
            "config": config_digest(task),
            "dataset": dataset_identity(task),
        },
    }


def request_of(instance: Any, name: str, settings: Mapping[str, Any], repeat: int) -> Request:
    """The question that an lm-eval Instance asks. Raises TaskError for one that is none of the three kinds."""
    try:
        kind = Kind(instance.request_type)
    except ValueError as error:
        raise TaskError(f"task {name!r} makes requests of type {instance.request_type!r}") from error
    args = instance.args
    second = {Kind.LOGLIKELIHOOD: str, Kind.GENERATE: dict}.get(kind)
    good = len(args) == (1 if second is None else 2) and isinstance(args[0], str)
    if not good or (second is not None and not isinstance(args[1], second)):
        raise TaskError(f"task {name!r} makes {kind} requests of ({', '.join(type(a).__name__ for a in args)})")
    text, messages, add_generation_prompt = chat.parse(args[0])
    template = settings["apply_chat_template"]
    common: dict[str, Any] = {"kind": kind, "text": text, "messages": messages}
    common["add_generation_prompt"] = add_generation_prompt
    if messages and isinstance(template, str):
        common["template_arguments"] = canonical_json({"chat_template": template})
    if kind is not Kind.GENERATE:
        # A log-likelihood asked again has the same answer: all repeats share one.
        return Request(**common, continuation=None if kind is Kind.ROLLING else args[1])
    try:
        arguments = canonical_json(args[1])
    except (TypeError, ValueError) as error:
        raise TaskError(f"task {name!r} has generation arguments that JSON cannot express: {error}") from error
    return Request(**common, arguments=arguments, sample_index=repeat, replicate=settings["replicate"])


def kept_document(doc: Any, name: str) -> str:
    """The document as text. Raises TaskError if it cannot be kept exactly."""
    try:
        return documents.dump(doc)
    except documents.Unkept as error:
        raise TaskError(f"task {name!r} has documents that cannot be kept: {error}") from error


def dataset_identity(task: Any) -> dict[str, Any]:
    """Path, name and revision of the data, as far as known; what was asked decides, this explains."""
    kwargs = task.config.dataset_kwargs if isinstance(task.config.dataset_kwargs, dict) else {}
    revision = kwargs.get("revision")
    splits = getattr(task, "dataset", None)
    for split in splits.values() if isinstance(splits, dict) else []:
        sums = getattr(getattr(split, "info", None), "download_checksums", None) or {}
        hashes = {url.split("@", 1)[1].split("/", 1)[0] for url in sums if url.startswith("hf://") and "@" in url}
        revision = min(hashes) if len(hashes) == 1 else revision
    return {"path": task.DATASET_PATH, "name": task.DATASET_NAME, "revision": revision}


def explained(error: Exception, leaf: Leaf, task: Any) -> TaskError:
    """What a task raised while it was built or asked, as a TaskError that names it and, for missing data, the data."""
    said = f"{type(error).__name__}: {error}".strip()
    kinds = {cls.__name__ for cls in type(error).__mro__}
    missing = {"ConnectionError", "OfflineModeIsEnabled", "DatasetNotFoundError", "LocalEntryNotFoundError"}
    missing |= {"DataFilesNotFoundError", "FileNotFoundError", "OfflineModeIsEnabledError"}
    if task is None and kinds & missing:
        return TaskError(
            f"task {leaf.name!r}: its data cannot be had here: {said}",
            hint="on a machine with network: proctor prepare; or check dataset_path and data_files",
        )
    if "ModuleNotFoundError" in kinds:
        return TaskError(
            f"task {leaf.name!r} needs a Python package that lm-eval's environment lacks: {said}",
            hint="install it beside lm-eval",
        )
    return TaskError(f"task {leaf.name!r} cannot be recorded: {said}")


if __name__ == "__main__":
    serve(main)
