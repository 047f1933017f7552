"""The append-only ledger of a study: one JSON row per line, each on disk before the work goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from aqn_tune.errors import UserError, storage_error
from aqn_tune.ledger.rows import (
    CellRow,
    EvaluationRow,
    LedgerRow,
    MechanismRow,
    OwnTrainingRow,
    RecordedRow,
    SearchRow,
    TrainingRow,
)

_ROW: TypeAdapter[RecordedRow] = TypeAdapter(RecordedRow)


class Repeated(NamedTuple):
    """What cells have trained for themselves though the ledger had it (`--no-reuse`)."""

    trainings: int
    steps: int
    """Optimiser steps of those trainings."""
    seconds: float
    """Their share of the wall time of their packs."""


NOTHING_REPEATED = Repeated(0, 0, 0.0)


class Ledger:
    """Read and append the rows of one study. Only the driver writes; rows are never changed.

    The last row of a training or of an evaluation (training x step x condition x scenario x split)
    is the one that holds; earlier ones are history.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trainings: dict[str, TrainingRow] = {}
        self.rungs: dict[tuple[str, int], TrainingRow] = {}
        self.evaluations: dict[tuple[str, int, str, str, str], EvaluationRow] = {}
        self.cells: dict[tuple[str, int, str, str, int], CellRow] = {}
        self.search: list[SearchRow] = []
        self.mechanism: dict[tuple[str, int], MechanismRow] = {}
        """What was seen of each training, by training key and step."""
        self.own_trainings: dict[tuple[str, str], OwnTrainingRow] = {}
        """How far each cell has trained a run of its own, by training key and cell."""
        self.own_seconds: dict[tuple[str, str], float] = {}
        """Wall time of each of those runs that `seconds` does not hold."""
        self.eval_seconds: dict[str, float] = {}
        """Wall time of the evaluations of each training, a part of `seconds`."""
        self.generate_seconds: dict[str, float] = {}
        """Wall time in which each training's model wrote answers, a part of `seconds`."""
        self.compile_seconds: dict[str, float] = {}
        """Wall time that each training has waited for compiled layers, a part of `seconds`."""
        self.seconds: dict[str, float] = {}
        """Wall time that each training has taken so far, all its rows together."""
        self._held: list[RecordedRow] | None = None
        """Rows that are written at the end of `together`; None outside it."""
        for row in self.recorded():
            self._index(row)

    def rows(self) -> Iterator[LedgerRow]:
        """Read the rows that results rest on from disk, in the order in which they were written."""
        return (
            row for row in self.recorded() if not isinstance(row, MechanismRow | OwnTrainingRow)
        )

    def recorded(self) -> Iterator[RecordedRow]:
        """Read every row from disk, in the order in which they were written."""
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            if number == len(lines) and not line.endswith("\n"):
                return  # cut off while it was being written: the row was never promised
            try:
                yield _ROW.validate_json(line)
            except ValidationError as error:
                raise UserError(
                    f"{self.path}, line {number}: not a ledger row ({error.errors()[0]['msg']}); "
                    "the file was changed, or written by another version"
                ) from None

    def _index(self, row: RecordedRow) -> None:
        if isinstance(row, TrainingRow):
            self.trainings[row.training_key] = row
            spent = self.seconds.get(row.training_key, 0.0)
            self.seconds[row.training_key] = spent + row.seconds
            spent = self.eval_seconds.get(row.training_key, 0.0)
            self.eval_seconds[row.training_key] = spent + row.eval_seconds
            spent = self.generate_seconds.get(row.training_key, 0.0)
            self.generate_seconds[row.training_key] = spent + row.generate_seconds
            spent = self.compile_seconds.get(row.training_key, 0.0)
            self.compile_seconds[row.training_key] = spent + row.compile_seconds
            self.rungs[row.training_key, row.step_reached] = row
        elif isinstance(row, EvaluationRow):
            self.evaluations[evaluation_id(row)] = row
        elif isinstance(row, CellRow):
            key = (row.stage, row.generation, row.scenario, row.arm, row.replicate)
            self.cells[key] = row
        elif isinstance(row, MechanismRow):
            self.mechanism[row.training_key, row.step] = row
        elif isinstance(row, OwnTrainingRow):
            run = (row.training_key, row.cell)
            self.own_trainings[run] = row
            self.own_seconds[run] = self.own_seconds.get(run, 0.0) + row.seconds
        else:
            self.search.append(row)

    def append(self, rows: Iterable[RecordedRow]) -> None:
        """Write `rows` and wait until they are on disk.

        Raises UserError where the storage does not take them; the ledger then holds the rows up to some
        point, and what was being written is cut off by the next one who writes.
        """
        rows = list(rows)
        if not rows:
            return
        if self._held is None:
            self._write(rows)
        else:
            self._held += rows
        for row in rows:
            self._index(row)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write the rows that are appended inside the block at its end, with one wait for the disk.

        They are in the index at once. Use it for rows of one event, none of which takes effect outside before
        all of them are there; blocks may be nested. What was appended before an exception is written, too.
        """
        if self._held is not None:
            yield
            return
        self._held = []
        try:
            yield
        finally:
            rows, self._held = self._held, None
            if rows:
                self._write(rows)

    def _write(self, rows: Sequence[RecordedRow]) -> None:
        text = "".join(
            json.dumps(row.model_dump(mode="json"), allow_nan=False) + "\n" for row in rows
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._cut_torn_line()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            mendable = storage_error(error, self.path)
            if mendable is None:
                raise
            raise mendable from error

    def _cut_torn_line(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            content_end = file.seek(0, os.SEEK_END)
            if content_end == 0:
                return
            file.seek(content_end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)

    def repeated(self) -> Repeated:
        """Return the trainings that equal a recorded one and were run all the same."""
        again = [r for r in self.own_trainings.values() if r.step_reached and not r.recorded]
        return Repeated(
            len(again), sum(row.step_reached for row in again), sum(self.own_seconds.values())
        )

    def evaluation(
        self, training_key: str, step: int, condition: str, scenario: str, split: str
    ) -> EvaluationRow | None:
        """Return one evaluation, None when it was not made."""
        return self.evaluations.get((training_key, step, condition, scenario, split))


def evaluation_id(row: EvaluationRow) -> tuple[str, int, str, str, str]:
    """Return what identifies an evaluation: training, step, condition, scenario, split."""
    return (row.training_key, row.step, row.condition, row.scenario, row.split)
