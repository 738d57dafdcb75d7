"""What `proctor init` writes is valid as it stands, whatever was answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proctor.config.load import load_run
from proctor.config.native_task import load_task_file
from proctor.config.schema import json_schema
from proctor.config.spec import LmEvalTask, NativeTaskRef, RunSpec
from proctor.config.starter import DATA_FILE, QUESTIONS, TASK_FILE, default_answers, starter_files, template


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return directory / "run.yaml"


def test_the_defaults_are_a_run_of_an_embedded_model_on_a_task_of_its_own(tmp_path: Path) -> None:
    spec = load_run(write(tmp_path, starter_files()))
    assert [m.path for m in spec.models.values()] == ["embedded:smollm2-135m"]
    assert spec.tasks == (NativeTaskRef(native=(str(tmp_path / TASK_FILE),)),)
    task = load_task_file(tmp_path / TASK_FILE)
    assert task.output == "multiple_choice" and task.dataset.path == "colours.jsonl"
    rows = [json.loads(line) for line in (tmp_path / DATA_FILE).read_text().splitlines()]
    assert len(rows) >= 12 and all(row["answer"] in row["colours"] for row in rows)


def test_the_commented_examples_are_valid_too(tmp_path: Path) -> None:
    examples = ("#   ", "# engine", "# launch", "# profile")
    lines = [line[2:] if line.startswith(examples) else line for line in template().splitlines()]
    spec = load_run(write(tmp_path, {"run.yaml": "\n".join(lines)}), ["profile=default"])
    assert set(spec.models) == {"smollm2", "mine"} and len(spec.tasks) == 2
    assert spec.tasks[1].num_fewshot == (0, 5)


@pytest.mark.parametrize("model", ["/models/a b", "org/name", "./x.gguf", "http://localhost:8000/v1", "../'q\"$(x)"])
def test_answers_become_values(model: str, tmp_path: Path, hostile_name: str) -> None:
    answers = {
        "name": hostile_name,
        "model": model,
        "served_model": hostile_name,
        "revision": "2024-01-01",
        "tasks": "hellaswag, arc_easy , mine/t.yaml",
        "limit": "1_000",
        "store": "./my store",
    }
    for question in QUESTIONS:
        assert question.check(answers[question.key]) is None
    spec = load_run(write(tmp_path, starter_files(answers)))
    assert spec.name == hostile_name and spec.store == str(tmp_path / "my store")
    (entry,) = spec.models.values()
    if model.startswith("http"):
        assert (entry.served_model, entry.revision) == (hostile_name, "2024-01-01")
    native, harness = spec.tasks
    assert isinstance(native, NativeTaskRef) and native.native == (str(tmp_path / "mine" / "t.yaml"),)
    assert isinstance(harness, LmEvalTask) and harness.lm_eval == ("hellaswag", "arc_easy")
    assert native.limit == harness.limit == 1000
    assert set(starter_files(answers)) == {"run.yaml"}


@pytest.mark.parametrize(
    ("key", "answer"), [("name", " "), ("limit", "0"), ("limit", "some"), ("tasks", " , "), ("model", "")]
)
def test_bad_answers_are_told(key: str, answer: str) -> None:
    (question,) = (q for q in QUESTIONS if q.key == key)
    assert question.check(answer)


def test_the_endpoint_questions_are_asked_of_endpoints_only() -> None:
    asked = [q.key for q in QUESTIONS if q.asked({"model": "http://h"})]
    assert set(asked) - set(default_answers()) == {"served_model", "revision"}


def test_json_schema_knows_every_key_and_documents_it() -> None:
    schema = json_schema()
    assert schema["$schema"].endswith("2020-12/schema") and schema["title"] == "Proctor run"
    assert set(schema["properties"]) == {*RunSpec.model_fields, "extends"}
    definitions: dict[str, Any] = schema["$defs"]
    assert definitions["ModelSpec"]["properties"]["revision"]["description"].startswith("Hub revision")
    assert definitions["VllmServer"]["properties"]["args"]["description"].startswith("The server's own options")
    assert all(d["additionalProperties"] is False for d in definitions.values())
    assert definitions["VllmServer"]["required"] == ["type"]
    assert {"type": "string"} in definitions["LmEvalTask"]["properties"]["lm_eval"]["anyOf"]
    json.dumps(schema, allow_nan=False)
