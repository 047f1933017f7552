"""`runs.parquet`: one line per cell and condition at the last step, for pandas and friends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from aqn_tune.ledger.rows import CellRow
from aqn_tune.report.results import Results
from aqn_tune.study.runs import ConditionName, Split

FORMAT = 1
"""Raised when a column changes its meaning or goes away; in the file's metadata as `aqn_tune.format`."""

Kind = Literal["text", "integer", "number"]


class RunColumn(NamedTuple):
    """A column of `runs.parquet`."""

    name: str
    kind: Kind
    says: str


COLUMNS = (
    RunColumn("stage", "text", "search or confirm"),
    RunColumn("generation", "integer", "generation of confirm seeds; 0 in the search"),
    RunColumn("scenario", "text", "scenario, as the reports name it"),
    RunColumn("during", "text", "when the fault acts: both, eval or train"),
    RunColumn("arm", "text", "control, own arm, finalist or config"),
    RunColumn("config", "text", "config id of a searched arm; empty for controls"),
    RunColumn("replicate", "integer", "number of the seed, from 0; equal numbers are pairs"),
    RunColumn("seed", "text", "replicate seed; has 63 bits, so it is text: no reader rounds it"),
    RunColumn("training_key", "text", "identity of the training; cells that train alike share it"),
    RunColumn("condition", "text", "clean or faulty: the device that it was evaluated on"),
    RunColumn("status", "text", "finished, unfinished, failed or missing"),
    RunColumn("error", "text", "why it failed; empty otherwise"),
    RunColumn("step", "integer", "optimiser steps taken when the numbers were taken"),
    RunColumn("steps", "integer", "optimiser steps it was meant to take"),
    RunColumn("loss", "number", "answer cross-entropy, nats per answer token, mean over the draws"),
    RunColumn("exact_match", "number", "share of rows whose whole answer is predicted, teacher-forced, 0..1"),
    RunColumn("generated_exact_match", "number", "share of rows written exactly, 0..1 (confirm.generate)"),
    RunColumn("answer_match", "number", "share of rows with the right final number, 0..1 (confirm.generate)"),
    RunColumn("rows", "integer", "rows evaluated"),
    RunColumn("draws", "integer", "draws of the random faults, or unseen devices"),
    RunColumn("loss_sd_over_draws", "number", "standard deviation of the loss over draws; null for one"),
    RunColumn("exact_match_sd_over_draws", "number", "the same of exact_match"),
    RunColumn("affected_fraction", "number", "share of values that the first fault changed, 0..1"),
    RunColumn("relative_error", "number", "||delta|| / ||x|| of the first fault"),
    RunColumn("seconds", "number", "wall time: its share of its packs, training and evaluation"),
    RunColumn("source", "text", "folder and pack of another study that trained it; empty for this one"),
    RunColumn("adapter", "text", "exported adapter, relative to the study's folder; empty for none"),
)  # fmt: skip
SWEEP_PREFIX = "sweep_"
"""A column for each swept key of the scenario but `during`, behind it: `sweep_threshold`."""


def run_lines(results: Results) -> list[dict[str, Any]]:
    """Return the lines, by the names of `COLUMNS` and one `sweep_<key>` for each swept key.

    A run that failed, was stopped or has not ended has null for its numbers.
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
    sweep = {f"{SWEEP_PREFIX}{k}": v for k, v in scenario.values.items() if k != "during"}
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


def column_names(results: Results) -> list[str]:
    """Return the columns of a study's table, in order."""
    swept = dict.fromkeys(
        f"{SWEEP_PREFIX}{key}"
        for scenario in results.scenarios
        for key in scenario.values
        if key != "during"
    )
    names = [column.name for column in COLUMNS]
    place = names.index("during") + 1
    return [*names[:place], *swept, *names[place:]]


def write_parquet(results: Results, path: Path) -> None:
    """Write the lines; the file is replaced in one step.

    Every field carries what it says as `description`, and the file `aqn_tune.format`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"text": pa.string(), "integer": pa.int64(), "number": pa.float64()}
    known = {column.name: column for column in COLUMNS}
    lines = run_lines(results)
    fields, arrays = [], []
    for name in column_names(results):
        column = known.get(name)
        array = pa.array(
            [line.get(name) for line in lines], type=kinds[column.kind] if column else None
        )
        says = column.says if column else f"swept key {name.removeprefix(SWEEP_PREFIX)}"
        fields.append(pa.field(name, array.type, metadata={"description": says}))
        arrays.append(array)
    schema = pa.schema(fields, metadata={"aqn_tune.format": str(FORMAT)})
    draft = path.with_name(path.name + ".tmp")
    pq.write_table(pa.table(arrays, schema=schema), draft)
    os.replace(draft, path)
