"""How much work a stage is: trainings, steps and evaluations, counted before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from math import ceil
from typing import NamedTuple

from aqn_tune.search.rungs import rung_steps
from aqn_tune.study.calibration import Costs
from aqn_tune.study.cells import ArmCells, Cell
from aqn_tune.study.packing import jobs_of, make_packs, pack_size
from aqn_tune.study.runs import Pack, Run
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


@dataclass(frozen=True)
class Part:
    """Packs of a stage that may run at a time; the next part waits for all of them."""

    packs: int
    largest: Work
    """None of them is more work than this."""


class Load(NamedTuple):
    """The work of a stage, and how it is divided among workers."""

    work: Work
    parts: tuple[Part, ...] = ()
    """Empty where it is not known: it then divides at will."""


def seconds_of(loads: Iterable[Load], costs: Costs, workers: int) -> float:
    """Return about how long stages take, one after another, on so many workers at a time.

    A pack takes one worker: a stage is never shorter than the largest packs of its parts.
    """
    stages = (max(_busy(load.work, costs) / workers, sum(_longest(load, costs))) for load in loads)
    return sum(stages) + OVERHEAD_SECONDS


def most_seconds_of(loads: Iterable[Load], costs: Costs, workers: int) -> float:
    """Return what `seconds_of` never exceeds, in whichever order the workers take the packs.

    Of two bounds that is the lower: every round as long as the largest pack, and an even share of everything
    else with the largest pack at the end.
    """
    return sum(_most_seconds(load, costs, workers) for load in loads) + OVERHEAD_SECONDS


def _most_seconds(load: Load, costs: Costs, workers: int) -> float:
    longest = _longest(load, costs)
    even = (_busy(load.work, costs) - sum(longest)) / workers + sum(longest)
    rounds = [ceil(part.packs / workers) for part in load.parts]
    in_rounds = sum(n * pack for n, pack in zip(rounds, longest, strict=True))
    return min(even, in_rounds) if load.parts else even


def _longest(load: Load, costs: Costs) -> list[float]:
    return [_busy(part.largest, costs) for part in load.parts]


def _busy(work: Work, costs: Costs) -> float:
    return work.steps * costs.seconds_per_step + work.rows * costs.seconds_per_row


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
    parts: tuple[Part, ...]
    """What of it may run at a time."""


def search_plan(study: Study, scenarios: Sequence[Scenario], cells: ArmCells) -> StagePlan:
    """Return the work of the search: its controls, and its configs as far as ASHA lets them go.

    ASHA is counted as keeping exactly one in `reduction_factor` at each rung. What other studies have
    trained already is counted as if they had not.
    """
    if study.search is None:
        raise ValueError("the study has no search")
    rungs, rows = rung_steps(study.search, study.training.steps), split_rows(study, "search")
    base = _base_work(cells, rows)
    controls = _trainings_work(study, cells, rungs, rows) + base
    replicates = study.search.replicates
    packs = [_runs_work(pack.runs, rungs, rows) for pack in _packs(study, cells.cells)]
    count = len(packs) + study.search.configs * len(scenarios)
    expected = most = NOTHING
    for passes in _passes(scenarios, cells):
        packs.append(_rung_work(replicates, rungs[-1], passes * len(rungs), rows, True))
        alive = float(study.search.configs)
        previous = 0
        for rung in rungs:
            started = round(alive) * replicates
            full = study.search.configs * replicates
            first = previous == 0
            expected += _rung_work(started, rung - previous, passes, rows, first)
            most += _rung_work(full, rung - previous, passes, rows, first)
            alive, previous = max(alive / study.search.reduction_factor, min(alive, 1)), rung
    parts = (Part(1, base), Part(count, _largest(packs)))
    return _stage_plan(study, "search", cells, rows, controls + expected, controls + most, parts)


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
    base = _base_work(cells, rows)
    work = _trainings_work(study, cells, rungs, rows) + base
    # A finalist and its `global` twin; its `none` twin is `fault_only` unless the search may change
    # more than the noise, or nothing is shared.
    dimensions = study.search.space.dimensions if study.search else {}
    shared = study.compute.reuse and not {"learning_rate", "rank"} & set(dimensions)
    arms = 2 if shared else 3
    per_seed = study.finalist_count() * arms
    parts = [Part(1, base)]
    for first, end in pairwise((0, *(study.confirm.looks or (study.confirm.replicates,)))):
        known = _packs(study, [cell for cell in cells.cells if first <= cell.replicate < end])
        packs = [_runs_work(pack.runs, rungs, rows) for pack in known]
        coming = per_seed * (end - first) * len(scenarios)
        # Runs of different rank may need packs of their own.
        apart = per_seed * len(scenarios) if "rank" in dimensions else min(coming, 1)
        if coming:
            # They may join the packs of others.
            runs = min(pack_size(study), coming + sum(len(pack.runs) for pack in known))
            most = max(_passes(scenarios, cells))
            packs.append(_rung_work(runs, rungs[-1], most, rows, True))
        more = apart * ceil(coming / apart / pack_size(study)) if apart else 0
        parts.append(Part(len(known) + more, _largest(packs)))
    for passes in _passes(scenarios, cells):
        work += _rung_work(
            per_seed * study.confirm.replicates, study.training.steps, passes, rows, True
        )
    return _stage_plan(study, "confirm", cells, rows, work, work, tuple(parts))


def _packs(study: Study, cells: Sequence[Cell]) -> tuple[Pack, ...]:
    """Return the packs of cells, to count them and their runs by; where they are evaluated is left open."""
    jobs = jobs_of(cells, reuse=study.compute.reuse)
    return make_packs(
        jobs,
        stage="search",
        prefix="",
        size=pack_size(study),
        rungs=(study.training.steps,),
        split="validation",
    )


def _largest(works: Iterable[Work]) -> Work:
    """Return the most of everything that one of `works` has."""
    return Work(*(max(column) for column in zip(*map(astuple, works), strict=True)))


def _trainings_work(study: Study, cells: ArmCells, rungs: Sequence[int], rows: int) -> Work:
    runs = [job.run for job in jobs_of(cells.cells, reuse=study.compute.reuse)]
    return _runs_work(runs, rungs, rows)


def _runs_work(runs: Sequence[Run], rungs: Sequence[int], rows: int) -> Work:
    evaluations = sum(c.draws for run in runs for c in run.conditions) * len(rungs)
    return Work(len(runs), len(runs) * rungs[-1], evaluations, evaluations * rows)


def _base_work(cells: ArmCells, rows: int) -> Work:
    """Return the evaluations of the untrained base: clean, and faulty in each scenario."""
    draws = {(c.name, c.scenario): c.draws for cell in cells.cells for c in cell.run.conditions}
    evaluations = sum(draws.values())
    return Work(0, 0, evaluations, evaluations * rows)


def _stage_plan(
    study: Study,
    stage: Stage,
    cells: ArmCells,
    rows: int,
    expected: Work,
    most: Work,
    parts: tuple[Part, ...],
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
        parts=parts,
    )


def split_rows(study: Study, stage: Stage) -> int:
    """Return how many rows a stage evaluates on. Reads the files of a task that has files."""
    if isinstance(study.task, WordProblems):
        return study.task.validation_rows if stage == "search" else study.task.test_rows
    splits = study.task.splits()
    return len(splits.validation if stage == "search" else splits.test)
