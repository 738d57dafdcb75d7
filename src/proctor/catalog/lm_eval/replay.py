"""Child: mark the answers to suites with lm-eval's own filters, metrics, errors and groups.

Job: {suites, workers}; a suite is {settings, leaves, network}, a leaf {task, config, documents, instances, ids,
dataset}, where `documents` and `instances` name files and an instance is [kind, doc_id, index, answers].
Result: {version, suites}; a suite is {empty} or {error}, beside N.samples.jsonl, one line a document and filter, and
N.raw.json.

A task is rebuilt around its recorded documents, without its data. `dataset: true` builds it with its data, for
tasks whose marking needs more of it than the documents; what is marked are the recorded documents even then.
"""

# lm-eval is not in the environment that the types are checked in.
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from proctor.catalog.lm_eval import documents
from proctor.catalog.lm_eval.forks import in_processes
from proctor.catalog.lm_eval.record import build_leaf
from proctor.catalog.lm_eval.session import (
    Model,
    Offline,
    Prepared,
    config_digest,
    evaluate,
    expressed,
    own_map_cache,
    version,
)
from proctor.catalog.lm_eval.tasks import Plan, open_manager, plan, unanchored
from proctor.catalog.lm_eval.wire import error_report, read_json, read_lines, serve, write_lines
from proctor.errors import HarnessError


class Documents:
    """The recorded documents of a task, in the place of its evaluation split."""

    def __init__(self, kept: Mapping[str, Any], ids: list[int]) -> None:
        self._texts: Mapping[str, str] = kept["docs"]
        self._total = int(kept["total"])
        self._first = next(iter(self._texts))
        self.ids = ids
        self.features = dict.fromkeys(kept["features"])

    def __len__(self) -> int:
        """Of the whole split, as lm-eval reports it."""
        return self._total

    def __getitem__(self, index: int) -> Any:
        """Any document will do: lm-eval looks at one to see what the task is like."""
        if index != 0:
            raise HarnessError(f"replay was asked for document {index} by position")
        return documents.load(self._texts[self._first])

    def doc(self, doc_id: int) -> Any:
        """A fresh copy, as a data set gives one at each access."""
        return documents.load(self._texts[str(doc_id)])

    def pairs(self) -> Iterator[tuple[int, Any]]:
        """(id, document) of the documents to mark."""
        return ((doc_id, self.doc(doc_id)) for doc_id in self.ids)


class Leaf:
    """One recorded leaf: its documents, its instances with their answers, and the class that lm-eval gets of it."""

    def __init__(self, directory: Path, job: Mapping[str, Any]) -> None:
        self.name = str(job["task"])
        self.config = str(job["config"])
        self.with_data = bool(job["dataset"])
        self.kept = read_json(directory / job["documents"])
        self.docs = Documents(self.kept, list(job["ids"]))
        self._file = directory / job["instances"]

    def instances(self) -> list[Instance]:
        """The recorded instances, in their order, each with an iterator over its answers."""
        made: list[Instance] = []
        shared = {doc_id: self.docs.doc(doc_id) for doc_id in self.docs.ids}
        for kind, doc_id, index, answers, *_ in read_lines(self._file):
            # What was asked plays no part in marking: only documents and answers do.
            instance = Instance(
                request_type=kind,
                doc=shared[doc_id],
                arguments=("",),
                idx=index,
                metadata=(self.name, doc_id, len(answers)),
            )
            instance.answers = iter([tuple(a) if isinstance(a, list) else a for a in answers])
            made.append(instance)
        return made

    def recorded_class(self, base: type) -> type:
        """`base`, asking and marking what was recorded."""
        leaf = self

        class Recorded(base):
            def build_all_requests(self, **_: Any) -> None:
                found = config_digest(self)
                if found != leaf.config:
                    raise HarnessError(
                        f"task {leaf.name!r} is configured differently now ({found[:12]}) than when it was recorded "
                        f"({leaf.config[:12]}): its YAML or Python has changed",
                        hint="record it again: proctor plan",
                    )
                self._instances = leaf.instances()

            def doc_iterator(self, **_: Any) -> Iterator[tuple[int, Any]]:
                return leaf.docs.pairs()

        class Rebuilt(Recorded):
            def download(self, dataset_kwargs: Any = None, *_: Any, **__: Any) -> None:
                if isinstance(dataset_kwargs, dict):
                    dataset_kwargs.pop("trust_remote_code", None)
                self.dataset = {}

            def fewshot_docs(self) -> None:
                return None

            @property
            def eval_docs(self) -> Documents:
                return leaf.docs

        made = Recorded if self.with_data else Rebuilt
        made.__name__, made.__qualname__, made.__module__ = base.__name__, base.__qualname__, base.__module__
        return made


def main(directory: Path, job: Mapping[str, Any]) -> Any:
    """Mark every suite, each in a process of its own."""
    return for_each_suite(mark_suite, directory, job)


def for_each_suite(run: Callable[..., Any], directory: Path, job: Mapping[str, Any]) -> Any:
    """Call `run(directory, suite=..., number=...)` in a process for each suite; gather values and errors."""
    work = {str(n): partial(run, suite=suite, number=n) for n, suite in enumerate(job["suites"])}
    errors = in_processes(work, directory, job["workers"])
    suites: list[Any] = []
    for name in work:
        if name in errors:
            report = error_report(errors[name])
            suites.append({"error": report | {"hint": report["hint"] or f"the log: {job['log']}"}})
        else:
            suites.append(read_json(directory / f"{name}.json"))
    return {"version": version(), "suites": suites}


def mark_suite(directory: Path, *, suite: Mapping[str, Any], number: int) -> Any:
    """Mark one suite; call it in a process of its own."""
    offline = Offline()
    offline.block = not suite["network"]
    own_map_cache(directory / f"{number}.cache")
    manager, planned = planning(suite)
    leaves = [Leaf(directory, leaf) for leaf in suite["leaves"]]
    results, empty = mark(manager, planned, leaves, suite["settings"], suite["settings"]["bootstrap_iters"])
    write_lines(directory / f"{number}.samples.jsonl", sample_lines(results.pop("samples", {})))
    results.pop("date", None)  # The same answers give the same marks, whenever.
    write_lines(directory / f"{number}.raw.json", [json.dumps(results, default=expressed)])
    return {"empty": empty}


def planning(suite: Mapping[str, Any]) -> tuple[Any, Plan]:
    """lm-eval's view of the suite now. Raises HarnessError if it stands for other tasks than were recorded."""
    settings = suite["settings"]
    manager = open_manager(settings, unanchored(settings["index"], settings["include_path"]))
    planned = plan(manager, settings["spec"])
    recorded = [leaf["task"] for leaf in suite["leaves"]]
    if recorded != list(planned.leaves):
        raise HarnessError(
            f"{planned.name!r} now stands for {list(planned.leaves)}, but was recorded as {recorded}",
            hint="record it again: proctor plan",
        )
    return manager, planned


def mark(
    manager: Any, planned: Plan, leaves: list[Leaf], settings: Mapping[str, Any], bootstrap_iters: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """lm-eval's results over the leaves that have complete documents; what is known of those that have none."""
    empty: dict[str, Any] = {}

    def answer(kind: str, requests: list[Any]) -> list[Any]:
        wrong = {r.request_type for r in requests} - {kind}
        if wrong:
            raise HarnessError(f"{kind} was asked with requests of {sorted(wrong)}")
        return [next(request.answers) for request in requests]

    def load() -> dict[str, Any]:
        tasks: dict[str, Any] = {}
        for leaf in leaves:
            task = rebuild(manager, planned, leaf, settings)
            if leaf.docs.ids:
                tasks[leaf.name] = task
            else:
                filters = [f.name for f in task._filters]
                better = task.higher_is_better()
                empty[leaf.name] = [[m, f, better.get(m)] for m in task.aggregation() for f in filters]
        return tasks

    # Without the torch seed: marking draws nothing from torch, and importing it takes longer than all the rest.
    seeds = [*settings["seeds"][:2], None if not any(leaf.with_data for leaf in leaves) else settings["seeds"][2]]
    results = evaluate(
        Model(answer),
        Prepared(load, planned.groups),
        dict(settings, seeds=seeds),
        limit=None,
        samples=None,
        bootstrap_iters=bootstrap_iters,
    )
    return results, empty


def rebuild(manager: Any, planned: Plan, leaf: Leaf, settings: Mapping[str, Any]) -> Any:
    """The task around its recorded documents. Raises HarnessError, naming the task, if that cannot be done."""
    try:
        task = build_leaf(manager, planned.leaves[leaf.name], settings, leaf.recorded_class)
    except HarnessError:
        raise
    except Exception as error:
        raise HarnessError(f"task {leaf.name!r} cannot be rebuilt: {type(error).__name__}: {error}") from error
    task.multiple_input, task.multiple_target = leaf.kept["multiple_input"], leaf.kept["multiple_target"]
    return task


def sample_lines(samples: Mapping[str, list[dict[str, Any]]]) -> Iterator[str]:
    """One line a document and filter."""
    for task, rows in samples.items():
        for row in rows:
            kept = {key: row[key] for key in ("doc_id", "filter", "target", "filtered_resps")}
            kept |= {"task": task, "metrics": {name: row[name] for name in row["metrics"]}}
            yield json.dumps(kept, default=expressed)


if __name__ == "__main__":
    serve(main)
