"""Answers to scores: mark every suite of every model with what is there, keep rows and samples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from proctor.api.context import RunContext
from proctor.api.marking import Memory
from proctor.api.recording import Recorded, harness, recorded
from proctor.api.targets import Target, resolve_targets
from proctor.errors import ProctorError
from proctor.processes.exchange import RunModule, run_module
from proctor.records import Answer, EngineInfo, Response, ScoreRow, Suite
from proctor.report.table import rows_to_json
from proctor.score.lm_eval import LmEvalReplay, Said
from proctor.score.native import NativeReplay
from proctor.score.replay import Marks, MetricValue
from proctor.stats.intervals import interval
from proctor.store import ScoredSuite, Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Every row of a run, in model and task order."""

    run: str
    suites: tuple[ScoredSuite, ...]
    members: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Group → its tasks and groups, for indentation."""

    @property
    def rows(self) -> tuple[ScoreRow, ...]:
        """Every score."""
        return tuple(row for suite in self.suites for row in suite.rows)

    @property
    def complete(self) -> bool:
        """Whether every row stands on all of its documents."""
        return all(r.n == r.n_expected and r.value is not None for r in self.rows)


def score(config: str | Path, overrides: Sequence[str] = ()) -> Scores:
    """Mark what is answered so far, with the recordings of the last run or prepare. Needs no model."""
    context = RunContext.open(config, overrides)
    store = context.store(create=False)
    found = recorded(context, store)
    with harness() as residents:
        return score_run(context, store, resolve_targets(context, store), found, run=residents.run)


def score_run(
    context: RunContext,
    store: Store,
    targets: Sequence[Target],
    recorded: Recorded,
    *,
    memory: Memory | None = None,
    run: RunModule = run_module,
) -> Scores:
    """Mark everything. Deterministic; needs no model. Raises HarnessError, StoreError.

    With `memory`, what a harness said of the same answers is not asked again.
    """
    scored: list[ScoredSuite] = []
    for target in targets:
        scored += _score_target(store, target, recorded, None if memory is None else memory.of(target), run)
        if memory is not None:
            memory.keep(target)
    store.write_scores(context.spec.name, scored)
    scores = Scores(run=context.spec.name, suites=tuple(scored))
    context.directory.create()
    path = context.directory.report / "scores.json"
    context.directory.write(path, json.dumps(rows_to_json(scores.rows), indent=1))
    return scores


def _score_target(
    store: Store, target: Target, recorded: Recorded, said: dict[str, Said] | None, run: RunModule
) -> list[ScoredSuite]:
    answers = store.answers(target.weights, target.resolution)
    keys = dict.fromkeys(i.key for r in recorded.recordings.values() for i in r.instances)
    found = answers.read(list(keys))
    known = answers.engines()
    out: list[ScoredSuite] = []
    for suite, marks in zip(recorded.suites, _mark(recorded, found, said, run), strict=True):
        mine = (i.key for fp in suite.recordings for i in recorded.recordings[fp].instances)
        engines = _engines((found[k] for k in mine if k in found), known)
        rows = tuple(_row(target, suite, value, engines) for value in marks.values)
        out.append(
            ScoredSuite(model=target.id, label=target.entry.label, suite=suite.id, rows=rows, samples=marks.samples)
        )
    return out


def _mark(
    recorded: Recorded, answers: Mapping[str, Answer], said: dict[str, Said] | None, run: RunModule
) -> list[Marks]:
    """The marks of every suite, in order; the harness is started once for all of its suites."""
    recordings = list(recorded.recordings.values())
    theirs = [s for s in recorded.suites if s.source == "lm_eval"]
    found: dict[str, Marks | ProctorError] = {}
    if theirs:
        marked = LmEvalReplay(run=run).mark_all(theirs, recordings, answers, known=said)
        found.update(zip((s.id for s in theirs), marked, strict=True))
    for suite in recorded.suites:
        if suite.source != "lm_eval":
            mine = [recorded.recordings[fp] for fp in suite.recordings]
            found[suite.id] = NativeReplay().mark(suite, mine, answers)
    marks: list[Marks] = []
    for suite in recorded.suites:
        outcome = found[suite.id]
        if isinstance(outcome, ProctorError):
            raise outcome
        marks.append(outcome)
    return marks


def _engines(found: Iterable[Answer], known: Mapping[str, EngineInfo]) -> tuple[str, ...]:
    ids = {a.engine_id for a in found if isinstance(a, Response)}
    return tuple(sorted(_named(known[i]) if i in known else i for i in ids))


def _named(info: EngineInfo) -> str:
    parts = (info.engine, info.version, info.dtype, info.parallelism, info.hardware, info.method)
    return " ".join(p for p in parts if p and p != "unknown")


def _row(target: Target, suite: Suite, value: MetricValue, engines: tuple[str, ...]) -> ScoreRow:
    low, high = value.low, value.high
    if low is None and (found := interval(value.value, value.stderr, value.n, value.metric)) is not None:
        low, high = found
    shots = value.num_fewshot if value.num_fewshot is not None else suite.num_fewshot
    return ScoreRow(
        model=target.entry.display_name,
        label=target.entry.label,
        step=target.entry.step,
        task=value.task,
        metric=value.metric,
        filter=value.filter,
        value=value.value,
        stderr=value.stderr,
        low=low,
        high=high,
        n=value.n,
        n_expected=value.n_expected,
        num_fewshot=shots,
        higher_is_better=value.higher_is_better,
        is_group=value.is_group,
        task_version=value.task_version,
        source=suite.source,
        task_fingerprint=value.fingerprint,
        weights=target.weights,
        profile=target.profile,
        tokens_trained=target.entry.tokens_trained,
        coverage=value.coverage,
        engines=engines,
    )
