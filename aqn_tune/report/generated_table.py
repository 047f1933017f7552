"""What the confirmed models write by themselves, beside what they predict behind the true tokens."""

from __future__ import annotations

from collections.abc import Sequence

from aqn_tune.ledger.rows import EvaluationRow
from aqn_tune.report.device_tables import faulty_evaluations
from aqn_tune.report.results import Results
from aqn_tune.report.scenario_tables import sweep_label
from aqn_tune.report.table import Cell, Column, Table
from aqn_tune.report.text import percent_with_sd, spread
from aqn_tune.study.scenario import During


def generated_tables(results: Results, during: During) -> tuple[Table, ...]:
    """Return the shares of right answers under the fault; no table where nothing was generated."""
    rows: list[tuple[Cell, ...]] = []
    for scenario, evidence in results.evidence_of(during):
        label = sweep_label(scenario)
        for arm in evidence.arms:
            found = faulty_evaluations(results, scenario.name, arm.arm)
            if not any(row.generated_exact_match is not None for row in found):
                continue
            rows.append((label, arm.arm, *_shares(found)))
            label = ""
    if not rows:
        return ()
    columns = (
        Column("scenario", align="left"),
        Column("arm", align="left"),
        Column("exact match, teacher-forced"),
        Column("exact match, written"),
        Column("right final answer, written"),
    )
    note = (
        "Under the fault, mean over seeds and their standard deviation. Teacher-forced: every token of the "
        "answer is the most likely one behind the true tokens. Written: the model decodes greedily, token "
        "by token; the two agree unless a fault looks at what else is in the batch."
    )
    return (Table("Written answers", columns, tuple(rows), (note,)),)


def _shares(rows: Sequence[EvaluationRow]) -> tuple[Cell, ...]:
    columns: tuple[list[float | None], ...] = (
        [row.exact_match for row in rows],
        [row.generated_exact_match for row in rows],
        [row.answer_match for row in rows],
    )
    return tuple(percent_with_sd(spread(column)) for column in columns)
