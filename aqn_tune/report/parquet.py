"""`runs.parquet`: one line per cell and condition at the last step, for pandas and friends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from aqn_tune.ledger.rows import CellRow
from aqn_tune.report.results import Results
from aqn_tune.study.runs import ConditionName, Split


def run_lines(results: Results) -> list[dict[str, Any]]:
    """Return the lines; a run that failed, was stopped or has not ended has null for its numbers.

    Columns: stage, generation, scenario, during, one per swept key (`sweep_threshold`), arm,
    config, replicate, seed, training_key, condition (clean or faulty), status, error, step (at
    which the numbers were taken), steps (meant), loss (nats per answer token), exact_match (0..1, by
    teacher forcing), generated_exact_match and answer_match (0..1, of what the model wrote;
    `confirm.generate`), rows, draws (of the faults), loss_sd_over_draws and exact_match_sd_over_draws,
    affected_fraction and relative_error (of the first fault), seconds, source (folder and pack of
    another study that trained it, empty for this one), adapter.
    """
    return [
        _line(results, cell, condition)
        for cell in results.cells
        for condition in ("clean", "faulty")
    ]


def _line(results: Results, cell: CellRow, condition: ConditionName) -> dict[str, Any]:
    scenario = results.scenario(cell.scenario)
    training = results.trainings.get(cell.training_key)
    status = training.status if training else "missing"
    split: Split = "validation" if cell.stage == "search" else "test"
    row = None
    if training is not None and status == "finished":
        where = cell.scenario if condition == "faulty" else ""
        row = results.evaluation(cell.training_key, training.steps, condition, where, split)
    fault = row.faults[0] if row and row.faults else None
    sweep = {f"sweep_{k}": v for k, v in scenario.values.items() if k != "during"}
    return {
        "stage": cell.stage,
        "generation": cell.generation,
        "scenario": cell.scenario,
        "during": scenario.spec.during,
        **sweep,
        "arm": cell.arm,
        "config": cell.config,
        "replicate": cell.replicate,
        # Seeds have 63 bits: as text no reader can round them.
        "seed": str(cell.seed),
        "training_key": cell.training_key,
        "condition": condition,
        "status": status,
        "error": training.error if training else "",
        "step": row.step if row else None,
        "steps": training.steps if training else None,
        "loss": row.loss if row else None,
        "exact_match": row.exact_match if row else None,
        "generated_exact_match": row.generated_exact_match if row else None,
        "answer_match": row.answer_match if row else None,
        "rows": row.rows if row else None,
        "draws": row.draws if row else None,
        "loss_sd_over_draws": row.loss_sd if row else None,
        "exact_match_sd_over_draws": row.exact_match_sd if row else None,
        "affected_fraction": fault.affected_fraction if fault else None,
        "relative_error": fault.relative_error if fault else None,
        "seconds": results.seconds.get(cell.training_key),
        "source": training.source if training else "",
        "adapter": training.adapter if training else "",
    }


NUMBERS = (
    "loss",
    "exact_match",
    "generated_exact_match",
    "answer_match",
    "loss_sd_over_draws",
    "exact_match_sd_over_draws",
    "affected_fraction",
    "relative_error",
    "seconds",
)
COUNTS = ("generation", "replicate", "step", "steps", "rows", "draws")


def write_parquet(results: Results, path: Path) -> None:
    """Write the lines; the file is replaced in one step."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = run_lines(results)
    columns: dict[str, Any] = {}
    names = list(dict.fromkeys(name for line in lines for name in line))
    for name in names or [*COUNTS, *NUMBERS]:
        kind = pa.float64() if name in NUMBERS else pa.int64() if name in COUNTS else None
        columns[name] = pa.array([line.get(name) for line in lines], type=kind)
    draft = path.with_name(path.name + ".tmp")
    pq.write_table(pa.table(columns), draft)
    os.replace(draft, path)
