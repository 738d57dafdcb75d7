"""Planning, pure: what is owed becomes shards with a cost. No I/O, no clock."""

from proctor.plan.cost import CostModel
from proctor.plan.shards import OwedTask, cut_shards
from proctor.plan.views import Forecast, ModelPlan, Plan, TaskPlan

__all__ = ["CostModel", "Forecast", "ModelPlan", "OwedTask", "Plan", "TaskPlan", "cut_shards"]
