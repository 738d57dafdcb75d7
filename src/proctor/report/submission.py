"""What `proctor submit` shows: an array of workers for each kind of resources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proctor.report.layout import Layout, Line, heading
from proctor.report.text import count, duration


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayPlan:
    """What is or would be sent for one shape."""

    shape: str
    name: str
    models: tuple[str, ...]
    script: str
    cluster: str
    partition: str
    gpus: int
    """On each node."""
    nodes: int
    workers: int
    """That the work is for."""
    live: int
    """Elements that wait or run already."""
    missing: int
    """Elements to be sent."""
    time_limit_s: float | None
    attempts: int
    """Jobs in a row that one element is expected to need."""
    reason: str
    """Why so many workers."""
    overrides: tuple[str, ...] = ()


def submission_table(arrays: Sequence[ArrayPlan]) -> Layout:
    """A line for each array."""
    names = (
        "array",
        "cluster",
        "partition",
        "models",
        "workers",
        "in the queue",
        "to send",
        "nodes",
        "GPUs/node",
        "time",
    )
    right = ("models", "workers", "in the queue", "to send", "nodes", "GPUs/node", "time")
    lines = [
        Line(
            cells=(
                a.shape,
                a.cluster,
                a.partition,
                *map(count, (len(a.models), a.workers, a.live, a.missing, a.nodes, a.gpus)),
                "-" if a.time_limit_s is None else duration(a.time_limit_s),
            )
        )
        for a in arrays
    ]
    notes = [f"{a.shape}: {a.workers} workers: {a.reason}" for a in arrays]
    notes += [f"{a.shape}: each is expected to need {a.attempts} attempts" for a in arrays if a.attempts > 1]
    return Layout(title="submission", columns=heading(*names, right=right), lines=tuple(lines), notes=tuple(notes))
