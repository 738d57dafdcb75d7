"""Planning, pure: what is owed becomes shards with a cost. No I/O, no clock."""

from proctor.plan.cost import CostModel, Lengths, Spent
from proctor.plan.cuts import AskingOrder, Cut, ShardSizes
from proctor.plan.forecast import (
    PlanAgainstActual,
    Recommendation,
    Scaling,
    TimeLimit,
    plan_against_actual,
    recommended_workers,
    scaling,
    time_limit,
)
from proctor.plan.requests import Bits, Priced, RequestTable, TaskRequests
from proctor.plan.shards import OwedTask, Shards, cut_shards, shard_id
from proctor.plan.strategies import Cutter, Strategy, StrategyName
from proctor.plan.views import Forecast, ModelPlan, Plan, TaskPlan

__all__ = [
    "AskingOrder",
    "Bits",
    "CostModel",
    "Cut",
    "Cutter",
    "Forecast",
    "Lengths",
    "ModelPlan",
    "OwedTask",
    "Plan",
    "PlanAgainstActual",
    "Priced",
    "Recommendation",
    "RequestTable",
    "Scaling",
    "ShardSizes",
    "Shards",
    "Spent",
    "Strategy",
    "StrategyName",
    "TaskPlan",
    "TaskRequests",
    "TimeLimit",
    "cut_shards",
    "plan_against_actual",
    "recommended_workers",
    "scaling",
    "shard_id",
    "time_limit",
]
