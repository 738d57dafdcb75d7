"""The live view: what it counts, how often it speaks, and that it never ends a run."""

from __future__ import annotations

import io
from typing import Any

import pytest

from proctor.report.live import LINE_INTERVAL_S, LiveProgress
from proctor.report.views import ProgressEvent


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    """A pipe whose reader has gone."""

    def __init__(self, error: Exception, *, terminal: bool) -> None:
        super().__init__()
        self._error = error
        self._terminal = terminal
        self.writes = 0

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str, /) -> int:
        self.writes += 1
        raise self._error


def event(**fields: Any) -> ProgressEvent:
    return ProgressEvent(**({"model": "smol", "worker": "w0", "phase": "asking"} | fields))


def lines(file: io.StringIO) -> list[str]:
    return file.getvalue().splitlines()


def test_plain_lines_are_few_and_say_rate_and_time_left() -> None:
    clock, file = Clock(), io.StringIO()
    with LiveProgress(file, owed={"smol": 1000}, clock=clock) as view:
        for second in range(21):
            view.update(event(requests=10 * second, prompt_tokens=400 * second, completion_tokens=100 * second))
            clock.now += 1
        assert lines(file)[0] == "smol: asking, 0 of 1,000 (0 %)"
        assert len(lines(file)) == 1 + 20 // LINE_INTERVAL_S
        clock.now -= 1
        view.update(event(requests=200, prompt_tokens=8000, completion_tokens=2000, message="server restarted"))
    assert lines(file)[-1] == (
        "smol: asking, 200 of 1,000 (20 %), 10.0 requests/s, 500 tokens/s, 1 min 20 s left, server restarted"
    )


def test_a_new_phase_is_said_at_once_and_once() -> None:
    clock, file = Clock(), io.StringIO()
    with LiveProgress(file, clock=clock) as view:
        view.update(event(phase="starting"))
        view.update(event(phase="starting"))
        view.update(event(phase="asking"))
        view.update(event(phase="done", requests=3, failed=2, failures={"server": 2}))
    assert lines(file) == [
        "smol: starting",
        "smol: asking",
        "smol: done, 5 requests, 2 failed (server 2)",
    ]


def test_workers_add_up_and_a_restarted_one_goes_on() -> None:
    clock, file = Clock(), io.StringIO()
    with LiveProgress(file, clock=clock) as view:
        view.expect("smol", 100)
        view.update(event(worker="a", requests=10, failed=1, failures={"server": 1}))
        view.update(event(worker="b", requests=20, aliases=5))
        view.update(event(worker="a", phase="starting", requests=0))
        view.update(event(worker="a", requests=4, failed=1, failures={"transport": 1}))
        view.update(event(worker="a", phase="done", requests=4, failed=1, failures={"transport": 1}))
        view.update(event(worker="b", phase="done", requests=20, aliases=5))
    assert lines(file)[-1] == ("smol: done (2 of 2 workers), 41 of 100 (41 %), 2 failed (server 1, transport 1)")


def test_time_alone_brings_a_line_only_while_there_is_work() -> None:
    clock, file = Clock(), io.StringIO()
    with LiveProgress(file, owed={"smol": 10}, clock=clock) as view:
        view.update(event(requests=1))
        clock.now += 4
        view.update(event(requests=2))
        clock.now += 4
        view.tick()
        assert len(lines(file)) == 2
        view.update(event(phase="done", requests=10))
        said = len(lines(file))
        clock.now += 100
        view.tick()
        assert len(lines(file)) == said


def test_names_are_escaped_on_both() -> None:
    for file in (io.StringIO(), Terminal()):
        with LiveProgress(file, width=200) as view:
            view.update(event(model="[red]a\x1b]0;x\x07\nb", message="[/]\r!"))
            view.message("over\x1b[2Jwritten [b]")
        text = file.getvalue()
        assert "[red]a\\x1b]0;x\\x07\\nb" in text and "[/]\\r!" in text
        assert "over\\x1b[2Jwritten [b]" in text
        assert "\x1b]0" not in text and "\x1b[2J" not in text and "\x07" not in text


def test_terminal_frame() -> None:
    clock, file = Clock(), Terminal()
    with LiveProgress(file, owed={"smol": 100}, clock=clock, width=100) as view:
        view.update(event(requests=10))
        clock.now += 2
        view.update(event(requests=30, failed=1, prompt_tokens=400, failures={"server": 1}))
    frame = file.getvalue().rpartition("tokens/s")[2]
    for part in ("smol", "asking", "31 of 100 (31 %)", "10.5", "200", "7 s", "1 failed (server 1)", "2 s so far"):
        assert part in frame


def test_a_narrow_screen_keeps_the_numbers() -> None:
    clock, file = Clock(), Terminal()
    with LiveProgress(file, owed={"m" * 90: 100}, clock=clock, width=70) as view:
        view.update(event(model="m" * 90, requests=10))
        clock.now += 2
        view.update(event(model="m" * 90, requests=30, message="x" * 90))
    frame = file.getvalue().rpartition("tokens/s")[2]
    assert "30 of 100 (30 %)" in frame and "m…" in frame


def test_many_models_fit_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "12")
    file = Terminal()
    with LiveProgress(file, width=100) as view:
        for i in range(50):
            view.update(event(model=f"model-{i}", phase="done" if i < 40 else "asking"))
    frame = file.getvalue().rpartition("tokens/s")[2]
    assert "and 42 more models" in frame and "model-47" in frame and "model-3 " not in frame


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(28, "No space left on device"), ValueError("I/O operation on closed file")]
)
def test_a_lost_output_ends_the_view_and_not_the_run(error: Exception, terminal: bool) -> None:
    file = Broken(error, terminal=terminal)
    with LiveProgress(file) as view:
        for i in range(5):
            view.update(event(phase=f"phase {i}"))
        view.message("x")
        view.tick()
    assert file.writes == 1, "after the first failure nothing is tried again"


def test_an_odd_encoding_gets_escapes() -> None:
    raw = io.BytesIO()
    with LiveProgress(io.TextIOWrapper(raw, encoding="ascii")) as view:
        view.update(event(model="模型"))
        assert raw.getvalue() == b"\\u6a21\\u578b: asking\n"
