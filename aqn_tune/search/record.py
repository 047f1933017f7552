"""Writing what workers report into the ledger, each row once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from aqn_tune.errors import UserError
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.broken import BROKE_OFF as BROKE_OFF
from aqn_tune.ledger.broken import broke_off as broke_off
from aqn_tune.ledger.ledger import evaluation_id
from aqn_tune.ledger.rows import (
    CellRow,
    EvaluationRow,
    MechanismRow,
    RecordedRow,
    TrainingRow,
)
from aqn_tune.study.cells import Cell
from aqn_tune.study.runs import Pack

RowListener = Callable[[Sequence[RecordedRow]], None]
"""Is given rows right after they are on disk."""

_OF_THE_PACK = {"seconds", "pack", "pack_size"}


class Recorder:
    """The only writer of a ledger while a stage runs.

    After a restart or a worker's death a pack reports rungs that the ledger may hold already. Those
    rows must be equal to the recorded ones and are not written again.
    """

    def __init__(self, ledger: Ledger, root: Path, listeners: Iterable[RowListener] = ()) -> None:
        self.ledger = ledger
        self._root = root
        self._listeners = tuple(listeners)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the listeners behind: they hold open files, and no copy may write."""
        return {"ledger": self.ledger, "_root": self._root, "_listeners": ()}

    def write(self, rows: Iterable[RecordedRow]) -> None:
        """Append `rows` as they are, wait until they are on disk, and tell the listeners."""
        rows = list(rows)
        if not rows:
            return
        self.ledger.append(rows)
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
        not deterministic, and a continued study could not be trusted. Two packs that hold the same
        training may differ by rounding; the first one recorded holds.
        """
        new: list[RecordedRow] = []
        for row in rows:
            if isinstance(row, EvaluationRow):
                if row.final != (row.step == pack.runs[0].training.steps):
                    raise ValueError(
                        f"pack {pack.name}: step {row.step} of {pack.runs[0].training.steps} was "
                        f"reported as {'final' if row.final else 'not final'}"
                    )
                known_evaluation = self.ledger.evaluations.get(evaluation_id(row))
                if known_evaluation is None:
                    new.append(row)
                elif known_evaluation != row and self._same_pack(row.training_key, pack):
                    raise _differs(pack, known_evaluation, row)
            elif pack.rungs != (0,):
                # The base pack takes no step: its rows are no state of the training that it names.
                self._observations(pack, row, new)
                row = row.model_copy(update={"observations": ()})
                self._training(pack, self._with_relative_adapter(row), new)
        self.write(new)

    def _observations(self, pack: Pack, row: TrainingRow, new: list[RecordedRow]) -> None:
        """Give what was seen of a training rows of its own, ahead of the row that says it got there."""
        for seen in row.observations:
            mechanism = MechanismRow(training_key=row.training_key, **dict(seen))
            known = self.ledger.mechanism.get((row.training_key, seen.step))
            if known is None:
                new.append(mechanism)
            elif known != mechanism and self._same_pack(row.training_key, pack):
                raise _differs(pack, known, mechanism)

    def _training(self, pack: Pack, row: TrainingRow, new: list[RecordedRow]) -> None:
        known = self.ledger.trainings.get(row.training_key)
        same_rung = self.ledger.rungs.get((row.training_key, row.step_reached))
        if (
            known is None
            or broke_off(known)
            or row.step_reached > known.step_reached
            or (known.status == "unfinished" and row.status != "unfinished")
        ):
            new.append(row)
        elif same_rung is not None and self._same_pack(row.training_key, pack):
            old, again = (r.model_dump(exclude=_OF_THE_PACK) for r in (same_rung, row))
            if old != again:
                raise _differs(pack, same_rung, row)

    def _same_pack(self, training_key: str, pack: Pack) -> bool:
        known = self.ledger.trainings.get(training_key)
        return known is not None and known.pack == pack.name and known.pack_size == len(pack.runs)

    def _with_relative_adapter(self, row: TrainingRow) -> TrainingRow:
        adapter = Path(row.adapter)
        if not row.adapter or not adapter.is_relative_to(self._root):
            return row
        return row.model_copy(update={"adapter": adapter.relative_to(self._root).as_posix()})

    def broke(self, pack: Pack, training_keys: Iterable[str], error: str) -> None:
        """Write that the trainings of a pack, as far as they had not ended, broke off."""
        rows = []
        for run, key in zip(pack.runs, training_keys, strict=True):
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


def _differs(pack: Pack, known: RecordedRow, row: RecordedRow) -> UserError:
    old, new = known.model_dump(mode="json"), row.model_dump(mode="json")
    fields = ", ".join(f"{k}: {old[k]} / {new[k]}" for k in old if old[k] != new[k])
    return UserError(
        f"pack {pack.name}: a repeated training gave other numbers than those recorded ({fields}). "
        "The same training must give the same numbers: was the ledger edited, or is this another "
        "machine or another version? Start anew with --fresh"
    )
