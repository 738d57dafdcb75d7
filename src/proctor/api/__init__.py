"""The Python surface: all that the command line does.

import asyncio
from proctor import api

outcome = asyncio.run(api.run("run.yaml"))
for row in outcome.scores.rows:
    print(row.model, row.task, row.metric, row.value, row.stderr, row.n)

Names are imported when they are first used: a search for a task need not load what a run needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from proctor.api.claiming import HeldClaim, claims, void_claims
    from proctor.api.cluster_check import CheckedCluster, check_cluster
    from proctor.api.cluster_profiles import KnownClusters, ResolvedCluster, clusters, detect_cluster, resolve_cluster
    from proctor.api.counting import status
    from proctor.api.doctoring import Diagnosis, doctor
    from proctor.api.inspecting import Checked, fetch_model, init, models, validate
    from proctor.api.jobs import cancel
    from proctor.api.logs import FailedSample, LogFile, failed_samples, last_lines, log_files
    from proctor.api.planning import plan
    from proctor.api.preparing import PreparedTask, prepare
    from proctor.api.presenting import (
        outcome_to_json,
        owed_words,
        plan_to_json,
        scores_to_json,
        submission_to_json,
    )
    from proctor.api.progress import Progress, Silent
    from proctor.api.running import Outcome, run
    from proctor.api.scoring import Scores, score
    from proctor.api.searching import has_lm_eval, search_tasks
    from proctor.api.submitting import Selection, SubmitOutcome, submit
    from proctor.api.targets import Target
    from proctor.config.schema import json_schema
    from proctor.plan import Plan

_HOMES: Final = {
    "proctor.api.claiming": ("HeldClaim", "claims", "void_claims"),
    "proctor.api.cluster_check": ("CheckedCluster", "check_cluster"),
    "proctor.api.cluster_profiles": (
        "KnownClusters",
        "ResolvedCluster",
        "clusters",
        "detect_cluster",
        "resolve_cluster",
    ),
    "proctor.api.counting": ("status",),
    "proctor.api.doctoring": ("Diagnosis", "doctor"),
    "proctor.api.inspecting": ("Checked", "fetch_model", "init", "models", "validate"),
    "proctor.api.jobs": ("cancel",),
    "proctor.api.logs": ("FailedSample", "LogFile", "failed_samples", "last_lines", "log_files"),
    "proctor.api.planning": ("plan",),
    "proctor.api.presenting": ("outcome_to_json", "owed_words", "plan_to_json", "scores_to_json", "submission_to_json"),
    "proctor.api.preparing": ("PreparedTask", "prepare"),
    "proctor.api.progress": ("Progress", "Silent"),
    "proctor.api.running": ("Outcome", "run"),
    "proctor.api.scoring": ("Scores", "score"),
    "proctor.api.searching": ("has_lm_eval", "search_tasks"),
    "proctor.api.submitting": ("Selection", "SubmitOutcome", "submit"),
    "proctor.api.targets": ("Target",),
    "proctor.config.schema": ("json_schema",),
    "proctor.plan": ("Plan",),
}
_HOME: Final = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Checked",
    "CheckedCluster",
    "Diagnosis",
    "FailedSample",
    "HeldClaim",
    "KnownClusters",
    "LogFile",
    "Outcome",
    "Plan",
    "PreparedTask",
    "Progress",
    "ResolvedCluster",
    "Scores",
    "Selection",
    "Silent",
    "SubmitOutcome",
    "Target",
    "cancel",
    "check_cluster",
    "claims",
    "clusters",
    "detect_cluster",
    "doctor",
    "failed_samples",
    "fetch_model",
    "has_lm_eval",
    "init",
    "json_schema",
    "last_lines",
    "log_files",
    "models",
    "outcome_to_json",
    "owed_words",
    "plan",
    "plan_to_json",
    "prepare",
    "resolve_cluster",
    "run",
    "score",
    "scores_to_json",
    "search_tasks",
    "status",
    "submission_to_json",
    "submit",
    "validate",
    "void_claims",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
