"""All paths of one run, and the small files in it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from proctor.errors import StoreError
from proctor.records import Shard
from proctor.store.arrow import pa, pq


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """`runs/<name>/`: what was asked for, what was planned, what happened. Nothing in it is needed to keep answers."""

    root: Path

    @property
    def config(self) -> Path:
        """The file as the user wrote it."""
        return self.root / "run.yaml"

    @property
    def resolved(self) -> Path:
        """Everything spelt out: re-runs the run."""
        return self.root / "resolved.yaml"

    @property
    def suites(self) -> Path:
        """Which suites were recorded for which entry."""
        return self.root / "suites.json"

    @property
    def plan(self) -> Path:
        return self.root / "plan.parquet"

    @property
    def jobs(self) -> Path:
        return self.root / "jobs"

    @property
    def assignments(self) -> Path:
        """Which jobs the workers of one shape take."""
        return self.root / "assignments"

    @property
    def events(self) -> Path:
        return self.root / "events"

    @property
    def attempts(self) -> Path:
        """What each start of a worker on a cluster came to."""
        return self.root / "attempts"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def create(self) -> None:
        """Make the directories. Raises StoreError where that is not possible."""
        try:
            for directory in (self.root, self.jobs, self.assignments, self.events, self.logs, self.report):
                directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot create the run directory {str(self.root)!r}: {error.strerror}",
                hint="choose another place with `runs:` or make it writable",
            ) from error

    def write(self, path: Path, text: str) -> None:
        """Put `text` at `path` in one step: a reader sees the old file or the new one."""
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with fresh.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise StoreError(
                f"cannot write {str(path)!r}: {error.strerror}",
                hint="free some space or check the permissions",
            ) from error

    def write_shards(self, shards: Sequence[Shard]) -> None:
        """Replace the plan. Columns: model, shard, cost_s, task, ordinal; one row per request, in asking order."""
        rows = [(s.model, s.id, s.cost_s, task, ordinal) for s in shards for task, ordinal in s.items]
        columns: list[list[Any]] = [list(c) for c in zip(*rows, strict=True)] or [[], [], [], [], []]
        types: list[Any] = [pa.string(), pa.string(), pa.float64(), pa.string(), pa.int64()]
        names = ["model", "shard", "cost_s", "task", "ordinal"]
        table = pa.table([pa.array(c, t) for c, t in zip(columns, types, strict=True)], names=names)
        fresh = self.plan.with_name(f".plan.{os.getpid()}")
        try:
            pq.write_table(table, fresh, compression="zstd")
            fresh.replace(self.plan)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise StoreError(f"cannot write {str(self.plan)!r}: {error.strerror}", hint="free some space") from error

    def read_shards(self, model: str) -> list[Shard]:
        """The planned shards of one model, in asking order. Raises StoreError if there is no readable plan."""
        try:
            table = pq.read_table(self.plan, filters=[("model", "=", model)])
        except (OSError, pa.ArrowInvalid) as error:
            raise StoreError(
                f"cannot read the plan {str(self.plan)!r}: {error}",
                hint="repeat `proctor run`: it plans again",
            ) from error
        return list(_shards(table.to_pylist()))


def _shards(rows: Iterable[dict[str, Any]]) -> Iterable[Shard]:
    for (model, shard), items in groupby(rows, key=lambda r: (r["model"], r["shard"])):
        members = list(items)
        yield Shard(
            id=shard,
            model=model,
            cost_s=members[0]["cost_s"],
            items=tuple((r["task"], r["ordinal"]) for r in members),
        )
