"""All paths of one run, and the small files in it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proctor.errors import StoreError
from proctor.records import Shard
from proctor.store.arrow import pa
from proctor.worker.plan_file import read_plan, write_plan

PLANNED: Final = "planned"
NOTHING_OWED: Final = "none"
"""What `RunDirectory.plan_token` may say."""


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
        return self.root / "plan.bits"

    def plan_token(self, token: str) -> Path:
        """Tells workers that one command began before it had a plan that the plan is there, or that nothing is owed.

        Each command has a token of its own: the same run may be started twice at a time.
        """
        return self.root / f"plan-{token}.token"

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
    def forecast(self) -> Path:
        """What the plan foresaw for each model."""
        return self.root / "forecast.json"

    @property
    def bundle(self) -> Path:
        """Which files the run needs, and how to know them."""
        return self.root / "bundle.json"

    @property
    def submissions(self) -> Path:
        """What was sent to a cluster, a line each."""
        return self.root / "submissions.jsonl"

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
        """Replace the plan by these shards. Raises StoreError."""
        models = {shard.model: [s for s in shards if s.model == shard.model] for shard in shards}
        self.write_plan(models)

    def write_plan(self, models: Mapping[str, Sequence[Shard]]) -> None:
        """Replace the plan by the shards of these models. Raises StoreError.

        Shards of a strategy's own are written out; others as the bits that they are cut from.
        """
        fresh = self.plan.with_name(f".plan.{os.getpid()}")
        try:
            write_plan(fresh, models)
            fresh.replace(self.plan)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise StoreError(f"cannot write {str(self.plan)!r}: {error.strerror}", hint="free some space") from error

    def read_shards(self, model: str) -> list[Shard]:
        """The planned shards of one model, in asking order. Raises StoreError if there is no readable plan."""
        try:
            return list(read_plan(self.plan, model) or ())
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise StoreError(
                f"cannot read the plan {str(self.plan)!r}: {error}",
                hint="repeat `proctor run`: it plans again",
            ) from error
