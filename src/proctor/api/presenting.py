"""Results as JSON values and as words."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from proctor.api.running import Outcome
from proctor.api.scoring import Scores
from proctor.api.submitting import SubmitOutcome
from proctor.plan import Plan
from proctor.report.table import rows_to_json


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan without its single requests."""
    return {
        "run": plan.run,
        "strategy": plan.strategy,
        "forecast": asdict(plan.forecast),
        "models": [
            {
                "model": m.model,
                "display_name": m.display_name,
                "label": m.label,
                "weights": m.weights,
                "resolution": m.resolution,
                "owed": m.owed,
                "shared": m.shared,
                "damaged": m.damaged,
                "shards": m.shard_count,
                "cost_s": m.cost_s,
                "prompt_tokens": m.prompt_tokens,
                "completion_tokens": m.completion_tokens,
                "startup_s": m.startup_s,
                "longest_s": m.longest_s,
                "workers": m.workers,
                "gpus": m.gpus,
                "gpus_reason": m.gpus_reason,
                "rates": m.rates,
                "tasks": [asdict(t) for t in m.tasks],
            }
            for m in plan.models
        ],
    }


def scores_to_json(scores: Scores, *, samples: bool = False) -> dict[str, Any]:
    """Every row; with `samples`, every document too."""
    value: dict[str, Any] = {"run": scores.run, "complete": scores.complete, "rows": rows_to_json(scores.rows)}
    if samples:
        value["samples"] = [
            {"model": s.model, "label": s.label, "suite": s.suite, **asdict(sample)}
            for s in scores.suites
            for sample in s.samples
        ]
    return value


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """The scores, what was owed before and after, and what went wrong."""
    return scores_to_json(outcome.scores) | {
        "complete": outcome.complete,
        "owed_before": outcome.before.owed,
        "owed": outcome.after.owed,
        "drained": outcome.drained,
        "errors": [str(e) for e in outcome.errors],
    }


def submission_to_json(outcome: SubmitOutcome) -> dict[str, Any]:
    """What was sent, what a limit kept out, and why."""
    return {
        "run": outcome.run,
        "dry_run": outcome.dry_run,
        "arrays": [asdict(a) for a in outcome.arrays],
        "sent": [asdict(s) for s in outcome.sent],
        "owed_elements": outcome.owed,
        "stopped_by": None if outcome.stopped_by is None else str(outcome.stopped_by),
        "plan": plan_to_json(outcome.plan),
    }


def owed_words(outcome: Outcome) -> str:
    """What is missing, in a line."""
    failed = sum(t.failed for m in outcome.after.models for t in m.tasks)
    words: list[str] = []
    if outcome.after.owed:
        words.append(f"{outcome.after.owed} requests are still owed")
    if failed:
        words.append(f"{failed} requests failed for good (`proctor status` says why; --retry-failed asks again)")
    if not words:
        words.append("some scores do not stand on all of their documents")
    return "; ".join(words)
