"""Scores as a table and as JSON: no value without its n, its interval and what is missing from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from proctor.records import Coverage, ScoreRow
from proctor.report.layout import Layout, Line, heading, number
from proctor.report.text import count

_NOTE = "* incomplete: some documents have no answer, so the value is not that of the whole task"


_Place = tuple[str, str, str, int | None]
"""Model, checkpoint, task, shots."""


def score_table(
    rows: Sequence[ScoreRow], *, members: Mapping[str, Sequence[str]] | None = None, title: str = ""
) -> Layout:
    """One line for each score, in the order given, one task's metrics side by side.

    `members` (group: its tasks or groups) brings a group's members below it and indents them. Columns that
    would say nothing (filter, checkpoint) are left out.
    """
    placed = _placed(rows, members or {})
    with_filter = any(r.filter not in ("", "none") for r in rows)
    with_label = any(r.label not in ("", "main") for r in rows)
    names = ["model", *(["checkpoint"] if with_label else []), "task", "shots", "metric"]
    names += [*(["filter"] if with_filter else []), "value", "± stderr", "95 % interval", "n", "coverage"]
    lines: list[Line] = []
    for row, depth in placed:
        cells = [row.model, *([row.label] if with_label else []), "  " * depth + row.task]
        cells += ["-" if row.num_fewshot is None else str(row.num_fewshot), row.metric + arrow(row)]
        cells += [row.filter] if with_filter else []
        cells += [_value(row), _stderr(row), _interval(row), _n(row), coverage_words(row.coverage, row)]
        lines.append(Line(cells=tuple(cells), strong=row.is_group, warn=not complete(row)))
    notes = (_NOTE,) if any(not complete(r) for r in rows) else ()
    columns = heading(*names, right=("shots", "value", "± stderr", "95 % interval", "n"))
    return Layout(title=title, columns=columns, lines=tuple(lines), notes=notes)


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
    return "; ".join(parts) or "complete"


def arrow(row: ScoreRow) -> str:
    """Which way is better."""
    return {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]


def _value(row: ScoreRow) -> str:
    return number(row.value) + ("" if complete(row) else " *")


def _stderr(row: ScoreRow) -> str:
    return "-" if row.stderr is None else f"± {row.stderr:.4f}"


def _interval(row: ScoreRow) -> str:
    return "-" if row.low is None or row.high is None else f"{row.low:.4f} to {row.high:.4f}"


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
