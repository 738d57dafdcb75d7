"""What goes to lm-eval and what is made of its results, with a stand-in for the child."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from proctor.errors import HarnessError
from proctor.records import (
    Answer,
    Boundary,
    Failure,
    Instance,
    Kind,
    Recording,
    Request,
    Response,
    Suite,
    canonical_json,
)
from proctor.score.lm_eval import LmEvalReplay

RAW = {
    "results": {"t": {"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "t"}, "g": {"acc,none": 0.5}},
    "higher_is_better": {"t": {"acc": True}},
    "n-shot": {"t": 2},
    "versions": {"g": 1},
}
SAMPLE = {
    "task": "t",
    "doc_id": 0,
    "filter": "none",
    "target": 1,
    "filtered_resps": ["[invalid]"],
    "metrics": {"acc": 0},
}


@pytest.fixture
def child(tmp_path: Path) -> Path:
    """An interpreter that answers as our replay module would, and keeps what it was given beside itself."""
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport json, pathlib, shutil, sys\nd = pathlib.Path(sys.argv[-1])\n"
        f"shutil.copytree(d, {str(tmp_path / 'given')!r})\n"
        f"(d / '0.raw.json').write_text({json.dumps(RAW)!r})\n"
        f"(d / '0.samples.jsonl').write_text({json.dumps(SAMPLE) + chr(10)!r})\n"
        "result = {'version': '0.4.13', 'suites': [{'empty': {}}]}\n"
        "(d / 'result.json').write_text(json.dumps(result))\n"
    )
    program.chmod(0o755)
    return program


def recorded(version: str = "0.4.13") -> tuple[Suite, Recording]:
    """Three documents; each asks for two samples of one text."""
    instances: list[Instance] = []
    for doc in range(3):
        for repeat in range(2):
            request = Request(kind=Kind.GENERATE, text=f"Q{doc}", sample_index=repeat)
            instances.append(Instance(request=request, key=request.key, doc_id=doc, index=0, repeat=repeat))
    recording = Recording(
        fingerprint="f",
        source="lm_eval",
        source_version=version,
        task="t",
        task_version="1",
        num_fewshot=2,
        settings=canonical_json({"config": "c"}),
        instances=tuple(instances),
        documents="{}",
    )
    settings = canonical_json({"groups": {"g": ["t"]}, "python": None})
    suite = Suite(id="s", source="lm_eval", names=("g",), num_fewshot=None, recordings=("f",), settings=settings)
    return suite, recording


def answered(recording: Recording) -> dict[str, Answer]:
    return {
        i.key: Response(
            key=i.key, physical_key="", text=f"<think>no</think> a{i.doc_id}{i.repeat}", finish_reason="stop"
        )
        for i in recording.instances
    }


def rows(child: Path) -> list[Any]:
    (file,) = (child.parent / "given").glob("instances-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_answers_are_bound_by_key_and_repeats_stay_together(child: Path) -> None:
    suite, recording = recorded()
    given = answered(recording)
    LmEvalReplay(str(child)).mark(suite, [recording], dict(reversed(given.items())))
    assert rows(child) == [
        ["generate_until", doc, 0, [f"<think>no</think> a{doc}0", f"<think>no</think> a{doc}1"]] for doc in range(3)
    ]


def test_thinking_is_cut_off_where_asked(child: Path) -> None:
    suite, recording = recorded()
    marks = LmEvalReplay(str(child), think_end_token="</think>").mark(suite, [recording], answered(recording))
    assert rows(child)[1][3] == ["a10", "a11"]
    assert marks.samples[0].responses[0] == "<think>no</think> a00"


def test_a_document_without_all_its_answers_is_left_out_and_counted(child: Path) -> None:
    suite, recording = recorded()
    given = answered(recording)
    lost, failed = recording.instances[2].key, recording.instances[5].key
    del given[lost]
    given[failed] = Failure(key=failed, boundary=Boundary.SERVER, message="500", retryable=True)
    marks = LmEvalReplay(str(child)).mark(suite, [recording], given)
    assert [row[1] for row in rows(child)] == [0]
    leaf, group = marks.values
    assert (leaf.value, leaf.stderr, leaf.n, leaf.n_expected, leaf.higher_is_better) == (0.5, None, 1, 3, True)
    assert (leaf.coverage.requested, leaf.coverage.answered, leaf.coverage.failures) == (6, 4, (("server", 1),))
    assert leaf.coverage.unparsable == 1
    assert (group.is_group, group.fingerprint, group.n_expected, group.missing_members) == (True, "s", 3, ())
    assert marks.samples[0].keys == tuple(i.key for i in recording.instances[:2])


def test_an_answer_of_the_wrong_kind_is_no_answer(child: Path) -> None:
    suite, recording = recorded()
    given = answered(recording)
    key = recording.instances[0].key
    given[key] = Response(key=key, physical_key="", logprob=-1.0, is_greedy=True)
    LmEvalReplay(str(child)).mark(suite, [recording], given)
    assert [row[1] for row in rows(child)] == [1, 2]


def test_another_version_does_not_mark(child: Path) -> None:
    suite, recording = recorded("0.4.12")
    with pytest.raises(HarnessError, match=r"0\.4\.12.*0\.4\.13"):
        LmEvalReplay(str(child)).mark(suite, [recording], answered(recording))


def test_a_recording_that_is_not_there_is_named(child: Path) -> None:
    suite, _ = recorded()
    with pytest.raises(HarnessError, match="suite g lacks recordings f"):
        LmEvalReplay(str(child)).mark(suite, [], {})
