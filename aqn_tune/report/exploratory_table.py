"""Differences that were not declared: every noised arm against fault_only and global."""

from __future__ import annotations

from aqn_tune.evidence.contrasts import PairedContrast
from aqn_tune.evidence.exploratory import Exploratory, explore
from aqn_tune.evidence.verdicts import Undetermined
from aqn_tune.report.results import Results
from aqn_tune.report.scenario_tables import DURING, NATS, sweep_label
from aqn_tune.report.table import Cell, Column, Table
from aqn_tune.report.text import NONE, confidence, count, interval, p_value, signed
from aqn_tune.study.cells import named_arms
from aqn_tune.study.scenario import During
from aqn_tune.study.space import arm_of


def noised_arms(results: Results) -> dict[str, tuple[str, ...]]:
    """Return the arms of each scenario that train with noise: controls, own arms, finalists."""
    named = named_arms(results.study)
    params = {(one.scenario, one.config): one.params for one in results.searched}

    def noised(scenario: str, arm: str, config: str) -> bool:
        if arm in named:
            return named[arm].noise is not None
        found = params.get((scenario, config))
        if arm.endswith("_none") or not found:
            return False
        return arm_of(dict(found)).noise is not None

    return {
        evidence.scenario: tuple(
            arm.arm
            for arm in evidence.arms
            if arm.seeds and noised(evidence.scenario, arm.arm, arm.seeds[0].config)
        )
        for evidence in results.evidence.scenarios
    }


def explored(results: Results) -> tuple[Exploratory, ...]:
    """Return the exploratory contrasts of a study, none before its confirmation is complete."""
    return explore(results.evidence, noised_arms(results)) if results.makes_claims else ()


def exploratory_table(
    results: Results, during: During, found: tuple[Exploratory, ...]
) -> Table | None:
    """Return the exploratory contrasts of the scenarios in which the fault acts `during`.

    `found` is what `explored` returns; None when it has nothing there.
    """
    rows: list[tuple[Cell, ...]] = []
    notes: list[str] = []
    for scenario, _ in results.evidence_of(during):
        label = sweep_label(scenario)
        for one in found:
            if one.scenario != scenario.name:
                continue
            head = (label, f"{one.arm} vs {one.reference}")
            rows.append((*head, *_numbers(one)))
            if isinstance(one.contrast, Undetermined):
                notes.append(f"{', '.join(head)}: {one.contrast.reason}.")
    if not rows:
        return None
    columns = (
        Column("scenario", align="left"),
        Column("arm vs reference", align="left"),
        Column("difference", NATS),
        Column(f"{confidence(results.evidence.declared.alpha)} interval"),
        Column("p"),
        Column("q"),
    )
    explained = (
        "Contrasts that were not declared beforehand; they have no verdict and no claim rests on "
        "them. Difference = loss of the reference - loss of the arm; interval and p are the paired "
        "t-test's, of each contrast alone. q is p adjusted by Benjamini-Hochberg over the "
        f"{count(len(found), 'exploratory contrast')} of the study."
    )
    title = f"Exploratory, makes no claims: {DURING[during]}"
    return Table(title, columns, tuple(rows), (explained, *dict.fromkeys(notes)))


def _numbers(one: Exploratory) -> tuple[Cell, ...]:
    if not isinstance(one.contrast, PairedContrast):
        return (NONE,) * 4
    contrast = one.contrast
    return (
        signed(contrast.improvement),
        interval(contrast.low, contrast.high),
        p_value(contrast.t_p),
        p_value(one.q),
    )
