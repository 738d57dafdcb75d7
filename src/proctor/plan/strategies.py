"""Strategy names to shards: `balanced` cuts by cost, the published ones by their own rules.

Under a published strategy a dataset is a task of the run, a part is a range of its documents, and a task of theirs,
which one job would run, is one shard, or several where it does not fit a time limit. A dataset or part that owes
nothing is skipped, as their finished output is.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from proctor.plan.cuts import AskingOrder, Cut, ShardSizes, fitting_ends, longest_documents_first, order_of
from proctor.plan.partition import (
    Dataset,
    Part,
    PartitionTask,
    chosen,
    partition_naive,
    partition_size,
    partition_workers,
)
from proctor.plan.partition.published import GEN_TASK_COEF, MAX_TASK_SIZE, MIN_TASK_SIZE
from proctor.plan.requests import Bits, Priced, RequestTable, TaskRequests

StrategyName = Literal["balanced", "naive", "size", "workers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """How what is owed becomes shards."""

    name: StrategyName = "balanced"
    n: int = 1
    """naive: tasks a shard."""
    max_task_size: int = MAX_TASK_SIZE
    gen_task_coef: int = GEN_TASK_COEF
    num_worker: int | None = None
    """workers: None for the number of workers of the launch."""
    num_split: int | None = None
    min_task_size: int = MIN_TASK_SIZE
    split: bool = False
    """size, workers: one part a shard instead of merging."""


CUT_NOW: Final = 50_000_000
"""Rows whose shards are found while planning, half a second of it; of more, when somebody looks at them."""


class Cutter:
    """Cuts owed sets of one priced table. Equal sets, for equal sizes, give the same `Cut`."""

    def __init__(self, priced: Priced, strategy: Strategy) -> None:
        self._priced = priced
        self._strategy = strategy
        self._order: AskingOrder | None = None
        self._made: dict[tuple[bytes, ShardSizes], Cut] = {}
        self._rows = 0  # whose shards have been found

    def cut(self, owed: Bits, sizes: ShardSizes) -> Cut:
        """The shards of the rows whose bits are set. Raises ConfigError for limits that make no shards."""
        key = (hashlib.blake2b(owed.data).digest(), sizes)
        if key not in self._made:
            how = self._balanced if self._strategy.name == "balanced" else self._named
            cut = self._made[key] = how(owed, sizes)
            if self._rows < CUT_NOW:
                self._rows += len(cut.order.rows) if len(cut.ends) else 0
        return self._made[key]

    def _balanced(self, owed: Bits, sizes: ShardSizes) -> Cut:
        if self._order is None:
            self._order = longest_documents_first(self._priced.table, self._priced.cost_us)
        return Cut(order=self._order, owed=owed, sizes=sizes)

    def _named(self, owed: Bits, sizes: ShardSizes) -> Cut:
        table, cost = self._priced.table, self._priced.cost_us
        wanted = np.unpackbits(owed, count=table.rows).astype(np.bool_)
        shards = [rows for rows in named_rows(table, wanted, self._strategy, sizes.workers) if len(rows)]
        rows = np.concatenate([*shards, np.empty(0, np.int64)]).astype(np.int64)
        ends = np.cumsum([len(r) for r in shards]).astype(np.int64)
        ends = fitting_ends(cost[rows], ends, sizes.limit_s)
        return Cut(order=order_of(table, rows, cost), owed=None, fixed=ends)


def named_rows(
    table: RequestTable, wanted: NDArray[np.bool_], strategy: Strategy, workers: int
) -> list[NDArray[np.int64]]:
    """The wanted rows of each shard under a published strategy, in order. Raises ConfigError for bad limits."""
    found = {name: _Documents.of(table, i, wanted) for i, name in enumerate(_names(table.tasks))}
    datasets = [d.dataset(name) for name, d in found.items()]
    done = {(_MODEL, name) for name, documents in found.items() if not documents.wanted.any()}
    # Parts that owe nothing are known once the parts are: by splitting without merging.
    for task in _partition(replace(strategy, split=True), workers, datasets, done):
        done |= {(_MODEL, p.name) for p in task.parts if not len(found[p.dataset].rows(p))}
    tasks = _partition(strategy, workers, datasets, done)
    return [np.concatenate([found[p.dataset].rows(p) for p in task.parts]) for task in tasks]


_MODEL: Final = ""
"""The strategies partition for several models; here it is always one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Documents:
    """One task's documents, numbered from 0 in the order of their ids."""

    start: int
    """First row of the task."""
    number: NDArray[np.int64]
    """Document of each row."""
    count: int
    wanted: NDArray[np.bool_]
    generates: bool

    @classmethod
    def of(cls, table: RequestTable, index: int, wanted: NDArray[np.bool_]) -> Self:
        task, start = table.tasks[index], int(table.starts[index])
        ids, number = np.unique(task.documents, return_inverse=True)
        return cls(
            start=start,
            number=number.astype(np.int64),
            count=len(ids),
            wanted=wanted[start : start + len(task)],
            generates=bool((task.caps > 0).any()),
        )

    def dataset(self, name: str) -> Dataset:
        """As the strategies see it: a log-likelihood costs one unit for each choice of a document."""
        choices = max(1, round(len(self.number) / max(1, self.count)))
        template = None if self.generates else tuple(str(i) for i in range(choices))
        return Dataset(name=name, total=self.count, template=template)

    def rows(self, part: Part) -> NDArray[np.int64]:
        """Wanted rows of the part's documents, document by document."""
        place = np.full(self.count, -1, np.int64)
        documents = chosen(part.test_range, self.count)
        place[documents] = np.arange(len(documents))
        at = place[self.number]
        rows = np.flatnonzero((at >= 0) & self.wanted)
        return rows[np.argsort(at[rows], kind="stable")] + self.start


def _names(tasks: Sequence[TaskRequests]) -> list[str]:
    """The tasks' names; one that occurs several times also has its shots, or else its number."""
    counts = Counter(t.task for t in tasks)
    names = [t.task if counts[t.task] == 1 else f"{t.task}@{t.num_fewshot}" for t in tasks]
    again = Counter(names)
    return [name if again[name] == 1 else f"{name}#{i}" for i, name in enumerate(names)]


def _partition(
    strategy: Strategy, workers: int, datasets: Sequence[Dataset], done: Collection[tuple[str, str]]
) -> list[PartitionTask]:
    how = "split" if strategy.split else "heuristic"
    if strategy.name == "naive":
        return partition_naive([_MODEL], datasets, n=strategy.n, existing=done)
    if strategy.name == "size":
        return partition_size(
            [_MODEL],
            datasets,
            max_task_size=strategy.max_task_size,
            gen_task_coef=strategy.gen_task_coef,
            strategy=how,
            existing=done,
        )
    return partition_workers(
        [_MODEL],
        datasets,
        num_worker=strategy.num_worker or workers,
        num_split=strategy.num_split,
        min_task_size=strategy.min_task_size,
        strategy=how,
        existing=done,
    )
