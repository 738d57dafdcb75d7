"""Scores as a table and as JSON: no value without its n, its interval and what is missing from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from proctor.records import Coverage, ScoreRow
from proctor.report.layout import Layout, Line, heading, number
from proctor.report.text import count

_NOTE = "* incomplete: some documents have no answer, so the value is not that of the whole task"


_ALL = "every request was answered; none was cut short or unparsable"
_COMPLETE = "complete"

_Place = tuple[str, str, str, int | None]
"""Model, checkpoint, task, shots."""


def score_table(
    rows: Sequence[ScoreRow], *, members: Mapping[str, Sequence[str]] | None = None, title: str = ""
) -> Layout:
    """One line for each score, in the order given, one task's metrics side by side.

    `members` (group: its tasks or groups) brings a group's members below it and indents them. Columns that
    would say nothing (checkpoint, filter, coverage) are left out; for the coverage a note stands instead.
    """
    with_label = any(r.label not in ("", "main") for r in rows)
    with_filter = any(r.filter not in ("", "none") for r in rows)
    flawed = any(coverage_words(r.coverage, r) != _COMPLETE for r in rows)
    columns: list[tuple[str, bool, Callable[[ScoreRow, int], str]]] = [
        ("model", True, lambda row, depth: row.model),
        ("checkpoint", with_label, lambda row, depth: row.label),
        ("task", True, lambda row, depth: "  " * depth + row.task),
        ("shots", True, lambda row, depth: "-" if row.num_fewshot is None else str(row.num_fewshot)),
        ("metric", True, lambda row, depth: row.metric + arrow(row)),
        ("filter", with_filter, lambda row, depth: row.filter),
        ("value ± stderr", True, lambda row, depth: _value(row)),
        ("95 % interval", True, lambda row, depth: _interval(row)),
        ("n", True, lambda row, depth: _n(row)),
        ("coverage", flawed, lambda row, depth: coverage_words(row.coverage, row)),
    ]
    shown_columns = [(name, cell) for name, wanted, cell in columns if wanted]
    lines = tuple(
        Line(
            cells=tuple(cell(row, depth) for _, cell in shown_columns),
            strong=row.is_group,
            warn=not complete(row),
        )
        for row, depth in _placed(rows, members or {})
    )
    notes = (_NOTE,) if any(not complete(r) for r in rows) else () if flawed or not rows else (_ALL,)
    names = heading(*(name for name, _ in shown_columns), right=("shots", "value ± stderr", "95 % interval", "n"))
    return Layout(title=title, columns=names, lines=lines, notes=notes)


def rows_to_json(rows: Sequence[ScoreRow]) -> list[dict[str, Any]]:
    """Each row as an object with all its fields, and `complete`. JSON has no infinity: such a value is the
    text "inf", "-inf" or "nan"."""
    out: list[dict[str, Any]] = []
    for row in rows:
        value = {k: _finite(v) for k, v in asdict(row).items()}
        value["coverage"]["failures"] = dict(row.coverage.failures)
        value["engines"] = list(row.engines)
        value["complete"] = complete(row)
        out.append(value)
    return out


def complete(row: ScoreRow) -> bool:
    """There is a value, every document is in it, and every request was answered."""
    return row.value is not None and row.n == row.n_expected and row.coverage.complete


def coverage_words(coverage: Coverage, row: ScoreRow | None = None) -> str:
    """What is wrong with the answers behind a score, in words; `complete` if nothing."""
    parts: list[str] = []
    if row is not None and row.value is None:
        parts.append("no value: members missing" if row.is_group else "no value")
    missing = coverage.requested - coverage.answered - coverage.failed
    if coverage.failed:
        kinds = ", ".join(f"{name} {count(n)}" for name, n in coverage.failures)
        parts.append(f"{count(coverage.failed)} failed" + (f" ({kinds})" if kinds else ""))
    if missing > 0:
        parts.append(f"{count(missing)} unanswered")
    if coverage.truncated:
        parts.append(f"{count(coverage.truncated)} truncated")
    if coverage.unparsable:
        parts.append(f"{count(coverage.unparsable)} unparsable")
    if row is not None and row.n < row.n_expected and not (coverage.failed or missing > 0):
        parts.append("documents left out")
    return "; ".join(parts) or _COMPLETE


def arrow(row: ScoreRow) -> str:
    """Which way is better."""
    return {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]


def _value(row: ScoreRow) -> str:
    stderr = "" if row.stderr is None else f" ± {number(row.stderr)}"
    return number(row.value) + stderr + ("" if complete(row) else " *")


def _interval(row: ScoreRow) -> str:
    if row.low is None or row.high is None:
        return "-"
    return f"{number(row.low, digits=3)} to {number(row.high, digits=3)}"


def _n(row: ScoreRow) -> str:
    return count(row.n) if row.n == row.n_expected else f"{count(row.n)} of {count(row.n_expected)}"


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _placed(rows: Sequence[ScoreRow], members: Mapping[str, Sequence[str]]) -> list[tuple[ScoreRow, int]]:
    """Rows in order, each group followed by its members, one level deeper; a member stays with its own
    model, checkpoint and shots. A group that contains itself is not followed."""
    below = {m for group in members for m in members[group] if m != group}
    index: dict[_Place, list[ScoreRow]] = {}
    by_task: dict[tuple[str, str, str], list[_Place]] = {}
    for row in rows:
        key = (row.model, row.label, row.task, row.num_fewshot)
        if key not in index:
            by_task.setdefault(key[:3], []).append(key)
        index.setdefault(key, []).append(row)
    out: list[tuple[ScoreRow, int]] = []
    done: set[_Place] = set()

    def place(key: _Place, depth: int) -> None:
        if key in done:
            return
        done.add(key)
        out.extend((row, depth) for row in index[key])
        for member in members.get(key[2], ()):
            for other in by_task.get((key[0], key[1], member), ()):
                # A group that does not know its shots takes the members of every number of shots.
                if key[3] is None or other[3] == key[3]:
                    place(other, depth + 1)

    for key in (*(k for k in index if k[2] not in below), *index):
        place(key, 0)
    return out
