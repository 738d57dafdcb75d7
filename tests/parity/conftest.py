"""What the end-to-end comparisons share: the tasks and their data, and both commands, ours and lm-eval's."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).parent
DATA = HERE / "data"
COLOURS = ("red", "deep blue", "green", "ünï", "black and white", "yellow")

FULL = bool(os.environ.get("PROCTOR_PARITY_FULL"))
LENGTH = "200" if FULL else "40"
"""Tokens that GSM8K generates: fewer than the tiny model's window, which must keep a piece of the prompt."""
WAIT_S = 7200.0 if FULL else 1700.0
"""For one command. Minutes on a quiet machine; but the tests run beside others, on two cores, anywhere."""

Metrics = dict[tuple[str, str, str], tuple[float | None, float | None]]
"""(task, metric, filter) → value and standard error."""


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def colour_rows(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    things = ("sky", "grass", "night", "fire engine", "zebra", "banana", "sea", "leaf")
    return [
        {
            "question": f"Which colour has the {rng.choice(things)} in picture {n}?",
            "choices": rng.sample(COLOURS, 3),
            "gold": rng.randrange(3),
        }
        for n in range(count)
    ]


def write_data(root: Path) -> None:
    """The data of every task: what is shipped beside this file, and what is drawn here."""
    (root / "hellaswag.jsonl").write_bytes((DATA / "hellaswag.jsonl").read_bytes())
    problems = (DATA / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (root / "gsm8k_test.jsonl").write_text("".join(problems[:16]), encoding="utf-8")
    (root / "gsm8k_train.jsonl").write_text("".join(problems[16:]), encoding="utf-8")
    write_lines(root / "colours.jsonl", colour_rows(16, 1))
    write_lines(root / "colours_odd.jsonl", colour_rows(7, 2))
    write_lines(root / "colours_train.jsonl", colour_rows(12, 3))
    rng = random.Random(4)
    words = [w for problem in problems for w in json.loads(problem)["question"].split()]
    passages = [" ".join(rng.choices(words, k=k)) for k in (30, 220, 90, 1, 600, 250, 5)]
    write_lines(root / "passages.jsonl", [{"text": text} for text in passages])
    long = [(" ".join(rng.choices(words, k=k)), colour_rows(1, k)[0]) for k in (40, 200, 240, 300, 700, 190)]
    write_lines(root / "long.jsonl", [row | {"text": f"{text}. {row['question']}"} for text, row in long])


@dataclass(frozen=True, kw_only=True)
class Commands:
    """Both commands, over the same tasks."""

    python: str
    models: Path
    tasks: Path
    environment: Mapping[str, str]

    def run(self, argv: list[str], *, timeout: float = WAIT_S, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run to the end; its output is the error if it fails."""
        env = os.environ | self.environment | environment
        done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=timeout, check=False)
        assert done.returncode == 0, f"{argv}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done

    def lm_eval(
        self,
        out: Path,
        tasks: Sequence[str],
        model_args: Mapping[str, Any],
        *flags: str,
        timeout: float = WAIT_S,
        **more: str,
    ) -> Metrics:
        """What `python -m lm_eval` writes as its results, at full precision."""
        argv = [self.python, "-m", "lm_eval", *(flags if "--model" in flags else ("--model", "hf", *flags))]
        argv += ["--include_path", str(self.tasks)]
        argv += ["--model_args", json.dumps(dict(model_args))] if model_args else []
        self.run([*argv, "--tasks", ",".join(tasks), "--output_path", str(out)], timeout=timeout, **more)
        (written,) = out.rglob("results_*.json")
        return lm_eval_metrics(json.loads(written.read_text(encoding="utf-8")))

    def proctor(self, config: Path, verb: str = "run", *, timeout: float = WAIT_S, **more: str) -> dict[str, Any]:
        """What `proctor run FILE --json` prints."""
        done = self.run([sys.executable, "-m", "proctor", verb, str(config), "--json"], timeout=timeout, **more)
        return json.loads(done.stdout)

    def write_run(self, root: Path, **keys: Any) -> Path:
        """run.yaml; an entry of `tasks` that names no source's directory gets ours and lm-eval's interpreter."""
        entries = [{"include_path": [str(self.tasks)], "python": self.python} | entry for entry in keys.pop("tasks")]
        run = {"name": "parity", "store": str(root / "store"), "runs": str(root / "runs"), "tasks": entries, **keys}
        path = root / "run.yaml"
        path.write_text(yaml.safe_dump(run), encoding="utf-8")
        return path


def lm_eval_metrics(results: Mapping[str, Any]) -> Metrics:
    """The metrics of lm-eval's results file: tasks and groups."""
    found: Metrics = {}
    for task, values in (results["results"] | results.get("groups", {})).items():
        for name, value in values.items():
            metric, _, filter_ = name.partition(",")
            if filter_ and not metric.endswith("_stderr"):
                stderr = values.get(f"{metric}_stderr,{filter_}")
                found[task, metric, filter_] = value, stderr if isinstance(stderr, float) else None
    return found


def printed(value: float | None) -> str:
    """As lm-eval's table prints a number."""
    return "N/A" if value is None else f"{value:.4f}"


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How our metrics are read and compared."""

    @staticmethod
    def metrics(outcome: Mapping[str, Any], model: str, *, chat: bool = False) -> Metrics:
        """One model's metrics in what our command printed; those of the chat tasks, or of the others."""
        rows = [r for r in outcome["rows"] if r["model"] == model and r["task"].startswith("e2e_talk") == chat]
        assert all(row["complete"] for row in rows), [row for row in rows if not row["complete"]]
        keys = [(row["task"], row["metric"], row["filter"]) for row in rows]
        assert len(keys) == len(set(keys))
        return {key: (row["value"], row["stderr"]) for key, row in zip(keys, rows, strict=True)}

    @staticmethod
    def of_lm_eval(results: Mapping[str, Any]) -> Metrics:
        """The metrics of lm-eval's results."""
        return lm_eval_metrics(results)

    @staticmethod
    def check(ours: Metrics, theirs: Metrics, *, exact: bool) -> None:
        """The same metrics, equal in every printed digit; with `exact`, in every bit."""
        assert sorted(ours) == sorted(theirs)
        off = {
            key: (ours[key], theirs[key])
            for key in ours
            if [printed(v) for v in ours[key]] != [printed(v) for v in theirs[key]]
        }
        assert not off
        inexact = {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}
        assert not (exact and inexact)
        print(f"{len(ours)} metrics equal as printed, {len(ours) - len(inexact)} of them in every bit")


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    """Both commands, with data set and Proctor caches of their own."""
    python, models = os.environ.get("PROCTOR_LM_EVAL_PYTHON"), os.environ.get("PROCTOR_TEST_MODELS")
    if not python or not models:
        pytest.skip("PROCTOR_LM_EVAL_PYTHON and PROCTOR_TEST_MODELS are not set")
    root = tmp_path_factory.mktemp("end_to_end")
    for name in ("tasks", "data", "hf", "cache"):
        (root / name).mkdir()
    write_data(root / "data")
    code = "import lm_eval, os; print('@@' + os.path.dirname(lm_eval.__file__))"
    place = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split("@@")[1]
    for file in (HERE / "tasks").iterdir():
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        text = text.replace("@DATA@", str(root / "data")).replace("@LM_EVAL@", place.strip())
        if text:
            (root / "tasks" / file.name).write_text(text.replace("@LENGTH@", LENGTH), encoding="utf-8")
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(root / "hf"),
        "PROCTOR_CACHE": str(root / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
        # Processes that run side by side would spin for each other's cores.
        "OMP_NUM_THREADS": "1",
        # Logits of 50 MB, mapped and zeroed anew for every request, were a third of the time.
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**31),
    }
    return Commands(python=python, models=Path(models), tasks=root / "tasks", environment=environment)


@pytest.fixture(scope="session")
def gguf() -> Path | None:
    """The embedded model's file; None where the environment names none."""
    path = os.environ.get("PROCTOR_TEST_GGUF")
    return Path(path) if path else None


@pytest.fixture(scope="session")
def parity() -> Parity:
    """See `Parity`."""
    return Parity()
