"""A table as plain values, and its two renderings: for a terminal and for everything else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from proctor.report.text import encodable, shown

_FOLDED: Final = 8
"""A name may be folded to this many characters a line on a narrow screen, not to fewer; a heading is never folded."""
_LARGE: Final = 1e6
"""From here on numbers are written with an exponent: their digits would say nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A heading; numbers stand at the right."""

    heading: str
    right: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One row. `warn` and `strong` only colour it: what they mean is also said in words."""

    cells: tuple[str, ...]
    strong: bool = False
    warn: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A table that knows nothing of where it is printed. Cells may hold anything: rendering escapes it."""

    title: str = ""
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = field(default=())

    def plain(self) -> str:
        """Aligned text without colours or wrapping, ending in a newline; columns are two spaces apart."""
        rows = [tuple(c.heading for c in self.columns), *(tuple(map(shown, line.cells)) for line in self.lines)]
        widths = [max(cell_len(row[i]) for row in rows) for i in range(len(self.columns))]
        out = [shown(self.title)] if self.title else []
        for number, row in enumerate(rows):
            out.append("  ".join(self._padded(i, cell, widths[i]) for i, cell in enumerate(row)).rstrip())
            if number == 0:
                out.append("  ".join("-" * w for w in widths))
        out += map(shown, self.notes)
        return "\n".join(out) + "\n"

    def rich(self) -> Table:
        """The table for a terminal. Names are Text, so that their markup is not read. Where the screen is
        narrow, names fold inside their cells and numbers stay whole."""
        table = Table(
            title=Text(shown(self.title)) if self.title else None,
            caption=Text("\n".join(map(shown, self.notes))) if self.notes else None,
            caption_justify="left",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for i, column in enumerate(self.columns):
            table.add_column(
                Text(column.heading),
                justify="right" if column.right else "left",
                no_wrap=column.right,
                overflow="fold",
                min_width=self._least(i),
            )
        for line in self.lines:
            style = "yellow" if line.warn else "bold" if line.strong else ""
            table.add_row(*(Text(shown(cell), style=style) for cell in line.cells))
        return table

    def least_width(self) -> int:
        """Characters that the table needs on a terminal: numbers whole, names folded to a readable width."""
        # Between two columns rich has a space, the line's own and a space again; one more at each end.
        return sum(3 + self._least(i) for i in range(len(self.columns))) - 1

    def _least(self, index: int) -> int:
        """Characters of one column."""
        column = self.columns[index]
        own = cell_len(column.heading)
        widest = max((cell_len(shown(line.cells[index])) for line in self.lines), default=0)
        return max(own, widest if column.right else min(widest, _FOLDED))

    def _padded(self, index: int, cell: str, width: int) -> str:
        gap = " " * (width - cell_len(cell))
        return gap + cell if self.columns[index].right else cell + gap


def show_all(layouts: Iterable[Layout], file: TextIO, *, width: int | None = None) -> None:
    """Write several tables with an empty line between them."""
    for number, layout in enumerate(layouts):
        if number:
            file.write("\n")
        show(layout, file, width=width)


def show(layout: Layout, file: TextIO, *, width: int | None = None) -> None:
    """Write the table: with rich where `file` is a terminal wide enough for it, plain otherwise."""
    console = Console(file=file, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)
    fits = layout.least_width() <= console.width
    if fits and console.is_terminal and console.encoding.lower().startswith("utf"):
        console.print(layout.rich())
        return
    # A table that does not fit is printed whole: the terminal wraps lines, but no name loses a letter.
    file.write(encodable(layout.plain(), getattr(file, "encoding", None)))
    file.flush()


def number(value: float | None, *, digits: int = 4) -> str:
    """As lm-evaluation-harness prints it: four decimals; `-` for no value."""
    if value is None:
        return "-"
    return f"{value:.{digits}e}" if abs(value) >= _LARGE else f"{value:.{digits}f}"


def heading(*names: str, right: Sequence[str] = ()) -> tuple[Column, ...]:
    """Columns by name."""
    return tuple(Column(heading=n, right=n in right) for n in names)
