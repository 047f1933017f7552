"""Writing what workers report into the ledger, each row once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from aqn_tune.errors import UserError
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.broken import BROKE_OFF as BROKE_OFF
from aqn_tune.ledger.broken import broke_off as broke_off
from aqn_tune.ledger.ledger import evaluation_id
from aqn_tune.ledger.rows import (
    CellRow,
    EvaluationRow,
    MechanismRow,
    OwnTrainingRow,
    RecordedRow,
    TrainingRow,
)
from aqn_tune.study.cells import Cell
from aqn_tune.study.runs import Pack

RowListener = Callable[[Sequence[RecordedRow]], None]
"""Is given rows right after they are on disk."""

_NOT_COMPARED = {
    "seconds",
    "eval_seconds",
    "generate_seconds",
    "compile_seconds",
    "pack",
    "pack_size",
    "lockstep",
    "lockstep_limit",
    "source",
}


class Recorder:
    """The only writer of a ledger while a stage runs.

    After a restart or a worker's death a pack reports rungs that the ledger may hold already. Those
    rows must be equal to the recorded ones and are not written again.
    """

    def __init__(self, ledger: Ledger, root: Path, listeners: Iterable[RowListener] = ()) -> None:
        self.ledger = ledger
        self._root = root
        self._listeners = tuple(listeners)
        self._untold: list[RecordedRow] | None = None
        """Rows that listeners are told at the end of `together`; None outside it."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave the listeners behind: they hold open files, and no copy may write."""
        return {"ledger": self.ledger, "_root": self._root, "_listeners": (), "_untold": None}

    def write(self, rows: Iterable[RecordedRow]) -> None:
        """Append `rows` as they are, wait until they are on disk, and tell the listeners."""
        rows = list(rows)
        if not rows:
            return
        self.ledger.append(rows)
        if self._untold is None:
            self._tell(rows)
        else:
            self._untold += rows

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write what one event comes to at the end of the block, with one wait for the disk."""
        if self._untold is not None:
            yield
            return
        self._untold = []
        try:
            with self.ledger.together():
                yield
        finally:
            rows, self._untold = self._untold, None
        self._tell(rows)

    def _tell(self, rows: Sequence[RecordedRow]) -> None:
        if rows:
            for listener in self._listeners:
                listener(rows)

    def cells(self, cells: Iterable[Cell], *, generation: int = 0) -> None:
        """Write the cells that the ledger does not hold yet.

        Raises UserError when it holds one of them with another training.
        """
        rows = []
        for cell in cells:
            row = CellRow(
                stage=cell.stage,
                scenario=cell.scenario,
                arm=cell.arm,
                config=cell.config,
                replicate=cell.replicate,
                seed=cell.run.seed,
                generation=generation,
                training_key=cell.training_key,
            )
            known = self.ledger.cells.get(
                (row.stage, row.generation, row.scenario, row.arm, row.replicate)
            )
            if known is None:
                rows.append(row)
            elif known != row:
                raise UserError(
                    f"{self.ledger.path}: {row.stage}/{row.scenario}/{row.arm}/{row.replicate} is "
                    f"recorded with training {known.training_key}, the study now says "
                    f"{row.training_key}; the folder belongs to another version of the study or of "
                    "aqn_tune: start anew (--fresh)"
                )
        self.write(rows)

    def report(self, pack: Pack, rows: Iterable[EvaluationRow | TrainingRow]) -> None:
        """Write what a pack reported at a rung, without what is recorded already.

        Raises UserError when a row of the same pack differs from the recorded one: the training is
        not deterministic, and a continued study could not be trusted. The same goes for a run that a
        cell trains for itself (`--no-reuse`), whatever pack the recorded one ran in. Two other packs
        that hold the same training, or one that went through in other parts (`TrainingRow.lockstep`),
        may differ by rounding; the first one recorded holds.
        """
        new: list[RecordedRow] = []
        rows = tuple(rows)
        lockstep = {row.training_key: row.lockstep for row in rows if isinstance(row, TrainingRow)}
        for row in rows:
            key = row.training_key
            again = _Again(pack, key, self._same_pack(key, pack, lockstep.get(key)))
            if isinstance(row, EvaluationRow):
                if row.final != (row.step == pack.runs[0].training.steps):
                    raise ValueError(
                        f"pack {pack.name}: step {row.step} of {pack.runs[0].training.steps} was "
                        f"reported as {'final' if row.final else 'not final'}"
                    )
                known_evaluation = self.ledger.evaluations.get(evaluation_id(row))
                if known_evaluation is None:
                    new.append(row)
                else:
                    again.check(known_evaluation, row)
            elif pack.rungs != (0,):
                # The base pack takes no step: its rows are no state of the training that it names.
                self._observations(again, row, new)
                row = row.model_copy(update={"observations": ()})
                self._training(again, self._with_relative_adapter(row), new)
        self.write(new)

    def _observations(self, again: _Again, row: TrainingRow, new: list[RecordedRow]) -> None:
        """Give what was seen of a training rows of its own, ahead of the row that says it got there."""
        for seen in row.observations:
            mechanism = MechanismRow(training_key=row.training_key, **dict(seen))
            known = self.ledger.mechanism.get((row.training_key, seen.step))
            if known is None:
                new.append(mechanism)
            else:
                again.check(known, mechanism)

    def _training(self, again: _Again, row: TrainingRow, new: list[RecordedRow]) -> None:
        known = self.ledger.trainings.get(row.training_key)
        same_rung = self.ledger.rungs.get((row.training_key, row.step_reached))
        if again.cell and known is not None and _contradict(known, row):
            again.check(known, row)
        recorded = (
            known is None
            or broke_off(known)
            or row.step_reached > known.step_reached
            or (known.status == "unfinished" and row.status != "unfinished")
        )
        if recorded:
            new.append(row)
        elif same_rung is not None and not _one_failed_later(same_rung, row):
            again.check(same_rung, row)
        if again.cell:
            self._own(again.cell, row, new, recorded=recorded)

    def _own(self, cell: str, row: TrainingRow, new: list[RecordedRow], *, recorded: bool) -> None:
        """Say that a cell has brought a run of its own to a rung, unless it is said already."""
        known = self.ledger.own_trainings.get((row.training_key, cell))
        if known is not None and (
            known.status != "unfinished"
            or (row.step_reached <= known.step_reached and row.status == "unfinished")
        ):
            return
        new.append(
            OwnTrainingRow(
                training_key=row.training_key,
                cell=cell,
                stage=row.stage,
                step_reached=row.step_reached,
                status=row.status,
                recorded=recorded,
                seconds=0.0 if recorded else row.seconds,
                pack=row.pack,
                pack_size=row.pack_size,
            )
        )

    def _same_pack(self, training_key: str, pack: Pack, lockstep: int | None) -> bool:
        known = self.ledger.trainings.get(training_key)
        if known is None or known.source:
            return False
        same = (known.pack, known.pack_size) == (pack.name, len(pack.runs))
        return same and lockstep in (None, known.lockstep)

    def _with_relative_adapter(self, row: TrainingRow) -> TrainingRow:
        adapter = Path(row.adapter)
        if not row.adapter or not adapter.is_relative_to(self._root):
            return row
        return row.model_copy(update={"adapter": adapter.relative_to(self._root).as_posix()})

    def broke(self, pack: Pack, training_keys: Iterable[str], error: str) -> None:
        """Write that the trainings of a pack, as far as they had not ended, broke off."""
        rows: list[RecordedRow] = []
        for run, key in zip(pack.runs, training_keys, strict=True):
            # Another cell may train the same later and finish it: this one has not.
            rows += self._own_broke(pack, key, error)
            known = self.ledger.trainings.get(key)
            if known is not None and known.status != "unfinished" and not broke_off(known):
                continue
            rows.append(
                TrainingRow(
                    training_key=key,
                    stage=pack.stage,
                    seed=run.seed,
                    steps=run.training.steps,
                    step_reached=known.step_reached if known else 0,
                    status="failed",
                    error=BROKE_OFF + error,
                    seconds=0.0,
                    pack=pack.name,
                    pack_size=len(pack.runs),
                )
            )
        self.write(rows)

    def _own_broke(self, pack: Pack, key: str, error: str) -> list[RecordedRow]:
        """Return the row of a run that broke off for its cell; nothing where the cell shares its run."""
        cell = pack.own.get(key, "")
        known = self.ledger.own_trainings.get((key, cell))
        if not cell or (known is not None and known.status != "unfinished"):
            return []
        return [
            OwnTrainingRow(
                training_key=key,
                cell=cell,
                stage=pack.stage,
                step_reached=known.step_reached if known else 0,
                status="unfinished",
                recorded=False,
                seconds=0.0,
                pack=pack.name,
                pack_size=len(pack.runs),
                error=BROKE_OFF + error,
            )
        ]


def _contradict(known: TrainingRow, row: TrainingRow) -> bool:
    """Return whether of two runs of one training one failed at a step that the other has survived."""
    failed, other = (known, row) if known.status == "failed" else (row, known)
    if failed.status != "failed" or other.status == "failed" or broke_off(failed):
        return False
    return other.status == "finished" or other.step_reached > failed.step_reached


def _one_failed_later(known: TrainingRow, row: TrainingRow) -> bool:
    """Return whether rows of equal steps are of different rungs, because a run failed between them.

    A run that failed is reported at every later rung, with no step since.
    """
    if known.status == row.status == "failed":
        return not row.train_losses
    return {known.status, row.status} == {"failed", "unfinished"}


class _Again(NamedTuple):
    """A training whose rows may have been recorded before."""

    pack: Pack
    """The pack that reports them now."""
    training_key: str
    same_pack: bool
    """Whether it is the one that reported them before."""

    @property
    def cell(self) -> str:
        """The cell that this run is trained for alone, empty when it is shared."""
        return self.pack.own.get(self.training_key, "")

    def check(self, known: RecordedRow, row: RecordedRow) -> None:
        """Raise UserError when `row` has to be the one that is `known` and differs from it."""
        if not self.cell and not self.same_pack:
            return
        old, new = (one.model_dump(mode="json", exclude=_NOT_COMPARED) for one in (known, row))
        if self.cell:
            # Where an adapter lies is no result: every cell that trains for itself has its own.
            old.pop("adapter", None)
            new.pop("adapter", None)
        if old == new:
            return
        fields = ", ".join(f"{k}: {old[k]} / {new[k]}" for k in old if old[k] != new[k])
        if self.cell:
            raise UserError(
                f"{self.cell}: trained for itself (--no-reuse) it came to other numbers than those "
                f"recorded for training {self.training_key} ({fields}). The same training must "
                "give the same numbers: was the ledger edited, or is this another machine or "
                "another version? On a GPU, with compiled layers, with an odd number of rows in a batch "
                "and with a max_length that is no multiple of 8, packs round differently; --pack 1 "
                "trains every run alone. Start anew with --fresh"
            )
        raise UserError(
            f"pack {self.pack.name}: a repeated training gave other numbers than those recorded "
            f"({fields}). The same training must give the same numbers: was the ledger edited, or "
            "is this another machine or another version? Start anew with --fresh"
        )
