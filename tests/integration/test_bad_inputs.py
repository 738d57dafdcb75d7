"""Whatever is typed wrong or broken underneath: one clear message, the right exit code, and a store that is whole.

Each case gets a laboratory in which one good run has been done. It breaks something (mostly a copy of the good
run.yaml), runs one command line, and afterwards the good run must still be complete without asking anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from proctor.cli import run as command_line
from proctor.errors import StoreError
from proctor.store import Store

from .conftest import Lab, write_model

WORDS = [f"word{i:02d}" for i in range(12)]
MORE = ["other0", "other1"]
HARNESS = os.environ.get("PROCTOR_LM_EVAL_PYTHON")
LONGEST_MESSAGE = 4000
"""Bytes on standard error; a server's last log lines are the longest part."""

Change = Callable[["Bench"], "list[str] | None"]


@dataclass
class Bench:
    """The laboratory as one case sees it."""

    lab: Lab
    good: Path
    cleanup: contextlib.ExitStack

    @property
    def root(self) -> Path:
        """Where everything lies."""
        return self.lab.root

    @property
    def store(self) -> Path:
        """The store with the answers of the good run."""
        return self.root / "store"

    def spec(self) -> dict[str, Any]:
        """The good run.yaml as a value, under another name: a case leaves the good run's directory alone."""
        return yaml.safe_load(self.good.read_text()) | {"name": "bad"}

    def write(self, spec: dict[str, Any] | str, name: str = "bad.yaml") -> str:
        """A configuration that a case has broken."""
        path = self.root / name
        path.write_text(spec if isinstance(spec, str) else yaml.safe_dump(spec, sort_keys=False))
        return str(path)

    def file(self, name: str, content: str | bytes) -> str:
        """A file in the laboratory."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def task(self, name: str = "odd", rows: str | None = '{"word": "other0", "answer": "a"}\n', **change: Any) -> str:
        """A task file over its own data, like the good one but for `change`; None takes a key away."""
        if rows is not None:
            self.file(f"{name}.jsonl", rows)
        task: dict[str, Any] = yaml.safe_load((self.root / "words.yaml").read_text())
        task |= {"task": name, "dataset": {"path": f"{name}.jsonl"}} | change
        return self.file(f"{name}.yaml", yaml.safe_dump({k: v for k, v in task.items() if v is not None}))


@dataclass(frozen=True)
class Case:
    """One bad input."""

    name: str
    change: Change
    says: tuple[str, ...]
    code: int = 2
    real: bool = False
    """As a child process, not within this one."""
    slow: bool = False
    begins: str = "error: "
    """Of the one message."""
    own: bool = False
    """Breaks the good store or run: gets a laboratory of its own, and says itself what is left."""
    skip: str = ""


def edited(*path: str | int, to: Any, verb: str = "validate") -> Change:
    """The good run.yaml with one value changed; `...` deletes it."""

    def change(bench: Bench) -> list[str]:
        spec = bench.spec()
        at: Any = spec
        for part in path[:-1]:
            at = at.setdefault(part, {}) if isinstance(at, dict) else at[part]
        value = to(bench) if callable(to) else to
        if value is ...:
            del at[path[-1]]
        else:
            at[path[-1]] = value
        return [verb, bench.write(spec)]

    return change


def with_task(make: Callable[[Bench], str | dict[str, Any]], verb: str = "prepare") -> Change:
    """A run of one task entry."""

    def change(bench: Bench) -> list[str]:
        entry = make(bench)
        spec = bench.spec() | {"tasks": [entry if isinstance(entry, dict) else {"native": [entry]}]}
        return [verb, bench.write(spec)]

    return change


def with_server(*flags: str, task: str = "words", launch: Any = None, **change: Any) -> Change:
    """A run of two new questions against a fake server that behaves oddly."""

    def build(bench: Bench) -> list[str]:
        lab = replace(bench.lab, server_flags=list(flags))
        spec = bench.spec()
        spec["launch"] = launch or {}
        spec["engine"] |= {"retries": 1} | {k: v for k, v in change.items() if k != "server"}
        spec["engine"]["server"] = lab.server() | {"restarts": 0} | change.get("server", {})
        spec["tasks"] = [
            {"native": [str(new_task(bench, output="multiple_choice" if task == "choices" else "generate"))]}
        ]
        return ["run", bench.write(spec)]

    return build


def new_task(bench: Bench, output: str = "generate") -> Path:
    """A task that nobody has answered."""
    return bench.lab.write_task(f"new-{output}", MORE, output=output)


def with_endpoint(bench: Bench, url: str, **model: Any) -> list[str]:
    """A run of two new questions to a server that runs already."""
    spec = bench.spec() | {"engine": {"type": "openai", "retries": 1}}
    spec["models"] = {"remote": {"path": url, "served_model": "default"} | model}
    spec["tasks"] = [{"native": [str(new_task(bench))]}]
    return ["run", bench.write(spec)]


def serving(bench: Bench, *flags: str) -> str:
    """A fake server for the time of the case; its URL."""
    ready = bench.root / "port"
    ready.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "proctor.testing.server", "--port-file", str(ready), *flags], stdout=subprocess.DEVNULL
    )
    bench.cleanup.callback(process.wait)
    bench.cleanup.callback(process.terminate)
    while not ready.exists():
        assert process.poll() is None
    return f"http://127.0.0.1:{ready.read_text()}"


def busy_port(bench: Bench) -> int:
    """A port that somebody listens on for the time of the case."""
    listener = bench.cleanup.enter_context(socket.create_server(("127.0.0.1", 0)))
    return int(listener.getsockname()[1])


def mounted(bench: Bench, at: Path, *options: str) -> Path:
    """A mount for the time of the case."""
    done = subprocess.run(["mount", *options, str(at)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    bench.cleanup.callback(subprocess.run, ["umount", "-l", str(at)], check=True)
    return at


# --- the changes that take more than a line -------------------------------------------------------------


def no_config(bench: Bench) -> list[str]:
    return ["run", str(bench.root / "rn.yaml")]


def duplicate_key(bench: Bench) -> list[str]:
    return ["validate", bench.write(bench.good.read_text() + "\nname: again\n")]


def extends_cycle(bench: Bench) -> list[str]:
    bench.write({"extends": "bad.yaml"}, "other.yaml")
    return ["validate", bench.write({"extends": "other.yaml"})]


def duplicate_label(bench: Bench) -> list[str]:
    spec = bench.spec()
    entry = spec["models"]["m"] | {"model_key": "one"}
    spec["models"] = {"a": entry, "b": dict(entry)}
    return ["validate", bench.write(spec)]


def checkpoints(bench: Bench, **spec: Any) -> dict[str, Any]:
    for step in (100, 200):
        place = bench.root / "training" / f"checkpoint_{step}"
        if not place.exists():
            place.mkdir(parents=True)
            write_model(place)
    return {"path": str(bench.root / "training"), "checkpoints": {"pattern": "checkpoint_{step}"} | spec}


def without(bench: Bench, name: str, *patterns: str) -> str:
    """The good model in another directory, without some of its files."""
    shutil.copytree(bench.root / "model", bench.root / name, ignore=shutil.ignore_patterns(*patterns))
    return str(bench.root / name)


def torn_weights(bench: Bench) -> str:
    place = without(bench, "torn", "*.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    Path(place, "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(bench.root / "model" / "model.safetensors", Path(place, "model-1.safetensors"))
    return place


def missing_key(bench: Bench) -> list[str]:
    return with_endpoint(bench, serving(bench), api_key_env="NO_SUCH_KEY_VARIABLE")


def wrong_key(bench: Bench) -> list[str]:
    bench.lab.environment["SOME_KEY"] = "wrong-key-value"
    return with_endpoint(bench, serving(bench, "--api-key", "right"), api_key_env="SOME_KEY")


def port_taken(bench: Bench) -> list[str]:
    port = str(busy_port(bench))
    server = bench.lab.server()
    server["argv"] = [port if word == "{port}" else word for word in server["argv"]]
    return with_server(server=server)(bench) or []


def worker_job(bench: Bench) -> list[str]:
    (assignment,) = (bench.root / "runs/run/assignments").glob("*.json")
    (job,) = (bench.root / "runs/run/jobs").glob("*.json")
    job.write_text('{"run": "run", "mod')
    return ["-m", "proctor.worker", str(bench.root / "runs" / "run"), str(assignment), "0"]


def worker_assignment(bench: Bench) -> list[str]:
    torn = bench.file("runs/run/assignments/torn.json", '{"shape": "run", "jo')
    return ["-m", "proctor.worker", str(bench.root / "runs" / "run"), torn, "0"]


def worker_plan(bench: Bench) -> list[str]:
    (bench.root / "runs/run/plan.bits").write_bytes(b"PAR1 garbage")
    (assignment,) = (bench.root / "runs/run/assignments").glob("*.json")
    return ["-m", "proctor.worker", str(bench.root / "runs" / "run"), str(assignment), "0"]


def torn_suites(bench: Bench) -> list[str]:
    (bench.root / "runs" / "run" / "suites.json").write_text('{"tasks": ')
    return ["status", str(bench.good)]


def tasks_changed(bench: Bench) -> list[str]:
    spec = yaml.safe_load(bench.good.read_text())
    spec["tasks"][0]["limit"] = 3
    return ["score", bench.write(spec)]


def newer_store(bench: Bench) -> list[str]:
    marker = bench.store / "store.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"version": 99}))
    return ["run", str(bench.good)]


def damaged_marker(bench: Bench) -> list[str]:
    (bench.store / "store.json").write_bytes(b"\0" * 20)
    return ["status", str(bench.good)]


def damaged_recording(bench: Bench) -> list[str]:
    for path in (bench.store / "requests").glob("*.parquet"):
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 0xFF
        path.write_bytes(data)
    return ["score", str(bench.good)]


def damaged_suite(bench: Bench) -> list[str]:
    for path in (bench.store / "suites").glob("*.json"):
        path.write_text(path.read_text()[:-20])
    return ["score", str(bench.good)]


def read_only(bench: Bench) -> list[str]:
    mounted(bench, bench.store, "--bind", str(bench.store))
    subprocess.run(["mount", "-o", "remount,bind,ro", str(bench.store)], check=True)
    spec = bench.spec() | {"tasks": [{"native": [str(new_task(bench))]}]}
    return ["run", bench.write(spec)]


def lm_eval_task(bench: Bench, name: str = "sciqq", **more: Any) -> dict[str, Any]:
    return {"lm_eval": [name], "python": HARNESS} | more


def model_change(**change: Any) -> Change:
    """The good run with the model's entry changed; callables are given the bench."""

    def build(bench: Bench) -> list[str]:
        spec = bench.spec()
        spec["models"]["m"] |= {k: v(bench) if callable(v) else v for k, v in change.items()}
        return ["plan", bench.write(spec)]

    return build


CASES = [
    # The command line.
    Case("verb", lambda b: ["rnu", str(b.good)], ("unknown verb 'rnu'", "'run'"), real=True),
    Case("no such option", lambda b: ["run", "--jsno", str(b.good)], ("--jsno", "--json"), real=True),
    Case("two configurations", lambda b: ["run", str(b.good), "more.yaml"], ("more.yaml",)),
    Case("option without value", lambda b: ["run", str(b.good), "--set"], ("--set",)),
    Case("override without value", lambda b: ["run", str(b.good), "--set", "name"], ("'--set name'", "KEY=VALUE")),
    Case("override of nothing", lambda b: ["run", str(b.good), "--set", "engin.seed=1"], ("engin", "engine")),
    Case(
        "override wrong type",
        lambda b: ["run", str(b.good), "--set", "engine.max_in_flight=lots"],
        ("max_in_flight", "'lots'"),
    ),
    # The configuration file.
    Case("no configuration", no_config, ("rn.yaml", "run.yaml", "proctor init"), real=True),
    Case("directory", lambda b: ["run", str(b.root)], ("is a directory", "run.yaml")),
    Case("empty file", lambda b: ["validate", b.write("")], ("bad.yaml", "empty")),
    Case("not YAML", lambda b: ["validate", b.write("name: [a\nb: c")], ("bad.yaml:2", "not valid YAML")),
    Case("not text", lambda b: ["validate", b.file("bad.yaml", b"\xff\xfe\x00\x01")], ("not UTF-8",)),
    Case("key twice", duplicate_key, ("'name'", "twice")),
    Case("extends itself", extends_cycle, ("extends", "other.yaml")),
    Case("extends nothing", edited("extends", to="base.yaml"), ("base.yaml",)),
    Case("no models", edited("models", to=...), ("models",)),
    Case("models is a list", edited("models", to=["m"]), ("models", "mapping")),
    Case("no tasks", edited("tasks", to=[]), ("tasks",)),
    Case("unknown key", edited("modles", to={}), ("modles", "models")),
    Case("unknown key of a model", edited("models", "m", "pth", to="x"), ("models.m.pth", "path")),
    Case(
        "unknown key of checkpoints",
        edited("models", "m", "checkpoints", to={"patern": "c_{step}"}),
        ("models.m.checkpoints.patern", "pattern"),
    ),
    Case(
        "unknown key of a native task",
        edited("tasks", to=[{"native": ["demo:capitals"], "limt": 2}]),
        ("tasks.0.limt", "limit"),
    ),
    Case(
        "unknown key of an lm-eval task",
        edited("tasks", to=[{"lm_eval": "sciq", "num_fewshots": 2}]),
        ("tasks.0.num_fewshots", "num_fewshot"),
    ),
    Case("no task source", edited("tasks", to=[{"limit": 2}]), ("tasks.0", "native", "lm_eval")),
    Case("unknown key of the engine", edited("engine", "retrys", to=2), ("engine.retrys", "retries")),
    Case("unknown engine", edited("engine", "type", to="openia"), ("openia", "openai")),
    Case("unknown key of the server", edited("engine", "server", "replica", to=2), ("server.replica", "replicas")),
    Case("unknown server", edited("engine", "server", "type", to="vlm"), ("vlm", "vllm")),
    Case(
        "unknown placeholder", edited("engine", "server", "argv", to=["x", "{prot}"], verb="run"), ("{prot}", "{port}")
    ),
    Case("unknown key of launch", edited("launch", to={"worker": 1}), ("launch.worker", "workers")),
    Case(
        "unknown key of an override",
        edited("models", "m", "engine", to={"max_inflight": 2}),
        ("models.m.engine.max_inflight", "max_in_flight"),
    ),
    Case("negative limit", edited("tasks", 0, "limit", to=-3), ("limit", "-3")),
    Case("limit is no number", edited("tasks", 0, "limit", to="some"), ("limit", "some")),
    Case("shots are no number", edited("tasks", 0, "num_fewshot", to="few"), ("num_fewshot", "few")),
    Case("text for a number", edited("engine", "timeout_s", to="long"), ("engine.timeout_s", "long")),
    Case("no name", edited("name", to=""), ("name",)),
    # Models.
    Case("no such weights", model_change(path="/no/such/model"), ("/no/such/model",), real=True),
    Case("misspelt weights", model_change(path=lambda b: str(b.root / "modl")), ("modl", "model")),
    Case("no weights", model_change(path=lambda b: without(b, "bare", "*.safetensors")), ("bare", "weights")),
    Case("incomplete weights", model_change(path=torn_weights), ("torn", "incomplete", "model-2.safetensors")),
    Case("not a GGUF file", model_change(path=lambda b: b.file("m.gguf", b"GGML....")), ("m.gguf", "GGUF")),
    Case("cut GGUF file", model_change(path=lambda b: b.file("m.gguf", b"GGUF\3\0\0\0\1")), ("m.gguf",)),
    Case("no such embedded model", model_change(path="embedded:smolm2"), ("smolm2", "smollm2-135m")),
    Case("no tokenizer", model_change(tokenizer="./no-tokenizer"), ("no-tokenizer",)),
    Case("torn config.json", model_change(path=lambda b: torn_config(b)), ("config.json",)),
    Case(
        "no such step",
        edited("models", "m", to=lambda b: checkpoints(b, steps=[100, 300]), verb="plan"),
        ("300", "100, 200"),
    ),
    Case(
        "no such checkpoint",
        edited("models", "m", to=lambda b: checkpoints(b, pattern="chkpt_{step}"), verb="plan"),
        ("chkpt_{step}", "checkpoint_100"),
    ),
    Case("same model and label", duplicate_label, ("'one'", "main")),
    Case("no key", missing_key, ("NO_SUCH_KEY_VARIABLE", "export"), real=True),
    # Tasks.
    Case("no such task file", with_task(lambda b: str(b.root / "wrds.yaml")), ("wrds.yaml", "words.yaml"), real=True),
    Case("no such packaged task", with_task(lambda b: "demo:captials"), ("demo:captials", "demo:capitals"), real=True),
    Case("task twice", with_task(lambda b: {"native": ["demo:capitals", "demo:capitals"]}), ("demo:capitals", "twice")),
    Case("task file is a list", with_task(lambda b: b.file("odd.yaml", "- a\n")), ("odd.yaml", "mapping")),
    Case("task file is not YAML", with_task(lambda b: b.file("odd.yaml", "task: {")), ("odd.yaml", "not valid YAML")),
    Case("unknown key of a task file", with_task(lambda b: b.task(promt="x")), ("promt", "prompt")),
    Case("unknown metric", with_task(lambda b: b.task(metrics=["exact_mtch"])), ("exact_mtch", "exact_match")),
    Case("unknown output", with_task(lambda b: b.task(output="generat")), ("generat", "generate")),
    Case("metric of another output", with_task(lambda b: b.task(metrics=["accuracy"])), ("accuracy", "generate")),
    Case("no target", with_task(lambda b: b.task(target=None)), ("target",)),
    Case("no such field", with_task(lambda b: b.task(prompt="Say {{wrod}}:")), ("wrod", "word")),
    Case("half a template", with_task(lambda b: b.task(prompt="Say {{word:")), ("prompt",)),
    Case("bad pattern", with_task(lambda b: b.task(extract=[{"regex": "("}])), ("regular expression",)),
    Case("no data set", with_task(lambda b: b.task("lone", rows=None)), ("lone.jsonl",)),
    Case("empty data set", with_task(lambda b: b.task(rows="")), ("odd.jsonl", "empty")),
    Case("data set is not JSON", with_task(lambda b: b.task(rows='{"word": "a"}\n{"wor')), ("odd.jsonl", "line")),
    Case("rows are no objects", with_task(lambda b: b.task(rows="[1]\n")), ("odd.jsonl", "line 1")),
    Case("no gold", with_task(lambda b: b.task(rows='{"word": "a"}\n')), ("answer",)),
    Case("limit beyond", with_task(lambda b: {"native": [b.task()], "limit": "5:9"}), ("5:9", "none of 1")),
    Case("no such document", with_task(lambda b: {"native": [b.task()], "limit": [0, 7]}), ("7", "0 to 0")),
    Case("too many shots", with_task(lambda b: {"native": [b.task()], "num_fewshot": 5}), ("5",)),
    Case(
        "no interpreter",
        with_task(lambda b: {"lm_eval": ["sciq"], "python": "/no/bin/python"}),
        ("/no/bin/python", "interpreter"),
        real=True,
    ),
    Case(
        "interpreter without lm-eval",
        with_task(lambda b: {"lm_eval": ["sciq"], "python": sys.executable}),
        ("lm-eval", "install"),
        real=True,
    ),
    Case(
        "no such lm-eval task",
        with_task(lm_eval_task),
        ("sciqq", "sciq"),
        real=True,
        slow=True,
        skip="" if HARNESS else "PROCTOR_LM_EVAL_PYTHON is not set",
    ),
    # Servers.
    Case(
        "nobody listens",
        lambda b: with_endpoint(b, "http://127.0.0.1:9"),
        ("http://127.0.0.1:9",),
        code=1,
        real=True,
    ),
    Case(
        "another model is served",
        lambda b: with_endpoint(b, serving(b), served_model="llama"),
        ("'llama'", "'default'", "served_model"),
        code=1,
        real=True,
    ),
    Case("wrong key", wrong_key, ("401", "api_key_env"), code=1, real=True),
    Case("port taken", port_taken, ("port",), code=1, real=True),
    Case(
        "server dies while loading",
        with_server(server={"argv": ["/bin/sh", "-c", "echo loading shards; echo out of tea >&2; exit 3"]}),
        ("failed", "exit status 3", "out of tea", "log:"),
        code=1,
        real=True,
    ),
    Case("no such server", with_server(server={"argv": ["no-such-server"]}), ("no-such-server",), code=1, real=True),
    Case(
        "server never up",
        with_server("--slow-start-s", "60", server={"start_timeout_s": 1}),
        ("not up after 1 s", "start_timeout_s"),
        code=1,
        real=True,
    ),
    Case(
        "server dies at work",
        with_server("--die-after", "0"),
        ("died", "restarts"),
        code=1,
        real=True,
    ),
    Case(
        "echo ignored",
        with_server("--echo", "ignored", task="choices", loglikelihood="echo"),
        ("echo",),
        code=1,
        real=True,
    ),
    Case(
        "echo misaligned",
        with_server("--echo", "shifted", task="choices", loglikelihood="echo"),
        ("echo",),
        code=1,
        real=True,
    ),
    Case(
        "context too long",
        with_server(truncation="fail", max_length=10),
        ("2 requests failed for good", "proctor status"),
        code=3,
        real=True,
        begins="incomplete: ",
    ),
    Case(
        "longer than the server takes",
        with_server("--max-model-len", "10"),
        ("2 requests failed for good",),
        code=3,
        real=True,
        begins="incomplete: ",
    ),
    Case("GPUs that are not there", with_server(server={"gpus": 64}), ("64 GPUs",), code=1, real=True),
    Case("no such GPU", with_server(launch={"gpus": [77]}), ("77",), code=1, real=True),
    # The store and the run's directory.
    Case("not a store", edited("store", to=lambda b: str(b.root / "model"), verb="run"), ("not a store",), code=1),
    Case("store is a file", edited("store", to=lambda b: str(b.good), verb="run"), ("run.yaml",), code=1),
    Case("no store yet", edited("store", to=lambda b: str(b.root / "none"), verb="status"), ("no store",), code=1),
    Case("runs is a file", edited("runs", to=lambda b: str(b.good), verb="run"), ("run directory",), code=1),
    Case("nothing recorded", edited("name", to="new", verb="status"), ("'new'", "proctor prepare")),
    Case("tasks changed", tasks_changed, ("have changed", "proctor prepare")),
    Case("newer store", newer_store, ("format 99", "newer Proctor"), code=1, own=True),
    Case("damaged store.json", damaged_marker, ("store.json",), code=1, own=True),
    Case("damaged recording", damaged_recording, ("requests",), code=1, own=True),
    Case("damaged suite", damaged_suite, ("suites",), code=1, own=True),
    Case("torn suites.json", torn_suites, ("suites.json", "proctor prepare"), code=1, own=True),
    Case("torn job", worker_job, ("jobs/", "proctor run"), code=1, real=True, own=True),
    Case("torn assignment", worker_assignment, ("torn.json", "submitted it"), code=1, real=True, own=True),
    Case("torn plan", worker_plan, ("plan.bits", "proctor run"), code=1, real=True, own=True),
    Case("read-only store", read_only, ("read-only",), code=1, real=True),
]


def torn_config(bench: Bench) -> str:
    place = without(bench, "odd-model", "config.json")
    Path(place, "config.json").write_text('{"model_type": ')
    return place


def prepared(root: Path) -> Lab:
    """A laboratory in which one good run is done."""
    lab = Lab(root=root, latency_s=0.0)
    config = lab.write_run(tasks=[lab.write_task("words", WORDS)])
    lab.run("run", str(config), "--quiet")
    assert lab.answered_words(WORDS) == set(WORDS)
    return lab


def copied(lab: Lab, place: Path) -> Lab:
    """The same laboratory elsewhere, to be broken."""
    root = place / "lab"
    shutil.copytree(lab.root, root)
    for path in (root / "run.yaml", *(root / "runs" / "run" / "jobs").glob("*.json")):
        path.write_text(path.read_text().replace(str(lab.root), str(root)))
    assert command_line(["run", str(root / "run.yaml"), "--quiet"]) == 0
    return replace(lab, root=root, environment={})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """For the cases that change nothing that exists."""
    return prepared(tmp_path_factory.mktemp("good"))


@pytest.fixture
def cleanup() -> Iterator[contextlib.ExitStack]:
    """Ends servers, ports and mounts."""
    with contextlib.ExitStack() as stack:
        yield stack


def _parameters() -> list[Any]:
    return [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.slow else []) for c in CASES]


@pytest.mark.parametrize("case", _parameters())
def test_bad_input(
    case: Case,
    shared: Lab,
    cleanup: contextlib.ExitStack,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if case.skip:
        pytest.skip(case.skip)
    lab = copied(shared, tmp_path) if case.own else replace(shared, environment={})
    before = lab.asked()
    bench = Bench(lab=lab, good=lab.root / "run.yaml", cleanup=cleanup)
    arguments = case.change(bench) or []
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()

    if case.real:
        argv = [sys.executable, *arguments] if arguments[0] == "-m" else lab.command(*arguments)
        environment = os.environ | lab.environment
        done = subprocess.run(argv, capture_output=True, text=True, timeout=600, env=environment, check=False)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code = command_line(arguments)
        out, err = capfd.readouterr()
    assert code == case.code, out + err
    assert "Traceback" not in out + err, out + err
    messages = [line for line in err.splitlines() if line.startswith(("error: ", "incomplete: "))]
    assert [m.startswith(case.begins) for m in messages] == [True], err
    for words in case.says:
        assert words in err, err
    assert len(err.encode()) < LONGEST_MESSAGE, err
    if not case.own:
        cleanup.close()
        assert lab.answered_words(WORDS) == set(WORDS)
        assert command_line(["run", str(bench.good), "--quiet"]) == 0
        assert all(lab.asked()[lab.digest(w)] == before[lab.digest(w)] for w in WORDS)
        shutil.rmtree(bench.root / "runs" / "bad", ignore_errors=True)


def test_full_disk(shared: Lab, tmp_path: Path, cleanup: contextlib.ExitStack) -> None:
    """The run ends with one message; once there is space the same command finishes, and asks nothing again."""
    bench = Bench(lab=replace(shared, root=tmp_path), good=shared.root / "run.yaml", cleanup=cleanup)
    place = tmp_path / "small"
    place.mkdir()
    mounted(bench, place, "-t", "tmpfs", "-o", "size=1m", "tmpfs")
    words = [f"word{i:04d} " + "long " * 40 for i in range(400)]
    lab = bench.lab
    config = lab.write_run(tasks=[lab.write_task("many", words)], store=str(place / "store"))
    lab.run("prepare", str(config))
    filler = place / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(place).free - 60_000))

    failed = lab.run("run", str(config), "--quiet", expect=1)
    assert failed.stderr.count("error: ") == 1 and "Traceback" not in failed.stderr, failed.stderr
    assert "no space left" in failed.stderr and "nothing is lost" in failed.stderr
    asked, kept = lab.asked(), set(kept_words(lab, place / "store", words))
    assert 0 < len(kept) < len(words)

    filler.unlink()
    lab.run("run", str(config), "--quiet")
    assert set(kept_words(lab, place / "store", words)) == set(words)
    assert not [w for w in kept if lab.asked()[lab.digest(w)] != asked[lab.digest(w)]]


@pytest.mark.parametrize("compacted", [False, True], ids=["segment", "part"])
def test_tampered_row(tmp_path: Path, compacted: bool) -> None:
    """A flipped byte never changes an answer: it is reported, costs what it is in, and that is asked again."""
    lab = prepared(tmp_path)
    config = lab.root / "run.yaml"
    store = Store.open(lab.root / "store", create=False)
    (weights,) = store.weights()
    if compacted:
        store.compact(weights)
    place = lab.root / "store" / "weights" / weights
    (path,) = place.glob("part-*.parquet" if compacted else "*.jsonl")
    scores, before, whole = lab.scores(config), lab.asked(), path.read_bytes()
    costly: list[int] = []
    for at in range(0, len(whole), len(whole) // 40):
        path.write_bytes(flipped(whole, at))
        try:
            costly += [at] if lab.answered_words(WORDS) != set(WORDS) else []
        except StoreError as error:
            assert str(path) in error.message and error.hint
        for struck in place.glob("struck-*"):
            struck.unlink()
    assert costly
    path.write_bytes(flipped(whole, costly[len(costly) // 2]))

    done = lab.run("run", str(config), expect=None)
    if done.returncode:
        done = lab.run("run", str(config))

    assert "damaged rows in the store" in done.stderr, done.stderr
    again = {w for w in WORDS if lab.asked()[lab.digest(w)] > before[lab.digest(w)]}
    assert again and (compacted or len(again) == 1)
    assert lab.scores(config) == scores
    assert lab.answered_words(WORDS) == set(WORDS)


def flipped(data: bytes, at: int) -> bytes:
    """`data` with one bit of one byte changed."""
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def kept_words(lab: Lab, store: Path, words: list[str]) -> list[str]:
    """The words whose answer lies readable in a store."""
    lab = replace(lab, root=lab.root)
    place = lab.root / "store"
    if not place.exists():
        place.symlink_to(store)
    return sorted(lab.answered_words(words))
