"""The table of scores on standard output."""

from __future__ import annotations

import sys

from proctor.api.scoring import Scores
from proctor.report.layout import show
from proctor.report.table import score_table


def show_scores(scores: Scores, *, title: str) -> None:
    """The table of scores on standard output."""
    show(score_table(scores.rows, members=scores.members, title=title), sys.stdout)
