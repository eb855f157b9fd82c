"""Cells, rows and tables of the screen, before a console prints them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich import box
from rich.cells import cell_len
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from grokctl.text import harmless, to_copy

if TYPE_CHECKING:
    from rich.console import RenderableType

    from grokctl.checks import Status

Facts = Sequence[tuple[str, str]]
"""Names and values: the rows of a table with two columns."""

_COMMAND: Final = "grokctl "
"""How a value begins that is a command."""


@dataclass(frozen=True, slots=True)
class StatusCell:
    """A cell of a table with a status: a symbol and words."""

    status: Status
    text: str
    first: str = ""
    """Text before it, or above it in a narrow terminal."""


@dataclass(frozen=True, slots=True)
class StackedBar:
    """A bar of parts, on a scale that ends at a limit."""

    label: str
    parts: tuple[float, ...]
    limit: float
    text: str
    """The same in numbers, printed beside it."""


def table_of(
    columns: Sequence[str],
    rows: Sequence[Sequence[Text]],
    *,
    shown: Sequence[str],
    right: Sequence[str],
) -> Table:
    """A table with some of its columns.

    Args:
        columns: The names of all columns.
        rows: Cells, one for each column.
        shown: The names of the columns to show.
        right: Those that are aligned to the right.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for name in shown:
        heading = Text(harmless(name))
        table.add_column(heading, justify="right" if name in right else "left", overflow="fold")
    places = [columns.index(name) for name in shown]
    for row in rows:
        table.add_row(*(row[place] for place in places))
    return table


def rows_of(facts: Facts, *, indent: int = 0) -> Iterator[tuple[RenderableType, bool]]:
    """Names and values, and whether a value is to be copied: such a line is never wrapped."""
    width = max((cell_len(harmless(name)) for name, _ in facts), default=0)
    for name, value in facts:
        label, text = Text(one_line(name), style="dim"), to_copy(value)
        if " " not in text or text.startswith(_COMMAND):
            label.pad_right(width - label.cell_len)
            yield Text.assemble(" " * indent, label, "  ", text), True
            continue
        grid = Table.grid(Column(width=width), Column(overflow="fold"), padding=(0, 2, 0, 0))
        grid.add_row(label, Text(text))
        yield Padding(grid, (0, 0, 0, indent), expand=False), False


def one_line(text: str) -> str:
    """The text in one line."""
    return harmless(text).replace("\n", " ").replace("\t", " ")
