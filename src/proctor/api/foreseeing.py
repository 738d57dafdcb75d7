"""What a plan foresaw, kept beside the run, and held against what was used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

from proctor.api.context import RunContext
from proctor.api.measuring import Measured, measured
from proctor.api.progress import history
from proctor.plan import Plan, PlanAgainstActual, Spent, plan_against_actual


def keep_forecast(context: RunContext, plan: Plan) -> None:
    """Keep, for each model, what was used so far and what is owed now: together, what the whole is to take.

    Raises StoreError where it cannot be written.
    """
    used = _used(context)
    kept = _read(context)
    for model in plan.models:
        if model.owed:
            owed = Spent(
                requests=model.owed,
                seconds=model.cost_s,
                prompt_tokens=model.prompt_tokens,
                completion_tokens=model.completion_tokens,
            )
            kept[model.model] = used.get(model.model, Spent()) + owed
    text = json.dumps({"version": 1, "models": {name: asdict(spent) for name, spent in kept.items()}}, indent=1)
    context.directory.write(context.directory.forecast, text)


def foreseen(context: RunContext, found: Mapping[str, Measured]) -> list[PlanAgainstActual]:
    """Plan and measurement (`found`, by model) of each model that was planned; none where nothing was."""
    return plan_against_actual(list(_read(context).items()), [(model, m.spent) for model, m in found.items()])


def _used(context: RunContext) -> Mapping[str, Spent]:
    found = measured(history(context.directory.events))
    return {model: m.spent for model, m in found.items()}


def _read(context: RunContext) -> dict[str, Spent]:
    try:
        raw = json.loads(context.directory.forecast.read_text(encoding="utf-8"))
        return {name: Spent(**spent) for name, spent in raw["models"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # it serves for comparison only
