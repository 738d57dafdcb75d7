"""The Python surface: all that the command line does.

import asyncio
from proctor import api

outcome = asyncio.run(api.run("run.yaml"))
for row in outcome.scores.rows:
    print(row.model, row.task, row.metric, row.value, row.stderr, row.n)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from proctor.api.context import RunContext
from proctor.api.inspecting import (
    Checked,
    PreparedTask,
    fetch_model,
    has_lm_eval,
    init,
    models,
    prepare,
    search_tasks,
    validate,
)
from proctor.api.planning import make_plan
from proctor.api.presenting import outcome_to_json, owed_words, plan_to_json, scores_to_json
from proctor.api.progress import Progress, Silent
from proctor.api.recording import planned_suites, recorded
from proctor.api.running import Outcome, run
from proctor.api.scoring import Scores, score_run
from proctor.api.status import status
from proctor.api.targets import Target, resolve_targets
from proctor.config.schema import json_schema
from proctor.plan import Plan

__all__ = [
    "Checked",
    "Outcome",
    "Plan",
    "PreparedTask",
    "Progress",
    "Scores",
    "Silent",
    "Target",
    "fetch_model",
    "has_lm_eval",
    "init",
    "json_schema",
    "models",
    "outcome_to_json",
    "owed_words",
    "plan",
    "plan_to_json",
    "prepare",
    "run",
    "score",
    "scores_to_json",
    "search_tasks",
    "status",
    "validate",
]


def plan(config: str | Path, overrides: Sequence[str] = (), *, retry_failed: bool = False) -> Plan:
    """What the run asks, what is answered, what is owed and its cost. Asks nothing.

    Uses the requests that the last run or prepare recorded; records them if there are none, or if `tasks:` has changed.
    """
    context = RunContext.open(config, overrides)
    store = context.store(create=True)
    suites = planned_suites(context, store)
    targets = resolve_targets(context, store)
    return make_plan(context, store, targets, suites, retry_failed=retry_failed)


def score(config: str | Path, overrides: Sequence[str] = ()) -> Scores:
    """Mark what is answered so far, with the recordings of the last run or prepare. Needs no model."""
    context = RunContext.open(config, overrides)
    store = context.store(create=False)
    return score_run(context, store, resolve_targets(context, store), recorded(context, store))
