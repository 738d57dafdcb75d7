"""How close the planned shards come to the best possible makespan, in simulation with the production cut.

Workers start (start-up), then claim the next shard of the plan whenever they are free, at CLAIM_S each; a late worker
starts later and finds what is left. Plans are made from predictions, the clock runs on true costs: a prediction is the
truth times log-normal noise, of each request (sigma 0.5 or more) and of each task as a whole. Against it:

  static     contiguous equal slices of the documents, one a worker (SkyThought, NeMo)
  oellm      the same after a shuffle
  size       OpenCompass's size partitioner, tasks in its order, each with its own start-up, at most W at a time
  workers    OpenCompass's NumWorker partitioner with W workers, each task with its own start-up
  per-model  one job for the model (eval-hive): no other worker helps

Lower bound of any schedule: max(max_i c_i, sum c / W) + start-up. A ratio is makespan / bound. GPU-hours are what the
workers hold: `left` when each leaves once nothing is left to claim, `held` when all stay to the end; printed over
work + W start-ups. Prints a table; --json FILE writes every case.
"""

from __future__ import annotations

import argparse
import heapq
import inspect
import json
import pkgutil
import pydoc_data.topics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from proctor.plan import OwedTask, cut_shards
from proctor.plan.partition import Dataset, chosen, even_bounds, partition_size, partition_workers

CLAIM_S = 0.05
TASKS = 8
Costs = NDArray[np.float64]
Jobs = list[NDArray[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """True costs in seconds, and the task of each request."""

    name: str
    cost: Costs
    task: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One simulated run."""

    trace: str
    scheme: str
    workers: int
    startup_s: float
    sigma: float
    late_s: float
    ratio: float
    left: float
    held: float
    claims: int


def traces(requests: int, work_s: float) -> list[Trace]:
    """The same number of requests and the same total work, in three shapes."""
    rng = np.random.default_rng(7)
    task = np.sort(rng.integers(0, TASKS, requests))
    scale = rng.lognormal(0, 1, TASKS)[task]
    shapes = {
        "uniform": rng.uniform(0.5, 1.5, requests),
        "log-normal": rng.lognormal(0, 1.2, requests) * scale,
        "tokens": token_lengths(requests, rng),
    }
    return [Trace(name=n, cost=c * (work_s / c.sum()), task=task) for n, c in shapes.items()]


def token_lengths(requests: int, rng: np.random.Generator) -> Costs:
    """Costs of real texts: words in docstrings (answers) and in help topics (prompts) of the standard library.

    An answer's word costs ten of a prompt's, as decoding and prefilling do in the cost model.
    """
    answers: list[int] = []
    for module in sorted(m.name for m in pkgutil.iter_modules(json.__path__, "json.")) + sorted(SOURCES):
        found = __import__(module, fromlist=["_"])
        for _, value in inspect.getmembers(found, lambda v: inspect.isclass(v) or inspect.isroutine(v)):
            members = [value, *vars(value).values()] if inspect.isclass(value) else [value]
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                texts = [getattr(m, "__doc__", None) for m in members]
            answers += [len(t.split()) for t in texts if isinstance(t, str)]
    prompts = [len(text.split()) for text in pydoc_data.topics.topics.values()]
    return 10 * rng.choice(answers, requests) + rng.choice(prompts, requests).astype(np.float64)


SOURCES = ("argparse", "asyncio", "collections", "datetime", "decimal", "email.message", "http.client", "logging",
           "pathlib", "random", "socket", "statistics", "subprocess", "threading", "typing", "unittest")  # fmt: skip


def predict(trace: Trace, sigma: float, rng: np.random.Generator) -> Costs:
    """What the planner believes."""
    if not sigma:
        return trace.cost
    return trace.cost * rng.lognormal(0, sigma, len(trace.cost)) * rng.lognormal(0, sigma, TASKS)[trace.task]


def balanced(trace: Trace, predicted: Costs, workers: int) -> Jobs:
    """The production cut."""
    owed = []
    for task in range(TASKS):
        rows = np.flatnonzero(trace.task == task)
        owed.append(
            OwedTask(fingerprint=str(task), ordinals=rows, documents=np.arange(len(rows)), cost_s=predicted[rows])
        )
    return [np.array([o for _, o in s.items]) for s in cut_shards("m", owed, workers=workers)]


def static(trace: Trace, predicted: Costs, workers: int) -> Jobs:
    return [np.arange(a, b) for a, b in even_bounds(len(trace.cost), workers)]


def oellm(trace: Trace, predicted: Costs, workers: int) -> Jobs:
    order = np.random.default_rng(42).permutation(len(trace.cost))
    return [order[a:b] for a, b in even_bounds(len(order), workers)]


def size(trace: Trace, predicted: Costs, workers: int) -> Jobs:
    return _parts(trace, lambda d: partition_size(["m"], d))


def by_workers(trace: Trace, predicted: Costs, workers: int) -> Jobs:
    return _parts(trace, lambda d: partition_workers(["m"], d, num_worker=workers))


def per_model(trace: Trace, predicted: Costs, workers: int) -> Jobs:
    return [np.arange(len(trace.cost))]


def _parts(trace: Trace, partition: Callable[[Sequence[Dataset]], list]) -> Jobs:  # type: ignore[type-arg]
    rows = {f"task{t}": np.flatnonzero(trace.task == t) for t in range(TASKS)}
    datasets = [Dataset(name=name, total=len(found)) for name, found in rows.items()]
    return [
        np.concatenate([rows[p.dataset][chosen(p.test_range, len(rows[p.dataset]))] for p in task.parts])
        for task in partition(datasets)
    ]


SCHEMES = {
    "balanced": balanced,
    "static": static,
    "oellm": oellm,
    "size": size,
    "workers": by_workers,
    "per-model": per_model,
}


def simulate(cost: Costs, jobs: Jobs, workers: int, startup_s: float, *, claimed: bool, late_s: float = 0.0):
    """Makespan, and seconds held if workers leave early; worker 0 begins `late_s` late.

    `claimed`: a worker starts once and claims one shard after the other; otherwise every job has its own start-up.
    """
    took = [float(cost[j].sum()) for j in jobs]
    begins = [late_s if w == 0 else 0.0 for w in range(workers)]
    free = [(b + (startup_s if claimed else 0.0), w) for w, b in enumerate(begins)]
    heapq.heapify(free)
    held = [startup_s if claimed else 0.0] * workers
    end = 0.0
    for seconds in took:
        at, worker = heapq.heappop(free)
        spent = seconds + (CLAIM_S if claimed else startup_s)
        end = max(end, at + spent)
        held[worker] += spent
        heapq.heappush(free, (at + spent, worker))
    whole = sum(max(0.0, end - b) for b in begins) if claimed else sum(held)
    return end, sum(held), whole


def run(trace: Trace, scheme: str, workers: int, startup_s: float, sigma: float, late_s: float = 0.0) -> Result:
    """One case."""
    rng = np.random.default_rng([workers, int(startup_s), int(10 * sigma)])
    jobs = SCHEMES[scheme](trace, predict(trace, sigma, rng), workers)
    end, left, held = simulate(trace.cost, jobs, workers, startup_s, claimed=scheme == "balanced", late_s=late_s)
    work = float(trace.cost.sum())
    bound = max(float(trace.cost.max()), work / workers) + startup_s
    least = work + workers * startup_s
    return Result(
        trace=trace.name,
        scheme=scheme,
        workers=workers,
        startup_s=startup_s,
        sigma=sigma,
        late_s=late_s,
        ratio=end / bound,
        left=left / least,
        held=held / least,
        claims=len(jobs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--work-s", type=float, default=36_000.0, help="work in seconds: 10 GPU-hours")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    made = traces(options.requests, options.work_s)
    print("bound = max(max_i c_i, sum c / W) + start-up; columns: makespan / bound, worst over start-ups 0, 60, 600 s")
    results: list[Result] = []
    counts = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    for sigma in (0.5, 1.0):
        for trace in made:
            print(f"\n{trace.name}, sigma {sigma}: {len(trace.cost):,} requests, longest {trace.cost.max():.0f} s")
            print(f"{'scheme':10}" + "".join(f"{w:>8}" for w in counts) + "   GPU-h/least at 64: left, held; claims")
            for scheme in SCHEMES:
                rows = [[run(trace, scheme, w, s, sigma) for s in (0.0, 60.0, 600.0)] for w in counts]
                results += [r for row in rows for r in row]
                at = rows[counts.index(64)]
                tail = f"{max(r.left for r in at):9.3f}{max(r.held for r in at):9.3f}{at[0].claims:8,}"
                print(f"{scheme:10}" + "".join(f"{max(r.ratio for r in row):8.3f}" for row in rows) + tail)
    late = [run(t, "balanced", w, 60.0, 0.5, late_s=300.0) for t in made for w in counts[1:]]
    results += late
    print("\nbalanced, one worker 300 s late (bound as if it were not):")
    for trace in made:
        print(f"{trace.name:10}" + "".join(f"{r.ratio:8.3f}" for r in late if r.trace == trace.name))
    ours = [r for r in results if r.scheme == "balanced" and r.workers <= 64 and not r.late_s]
    for sigma in (0.5, 1.0):
        worst = max((r for r in ours if r.sigma == sigma), key=lambda r: r.ratio)
        spent = max(r.held for r in ours if r.sigma == sigma)
        where = f"{worst.trace}, {worst.workers} workers, start-up {worst.startup_s:.0f} s"
        print(f"\nsigma {sigma}: worst of balanced to 64 workers {worst.ratio:.3f} ({where});")
        print(f"  GPU-hours at most {spent:.3f} of work + one start-up a worker, all held to the end")
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
