"""Bad task files: one clear message each, with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from proctor.config.native_task import load_task_file
from proctor.errors import TaskError

HEAD = "task: t\ndataset: {path: d.jsonl}\n"
GENERATE = HEAD + "output: generate\nprompt: '{{q}}'\ntarget: '{{a}}'\n"
CHOICE = HEAD + "output: multiple_choice\nprompt: '{{q}}'\ntarget: '{{a}}'\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (GENERATE + "promt: x\n", ["t.yaml:6", "unknown key 'promt'", "'prompt'"]),
        (GENERATE + "generation: {max_gen_tok: 3}\n", ["t.yaml:6", "generation.max_gen_tok", "'max_gen_toks'"]),
        (GENERATE + "fewshot: {nun: 3}\n", ["fewshot.nun", "'num'"]),
        ("task: t\ndataset: {file: d}\noutput: generate\n", ["dataset.file", "unknown key 'file'"]),
        (GENERATE + "metrics: [exact_mach]\n", ["t.yaml:6", "'exact_mach'", "did you mean 'exact_match'?"]),
        (GENERATE + "metrics: [{metric: f1, ignore_cas: true}]\n", ["metrics.0.ignore_cas", "'ignore_case'"]),
        (GENERATE + "metrics: [{metric: f1, ignore_case: true}]\n", ["f1 has no ignore_ options"]),
        (GENERATE + "metrics: [{metric: f1, pattern: x}]\n", ["belongs to the metric regex"]),
        (GENERATE + "metrics: [{metric: regex, pattern: '('}]\n", ["'(' is not a regular expression"]),
        (GENERATE + "metrics: [accuracy]\n", ["accuracy does not go with output: generate", "contains"]),
        (GENERATE + "metrics: [f1, f1]\n", ["two metrics are called 'f1'", "`name`"]),
        (GENERATE + "extract: [trim]\n", ["extract.0.do", "'trim'", "valid: strip"]),
        (GENERATE + "extract: [{regex: '(', group: 1}]\n", ["not a regular expression"]),
        (GENERATE + "extract: [{regex: 'a', group: 1}]\n", ["0 group(s)"]),
        (GENERATE + "extract: [{regex: 'a', remove: 'b'}]\n", ["a step is one of"]),
        (GENERATE + "extract: [{remove: 'a', group: 0}]\n", ["`group` belongs to `regex`"]),
        (GENERATE + "choices: [a, b]\n", ["output: generate does not use `choices`"]),
        (GENERATE + "repeats: 0\n", ["repeats", "≥ 1"]),
        (GENERATE + "generation: {temperature: -1}\n", ["generation.temperature", "≥ 0"]),
        (HEAD + "output: generate\nprompt: x\n", ["needs the key `target`"]),
        (HEAD + "output: generate\ntarget: x\n", ["needs the key `prompt`"]),
        (CHOICE, ["output: multiple_choice needs the key `choices`"]),
        (HEAD + "output: perplexity\n", ["needs the key `text`"]),
        (HEAD + "output: perplexity\ntext: x\nrepeats: 2\n", ["does not use `repeats`"]),
        (HEAD + "output: choice\n", ["t.yaml:3", "'choice'", "multiple_choice, generate, perplexity"]),
        ("output: perplexity\ntext: x\n", ["task: this key is required", "dataset: this key is required"]),
        ("task: ''\ndataset: {path: d}\noutput: perplexity\ntext: x\n", ["task", "must not be empty"]),
        ("task: t\ndataset: {}\noutput: perplexity\ntext: x\n", ["either `path`", "or `hub`"]),
        ("task: t\ndataset: {path: a, hub: b}\noutput: perplexity\ntext: x\n", ["either `path`"]),
        ("task: t\ndataset: {path: a, split: b}\noutput: perplexity\ntext: x\n", ["belong to `hub`"]),
        (GENERATE + "fewshot: {path: a, split: b}\n", ["`path` or `split`, not both"]),
        (GENERATE + "task: again\n", ["t.yaml:6", "'task' appears twice"]),
        (GENERATE + "version: [1]\n", ["t.yaml:6", "version", "expected text"]),
        ("", ["this one is empty"]),
        ("- a\n", ["this one is a list"]),
        ("just words\n", ["this one is 'just words'"]),
        ("a: [\n", ["not valid YAML"]),
    ],
)
def test_bad_files(text: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TaskError) as caught:
        load_task_file(path)
    message = str(caught.value)
    assert [p for p in ["t.yaml", *parts] if p not in message] == [], message


def test_no_file_says_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "colours.yaml").write_text("x: 1")
    with pytest.raises(TaskError, match=r"next to it: 'colours\.yaml'") as caught:
        load_task_file(tmp_path / "colors.yaml")
    assert "proctor tasks" in str(caught.value)


def test_what_yaml_takes_for_something_else_is_text(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(
        "task: 12\nversion: 1.10\ndataset: {path: d.jsonl}\noutput: multiple_choice\nprompt: x\ntarget: 0\n"
        "choices: [yes, No, true, 3]\nmetrics: [accuracy]\n",
        encoding="utf-8",
    )
    task = load_task_file(path)
    assert (task.task, task.version, task.target, task.choices) == ("12", "1.10", "0", ("yes", "No", "true", "3"))


def test_usual_metrics(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(GENERATE, encoding="utf-8")
    assert [m.metric for m in load_task_file(path).marking] == ["exact_match"]
    path.write_text(CHOICE + "choices: '{{c}}'\n", encoding="utf-8")
    assert [m.metric for m in load_task_file(path).marking] == ["accuracy", "normalised_accuracy"]
