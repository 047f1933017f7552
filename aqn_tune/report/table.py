"""A table as data: the same rows go to Markdown, HTML and the terminal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Align = Literal["left", "right"]


class Column(NamedTuple):
    """Head of a column."""

    label: str
    unit: str = ""
    align: Align = "right"

    @property
    def head(self) -> str:
        """Label and unit in one line."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


class Mark(NamedTuple):
    """A cell that a page may colour."""

    text: str
    kind: str
    """A word that pages turn into a style: better, worse, harmless, ..."""
    symbol: str = ""
    """Printed before the text, in a fixed-width font."""


Cell = str | Mark


@dataclass(frozen=True)
class Table:
    """Columns, rows and the notes that belong below them."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: {len(row)} cells for {len(self.columns)} columns")

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown, notes below it."""
        rules = ["---" if column.align == "left" else "---:" for column in self.columns]
        lines = [
            _line([escape(column.head) for column in self.columns]),
            _line(rules),
            *(_line([_markdown(cell) for cell in row]) for row in self.rows),
        ]
        notes = [f"\n{escape(note)}" for note in self.notes]
        return "\n".join([*lines, *notes])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def escape(text: str) -> str:
    """Return text that Markdown prints as it is."""
    for character in ("\\", "|", "*", "_", "~", "<", "`"):
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split("\n"))


def _markdown(cell: Cell) -> str:
    if isinstance(cell, str):
        return escape(cell)
    return f"`{cell.symbol}` {escape(cell.text)}" if cell.symbol else escape(cell.text)
