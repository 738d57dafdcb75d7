"""Answers to scores: mark every suite of every model with what is there, keep rows and samples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from proctor.api.context import RunContext
from proctor.api.marking import Finished, Memory, engine_ids
from proctor.api.recording import Recorded, harness, recorded
from proctor.api.targets import Target, resolve_targets
from proctor.errors import ProctorError
from proctor.processes.exchange import RunModule, run_module
from proctor.records import Answer, EngineInfo, Recording, ScoreRow, Suite
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

    With `memory`, what was said of the very same answers is not asked again.
    """
    scored: list[ScoredSuite] = []
    for target in targets:
        scored += _score_target(store, target, recorded, memory, run)
        if memory is not None:
            memory.keep(target)
    store.write_scores(context.spec.name, scored)
    scores = Scores(run=context.spec.name, suites=tuple(scored))
    context.directory.create()
    path = context.directory.report / "scores.json"
    context.directory.write(path, json.dumps(rows_to_json(scores.rows), indent=1))
    return scores


def _score_target(
    store: Store, target: Target, recorded: Recorded, memory: Memory | None, run: RunModule
) -> list[ScoredSuite]:
    answers = store.answers(target.weights, target.resolution)
    finished = {} if memory is None else memory.finished(target, answers)
    keys = {fp: [i.key for i in r.instances] for fp, r in _open(recorded, finished).items()}
    found = answers.read(list(dict.fromkeys(key for some in keys.values() for key in some)))
    ids = {fp: engine_ids(found[k] for k in some if k in found) for fp, some in keys.items()}
    ids |= {fp: one.engines for fp, one in finished.items()}
    known = answers.engines()
    out: list[ScoredSuite] = []
    said = None if memory is None else memory.of(target)
    for suite, marks in zip(recorded.suites, _mark(recorded, found, finished, said, run), strict=True):
        engines = _engines({one for fp in suite.recordings for one in ids[fp]}, known)
        rows = tuple(_row(target, suite, value, engines) for value in marks.values)
        out.append(
            ScoredSuite(model=target.id, label=target.entry.label, suite=suite.id, rows=rows, samples=marks.samples)
        )
    return out


def _open(recorded: Recorded, finished: Mapping[str, Finished]) -> dict[str, Recording]:
    """The recordings that have to be marked. What is finished is not even read."""
    return {fp: recorded.recordings[fp] for fp in recorded.recordings if fp not in finished}


def _mark(
    recorded: Recorded,
    answers: Mapping[str, Answer],
    finished: Mapping[str, Finished],
    said: dict[str, Said] | None,
    run: RunModule,
) -> list[Marks]:
    """The marks of every suite, in order; the harness is started once for all of its suites."""
    recordings = list(_open(recorded, finished).values())
    theirs = [s for s in recorded.suites if s.source == "lm_eval"]
    found: dict[str, Marks | ProctorError] = {}
    if theirs:
        marked = LmEvalReplay(run=run).mark_all(theirs, recordings, answers, known=said)
        found.update(zip((s.id for s in theirs), marked, strict=True))
    known = {fp: one.marks for fp, one in finished.items()}
    for suite in recorded.suites:
        if suite.source != "lm_eval":
            found[suite.id] = NativeReplay().mark(suite, recordings, answers, known=known)
    marks: list[Marks] = []
    for suite in recorded.suites:
        outcome = found[suite.id]
        if isinstance(outcome, ProctorError):
            raise outcome
        marks.append(outcome)
    return marks


def _engines(ids: Iterable[str], known: Mapping[str, EngineInfo]) -> tuple[str, ...]:
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
