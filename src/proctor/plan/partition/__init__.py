"""Named partition strategies with published semantics, and the arithmetic of published launchers. Pure."""

from proctor.plan.partition.bounds import even_bounds, longest_first
from proctor.plan.partition.published import (
    Dataset,
    Part,
    PartitionTask,
    factor,
    partition_naive,
    partition_size,
    partition_workers,
)
from proctor.plan.partition.ranges import TestRange, actual_size, chosen, part_range

__all__ = [
    "Dataset",
    "Part",
    "PartitionTask",
    "TestRange",
    "actual_size",
    "chosen",
    "even_bounds",
    "factor",
    "longest_first",
    "part_range",
    "partition_naive",
    "partition_size",
    "partition_workers",
]
