"""What was run: the search, what failed, what could not exist, what it cost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from aqn_tune.report.results import FailedRun, Results, SearchedConfig
from aqn_tune.report.scenario_tables import NATS
from aqn_tune.report.table import Cell, Column, Mark, Table
from aqn_tune.report.text import NONE, count, duration, number
from aqn_tune.report.verdict_tables import params_text

SHOWN_PER_SCENARIO = 3
SHOWN_FAILED = 50
"""Enough to see what they have in common; a page with a thousand of them shows nothing else."""


def search_table(results: Results) -> Table | None:
    """Return the best finished configs of each scenario and what became of the others."""
    if not results.searched:
        return None
    rows: list[tuple[Cell, ...]] = []
    for scenario in results.scenarios:
        own = [one for one in results.searched if one.scenario == scenario.name]
        best = sorted(
            (one for one in own if one.state == "finished" and one.value is not None), key=_value
        )[:SHOWN_PER_SCENARIO]
        states = Counter(one.state for one in own)
        summary = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
        if not best:
            rows.append((scenario.name, summary or "no config yet", NONE, NONE, NONE))
        for rank, one in enumerate(best):
            head = (scenario.name, summary) if rank == 0 else ("", "")
            rows.append((*head, one.config, number(one.value), params_text(one.params)))
    columns = (
        Column("scenario", align="left"),
        Column("configs", align="left"),
        Column("best finished", align="left"),
        Column("faulty validation loss", NATS),
        Column("parameters", align="left"),
    )
    note = (
        "Exploration on the search seeds; it makes no claims. Only configs that reached the last "
        "rung are ranked, so that no ranking mixes training lengths."
    )
    return Table("Search", columns, tuple(rows), (note,))


def _value(one: SearchedConfig) -> float:
    return float("inf") if one.value is None else one.value


def failed_table(results: Results) -> Table | None:
    """Return the runs that failed, those of the confirmation first; None when none did."""
    if not results.failed:
        return None
    # An arm without a mean is a larger loss than a config of the search.
    failed = sorted(results.failed, key=lambda run: run.stage != "confirm")
    rows = tuple(
        (
            Mark(run.stage, "failed"),
            ", ".join(run.cells[:4]) + (f" and {len(run.cells) - 4} more" if run.cells[4:] else "")
            or run.training_key,
            str(run.step_reached),
            run.error,
        )
        for run in failed[:SHOWN_FAILED]
    )
    columns = (
        Column("stage", align="left"),
        Column("cells without a number", align="left"),
        Column("step"),
        Column("why", align="left"),
    )
    note = "A failed run never becomes a number: its arm has no mean and its contrasts no test."
    return Table("Failed runs", columns, rows, (note, *_further(failed)))


def _further(failed: Sequence[FailedRun]) -> Iterator[str]:
    """Yield how many runs are not shown, by what ended them, and where all are."""
    if len(failed) <= SHOWN_FAILED:
        return
    # The same failure at another step is the same failure.
    reasons = Counter(re.sub(r" at step \d+", "", run.error) for run in failed)
    most = "; ".join(f"{n:,} times: {error}" for error, n in reasons.most_common(3))
    yield (
        f"{len(failed) - SHOWN_FAILED:,} more are not shown; runs.parquet has a line for each of their "
        f"cells. What ended most of them: {most}."
    )


def missing_table(results: Results) -> Table | None:
    """Return the arms that do not exist in a scenario, None when all do."""
    if not results.not_available:
        return None
    rows = tuple((one.scenario, one.arm, one.reason) for one in results.not_available)
    columns = (
        Column("scenario", align="left"),
        Column("arm", align="left"),
        Column("why", align="left"),
    )
    return Table("Arms that are not available", columns, rows)


def cost_table(results: Results) -> Table:
    """Return what each stage has spent."""
    cells = Counter(cell.stage for cell in results.cells)
    rows = tuple(
        (
            cost.stage,
            f"{cells[cost.stage]:,}",
            f"{cost.trainings:,}",
            f"{cost.failed:,}",
            f"{cost.steps:,}",
            duration(cost.seconds),
        )
        for cost in results.evidence.costs
    )
    columns = (
        Column("stage", align="left"),
        Column("cells"),
        Column("trainings"),
        Column("failed"),
        Column("optimiser steps"),
        Column("training and evaluation"),
    )
    total = sum(cost.seconds for cost in results.evidence.costs)
    note = (
        "A cell is one arm, scenario and seed; cells that train alike share a training. Time is "
        "the sum over trainings of their share of a worker's time: "
        f"{duration(total)} in all, for {count(len(results.scenarios), 'scenario')}."
    )
    return Table("Cost", columns, rows, (note, *_not_counted(results)))


def _not_counted(results: Results) -> Iterator[str]:
    """Yield what the table does not hold: what cost nothing, and what gave no number."""
    for folder, trainings in results.reused.items():
        yield (
            f"{count(trainings, 'training')} of the search came from {folder}, which has trained the "
            "same with the same code: not counted here."
        )
    again = results.repeated
    if again.trainings:
        yield (
            f"{count(again.trainings, 'training')} ({again.steps:,} optimiser steps, "
            f"{duration(again.seconds)}) only repeated what was recorded already, as asked "
            "(--no-reuse), and came to the same numbers: not counted here."
        )
