"""How much work a stage is: trainings, steps and evaluations, counted before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aqn_tune.search.rungs import rung_steps
from aqn_tune.study.calibration import Costs
from aqn_tune.study.cells import ArmCells
from aqn_tune.study.packing import jobs_of
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study
from aqn_tune.study.seeds import Stage, replicate_seed
from aqn_tune.tasks import WordProblems


@dataclass(frozen=True)
class Work:
    """An amount of work."""

    trainings: int
    steps: int
    """Optimiser steps, summed over replicates."""
    evaluations: int
    """Passes over the split; an evaluation with several draws counts as many."""
    rows: int
    """Evaluated rows, summed over evaluations."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.trainings + other.trainings,
            self.steps + other.steps,
            self.evaluations + other.evaluations,
            self.rows + other.rows,
        )


NOTHING = Work(0, 0, 0, 0)


OVERHEAD_SECONDS = 20.0
"""Time to start Ray and its workers and to write the report, added to an estimate."""


def seconds_of(works: Sequence[Work], costs: Costs, workers: int) -> float:
    """Return how long stages take on so many workers at a time."""
    busy = sum(w.steps * costs.seconds_per_step + w.rows * costs.seconds_per_row for w in works)
    return busy / workers + OVERHEAD_SECONDS


@dataclass(frozen=True)
class StagePlan:
    """A stage of the study."""

    cells: int
    """Arm x scenario x replicate of the arms known now."""
    unique: int
    """Trainings that serve those cells: as many as the cells where nothing is reused."""
    seeds: tuple[int, ...]
    split_rows: int
    """Rows of the split on which the stage evaluates."""
    expected: Work
    """With ASHA stopping its share; whatever is not known yet counted in full."""
    most: Work
    """With nothing stopped."""


def search_plan(study: Study, scenarios: Sequence[Scenario], cells: ArmCells) -> StagePlan:
    """Return the work of the search: its controls, and its configs as far as ASHA lets them go.

    ASHA is counted as keeping exactly one in `reduction_factor` at each rung. What other studies have
    trained already is counted as if they had not.
    """
    if study.search is None:
        raise ValueError("the study has no search")
    rungs, rows = rung_steps(study.search, study.training.steps), split_rows(study, "search")
    controls = _trainings_work(study, cells, rungs, rows) + _base_work(cells, rows)
    replicates = study.search.replicates
    expected = most = NOTHING
    for passes in _passes(scenarios, cells):
        alive = float(study.search.configs)
        previous = 0
        for rung in rungs:
            started = round(alive) * replicates
            full = study.search.configs * replicates
            first = previous == 0
            expected += _rung_work(started, rung - previous, passes, rows, first)
            most += _rung_work(full, rung - previous, passes, rows, first)
            alive, previous = max(alive / study.search.reduction_factor, min(alive, 1)), rung
    return _stage_plan(study, "search", cells, rows, controls + expected, controls + most)


def _rung_work(trainings: int, steps: int, passes: int, rows: int, first: bool) -> Work:
    """Return what it takes to bring trainings to a rung and evaluate each in so many passes."""
    evaluations = trainings * passes
    return Work(trainings if first else 0, trainings * steps, evaluations, evaluations * rows)


def _passes(scenarios: Sequence[Scenario], cells: ArmCells) -> tuple[int, ...]:
    """Return how often an evaluation goes over the split in each scenario, clean and faulty."""
    conditions = {cell.scenario: cell.run.conditions for cell in cells.cells}
    return tuple(sum(c.draws for c in conditions[scenario.name]) for scenario in scenarios)


def confirm_plan(study: Study, scenarios: Sequence[Scenario], cells: ArmCells) -> StagePlan:
    """Return the work of the confirmation, with every finalist and twin that it may bring."""
    rungs, rows = (study.training.steps,), split_rows(study, "confirm")
    work = _trainings_work(study, cells, rungs, rows) + _base_work(cells, rows)
    # A finalist and its `global` twin; its `none` twin is `fault_only` unless the search may change
    # more than the noise, or nothing is shared.
    dimensions = study.search.space.dimensions if study.search else {}
    shared = study.compute.reuse and not {"learning_rate", "rank"} & set(dimensions)
    arms = 2 if shared else 3
    finalists = study.finalist_count() * arms * study.confirm.replicates
    for passes in _passes(scenarios, cells):
        work += _rung_work(finalists, study.training.steps, passes, rows, True)
    return _stage_plan(study, "confirm", cells, rows, work, work)


def _trainings_work(study: Study, cells: ArmCells, rungs: Sequence[int], rows: int) -> Work:
    runs = [job.run for job in jobs_of(cells.cells, reuse=study.compute.reuse)]
    evaluations = sum(c.draws for run in runs for c in run.conditions) * len(rungs)
    return Work(len(runs), len(runs) * rungs[-1], evaluations, evaluations * rows)


def _base_work(cells: ArmCells, rows: int) -> Work:
    """Return the evaluations of the untrained base: clean, and faulty in each scenario."""
    draws = {(c.name, c.scenario): c.draws for cell in cells.cells for c in cell.run.conditions}
    evaluations = sum(draws.values())
    return Work(0, 0, evaluations, evaluations * rows)


def _stage_plan(
    study: Study, stage: Stage, cells: ArmCells, rows: int, expected: Work, most: Work
) -> StagePlan:
    searching = stage == "search" and study.search is not None
    replicates = study.search.replicates if searching and study.search else study.confirm.replicates
    generation = 0 if stage == "search" else study.confirm.generation
    return StagePlan(
        cells=len(cells.cells),
        unique=len(jobs_of(cells.cells, reuse=study.compute.reuse)),
        seeds=tuple(
            replicate_seed(study.seed, stage, index, generation=generation)
            for index in range(replicates)
        ),
        split_rows=rows,
        expected=expected,
        most=most,
    )


def split_rows(study: Study, stage: Stage) -> int:
    """Return how many rows a stage evaluates on. Reads the files of a task that has files."""
    if isinstance(study.task, WordProblems):
        return study.task.validation_rows if stage == "search" else study.task.test_rows
    splits = study.task.splits()
    return len(splits.validation if stage == "search" else splits.test)
