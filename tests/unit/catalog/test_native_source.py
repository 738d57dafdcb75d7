"""What a task file is turned into."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from proctor.catalog.native import NativeSource, select
from proctor.config.spec import LmEvalTask, NativeTaskRef
from proctor.errors import TaskError, UnknownName, UsageError
from proctor.records import Kind, Message, Recording, Request

ROWS = [
    {"q": "sky", "options": ["blue", "green"], "answer": "blue"},
    {"q": "grass", "options": ["red", "green"], "answer": "green"},
    {"q": "blood", "options": ["red", "white"], "answer": "red"},
    {"q": "snow", "options": ["white", "black"], "answer": "white"},
]

CHOOSE: dict[str, Any] = {
    "task": "colours",
    "dataset": {"path": "data.jsonl"},
    "output": "multiple_choice",
    "prompt": "{{q}} is",
    "choices": "{{options}}",
    "target": "{{answer}}",
}

WRITE: dict[str, Any] = {
    "task": "colours",
    "dataset": {"path": "data.jsonl"},
    "output": "generate",
    "prompt": "{{q}} is",
    "target": "{{answer}}",
}

TaskFile = Callable[..., str]


@pytest.fixture
def task_file(tmp_path: Path) -> TaskFile:
    """Write data.jsonl and a task file; return the file's path. A value of None takes a key away."""

    def write(
        base: dict[str, Any] = CHOOSE,
        *,
        rows: list[dict[str, Any]] | None = None,
        name: str = "task.yaml",
        **changes: Any,
    ) -> str:
        lines = ROWS if rows is None else rows
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
        task = {k: v for k, v in (base | changes).items() if v is not None}
        path = tmp_path / name
        path.write_text(yaml.safe_dump(task, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return str(path)

    return write


def record(path: str, **options: Any) -> Recording:
    _, recordings = NativeSource().record(NativeTaskRef(native=(path,), **options))
    assert len(recordings) == 1
    return recordings[0]


def requests(path: str, **options: Any) -> list[Request]:
    return [i.request for i in record(path, **options).instances]


def test_multiple_choice_asks_each_choice(task_file: TaskFile) -> None:
    recording = record(task_file())
    assert [(i.request.text, i.request.continuation, i.doc_id, i.index) for i in recording.instances[:3]] == [
        ("sky is", " blue", 0, 0),
        ("sky is", " green", 0, 1),
        ("grass is", " red", 1, 0),
    ]
    assert {i.request.kind for i in recording.instances} == {Kind.LOGLIKELIHOOD}
    assert all(i.key == i.request.key for i in recording.instances)
    assert (recording.source, recording.task, recording.num_fewshot) == ("native", "colours", 0)


def test_generation_carries_raw_arguments(task_file: TaskFile) -> None:
    path = task_file(WRITE, generation={"until": ["\n"], "max_gen_toks": 5})
    assert json.loads(requests(path)[0].arguments) == {
        "until": ["\n"],
        "max_gen_toks": 5,
        "temperature": 0.0,
        "do_sample": False,
    }
    over = requests(path, gen_kwargs={"until": "END", "temperature": 0.7, "top_p": 0.9})[0]
    assert json.loads(over.arguments) == {
        "until": ["END"],
        "max_gen_toks": 5,
        "temperature": 0.7,
        "do_sample": False,
        "top_p": 0.9,
    }


def test_generation_stops_at_the_separator_if_nothing_is_said(task_file: TaskFile) -> None:
    path = task_file(WRITE, fewshot={"separator": "\n###\n"})
    assert json.loads(requests(path)[0].arguments)["until"] == ["\n###\n"]


def test_perplexity_asks_the_passage(task_file: TaskFile) -> None:
    path = task_file(
        {**CHOOSE, "output": "perplexity", "text": "{{q}} {{answer}}"}, prompt=None, choices=None, target=None
    )
    assert requests(path)[0] == Request(kind=Kind.ROLLING, text="sky blue")
    with pytest.raises(TaskError, match="takes no few-shot"):
        record(path, num_fewshot=1)
    with pytest.raises(TaskError, match="only for output: generate"):
        record(path, repeats=2)


def test_fewshot_is_crossed_into_suites(task_file: TaskFile) -> None:
    path = task_file()
    suites, recordings = NativeSource().record(NativeTaskRef(native=(path,), num_fewshot=(0, 2)))
    assert [s.num_fewshot for s in suites] == [0, 2]
    assert [r.num_fewshot for r in recordings] == [0, 2]
    assert [s.recordings for s in suites] == [(r.fingerprint,) for r in recordings]
    assert len({s.id for s in suites}) == 2


def test_fewshot_examples_never_show_the_document(task_file: TaskFile) -> None:
    rows = [*ROWS, ROWS[0]]  # a duplicate of the first document would give its answer away as well
    for request in requests(task_file(rows=rows), num_fewshot=3):
        *examples, question = request.text.split("\n\n")
        assert len(examples) == 3 and len(set(examples)) >= 2
        assert not any(e.startswith(question) for e in examples)
        known = {f"{r['q']} is {r['answer']}" for r in ROWS}
        assert set(examples) <= known


def test_more_shots_extend_fewer_and_seeds_differ(task_file: TaskFile) -> None:
    rows = [{"q": f"n{i}", "options": ["a", "b"], "answer": "a"} for i in range(40)]
    path = task_file(rows=rows)
    two, four = (requests(path, num_fewshot=n, limit=1)[0].text.split("\n\n") for n in (2, 4))
    assert four[:2] == two[:2]
    other = requests(path, num_fewshot=4, limit=1, fewshot_seed=7)[0].text.split("\n\n")
    assert other[:4] != four[:4]
    shown = [tuple(r.text.split("\n\n")[:2]) for r in requests(path, num_fewshot=2)]
    assert len(set(shown)) > 10, "each document draws its own examples"


def test_a_limit_does_not_change_a_document(task_file: TaskFile) -> None:
    path = task_file()
    every = [i for i in record(path, num_fewshot=2).instances if i.doc_id == 2]
    one = record(path, num_fewshot=2, limit=(2,)).instances
    assert [i.key for i in one] == [i.key for i in every]


def test_fewshot_from_another_file(task_file: TaskFile, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("q,options,answer\nlime,x,green\n", encoding="utf-8")
    path = task_file(WRITE, fewshot={"path": "train.csv", "num": 1})
    assert requests(path)[0].text == "lime is green\n\nsky is"
    with pytest.raises(TaskError, match=r"2 few-shot examples were asked for; .* has 1"):
        record(path, num_fewshot=2)
    with pytest.raises(TaskError, match="a local file has no splits"):
        record(task_file(WRITE, fewshot={"split": "train", "num": 1}))


def test_plain_text_with_instructions(task_file: TaskFile) -> None:
    path = task_file(WRITE, instruction="Name the colour.", delimiter=": ", fewshot={"separator": "\n"})
    text = requests(path, num_fewshot=1, system_instruction="Be brief.", limit=1)[0].text.split("\n")
    assert text[:2] == ["Be brief.", "Name the colour."] and text[3] == "sky is"
    assert text[2] in {"grass is: green", "blood is: red", "snow is: white"}


def test_chat_as_turns_and_in_one_message(task_file: TaskFile) -> None:
    path = task_file(instruction="Name the colour.")
    options = {"apply_chat_template": True, "system_instruction": "Be brief.", "num_fewshot": 1, "limit": 1}
    turns = requests(path, **options)
    assert [m.role for m in turns[0].messages] == ["system", "user", "assistant", "user"]
    assert turns[0].messages[0].content == "Be brief.\n\nName the colour."
    assert turns[0].messages[-1] == Message(role="user", content="sky is")
    assert [r.continuation for r in turns] == ["blue", "green"], "the choice opens the assistant's turn"
    assert turns[0].text == "" and turns[0].add_generation_prompt
    one = requests(path, fewshot_as_multiturn=False, **options)[0]
    assert [m.role for m in one.messages] == ["system", "user"]
    assert one.messages[1].content == f"{turns[0].messages[1].content} {turns[0].messages[2].content}\n\nsky is"


def test_repeats_and_replicates_are_other_requests(task_file: TaskFile) -> None:
    path = task_file(WRITE, repeats=2)
    first = record(path)
    assert [(i.doc_id, i.repeat, i.request.sample_index) for i in first.instances[:3]] == [
        (0, 0, 0),
        (0, 1, 1),
        (1, 0, 0),
    ]
    assert len({i.key for i in first.instances}) == 8
    again = record(path, replicate=1)
    assert not {i.key for i in first.instances} & {i.key for i in again.instances}
    more = record(path, repeats=3)
    assert {i.key for i in first.instances} < {i.key for i in more.instances}, "a larger n extends a smaller one"
    choice = task_file()
    assert record(choice).instances == record(choice, replicate=1).instances, "log-likelihoods are not sampled"


def test_fingerprint_is_of_the_content(task_file: TaskFile, tmp_path: Path) -> None:
    path = task_file()
    first = record(path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("task.yaml", "data.jsonl"):
        shutil.copy(tmp_path / name, elsewhere / name)
    assert record(str(elsewhere / "task.yaml")) == first == record(path)
    changed = {
        "data": task_file(rows=[*ROWS, {"q": "x", "options": ["a", "b"], "answer": "a"}], name="a.yaml"),
    }
    assert record(changed["data"]).fingerprint != first.fingerprint
    assert record(task_file(name="b.yaml", metrics=["accuracy"])).fingerprint != first.fingerprint
    assert record(task_file(name="c.yaml", description="other words")).fingerprint == first.fingerprint
    assert record(task_file(name="d.yaml", version="2")).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("limit", "chosen"),
    [
        (None, [0, 1, 2, 3, 4]),
        (2, [0, 1]),
        (9, [0, 1, 2, 3, 4]),
        (0.5, [0, 1, 2]),
        (0.01, [0]),
        ("1:3", [1, 2]),
        ("::2", [0, 2, 4]),
        ("-2:", [3, 4]),
        ("::-2", [0, 2, 4]),
        ((3, 1, 3), [1, 3]),
    ],
)
def test_limits(limit: Any, chosen: list[int]) -> None:
    assert select(limit, 5, name="t") == chosen


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ((5,), r"names document 5; valid: 0 to 4"),
        ("5:", "leaves none of 5"),
        ("-:", "is no slice"),
        ("::0", "is no slice"),
    ],
)
def test_limits_that_leave_nothing(limit: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        select(limit, 5, name="t")


@pytest.mark.parametrize(
    ("changes", "row", "message"),
    [
        (
            {"prompt": "{{question}}"},
            {},
            r"`prompt` at '.*data\.jsonl', line 2: there is no field 'question'; the row has",
        ),
        ({"prompt": "{{Q}} {{qq}}"}, {}, "there is no field 'Q'"),
        ({"prompt": "{{answr}}"}, {}, "did you mean 'answer'"),
        ({"prompt": "{{q.deep.er}}"}, {}, "has no attribute 'deep'"),
        ({"prompt": "{{q"}, {}, r"template of `prompt` does not parse \(line 1\)"),
        ({"prompt": "{{q | nofilter}}"}, {}, "No filter named 'nofilter'"),
        ({"prompt": "{{ ''.__class__.__mro__ }}"}, {}, "is unsafe"),
        ({"prompt": "{{ q / 2 }}"}, {}, "TypeError"),
        ({"prompt": "{{q}}"}, {"q": None}, "'q' is null"),
        ({}, {"answer": None}, "no gold answer"),
        ({}, {"answer": ""}, "no gold answer"),
        ({}, {"answer": "pink"}, "'pink' is neither the text of a choice nor an index from 0 to 1"),
        ({}, {"answer": 2}, "nor an index from 0 to 1"),
        ({}, {"answer": True}, "neither the text"),
        ({}, {"options": ["1", "0"], "answer": 0}, "`target_is: index` or `target_is: text`"),
        ({}, {"options": "blue"}, "must yield a list, not str"),
        ({}, {"options": ["blue"]}, "at least two choices"),
        ({}, {"options": ["blue", ""]}, "none empty"),
    ],
)
def test_bad_rows_name_field_and_line(
    changes: dict[str, Any], row: dict[str, Any], message: str, task_file: TaskFile
) -> None:
    path = task_file(
        rows=[{**ROWS[0], "Q": "a", "qq": "b", "question": "c", "answr": "d"}, {**ROWS[1], **row}], **changes
    )
    with pytest.raises(TaskError, match=message):
        record(path)


@pytest.mark.parametrize(
    ("answer", "options", "target_is", "gold"),
    [
        (1, ["blue", "green"], "auto", [1]),
        ("1", ["blue", "green"], "auto", [1]),
        ("1", ["1", "2"], "text", [0]),
        (1, ["1", "2"], "index", [1]),
        ("green", ["blue", "green", "green"], "auto", [1, 2]),
        ("1", ["0", "1"], "auto", [1]),
    ],
)
def test_gold(answer: Any, options: list[str], target_is: str, gold: list[int], task_file: TaskFile) -> None:
    path = task_file(rows=[{"q": "x", "options": options, "answer": answer}], target_is=target_is)
    assert json.loads(record(path).documents)["documents"][0]["gold"] == gold


def test_choices_one_by_one_and_fields_with_spaces(task_file: TaskFile) -> None:
    rows = [{"a b": "sky", "one": "blue", "two": "green"}]
    path = task_file(rows=rows, prompt='{{doc["a b"]}} is', choices=["{{one}}", "{{two}}"], target="{{one}}")
    assert [r.continuation for r in requests(path)] == [" blue", " green"]
    assert requests(path)[0].text == "sky is"


def test_references_may_be_several(task_file: TaskFile) -> None:
    path = task_file(WRITE, rows=[{"q": "x", "answer": ["Kyiv", "Kiev", 3]}, {"q": "y", "answer": 4}])
    documents = json.loads(record(path).documents)["documents"]
    assert [d["references"] for d in documents] == [["Kyiv", "Kiev", "3"], ["4"]]
    with pytest.raises(TaskError, match="reference is empty"):
        record(task_file(WRITE, rows=[{"q": "x", "answer": []}]))


def test_hostile_names_are_only_names(task_file: TaskFile, tmp_path: Path, hostile_name: str) -> None:
    directory = tmp_path / hostile_name
    directory.mkdir()
    task_file(CHOOSE, task=hostile_name)
    for name in ("task.yaml", "data.jsonl"):
        shutil.copy(tmp_path / name, directory / name)
    recording = record(str(directory / "task.yaml"))
    assert recording.task == hostile_name and len(recording.instances) == 8


def test_templates_are_text_not_templates_again(task_file: TaskFile) -> None:
    path = task_file(WRITE, rows=[{"q": "{{answer}} {% x", "answer": "b"}])
    assert requests(path)[0].text == "{{answer}} {% x is"


def test_packaged_tasks_are_listed_and_recorded() -> None:
    listed = NativeSource().list()
    names = tuple(t.name for t in listed)
    assert names == ("demo:capitals", "demo:opposites", "demo:passages")
    suites, recordings = NativeSource().record(NativeTaskRef(native=names))
    assert [r.task for r in recordings] == list(names)
    assert len(suites) == 1 and suites[0].recordings == tuple(r.fingerprint for r in recordings)
    sizes = {r.task: len({i.doc_id for i in r.instances}) for r in recordings}
    assert sizes["demo:opposites"] >= 40 and sizes["demo:capitals"] >= 30
    words = sum(len(i.request.text.split()) for r in recordings if r.task == "demo:passages" for i in r.instances)
    assert words > 1400, "at more than a token a word, over 1,500 tokens"


def test_list_finds_task_files_below_a_directory(task_file: TaskFile, tmp_path: Path) -> None:
    path = task_file()
    (tmp_path / "run.yaml").write_text("name: x\ntasks: []\n")
    found = [t for t in NativeSource().list(include=[str(tmp_path)]) if t.kind == "file"]
    assert [t.path for t in found] == [path]


def test_names_that_do_not_fit() -> None:
    with pytest.raises(UnknownName, match="did you mean 'demo:opposites'"):
        record("demo:oposites")
    with pytest.raises(UnknownName, match="valid: demo:capitals"):
        record("demo:../../x")
    with pytest.raises(TaskError, match="named twice"):
        NativeSource().record(NativeTaskRef(native=("demo:capitals", "demo:capitals")))
    with pytest.raises(UsageError, match="not LmEvalTask"):
        NativeSource().record(LmEvalTask(lm_eval=("x",)))
