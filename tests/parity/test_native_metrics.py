"""A native task and the same task in lm-eval's format: the same requests, and the same figures to the last bit.

Both sides are marked from answers that are a hash of the question, by their own code.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from proctor.catalog.lm_eval.source import LmEvalSource
from proctor.catalog.native import NativeSource
from proctor.config.spec import LmEvalTask, NativeTaskRef
from proctor.records import Answer, Kind, Recording, Response
from proctor.score.lm_eval import LmEvalReplay
from proctor.score.native import NativeReplay
from proctor.score.replay import Marks

PYTHON = os.environ.get("PROCTOR_LM_EVAL_PYTHON", sys.executable)
WORDS = ["blue", "Green!", "the blue", "red.", "", "Größe", " blue "]

pytestmark = [pytest.mark.parity, pytest.mark.timeout(300)]

ROWS = [
    {"q": f"colour {i} is", "options": ["blue", "green", "dark  red", "Größe"], "gold": i % 4, "ref": WORDS[i % 3]}
    for i in range(25)
]
NATIVE: dict[str, dict[str, Any]] = {
    "n_choice": {
        "output": "multiple_choice",
        "prompt": "{{q}}",
        "choices": "{{options}}",
        "target": "{{gold}}",
    },
    "n_write": {
        "output": "generate",
        "prompt": "{{q}}",
        "target": "{{ref}}",
        "generation": {"until": ["\n"], "max_gen_toks": 9},
        "metrics": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}],
    },
    "n_read": {"output": "perplexity", "text": " {{q}}  {{ref}}\n{{options[3]}} "},
}
THEIRS: dict[str, dict[str, Any]] = {
    "n_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "n_write": {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{ref}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 9, "temperature": 0.0, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}],
    },
    "n_read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": NATIVE["n_read"]["text"],
        "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
}
NAMES = {"accuracy": "acc", "normalised_accuracy": "acc_norm"}


def write(directory: Path) -> None:
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    for name, body in NATIVE.items():
        task = {"task": name, "dataset": {"path": "data.jsonl"}, **body}
        (directory / f"{name}.native.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    for name, body in THEIRS.items():
        where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        task = {"task": name, **where, **body}
        (directory / "lm_eval" / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def answer(key: str, kind: Kind) -> Response:
    number = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)
    if kind is Kind.GENERATE:
        return Response(key=key, physical_key=key, text=WORDS[number % len(WORDS)], finish_reason="stop")
    return Response(key=key, physical_key=key, logprob=-(number % 9973) / 97, is_greedy=False)


def answers(recordings: list[Recording]) -> dict[str, Answer]:
    return {i.key: answer(i.key, i.request.kind) for r in recordings for i in r.instances}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Recording, Marks, Recording, Marks]]:
    found = subprocess.run([PYTHON, "-c", "import lm_eval"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip("no lm-eval: set PROCTOR_LM_EVAL_PYTHON to a Python that has lm-eval 0.4.13")
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "lm_eval").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROCTOR_CACHE", str(directory / "cache"))
        write(directory)
        out: dict[str, tuple[Recording, Marks, Recording, Marks]] = {}
        entry = LmEvalTask(lm_eval=tuple(THEIRS), include_path=(str(directory / "lm_eval"),), python=PYTHON)
        suites, theirs = LmEvalSource().record(entry)
        marks = [LmEvalReplay().mark(suite, theirs, answers(theirs)) for suite in suites]
        for name in NATIVE:
            path = str(directory / f"{name}.native.yaml")
            (suite,), ours = NativeSource().record(NativeTaskRef(native=(path,)))
            (leaf,) = [r for r in theirs if r.task == name]
            found = next(m for m in marks if any(v.task == name for v in m.values))
            out[name] = (ours[0], NativeReplay().mark(suite, ours, answers(ours)), leaf, found)
        return out


@pytest.mark.parametrize("name", NATIVE)
def test_the_same_questions(name: str, both: dict[str, tuple[Recording, Marks, Recording, Marks]]) -> None:
    ours, _, theirs, _ = both[name]
    assert [i.request for i in ours.instances] == [i.request for i in theirs.instances]
    assert [i.key for i in ours.instances] == [i.key for i in theirs.instances], "so a run with both asks once"


@pytest.mark.parametrize("name", NATIVE)
def test_the_same_figures(name: str, both: dict[str, tuple[Recording, Marks, Recording, Marks]]) -> None:
    _, ours, _, theirs = both[name]
    printed = {v.metric: v for v in theirs.values if v.task == name}
    for value in ours.values:
        their = printed[NAMES.get(value.metric, value.metric)]
        assert value.value == pytest.approx(their.value, rel=1e-14), value.metric
        assert value.higher_is_better == their.higher_is_better
        assert (value.n, value.n_expected) == (their.n, their.n_expected) == (25, 25)
        if "perplexity" in value.metric or value.metric == "bits_per_byte":
            assert their.stderr is None and value.stderr is not None, (
                "lm-eval prints none here; ours is the delta method's"
            )
        else:
            assert value.stderr == pytest.approx(their.stderr, rel=1e-12)


def test_the_same_questions_in_a_chat(
    both: dict[str, tuple[Recording, Marks, Recording, Marks]], tmp_path: Path
) -> None:
    (tmp_path / "lm_eval").mkdir()
    write(tmp_path)
    options: dict[str, Any] = {"apply_chat_template": True, "system_instruction": "Be brief.", "limit": 3}
    names = ("n_choice", "n_write")
    paths = tuple(str(tmp_path / f"{name}.native.yaml") for name in names)
    _, ours = NativeSource().record(NativeTaskRef(native=paths, **options))
    entry = LmEvalTask(lm_eval=names, include_path=(str(tmp_path / "lm_eval"),), python=PYTHON, **options)
    _, theirs = LmEvalSource().record(entry)
    by_task = {r.task: [i.request for i in r.instances] for r in theirs}
    assert {r.task: [i.request for i in r.instances] for r in ours} == by_task
