"""From ledger rows to losses: which number stands for which arm, scenario and seed.

Only finished trainings count, only at their last step. A training that failed, was stopped or has
not ended yet gives no loss, and `problem` says which it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from aqn_tune.ledger.broken import BROKE_OFF
from aqn_tune.ledger.rows import (
    CellRow,
    EvaluationRow,
    FaultMeasure,
    LedgerRow,
    SearchRow,
    TrainingRow,
)
from aqn_tune.study.runs import ConditionName, Split
from aqn_tune.study.seeds import Stage


class CellResult(NamedTuple):
    """The numbers of one cell: one arm under one scenario with one seed."""

    replicate: int
    seed: int
    config: str
    """Config id of a searched arm, empty for controls."""
    training_key: str
    """Empty when the cell has no run yet."""
    loss: float | None
    """Loss under the scenario's deployed faults; what contrasts compare."""
    clean_loss: float | None
    """Loss without faults."""
    exact_match: float | None
    """Exact match under the deployed faults; None where the loss is missing."""
    step: int | None
    """Steps trained when the numbers were taken."""
    faults: tuple[FaultMeasure, ...]
    """What each fault did in the faulty evaluation."""
    failed: bool
    """Whether the run failed, as against not being there yet."""
    problem: str
    """Why `loss` is missing; empty when it is not."""

    @property
    def ended(self) -> bool:
        """Whether its run has come to an end: in a number, or in a failure of its own."""
        return self.loss is not None or (self.failed and not self.problem.startswith(BROKE_OFF))


class Cost(NamedTuple):
    """What a stage has spent. Trainings that were taken from other studies cost nothing."""

    stage: Stage
    trainings: int
    failed: int
    steps: int
    """Optimiser steps over all trainings."""
    seconds: float
    """Wall seconds, each training with its share of its pack."""


class _EvaluationKey(NamedTuple):
    training_key: str
    condition: ConditionName
    scenario: str
    split: Split


class Tables:
    """An index over the rows of one ledger. Build it once and ask it for cells.

    Where the same thing was recorded twice (a study that was continued), the later row counts.

    Raises:
        ValueError: a search seed among the confirm seeds, or one replicate of a stage and
            generation with two seeds. Either would make every verdict of the study worthless.
    """

    def __init__(self, rows: Iterable[LedgerRow]) -> None:
        self._cells: dict[tuple[Stage, int, str, str], dict[int, CellRow]] = {}
        self._trainings: dict[str, TrainingRow] = {}
        self._training_rows: list[TrainingRow] = []
        self._final: dict[_EvaluationKey, EvaluationRow] = {}
        self._base: dict[Split, float] = {}
        for row in rows:
            if isinstance(row, SearchRow):
                continue
            if isinstance(row, CellRow):
                place = (row.stage, row.generation, row.scenario, row.arm)
                self._cells.setdefault(place, {})[row.replicate] = row
            elif isinstance(row, TrainingRow):
                self._add_training(row)
            else:
                self._add_evaluation(row)
        self._check_seeds()

    def _add_training(self, row: TrainingRow) -> None:
        self._training_rows.append(row)
        # The untrained base is recorded under the key of a run that has yet to be trained.
        if row.step_reached > 0 or row.status == "failed":
            self._trainings[row.training_key] = row

    def _add_evaluation(self, row: EvaluationRow) -> None:
        if row.step == 0:
            if row.condition == "clean" and row.loss is not None:
                self._base[row.split] = row.loss
        elif row.final:
            key = _EvaluationKey(row.training_key, row.condition, row.scenario, row.split)
            self._final[key] = row

    def _check_seeds(self) -> None:
        seeds: dict[tuple[Stage, int, int], int] = {}
        for (stage, generation, scenario, arm), cells in self._cells.items():
            for replicate, cell in cells.items():
                known = seeds.setdefault((stage, generation, replicate), cell.seed)
                if known != cell.seed:
                    raise ValueError(
                        f"{stage} replicate {replicate} has seed {cell.seed} in {scenario}/{arm} "
                        f"and {known} elsewhere: the arms are not paired"
                    )
        search = {seed for (stage, _, _), seed in seeds.items() if stage == "search"}
        confirm = {seed for (stage, _, _), seed in seeds.items() if stage == "confirm"}
        if search & confirm:
            raise ValueError(f"search seeds among the confirm seeds: {sorted(search & confirm)}")

    def base_clean_loss(self, split: Split) -> float | None:
        """Return the clean loss of the untrained base on a split, `None` if it was not measured."""
        return self._base.get(split)

    def arms(self, stage: Stage, scenario: str, *, generation: int = 0) -> tuple[str, ...]:
        """Return the arms that have cells in a scenario, in the order they were recorded."""
        return tuple(
            arm for s, g, name, arm in self._cells if (s, g, name) == (stage, generation, scenario)
        )

    def replicates(self, stage: Stage, scenario: str, arm: str, *, generation: int = 0) -> int:
        """Return how many replicates of an arm have been recorded."""
        return len(self._cells.get((stage, generation, scenario, arm), {}))

    def cells(
        self, stage: Stage, scenario: str, arm: str, *, replicates: int, generation: int = 0
    ) -> tuple[CellResult, ...]:
        """Return the results of the first `replicates` seeds of an arm, the missing ones too."""
        rows = self._cells.get((stage, generation, scenario, arm), {})
        split: Split = "validation" if stage == "search" else "test"
        return tuple(self._result(index, rows.get(index), split) for index in range(replicates))

    def _result(self, replicate: int, cell: CellRow | None, split: Split) -> CellResult:
        def without_loss(problem: str, *, failed: bool = False) -> CellResult:
            seed, config, key = (-1, "", "")
            if cell is not None:
                seed, config, key = cell.seed, cell.config, cell.training_key
            return CellResult(
                replicate, seed, config, key, None, None, None, None, (), failed, problem
            )

        if cell is None:
            return without_loss("no run")
        training = self._trainings.get(cell.training_key)
        if training is None:
            return without_loss("not finished")
        if training.status == "failed":
            return without_loss(training.error or "failed", failed=True)
        if training.status == "unfinished":
            return without_loss(f"unfinished at step {training.step_reached}")
        clean = self._final.get(_EvaluationKey(cell.training_key, "clean", "", split))
        faulty = self._final.get(_EvaluationKey(cell.training_key, "faulty", cell.scenario, split))
        if faulty is None or clean is None:
            return without_loss(f"not evaluated on the {split} split")
        not_finite = faulty.loss is None
        return CellResult(
            replicate=replicate,
            seed=cell.seed,
            config=cell.config,
            training_key=cell.training_key,
            loss=faulty.loss,
            clean_loss=clean.loss,
            exact_match=None if not_finite else faulty.exact_match,
            step=faulty.step,
            faults=faulty.faults,
            failed=not_finite,
            problem="faulty loss is not finite" if not_finite else "",
        )

    def costs(self) -> tuple[Cost, ...]:
        """Return what each stage has spent so far, search first."""
        stages: tuple[Stage, ...] = ("search", "confirm")
        return tuple(self._cost(stage) for stage in stages)

    def _cost(self, stage: Stage) -> Cost:
        trainings = [
            row for row in self._trainings.values() if row.stage == stage and not row.source
        ]
        return Cost(
            stage=stage,
            trainings=len(trainings),
            failed=sum(row.status == "failed" for row in trainings),
            steps=sum(row.step_reached for row in trainings),
            seconds=sum(row.seconds for row in self._training_rows if row.stage == stage),
        )
