"""What each scenario does, and what each arm makes of it."""

from __future__ import annotations

from aqn_tune.evidence.arms import ArmEvidence
from aqn_tune.evidence.assemble import ScenarioEvidence
from aqn_tune.evidence.regimes import Recovery
from aqn_tune.report.dose import dose_notes
from aqn_tune.report.results import Results
from aqn_tune.report.table import Cell, Column, Mark, Table
from aqn_tune.report.text import (
    NONE,
    Spread,
    confidence,
    interval,
    number,
    percent,
    percent_with_sd,
    plain,
    signed,
    spread,
    with_sd,
)
from aqn_tune.study.scenario import During, Scenario

NATS = "nats/token"
DURING: dict[During, str] = {
    "both": "fault in training and at deployment",
    "eval": "fault at deployment only",
    "train": "fault in training only",
}
"""What the three kinds of scenario are called in headings; they answer different questions."""


def sweep_label(scenario: Scenario) -> str:
    """Return what the sweep set, without `during`: `threshold 0.2`; the name when nothing else."""
    parts = [f"{key} {plain(v)}" for key, v in scenario.values.items() if key != "during"]
    return ", ".join(parts) or scenario.name


def arm_of(evidence: ScenarioEvidence, name: str) -> ArmEvidence | None:
    """Return an arm of a scenario by name, None where it has no runs."""
    return next((arm for arm in evidence.arms if arm.arm == name), None)


def loss(arm: ArmEvidence | None) -> Spread:
    """Return mean and sd of an arm's faulty loss."""
    return spread([cell.loss for cell in arm.seeds]) if arm else Spread(None, None)


def clean_loss(arm: ArmEvidence | None) -> Spread:
    """Return mean and sd of an arm's loss without faults."""
    return spread([cell.clean_loss for cell in arm.seeds]) if arm else Spread(None, None)


def exact_match(arm: ArmEvidence | None) -> Spread:
    """Return mean and sd of an arm's exact match under the faults."""
    return spread([cell.exact_match for cell in arm.seeds]) if arm else Spread(None, None)


def fault_text(evidence: ScenarioEvidence, what: str) -> str:
    """Return a measure of each fault under the fault_only arm, in the order of the study."""
    shares = [percent(getattr(fault, what)) for fault in evidence.faults]
    return ", ".join(shares) or NONE


def scenario_table(results: Results, during: During) -> Table:
    """Return one line per scenario: what the fault changes, what it costs, which regime that is."""
    deployed = during != "eval"
    columns = [
        Column("scenario", align="left"),
        Column("values affected"),
        Column("relative error"),
        Column("untrained base, loss", NATS),
        Column("untrained base, exact match"),
    ]
    if deployed:
        columns += [Column("clean arm met by the fault, loss", NATS), Column("its exact match")]
    columns += [
        Column("fault_only, loss", NATS),
        Column("fault_only, exact match"),
        Column("damage", "% of G"),
        Column("regime", align="left"),
    ]
    rows: list[tuple[Cell, ...]] = []
    for scenario, evidence in results.evidence_of(during):
        base = results.base("faulty", scenario.name)
        clean, fault_only = arm_of(evidence, "clean"), arm_of(evidence, "fault_only")
        regime = evidence.regime
        cells: list[Cell] = [
            sweep_label(scenario),
            fault_text(evidence, "affected_fraction"),
            fault_text(evidence, "relative_error"),
            number(base.loss if base else None),
            percent(base.exact_match if base else None),
        ]
        if deployed:
            cells += [with_sd(loss(clean)), percent_with_sd(exact_match(clean))]
        cells += [
            with_sd(loss(fault_only)),
            percent_with_sd(exact_match(fault_only)),
            percent(regime.damage),
            Mark(str(regime.regime), str(regime.regime)),
        ]
        rows.append(tuple(cells))
    notes = [_reference_note(results, during)]
    notes += [
        f"{sweep_label(scenario)}: regime undetermined, {evidence.regime.reason}."
        for scenario, evidence in results.evidence_of(during)
        if evidence.regime.reason
    ]
    notes += dose_notes(results.evidence_of(during))
    return Table(f"Scenarios: {DURING[during]}", tuple(columns), tuple(rows), tuple(notes))


def _reference_note(results: Results, during: During) -> str:
    evidence = results.evidence_of(during)[0][1]
    clean = arm_of(evidence, "clean")
    base = results.base("clean", "")
    match = results.clean_exact_match(clean) if clean else Spread(None, None)
    return (
        f"Without any fault: untrained base {number(base.loss if base else None)} {NATS}, "
        f"exact match {percent(base.exact_match if base else None)}; "
        f"clean arm {with_sd(clean_loss(clean))} {NATS}, exact match {percent_with_sd(match)}; "
        f"gain G = {number(evidence.regime.gain)} {NATS}. "
        "Values are mean ± sd over seeds on the test split; "
        "'values affected' and 'relative error' are those of the fault_only arm. "
        "Damage = (fault_only - clean) / G: below 5 % harmless, above 100 % catastrophic "
        "(worse than not training at all)."
    )


def recovery_table(results: Results, during: During) -> Table:
    """Return the share of the damage that each arm wins back, one column per scenario."""
    pairs = results.evidence_of(during)
    names = dict.fromkeys(
        arm.arm
        for _, evidence in pairs
        for arm in evidence.arms
        if arm.arm not in ("clean", "fault_only")
    )
    columns = (
        Column("arm", align="left"),
        *(Column(sweep_label(scenario)) for scenario, _ in pairs),
    )
    rows = tuple(
        (name, *(_recovery(arm_of(evidence, name)) for _, evidence in pairs)) for name in names
    )
    level = confidence(results.evidence.declared.alpha)
    note = (
        "Recovery = (fault_only - arm) / (fault_only - clean), a ratio of mean losses: "
        f"0 % no help, 100 % as good as no fault; [{level} bootstrap interval]. n/a in a harmless "
        "regime, where there is nothing to recover. No claim rests on this table; claims are the "
        "verdicts."
    )
    return Table(f"Recovery: {DURING[during]}", columns, rows, (note,))


def _recovery(arm: ArmEvidence | None) -> Cell:
    return recovery_text(arm.recovery) if arm else NONE


def recovery_text(recovery: Recovery) -> str:
    """Return `52 % [48, 56]`, `n/a` where it has no meaning."""
    if recovery.value is None:
        return NONE
    text = percent(recovery.value, 0)
    if recovery.low is None or recovery.high is None:
        return text
    return f"{text} {interval(100 * recovery.low, 100 * recovery.high, 0)}"


def arms_table(results: Results, scenario: Scenario, evidence: ScenarioEvidence) -> Table:
    """Return every arm of one scenario, relative to the clean arm and to fault_only."""
    columns = (
        Column("arm", align="left"),
        Column("faulty loss", NATS),
        Column("to clean"),
        Column("to fault_only"),
        Column("faulty exact match"),
        Column("to clean", "points"),
        Column("to fault_only", "points"),
        Column("clean loss", NATS),
        Column("clean exact match"),
        Column("seeds"),
        Column("same training as", align="left"),
    )
    clean, fault_only = arm_of(evidence, "clean"), arm_of(evidence, "fault_only")
    clean_match = results.clean_exact_match(clean).mean if clean else None
    rows: list[tuple[Cell, ...]] = []
    for arm in evidence.arms:
        own, match = loss(arm), exact_match(arm)
        present = sum(cell.loss is not None for cell in arm.seeds)
        rows.append(
            (
                arm.arm,
                with_sd(own),
                signed(_minus(own.mean, clean_loss(clean).mean)),
                signed(_minus(own.mean, loss(fault_only).mean)),
                percent_with_sd(match),
                _points(_minus(match.mean, clean_match)),
                _points(_minus(match.mean, exact_match(fault_only).mean)),
                with_sd(clean_loss(arm)),
                percent_with_sd(results.clean_exact_match(arm)),
                _seeds(present, arm),
                same_training(evidence, arm),
            )
        )
    note = (
        "'To clean' compares with the clean arm on a healthy device; a lower loss is better. "
        "A mean is given only when every seed has its number. Arms that come to the same training "
        "share it and have the same numbers."
    )
    title = f"{sweep_label(scenario)}, {DURING[scenario.spec.during]}"
    return Table(title, columns, tuple(rows), (note,))


def same_training(evidence: ScenarioEvidence, arm: ArmEvidence) -> str:
    """Return the first other arm with the very same trainings, empty when there is none."""
    keys = [cell.training_key for cell in arm.seeds]
    if not all(keys):
        return ""
    for other in evidence.arms:
        if other is arm:
            return ""
        if [cell.training_key for cell in other.seeds] == keys:
            return other.arm
    return ""


def _seeds(present: int, arm: ArmEvidence) -> Cell:
    text = f"{present} of {len(arm.seeds)}"
    return Mark(f"{text}, {arm.failed} failed", "failed") if arm.failed else text


def _points(difference: float | None) -> str:
    return NONE if difference is None else signed(100 * difference, 1)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
