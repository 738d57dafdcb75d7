"""Child: mark the answers to a suite's recordings with lm-eval's own filters, metrics, errors and groups.

Job: {settings, leaves, network, prove}. For each leaf: {task, config, documents, instances, ids, dataset},
where `documents` and `instances` name files; an instance is [kind, doc_id, index, answers, keys]. Result: {version,
results, empty}, and one line a document and filter in samples.jsonl; with `prove`: {version, labels}.

A task is rebuilt around its recorded documents, without its data. `dataset: true` builds it with its data, for
tasks whose marking needs more of it than the documents; what is marked are the recorded documents even then.
"""

# lm-eval is not in the environment that the types are checked in.
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.utils import handle_non_serializable

from proctor.catalog.lm_eval import documents
from proctor.catalog.lm_eval.record import build_leaf
from proctor.catalog.lm_eval.session import (
    Model,
    Offline,
    Prepared,
    config_digest,
    evaluate,
    own_map_cache,
    version,
)
from proctor.catalog.lm_eval.tasks import Plan, open_manager, plan, unanchored
from proctor.catalog.lm_eval.wire import read_json, read_lines, serve, write_lines
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
    """Mark, or prove that marking works."""
    offline = Offline()
    offline.block = not job["network"]
    own_map_cache(directory / "cache")
    manager = open_manager(job["settings"], unanchored(job["settings"]["index"], job["settings"]["include_path"]))
    planned = plan(manager, job["settings"]["spec"])
    leaves = [Leaf(directory, leaf) for leaf in job["leaves"]]
    recorded = [leaf.name for leaf in leaves]
    if recorded != list(planned.leaves):
        raise HarnessError(
            f"{planned.name!r} now stands for {list(planned.leaves)}, but was recorded as {recorded}",
            hint="record it again: proctor plan",
        )
    results, empty = mark(manager, planned, leaves, job["settings"], job["settings"]["bootstrap_iters"])
    write_lines(directory / "samples.jsonl", sample_lines(results.pop("samples", {})))
    write_lines(directory / "raw.json", [json.dumps(results, default=handle_non_serializable)])
    return {"version": version(), "empty": empty, "seen": sorted(offline.seen)}


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

    results = evaluate(
        Model(answer),
        Prepared(load, planned.groups),
        settings,
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
            yield json.dumps(kept, default=handle_non_serializable)


if __name__ == "__main__":
    serve(main)
