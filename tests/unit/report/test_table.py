"""Tables: what they say, and that no name can break or forge them."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from proctor.plan.views import ModelPlan, Plan, TaskPlan
from proctor.records import Coverage, ScoreRow, Shard
from proctor.report.layout import Column, Layout, Line, heading, show
from proctor.report.table import complete, coverage_words, rows_to_json, score_table
from proctor.report.text import duration, encodable, shown
from proctor.report.verbs import plan_table, starts_table, status_table, worker_table
from proctor.report.views import ModelStarts, RunStatus, TaskStatus, WorkerStatus


def row(**fields: Any) -> ScoreRow:
    usual: dict[str, Any] = {
        "model": "smol",
        "label": "main",
        "step": None,
        "task": "colours",
        "metric": "accuracy",
        "filter": "none",
        "value": 0.75,
        "stderr": 0.0625,
        "low": 0.6,
        "high": 0.85,
        "n": 48,
        "n_expected": 48,
        "num_fewshot": 0,
        "higher_is_better": True,
        "coverage": Coverage(requested=192, answered=192),
    }
    return ScoreRow(**(usual | fields))


class Terminal(io.StringIO):
    """Says that it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


FAILED = Coverage(
    requested=192, answered=180, failed=5, truncated=2, unparsable=1, failures=(("context_length", 3), ("server", 2))
)


PLAIN = """\
run x
model  task           shots  metric             filter      value ± stderr   95 % interval         n  coverage
-----  -------------  -----  -----------------  ------  ------------------  --------------  --------  DASHES
smol   colours            0  accuracy ↑         none       0.7500 ± 0.0625  0.600 to 0.850        48  complete
smol   colours            0  word_perplexity ↓  mean@2  38.7849 ± 0.0625 *  0.600 to 0.850  45 of 48  FAILURES
模型   a longer task      -  accuracy ↑         none                   - *               -   0 of 48  NOTHING
* incomplete: some documents have no answer, so the value is not that of the whole task
"""
WORDS = {
    "DASHES": "-" * 78,
    "NOTHING": "no value; documents left out",
    "FAILURES": "5 failed (context_length 3, server 2); 7 unanswered; 2 truncated; 1 unparsable",
}


def test_plain_table_whole() -> None:
    rows = [
        row(),
        row(model="模型", task="a longer task", num_fewshot=None, value=None, stderr=None, low=None, high=None, n=0),
        row(metric="word_perplexity", value=38.78491, higher_is_better=False, n=45, coverage=FAILED, filter="mean@2"),
    ]
    assert score_table(rows, title="run x").plain() == re.sub("[A-Z]{5,}", lambda m: WORDS[m.group()], PLAIN)


def test_checkpoints_are_shown_where_there_are_any() -> None:
    headings = [c.heading for c in score_table([row(label="step 5"), row()]).columns]
    assert headings[:3] == ["model", "checkpoint", "task"] and "filter" not in headings


def test_coverage_is_a_note_where_nothing_is_wrong() -> None:
    fine = score_table([row(), row(task="other")])
    assert "coverage" not in fine.plain() and "every request was answered" in fine.plain()
    cut = score_table([row(), row(coverage=Coverage(requested=9, answered=9, truncated=1))])
    assert [line.cells[-1] for line in cut.lines] == ["complete", "1 truncated"] and cut.notes == ()
    assert score_table([]).notes == ()


def test_groups_bring_their_members_below_them() -> None:
    rows = [
        row(task="b"),
        row(task="mmlu", is_group=True, num_fewshot=None),
        row(task="a"),
        row(task="mmlu", is_group=True, num_fewshot=None, metric="normalised"),
        row(task="stem", is_group=True),
        row(task="alone"),
        row(model="other", task="a"),
    ]
    members = {"mmlu": ["stem", "b"], "stem": ["a"], "loop": ["loop"]}
    table = score_table(rows, members=members)
    assert [(line.cells[0], line.cells[1]) for line in table.lines] == [
        ("smol", "mmlu"),
        ("smol", "mmlu"),
        ("smol", "  stem"),
        ("smol", "    a"),
        ("smol", "  b"),
        ("smol", "alone"),
        ("other", "a"),
    ]
    assert [line.strong for line in table.lines[:4]] == [True, True, True, False]


def test_groups_in_a_circle_lose_no_row() -> None:
    rows = [row(task="x", is_group=True), row(task="y", is_group=True)]
    assert len(score_table(rows, members={"x": ["y"], "y": ["x"]}).lines) == 2


def test_a_group_without_a_member_says_so() -> None:
    group = row(is_group=True, value=None, stderr=None)
    assert coverage_words(group.coverage, group) == "no value: members missing"
    assert not complete(group)


def test_json_has_everything_and_is_json() -> None:
    found = rows_to_json([row(coverage=FAILED, value=math.inf, engines=("e1",)), row()])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found[0]["value"], found[0]["complete"], found[1]["complete"]) == ("inf", False, True)
    assert found[0]["coverage"]["failures"] == {"context_length": 3, "server": 2}
    assert {"model", "task", "n", "n_expected", "low", "high", "task_fingerprint", "engines"} <= found[0].keys()


HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "[red]x[/red]",
    "[/]",
    "a\nb",
    "a\rb",
    "\u202egnp.exe",
    "\x9b1m",
    "a\u2028b",
    ":smiley:",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_names_neither_break_nor_forge(name: str, stream: type[io.StringIO]) -> None:
    file = stream()
    show(score_table([row(model=name, task=name, metric=name, filter=name)], title=name), file, width=400)
    text = file.getvalue()
    visible = shown(name)
    assert text.count(visible) == 5
    assert not any(c in text for c in "\x9b\u202e\u2028\r")
    lines = [line for line in text.split("\n") if visible in line]
    assert len(lines) == 2, "the title and one row"
    if stream is io.StringIO:
        assert "\x1b" not in text


def test_hostile_names_of_the_tree(hostile_name: str) -> None:
    text = score_table([row(model=hostile_name)]).plain()
    assert len(text.split("\n")) == 5
    assert shown(hostile_name) in text.split("\n")[2]


def test_a_narrow_terminal_folds_names_and_keeps_numbers() -> None:
    file = Terminal()
    show(score_table([row(model="abcdefghij" * 5)]), file, width=80)
    text = file.getvalue()
    assert "0.7500 ± 0.0625" in text and "0.600 to 0.850" in text and "\x1b" in text
    assert "".join(line.strip().partition(" ")[0] for line in text.split("\n")[3:]).count("abcdefghij") == 5


def test_a_terminal_too_narrow_for_that_gets_plain_text() -> None:
    file = Terminal()
    show(score_table([row(model="m" * 100)]), file, width=60)
    assert "m" * 100 in file.getvalue() and "\x1b" not in file.getvalue()


def test_large_numbers_are_short() -> None:
    table = score_table([row(value=548607716240974.06, stderr=2.3e14, low=1.0, high=1.4e15)])
    assert "5.4861e+14 ± 2.3000e+14" in table.plain() and "1.000 to 1.400e+15" in table.plain()


def test_a_stream_that_cannot_write_it_gets_escapes() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    show(Layout(columns=(Column(heading="± x"),), lines=(Line(cells=("ü",)),)), file)
    assert raw.getvalue() == b"\\xb1 x\n---\n\\xfc\n"


def test_text() -> None:
    assert shown("plain ünïcødé 🦊") == "plain ünïcødé 🦊"
    assert shown("👩\u200d👩") == "👩\u200d👩"
    assert shown("a\tb\x00\U000e0001") == "a\\tb\\x00\\U000e0001"
    assert encodable("ü", "ascii") == "\\xfc" and encodable("ü", None) == "ü"
    assert [duration(s) for s in (-1, 45.4, 200, 7500, 273_600)] == [
        "0 s",
        "45 s",
        "3 min 20 s",
        "2 h 05 min",
        "3 d 4 h",
    ]


def test_plan_table() -> None:
    tasks = (
        TaskPlan(
            task="colours", num_fewshot=5, fingerprint="f", requests=1200, answered=200, failed=1, owed=999, cost_s=90
        ),
    )
    shards = (Shard(id="s", model="smol", items=(("f", 1), ("f", 2)), cost_s=90),)
    model = ModelPlan(
        model="smol", display_name="Smol", label="main", weights="w", resolution="r", tasks=tasks, shards=shards,
        cost_s=90, startup_s=10, prompt_tokens=5000, completion_tokens=700, shared=4, damaged=2,
    )  # fmt: skip
    table = plan_table(Plan(run="x", models=(model,), workers=2))
    expected = ("Smol", "main", "colours", "5", "1,200", "200", "1", "999", "1 min 30 s", "-")
    assert table.lines == (Line(cells=expected, warn=True),)
    assert table.notes == (
        "2 requests owed in 1 shards (balanced); about 1 min 40 s on 2 worker(s), 1 min 30 s of server time",
        "1 jobs, 0.0 GPU-hours with start-up; 5,000 prompt and 700 generated tokens",
        "more than 2 worker(s) do not pay: beyond it more than 25% of the worker time would be start-up and idling",
        "rates: prior",
        "4 requests occur in several tasks and are asked once",
        "2 damaged rows in the store: what they held is asked again",
        "failed for good: not asked again by itself",
    )


def test_status_table() -> None:
    status = RunStatus(
        run="x",
        tasks=(
            TaskStatus(model="a", task="t", requests=1000, answered=999, failed=1, failures=(("server", 1),)),
            TaskStatus(model="a", task="u", num_fewshot=5, requests=3, answered=1),
        ),
        workers=(
            WorkerStatus(worker="w0", model="a", phase="failed", seen=100.0, message="no space\nlog: x"),
            WorkerStatus(
                worker="w1",
                model="a",
                phase="asking",
                seen=104.0,
                in_flight=57,
                limits=(1000, 64),
                why=("grown", "cut: HTTP 429"),
            ),
        ),
        starts=(
            ModelStarts(model="a", starts=3, seconds=90.0, typical_s=40.0),
            ModelStarts(model="b", starts=1, seconds=10.0),
        ),
        elapsed_s=60,
        forecast_s=120,
        now=105.0,
    )
    table = status_table(status)
    assert [line.cells[4:9] for line in table.lines] == [
        ("1,000", "999", "1", "0", "99 %"),
        ("3", "1", "0", "2", "33 %"),
    ]
    assert table.notes == (
        "1,000 of 1,003 requests answered, 1 failed, 2 owed",
        "running for 1 min 00 s; the plan foresaw 2 min 00 s",
        "4 start(s) took 1 min 40 s in all",
    )
    assert [line.cells for line in starts_table(status).lines] == [
        ("a", "3", "1 min 30 s", "40 s"),
        ("b", "1", "10 s", "-"),
    ]
    reloaded = replace(
        status, starts=(*status.starts, ModelStarts(model="c", starts=0, seconds=0, reloads=2, reloading_s=5.0))
    )
    assert status_table(reloaded).notes[-1] == "weights were loaded into a running server 2 time(s), in 5 s"
    assert starts_table(reloaded).lines[-1].cells == ("c", "0", "0 s", "-", "2", "5 s")
    ended, busy = worker_table(status).lines
    assert ended.warn and ended.cells == ("w0", "a", "failed", "0", "-", "-", "5 s ago", "no space")
    assert busy.cells[5] == "57 of 1,064 (grown; cut: HTTP 429)"


def test_who_has_no_time_to_ask_more_is_named_while_it_asks() -> None:
    def worker(name: str, phase: str, core: float) -> WorkerStatus:
        return WorkerStatus(worker=name, model="a", phase=phase, seen=0.0, core=core)

    workers = (worker("w0", "asking", 0.97), worker("w1", "asking", 0.8), worker("w2", "done", 1.0))
    assert worker_table(RunStatus(run="x", tasks=(), workers=workers)).notes == (
        "w0: the process has no time left to ask more; `engine.client_processes` lets more of them ask",
    )
    assert worker_table(RunStatus(run="x", tasks=(), workers=workers[1:])).notes == ()


@pytest.mark.parametrize("columns", [2, 5, 9])
def test_a_table_that_is_said_to_fit_keeps_its_headings(columns: int) -> None:
    names = [f"column{i}" for i in range(columns)]
    line = Line(cells=("model", *("1,000" for _ in names[1:])))
    layout = Layout(columns=heading(*names, right=names[1:]), lines=(line,))
    file = Terminal()
    show(layout, file, width=layout.least_width())
    assert "─" in file.getvalue() and all(name in file.getvalue() for name in names)
    file = Terminal()
    show(layout, file, width=layout.least_width() - 1)
    assert "─" not in file.getvalue()
