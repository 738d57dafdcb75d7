"""The partition strategies that OpenCompass publishes: naive, size and workers (NumWorker).

A dataset becomes parts, parts become tasks; a task is what one job runs. Names of parts, texts of ranges and the
order of tasks are theirs, so that results can be compared. Where their code stops with an error, ours goes on:
a factor above the largest task makes parts of one document.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil
from typing import Final, Literal

from proctor.errors import ConfigError
from proctor.plan.partition.ranges import TestRange, actual_size, part_range

MAX_TASK_SIZE: Final = 40_000
GEN_TASK_COEF: Final = 20
NUM_WORKER: Final = 8
MIN_TASK_SIZE: Final = 16

_LONG: Final = (
    "bbh*",
    "gsm8k*",
    "math*",
    "strategyqa*",
    "agieval-jec*",
    "agieval-gaokao-mathcloze",
    "agieval-math",
    "*professional_law",
)
"""Datasets whose answers are long: ten times the cost."""
_DIALOGUE: Final = frozenset({"begin", "round", "end"})
"""Keys of a template that is one prompt; others name the choices of a comparison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """What the strategies know of a dataset."""

    name: str
    total: int
    """Documents, before the range."""
    test_range: TestRange = None
    template: tuple[str, ...] | None = None
    """Keys of the prompt template where it is a mapping; None for a single text."""

    @property
    def size(self) -> int:
        """Documents after the range. Raises ConfigError."""
        return actual_size(self.test_range, self.total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A dataset, or one of the slices that it was split into."""

    name: str
    dataset: str
    test_range: TestRange
    cost: int

    @property
    def range_text(self) -> str:
        """The range as text; '' for all."""
        return "" if self.test_range is None else str(self.test_range)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionTask:
    """What one job runs: parts of datasets for one model."""

    model: str
    parts: tuple[Part, ...]


Existing = Collection[tuple[str, str]]
"""(model, name of a dataset or part) pairs whose output is there: they are skipped."""


def factor(dataset: Dataset, *, gen_task_coef: int = GEN_TASK_COEF) -> int:
    """What one document costs: `gen_task_coef` for a generation, the number of choices for a comparison."""
    found = gen_task_coef
    if dataset.template is not None and not set(dataset.template) <= _DIALOGUE:
        found = len(dataset.template)
    return found * 10 if any(fnmatchcase(dataset.name, pattern) for pattern in _LONG) else found


def partition_naive(
    models: Sequence[str], datasets: Sequence[Dataset], *, n: int = 1, existing: Existing = ()
) -> list[PartitionTask]:
    """`n` datasets a task, in their order. Raises ConfigError for n < 1."""
    _at_least_one(n=n)
    tasks: list[PartitionTask] = []
    for model in models:
        left = [_whole(d, 0) for d in datasets if (model, d.name) not in existing]
        tasks += [PartitionTask(model=model, parts=tuple(left[i : i + n])) for i in range(0, len(left), n)]
    return tasks


def partition_size(
    models: Sequence[str],
    datasets: Sequence[Dataset],
    *,
    max_task_size: int = MAX_TASK_SIZE,
    gen_task_coef: int = GEN_TASK_COEF,
    strategy: Literal["heuristic", "split"] = "heuristic",
    existing: Existing = (),
) -> list[PartitionTask]:
    """Split what costs more than `max_task_size`, merge what costs less; dearest first.

    A part of a split dataset is charged `max_task_size`. Raises ConfigError for limits < 1 and bad ranges.
    """
    _at_least_one(max_task_size=max_task_size, gen_task_coef=gen_task_coef)
    sized = [(d, factor(d, gen_task_coef=gen_task_coef), d.size) for d in datasets]
    sized.sort(key=lambda item: item[1] * item[2], reverse=True)
    tasks: list[PartitionTask] = []
    for model in models:
        parts: list[Part] = []
        for dataset, each, size in sized:
            if (model, dataset.name) in existing:
                continue
            if each * size > max_task_size:
                longest = max(1, max_task_size // each)
                step = ceil(size / ceil(size / longest))
                split = _split(dataset, size, step, cost=max_task_size, space=True)
                parts += [p for p in split if (model, p.name) not in existing]
            else:
                parts.append(_whole(dataset, each * size))
        if strategy == "split":
            tasks += [PartitionTask(model=model, parts=(p,)) for p in parts]
        else:
            tasks += _merged(model, parts, max_task_size)
    return tasks


def partition_workers(
    models: Sequence[str],
    datasets: Sequence[Dataset],
    *,
    num_worker: int = NUM_WORKER,
    num_split: int | None = None,
    min_task_size: int = MIN_TASK_SIZE,
    strategy: Literal["heuristic", "split"] = "heuristic",
    existing: Existing = (),
) -> list[PartitionTask]:
    """Split each dataset into `num_split` (default: `num_worker`) parts of at least `min_task_size` documents.

    Part j goes into task j mod `num_worker`. Raises ConfigError for limits < 1 and bad ranges.
    """
    splits = num_worker if num_split is None else num_split
    _at_least_one(num_worker=num_worker, min_task_size=min_task_size)
    tasks: list[PartitionTask] = []
    for model in models:
        parts: list[Part] = []
        for dataset in datasets:
            if (model, dataset.name) in existing:
                continue
            size = dataset.size
            if splits <= 1 or size <= min_task_size:
                parts.append(_whole(dataset, size))
                continue
            step = max(ceil(size / splits), min_task_size)
            parts += [p for p in _split(dataset, size, step, cost=step, space=False) if (model, p.name) not in existing]
        width = len(parts) if strategy == "split" else num_worker
        buckets = [tuple(parts[i::width]) for i in range(min(width, len(parts)))]
        tasks += [PartitionTask(model=model, parts=bucket) for bucket in buckets]
    return tasks


def _whole(dataset: Dataset, cost: int) -> Part:
    return Part(name=dataset.name, dataset=dataset.name, test_range=dataset.test_range, cost=cost)


def _split(dataset: Dataset, size: int, step: int, *, cost: int, space: bool) -> list[Part]:
    return [
        Part(
            name=f"{dataset.name}_{i}",
            dataset=dataset.name,
            test_range=part_range(dataset.test_range, start, start + step, space=space),
            cost=cost,
        )
        for i, start in enumerate(range(0, size, step))
    ]


def _merged(model: str, parts: Sequence[Part], limit: int) -> list[PartitionTask]:
    ordered = sorted(parts, key=lambda p: p.cost, reverse=True)
    tasks: list[PartitionTask] = []
    current: list[Part] = []
    size = 0
    for i, part in enumerate(ordered):
        current.append(part)
        size += part.cost
        if i == len(ordered) - 1 or size + ordered[i + 1].cost > limit:
            tasks.append(PartitionTask(model=model, parts=tuple(current)))
            current, size = [], 0
    return tasks


def _at_least_one(**limits: int) -> None:
    for name, value in limits.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}, but must be at least 1", hint="set it in the `plan:` section")
