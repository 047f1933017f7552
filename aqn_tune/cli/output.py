"""How the commands print: tables for people, JSON for programs, progress on standard error."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status
    from rich.table import Table

    from aqn_tune.search.progress import Progress
    from aqn_tune.search.work import Best

PLAIN_SECONDS = 15.0
"""Seconds between two progress lines where standard error is no terminal."""


def console(*, error: bool = False) -> Console:
    """Return a console that writes to standard output, or to standard error.

    Away from a terminal lines are as long as COLUMNS says, 120 by default.
    """
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else 120
    return Console(file=stream, highlight=False, soft_wrap=False, width=width)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a table; a column whose name begins with `#` is aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        min_width=len(title) + 1,
    )
    for column in columns:
        right = column.startswith("#")
        made.add_column(column.removeprefix("#"), justify="right" if right else "left")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made


def print_json(value: Any) -> None:
    """Print a dataclass, or plain data, as JSON on standard output."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")


def set_verbosity(verbose: int) -> None:
    """Choose how much the libraries below may log."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", force=True)


class ProgressLine:
    """A line about long work: live on a terminal, now and then elsewhere, nothing when quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._console = console(error=True)
        self._status: Status | None = None
        self._last = 0.0
        self._text = ""
        self._bests: tuple[Best, ...] = ()
        self._newest: Best | None = None

    def __call__(self, text: str) -> None:
        """Show `text` in place of the line before."""
        if self._quiet or text == self._text:
            return
        if self._console.is_terminal:
            if self._status is None:
                self._status = self._console.status(text)
                self._status.start()
            self._status.update(text)
        elif time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            self._console.print(text, markup=False, soft_wrap=True)
        self._text = text

    def stage(self, moment: Progress) -> None:
        """Show a moment of a stage: what is done, runs, was stopped, failed; the newest best.

        Losses are compared within a scenario only: over all of them the mildest fault would always
        have the best. Shown is the scenario whose best config changed last.
        """
        ended = moment.finished + moment.stopped + moment.failed
        parts = [
            f"{moment.stage} {ended}/{moment.total}",
            f"{moment.running} running, {moment.stopped} stopped, {moment.failed} failed",
        ]
        changed = [best for best in moment.best if best not in self._bests]
        self._bests = moment.best
        if changed:
            self._newest = changed[-1]
        if moment.best and self._newest is not None:
            best = self._newest
            parts.append(f"best in {best.scenario}: {best.config} {best.value:.4f}")
        if moment.seconds_left is not None:
            parts.append(f"{duration(moment.seconds_left)} left")
        self("; ".join(parts))

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if not self._quiet:
            self._console.print(text, markup=False, soft_wrap=True)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


def duration(seconds: float) -> str:
    """Return seconds as people say them: `40 s`, `12 min`, `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Return a number of bytes as people say it."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
