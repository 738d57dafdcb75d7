"""Names that break what is put together by hand: whole runs with right scores, and nothing in a name is executed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from proctor.cli import run as command_line
from proctor.testing import write_byte_tokenizer

from .conftest import Lab, write_model

NAMES = [
    "two words",
    "quote'and\"double",
    "$(touch pwned)",
    "`touch pwned`; touch pwned &&|",
    "new\nline",
    "ünïcødé-模型-🦊",
    "-leading-dash",
    "per%cent #hash",
    "%s {port} {{word}} \\n [red]",
    "\x1b[31mred\u202etxet",
]
WORDS = ["one", "two", "three"]
HARNESS = os.environ.get("PROCTOR_LM_EVAL_PYTHON")


def task_file(directory: Path, name: str, *, file: str | None = None) -> Path:
    """A native task of that name in a file and over data of that name."""
    stem = file or name
    data = directory / f"{stem}.jsonl"
    data.write_text("".join(json.dumps({"word": w, "answer": "a", name: name}) + "\n" for w in WORDS))
    task = {
        "task": name,
        "version": 1,
        "dataset": {"path": data.name},
        "output": "generate",
        "prompt": "Say {{word}}:",
        "target": "{{answer}}",
        "metrics": ["contains"],
        "generation": {"until": ["\n"], "max_gen_toks": 8},
    }
    path = directory / f"{stem}.yaml"
    path.write_text(yaml.safe_dump(task, allow_unicode=True))
    return path


def model(directory: Path, number: int) -> dict[str, Any]:
    """A model of its own, by other weights."""
    directory.mkdir(parents=True)
    write_model(directory, weights=bytes([number]) * 16)
    return {"path": str(directory)}


def server(lab: Lab) -> dict[str, Any]:
    """The fake server, told the model's name and path."""
    found = lab.server()
    return found | {"argv": [*found["argv"], "--served-model", "{name}"], "env": {"MODEL_PATH": "x"}}


def run_here(lab: Lab, place: Path, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """A verb with `place` as working directory, which is where `touch pwned` would leave its mark."""
    done = subprocess.run(
        lab.command(*arguments),
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | lab.environment,
        cwd=place,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def nothing_executed(place: Path) -> None:
    """No name was taken for a command, and no process for one."""
    assert not list(place.rglob("pwned"))


def printable(text: str) -> bool:
    """Nothing in a line moves the cursor, hides or reorders."""
    return all(line.isprintable() for line in text.splitlines())


def test_many_models_of_one_run(lab: Lab, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Every hostile name as model, display name and directory, in one run with a hostile name and store."""
    work = lab.root / "work dir $(touch pwned)"
    work.mkdir()
    models = {n: model(work / f"m{i} {n}", i) | {"display_name": f"shown {n}"} for i, n in enumerate(NAMES)}
    served = [NAMES[1], NAMES[2], NAMES[4]]
    for name in set(NAMES) - set(served):
        models[name]["engine"] = {"type": "fake"}  # a server for each would take a minute
    run: dict[str, Any] = {
        "name": NAMES[2],
        "store": "store 'of' $(touch pwned)\nline",
        "runs": '-runs "%s"',
        "models": models,
        "tasks": [{"native": [task_file(work, NAMES[1]).name]}],
        "engine": {"type": "openai", "server": server(lab), "max_in_flight": 4},
        "launch": {"workers": 1, "max_workers": 3},
    }
    config = work / "run 'it' $(touch pwned).yaml"
    config.write_text(yaml.safe_dump(run, allow_unicode=True, sort_keys=False))

    monkeypatch.chdir(work)

    def said(*arguments: str) -> str:
        assert command_line(list(arguments)) == 0
        return capfd.readouterr().out

    planned = json.loads(said("plan", config.name, "--json"))
    assert [m["model"] for m in planned["models"]] == NAMES
    done = run_here(lab, work, "run", config.name)
    assert printable(done.stdout) and printable(done.stderr)
    # A table has one line for each row whatever the names hold; the weights do not matter to the fake server.
    rows = json.loads(said("score", config.name, "--json"))["rows"]
    assert [(r["model"], r["task"], r["metric"], r["n"]) for r in rows] == [
        (f"shown {n}", NAMES[1], "contains", len(WORDS)) for n in NAMES
    ]
    for group in (served, [n for n in NAMES if n not in served]):
        assert len({r["value"] for r in rows if r["model"].removeprefix("shown ") in group}) == 1
    assert sum(lab.asked().values()) == len(served) * len(WORDS)
    status = json.loads(said("status", config.name, "--json"))
    assert [(t["model"], t["answered"]) for t in status["tasks"]] == [(f"shown {n}", len(WORDS)) for n in NAMES]
    for verb in ("status", "plan", "score", "validate"):
        shown = said(verb, config.name)
        assert printable(shown), shown
    listed = said("models", config.name)
    assert printable(listed) and len(listed.splitlines()) == len(NAMES) + 3
    again = run_here(lab, work, "run", config.name)
    assert "0 requests to ask" in again.stderr
    nothing_executed(lab.root)


def test_tasks_of_those_names(lab: Lab) -> None:
    """As task, task file, data file, field and directory, beside one plain task: all are marked alike."""
    work = lab.root / NAMES[4]
    names = [*NAMES, "plain"]
    files: list[str] = []
    for name in names:
        (work / name).mkdir(parents=True)
        task_file(work / name, name)
        files.append(f"./{name}/{name}.yaml")
    run = {
        "name": NAMES[6],
        "store": f"store {NAMES[0]}",
        "models": {"m": model(work / "model", 1)},
        "tasks": [{"native": files}],
        "engine": {"type": "fake"},
    }
    (work / "run.yaml").write_text(yaml.safe_dump(run))
    outcome = json.loads(run_here(lab, work, "run", "--json").stdout)
    assert outcome["run"] == NAMES[6] and outcome["complete"] and not outcome["errors"]
    assert [r["task"] for r in outcome["rows"]] == names
    assert len({(r["metric"], r["value"], r["n"]) for r in outcome["rows"]}) == 1, "a name changes no score"
    status = run_here(lab, work, "status").stdout
    assert printable(status) and len(status.splitlines()) >= len(names)
    nothing_executed(lab.root)


def test_shell_line_gets_names_as_data(lab: Lab) -> None:
    """`shell:` finds model and name in its environment; they are never part of the line."""
    work = lab.root / "a $(touch pwned) 'place'"
    work.mkdir()
    line = (
        f'exec "{sys.executable}" -m proctor.testing.server --port "$PROCTOR_PORT" --journal "{lab.journal}" '
        '--served-model "$PROCTOR_NAME"'
    )
    run: dict[str, Any] = {
        "name": "r",
        "store": "s",
        "models": {NAMES[3]: model(work / "model `touch pwned`", 1)},
        "tasks": [{"native": [task_file(work, "t").name]}],
        "engine": {"type": "openai", "server": {"type": "command", "shell": line}},
    }
    (work / "run.yaml").write_text(yaml.safe_dump(run))
    run_here(lab, work, "run")
    assert sum(lab.asked().values()) == len(WORDS)
    nothing_executed(lab.root)


def test_endpoint_and_tokenizer(lab: Lab) -> None:
    """A served model and a tokenizer directory of hostile names; the endpoint is asked by that very name."""
    name = NAMES[1] + NAMES[2]
    work = lab.root / "work"
    (work / name).mkdir(parents=True)
    write_byte_tokenizer(work / name)
    ready = lab.root / "port"
    argv = [sys.executable, "-m", "proctor.testing.server", "--port-file", str(ready), "--served-model", name]
    process = subprocess.Popen([*argv, "--journal", str(lab.journal)], stdout=subprocess.DEVNULL, cwd=work)
    try:
        while not ready.exists():
            assert process.poll() is None
        url = f"http://127.0.0.1:{ready.read_text()}"
        run: dict[str, Any] = {
            "name": "r",
            "store": "s",
            "models": {"remote": {"path": url, "served_model": name, "revision": NAMES[4], "tokenizer": f"./{name}"}},
            "tasks": [{"native": [task_file(work, "t").name]}],
        }
        (work / "run.yaml").write_text(yaml.safe_dump(run))
        run_here(lab, work, "run")
        run_here(lab, work, "run")
    finally:
        process.terminate()
        process.wait()
    assert sum(lab.asked().values()) == len(WORDS)
    nothing_executed(lab.root)


@pytest.mark.slow
@pytest.mark.skipif(HARNESS is None, reason="PROCTOR_LM_EVAL_PYTHON is not set")
def test_lm_eval_tasks_in_a_hostile_directory(lab: Lab) -> None:
    """include_path with every character that a shell, a URL or a format string would take amiss."""
    work = lab.root / "in 'quotes' $(touch pwned) ünï %s"
    tasks = work / "my tasks\nhere"
    tasks.mkdir(parents=True)
    rows = [{"q": f"Is {w} right?", "a": 0} for w in WORDS]
    (tasks / "rows 'x'.json").write_text("".join(json.dumps(r) + "\n" for r in rows))
    name = "it's $(touch pwned)"
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "rows 'x'.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc"}],
    }
    (tasks / "task.yaml").write_text(yaml.safe_dump(task))
    run: dict[str, Any] = {
        "name": "r",
        "store": "s s",
        "models": {NAMES[3]: model(work / "model", 1)},
        "tasks": [{"lm_eval": [name], "include_path": ["./my tasks\nhere"], "python": HARNESS}],
        "engine": {"type": "fake"},
    }
    (work / "run.yaml").write_text(yaml.safe_dump(run))
    shutil.rmtree(work / "s s", ignore_errors=True)
    outcome = json.loads(run_here(lab, work, "run", "--json").stdout)
    assert [(r["task"], r["metric"], r["n"]) for r in outcome["rows"]] == [(name, "acc", len(WORDS))]
    nothing_executed(lab.root)
