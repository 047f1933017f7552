"""What the device did beyond its faults: number formats, and how much a fault's draw matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from aqn_tune.evidence.assemble import ScenarioEvidence
from aqn_tune.ledger.rows import EvaluationRow, QuantizerMeasure
from aqn_tune.report.results import Results
from aqn_tune.report.scenario_tables import NATS, arm_of, fault_text, sweep_label
from aqn_tune.report.table import Cell, Column, Table
from aqn_tune.report.text import NONE, number, percent
from aqn_tune.study.scenario import During, Scenario


def faulty_evaluations(results: Results, scenario: str, arm: str) -> tuple[EvaluationRow, ...]:
    """Return the final faulty evaluations of an arm's confirmed seeds."""
    evidence = next(e for e in results.evidence.scenarios if e.scenario == scenario)
    found = arm_of(evidence, arm)
    rows = [
        results.evaluation(cell.training_key, cell.step, "faulty", scenario, "test")
        for cell in (found.seeds if found else ())
        if cell.step is not None
    ]
    return tuple(row for row in rows if row is not None)


def device_tables(results: Results, during: During) -> tuple[Table, ...]:
    """Return the tables that have something to say."""
    found = (quantizer_table(results, during), draws_table(results, during))
    return tuple(table for table in found if table is not None)


def effect_text(results: Results, scenario: Scenario, evidence: ScenarioEvidence) -> str:
    """Return in a phrase what the device did to the values: the share that its faults changed, and the
    mean SQNR of its number formats."""
    phrases = []
    if evidence.faults:
        phrases.append(f"{fault_text(evidence, 'affected_fraction')} of values affected")
    rows = faulty_evaluations(results, scenario.name, "fault_only")
    ratios = [m.sqnr_db for row in rows for m in row.quantizers if m.sqnr_db is not None]
    if ratios:
        phrases.append(f"SQNR {number(fmean(ratios), 1)} dB")
    return ", ".join(phrases) or "effect not measured"


def quantizer_table(results: Results, during: During) -> Table | None:
    """Return what each number format costs its operands, None where nothing is quantized."""
    rows: list[tuple[Cell, ...]] = []
    for scenario, _ in results.evidence_of(during):
        measures = [
            m
            for row in faulty_evaluations(results, scenario.name, "fault_only")
            for m in row.quantizers
        ]
        for kind in dict.fromkeys((m.format, m.operand) for m in measures):
            own = [m for m in measures if (m.format, m.operand) == kind]
            label = (
                sweep_label(scenario) if not rows or rows[-1][0] != sweep_label(scenario) else ""
            )
            rows.append((label, *kind, *_quality(own)))
    if not rows:
        return None
    columns = (
        Column("scenario", align="left"),
        Column("format", align="left"),
        Column("operand", align="left"),
        Column("SQNR, mean over layers", "dB"),
        Column("worst layer", "dB"),
        Column("zeros"),
        Column("clipped"),
    )
    note = (
        "Of the fault_only arm in the confirmation, mean over seeds. SQNR is the energy of the values "
        "over that of their quantization error; zeros are values that the format cannot tell from 0; "
        "clipped values lie beyond the largest that their scale represents."
    )
    return Table("Number formats", columns, tuple(rows), (note,))


def _quality(measures: Sequence[QuantizerMeasure]) -> tuple[Cell, ...]:
    by_layer: dict[int, list[float]] = {}
    for measure in measures:
        if measure.sqnr_db is not None:
            by_layer.setdefault(measure.layer, []).append(measure.sqnr_db)
    layers = {layer: fmean(values) for layer, values in by_layer.items()}
    worst = min(layers, key=layers.__getitem__) if layers else None
    return (
        number(fmean(layers.values()), 1) if layers else NONE,
        f"{number(layers[worst], 1)} (layer {worst})" if worst is not None else NONE,
        percent(fmean(measure.zero_fraction for measure in measures)),
        percent(fmean(measure.clipped_fraction for measure in measures)),
    )


def draws_table(results: Results, during: During) -> Table | None:
    """Return how much the loss of a trained model changes from one draw of the fault, or one unseen
    device, to the next; None where every evaluation has a single draw."""
    rows: list[tuple[Cell, ...]] = []
    for scenario, evidence in results.evidence_of(during):
        label = sweep_label(scenario)
        for arm in evidence.arms:
            found = faulty_evaluations(results, scenario.name, arm.arm)
            spreads = [row.loss_sd for row in found]
            matches = [row.exact_match_sd for row in found]
            if not found or found[0].draws < 2:
                continue
            between = [row.loss for row in found if row.loss is not None]
            rows.append(
                (
                    label,
                    arm.arm,
                    str(found[0].draws),
                    number(_root_mean_square(spreads)),
                    percent(_root_mean_square(matches)),
                    number(_sd(between)),
                )
            )
            label = ""
    if not rows:
        return None
    columns = (
        Column("scenario", align="left"),
        Column("arm", align="left"),
        Column("draws"),
        Column("sd of the loss over draws", NATS),
        Column("sd of exact match over draws"),
        Column("sd of the loss over seeds", NATS),
    )
    note = (
        "Each trained model meets several draws of the random faults, or several unseen devices; its "
        "number is their mean. The spread over draws is pooled over seeds (root mean square), beside "
        "the spread of those means over training seeds, which is what the tests are about."
    )
    return Table("Draws of the fault", columns, tuple(rows), (note,))


def _root_mean_square(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return math.sqrt(fmean(value * value for value in known))


def _sd(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = fmean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
