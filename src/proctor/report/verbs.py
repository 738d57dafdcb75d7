"""The tables of `proctor plan` and `proctor status`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from proctor.plan.views import Plan
from proctor.report.layout import Layout, Line, heading
from proctor.report.text import count, duration
from proctor.report.views import RunStatus, TaskStatus, WorkerStatus

_NUMBERS = ("shots", "requests", "answered", "failed", "owed", "done", "cost", "tokens/s", "last seen")


SHOWN_TROUBLES = 10
FULL_CORE = 0.9
"""Share of a core from which on a process that asks is what others wait for."""


def plan_table(plan: Plan) -> Layout:
    """Every task of every model: what it asks, what is there already, what is owed and its cost."""
    names = ("model", "checkpoint", "task", "shots", "requests", "answered", "failed", "owed", "cost", "needs")
    lines: list[Line] = []
    for model in plan.models:
        for task in model.tasks:
            figures = (task.requests, task.answered, task.failed, task.owed)
            cells = (model.display_name, model.label, task.task, str(task.num_fewshot), *map(count, figures))
            cells += (duration(task.cost_s), ", ".join(task.labels) or "-")
            lines.append(Line(cells=cells, warn=task.failed > 0))
    return Layout(
        title=f"plan of {plan.run}",
        columns=heading(*names, right=_NUMBERS),
        lines=tuple(lines),
        notes=_plan_notes(plan),
    )


def status_table(status: RunStatus, *, detailed: bool = True) -> Layout:
    """What is answered, failed and owed: for every task of every model, or without `detailed` for every model."""
    tasks = status.tasks if detailed else _by_model(status.tasks)
    names = ("model", "checkpoint", "task", "shots", "requests", "answered", "failed", "owed", "done", "failures")
    notes = [
        f"{count(status.answered)} of {count(status.requests)} requests answered, {count(status.failed)} failed, "
        f"{count(status.owed)} owed"
    ]
    if status.elapsed_s is not None:
        foreseen = "" if status.forecast_s is None else f"; the plan foresaw {duration(status.forecast_s)}"
        notes.append(f"running for {duration(status.elapsed_s)}{foreseen}")
    if status.requests_per_s is not None:
        eta = "" if status.eta_s is None else f"; {duration(status.eta_s)} left at this rate"
        notes.append(f"{status.requests_per_s:.1f} requests/s{eta}")
    if status.shards:
        notes.append(f"{count(status.shards - status.shards_owed)} of {count(status.shards)} shards done")
    if status.starts:
        times, took = sum(s.starts for s in status.starts), sum(s.seconds for s in status.starts)
        notes.append(f"{count(times)} start(s) took {duration(took)} in all")
    if any(s.reloads for s in status.starts):
        times, took = sum(s.reloads for s in status.starts), sum(s.reloading_s for s in status.starts)
        notes.append(f"weights were loaded into a running server {count(times)} time(s), in {duration(took)}")
    if status.duplicates:
        notes.append(f"{count(status.duplicates)} answers came twice; the first of each counts")
    if status.damaged:
        notes.append(f"{count(status.damaged)} damaged rows in the store: what they held is asked again")
    return Layout(
        title=f"status of {status.run}",
        columns=heading(*names, right=_NUMBERS),
        lines=tuple(Line(cells=_task_cells(t), warn=t.failed > 0) for t in tasks),
        notes=tuple(notes),
    )


def jobs_table(status: RunStatus) -> Layout:
    """Every array on the cluster, and why attempts ended that should not have."""
    names = ("job", "array", "elements", "pending", "running", "restarts", "ended", "waits for")
    right = ("elements", "pending", "running", "restarts")
    lines = tuple(
        Line(
            cells=(
                j.job,
                j.shape,
                *map(count, (j.elements, j.pending, j.running, j.restarts)),
                ", ".join(f"{name} {count(n)}" for name, n in j.endings) or "-",
                ", ".join(f"{name} {count(n)}" for name, n in j.waits_for) or "-",
            ),
            warn=bool(j.troubles),
        )
        for j in status.jobs
    )
    troubles = [t for j in status.jobs for t in j.troubles]
    notes = [f"{t.job} on {t.host}: {t.ending}: {t.message.partition(chr(10))[0]}" for t in troubles[:SHOWN_TROUBLES]]
    if len(troubles) > SHOWN_TROUBLES:
        notes.append(f"and {count(len(troubles) - SHOWN_TROUBLES)} more: --json has all")
    notes += [f"→ {hint}" for hint in dict.fromkeys(t.hint for t in troubles) if hint]
    return Layout(title="jobs", columns=heading(*names, right=right), lines=lines, notes=tuple(notes))


def forecast_table(status: RunStatus) -> Layout:
    """What the plan foresaw for each model, and what was used."""
    names = ("model", "planned", "asked", "server time planned", "used", "expected", "tokens a request")
    lines = tuple(
        Line(
            cells=(
                p.model,
                count(p.requests),
                count(p.asked),
                duration(p.planned_s),
                duration(p.used_s),
                "-" if p.expected_s is None else duration(p.expected_s),
                "-" if p.tokens_ratio is None else f"{p.tokens_ratio:.2f} of the plan",
            )
        )
        for p in status.plan
    )
    return Layout(title="plan and actual", columns=heading(*names, right=names[1:]), lines=lines)


def starts_table(status: RunStatus) -> Layout:
    """How often workers started for each model, or loaded its weights into a running server, and what that took."""
    reloads = any(s.reloads for s in status.starts)
    names = ("model", "starts", "in all", "typical", *(("reloads", "in all") if reloads else ()))
    lines = tuple(
        Line(
            cells=(
                s.model,
                count(s.starts),
                duration(s.seconds),
                "-" if s.typical_s is None else duration(s.typical_s),
                *((count(s.reloads), duration(s.reloading_s)) if reloads else ()),
            )
        )
        for s in status.starts
    )
    return Layout(title="start-up", columns=heading(*names, right=names[1:]), lines=lines)


def worker_table(status: RunStatus) -> Layout:
    """Every worker: what it does, what its servers have at a time, and when it was last heard of."""
    names = ("worker", "model", "phase", "requests", "tokens/s", "in flight", "last seen", "message")
    lines = tuple(Line(cells=_worker_cells(w, status.now), warn=w.phase == "failed") for w in status.workers)
    full = [w.worker for w in status.workers if w.phase == "asking" and w.core >= FULL_CORE]
    more = "`engine.client_processes` lets more of them ask"
    notes = [f"{', '.join(full)}: the process has no time left to ask more; {more}"] if full else []
    return Layout(title="workers", columns=heading(*names, right=_NUMBERS), lines=lines, notes=tuple(notes))


def _plan_notes(plan: Plan) -> tuple[str, ...]:
    forecast = plan.forecast
    wall, server = duration(forecast.wall_s), duration(forecast.server_seconds)
    notes = [
        f"{count(forecast.requests)} requests owed in {'' if forecast.counted else 'about '}{count(forecast.shards)} "
        f"shards ({plan.strategy}); "
        f"about {wall} on {forecast.workers} worker(s), {server} of server time"
    ]
    if forecast.requests:
        tokens = f"{count(forecast.prompt_tokens)} prompt and {count(forecast.completion_tokens)} generated tokens"
        notes.append(f"{count(forecast.jobs)} jobs, {forecast.gpu_hours:.1f} GPU-hours with start-up; {tokens}")
        best = forecast.recommendation
        notes.append(f"more than {count(best.workers)} worker(s) do not pay: {best.reason}")
        notes.append(f"rates: {', '.join(sorted({m.rates for m in plan.models if m.owed}))}")
    notes += _gpu_notes(plan)
    shared = sum(m.shared for m in plan.models)
    if shared:
        notes.append(f"{count(shared)} requests occur in several tasks and are asked once")
    damaged = sum(m.damaged for m in plan.models)
    if damaged:
        notes.append(f"{count(damaged)} damaged rows in the store: what they held is asked again")
    if any(t.failed for m in plan.models for t in m.tasks):
        notes.append("failed for good: not asked again by itself")
    return tuple(notes)


def _gpu_notes(plan: Plan) -> list[str]:
    """What `gpus: auto` came to, and why; models with the same answer in one line."""
    found: dict[tuple[int, str], list[str]] = {}
    for model in plan.models:
        if model.gpus_reason:
            found.setdefault((model.gpus, model.gpus_reason), []).append(model.model)
    return [
        f"{first}{f' and {count(len(more))} more' if more else ''}: {count(gpus)} GPU(s) for each worker: {reason}"
        for (gpus, reason), (first, *more) in found.items()
    ]


def _by_model(tasks: Sequence[TaskStatus]) -> list[TaskStatus]:
    """One line for each model: its tasks added up."""
    groups: dict[tuple[str, str], list[TaskStatus]] = {}
    for task in tasks:
        groups.setdefault((task.model, task.label), []).append(task)
    found: list[TaskStatus] = []
    for (model, label), members in groups.items():
        failures: Counter[str] = Counter()
        for member in members:
            failures.update(dict(member.failures))
        found.append(
            TaskStatus(
                model=model,
                label=label,
                task=f"{count(len(members))} tasks" if len(members) > 1 else members[0].task,
                num_fewshot=members[0].num_fewshot if len(members) == 1 else None,
                requests=sum(m.requests for m in members),
                answered=sum(m.answered for m in members),
                failed=sum(m.failed for m in members),
                failures=tuple(sorted(failures.items())),
            )
        )
    return found


def _task_cells(task: TaskStatus) -> tuple[str, ...]:
    shots = "-" if task.num_fewshot is None else str(task.num_fewshot)
    # Rounded down: 100 % only when all is done.
    share = f"{100 * task.answered // task.requests} %" if task.requests else "-"
    figures = map(count, (task.requests, task.answered, task.failed, task.owed))
    failures = ", ".join(f"{name} {count(n)}" for name, n in task.failures) or "-"
    return (task.model, task.label, task.task, shots, *figures, share, failures)


def _worker_cells(worker: WorkerStatus, now: float | None) -> tuple[str, ...]:
    rate = "-" if worker.tokens_per_s is None else count(round(worker.tokens_per_s))
    age = "-" if now is None else f"{duration(now - worker.seen)} ago"
    said = worker.message.partition("\n")[0]
    figures = (count(worker.requests), rate, _in_flight(worker))
    return (worker.worker, worker.model, worker.phase, *figures, age, said or "-")


def _in_flight(worker: WorkerStatus) -> str:
    """Such as `57 of 64 (grown)`; with several servers the sum, and each reason once."""
    if not worker.limits:
        return "-"
    why = "; ".join(dict.fromkeys(w for w in worker.why if w))
    return f"{count(worker.in_flight)} of {count(sum(worker.limits))}" + (f" ({why})" if why else "")
