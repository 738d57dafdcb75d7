"""Child: prove that suites can be marked from their recordings alone, by marking made-up answers twice.

Once with the task as lm-eval builds it, from its data; once with the task rebuilt around its recording, with the
network blocked. Both must say the same, of every document. Job: as `replay`'s, with the request keys in the place of
the answers. Result: {version, suites}; a suite is {labels: {task: [..]}}, or {error} that names all tasks with which
something is wrong. Tasks of all suites are proven side by side, each in processes of its own.
"""

# lm-eval is not in the environment that the types are checked in.
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from proctor.catalog.lm_eval import fake
from proctor.catalog.lm_eval.forks import Work, in_processes
from proctor.catalog.lm_eval.record import build_leaf, request_of, selection
from proctor.catalog.lm_eval.replay import Leaf, mark, planning, sample_lines
from proctor.catalog.lm_eval.session import Model, Offline, Prepared, evaluate, own_map_cache, version
from proctor.catalog.lm_eval.tasks import Plan
from proctor.catalog.lm_eval.wire import error_report, read_json, read_lines, serve, write_lines
from proctor.errors import ProctorError, TaskError, together
from proctor.records import Kind, canonical_json


def main(directory: Path, job: Mapping[str, Any]) -> Any:
    """Prove every task of every suite, as many at once as there are workers."""
    work: dict[str, Work] = {
        f"{number}.{n}": partial(prove_leaf, suite=suite, number=number, n=n)
        for number, suite in enumerate(job["suites"])
        for n in range(len(suite["leaves"]))
    }
    errors = in_processes(work, directory, job["workers"])
    suites: list[Any] = []
    for number, suite in enumerate(job["suites"]):
        names = {f"{number}.{n}": leaf["task"] for n, leaf in enumerate(suite["leaves"])}
        failed = [errors[key] for key in names if key in errors]
        if failed:
            suites.append({"error": error_report(together(failed))})
        else:
            suites.append({"labels": {name: read_json(directory / f"{key}.json") for key, name in names.items()}})
    return {"version": version(), "suites": suites}


def prove_leaf(directory: Path, *, suite: Mapping[str, Any], number: int, n: int) -> list[str]:
    """The labels of the nth task. Raises TaskError, naming the task, for one that cannot be marked offline."""
    manager, plan = planned = planning(suite)
    name = suite["leaves"][n]["task"]
    genuine, alone, data = (f"{number}.{kind}-{n}" for kind in ("genuine", "alone", "data"))
    rebuilt = partial(_rebuilt, suite=suite, planned=planned, number=n)
    work: dict[str, Work] = {
        genuine: partial(_genuine, manager=manager, leaf=plan.leaves[name], settings=suite["settings"], tag=genuine),
        alone: partial(rebuilt, with_data=False, tag=alone),
        data: partial(rebuilt, with_data=True, tag=data),
    }
    errors = in_processes({key: work[key] for key in (genuine, alone)}, directory, 1)
    if genuine in errors:
        if alone in errors and errors[alone].message == errors[genuine].message:
            return ["unproven"]  # lm-eval itself cannot mark made-up answers: neither way is better.
        raise _refused(name, "lm-eval itself fails on it", errors[genuine])
    truth = read_json(directory / f"{genuine}.json")
    for key, label in ((alone, []), (data, ["dataset"])):
        if key == data:
            errors |= in_processes({key: work[key]}, directory, 1)
        if key not in errors:
            found = read_json(directory / f"{key}.json")
            if found["said"] == truth["said"]:
                return sorted({*label, *found["seen"]} - {"network"})
    if alone in errors:
        raise _refused(name, "it cannot be marked offline, from its documents alone or with its data", errors[alone])
    raise TaskError(f"task {name!r}: marked from its recording, made-up answers get other scores than lm-eval gives")


def _refused(name: str, what: str, error: ProctorError) -> TaskError:
    return TaskError(f"task {name!r}: {what}: {error.message}", hint=error.hint)


def _rebuilt(
    directory: Path, *, suite: Mapping[str, Any], planned: tuple[Any, Plan], number: int, with_data: bool, tag: str
) -> Any:
    offline = Offline()
    offline.block = True
    own_map_cache(directory / f"{tag}.cache")
    manager, plan = planned
    described = suite["leaves"][number]
    answered = directory / f"{tag}.jsonl"
    write_lines(answered, (_answered(row) for row in read_lines(directory / described["instances"])))
    leaf = Leaf(directory, dict(described, instances=answered.name, dataset=with_data))
    plan.leaves = {leaf.name: plan.leaves[leaf.name]}
    plan.groups = {}
    results, _ = mark(manager, plan, [leaf], suite["settings"], 0)
    return {"said": _said(results), "seen": sorted(offline.seen)}


def _answered(row: list[Any]) -> str:
    kind, doc_id, index, keys = row
    return canonical_json([kind, doc_id, index, [fake.answer(Kind(kind), key) for key in keys]])


def _genuine(directory: Path, *, manager: Any, leaf: Any, settings: Mapping[str, Any], tag: str) -> Any:
    own_map_cache(directory / f"{tag}.cache")
    chosen: dict[str, list[int]] | None = {} if isinstance(settings["limit"], str | list) else None

    def load() -> dict[str, Any]:
        task = build_leaf(manager, leaf, settings)
        if chosen is not None:
            chosen[leaf.name] = selection(settings["limit"], len(task.eval_docs), leaf.name)
        return {leaf.name: task}

    def answer(_kind: str, requests: list[Any]) -> list[Any]:
        asked: Counter[int] = Counter()
        given: list[Any] = []
        for instance in requests:
            request = request_of(instance, leaf.name, settings, asked[id(instance)])
            asked[id(instance)] += 1
            given.append(fake.answer(request.kind, request.key))
        return given

    limit = None if chosen is not None else settings["limit"]
    prepared = Prepared(load, {})
    return {"said": _said(evaluate(Model(answer), prepared, settings, limit=limit, samples=chosen, bootstrap_iters=0))}


def _said(results: dict[str, Any]) -> str:
    """Everything that marking said: metrics, and every document's targets, extractions and scores."""
    lines = list(sample_lines(results["samples"]))
    numbers = {task: {k: repr(v) for k, v in m.items() if "," in k} for task, m in results["results"].items()}
    return hashlib.sha256("\n".join([canonical_json(numbers), *lines]).encode("utf-8", "surrogatepass")).hexdigest()


if __name__ == "__main__":
    serve(main)
