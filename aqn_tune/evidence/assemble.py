"""From the ledger of a study to its evidence: one family of verdicts over all scenarios.

What is judged is fixed by a `Declared` (the lock of the confirm stage), never by what the ledger
happens to hold: a declared contrast whose runs failed stays in the family as inconclusive.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aqn_tune.evidence.arms import (
    ArmEvidence,
    FaultSummary,
    or_nan,
    summarise_arm,
    summarise_faults,
)
from aqn_tune.evidence.contrasts import PairedContrast, paired_contrast
from aqn_tune.evidence.decisions import Decision, contrast_name, decide
from aqn_tune.evidence.declared import Declared
from aqn_tune.evidence.looks import Look, look_reached
from aqn_tune.evidence.margins import ScenarioMargin, scenario_margin
from aqn_tune.evidence.power import mde_sd_units
from aqn_tune.evidence.regimes import RegimeReport, regime_of
from aqn_tune.evidence.tables import CellResult, Cost, Tables
from aqn_tune.evidence.verdicts import Judged, Undetermined, Verdict, judge

if TYPE_CHECKING:
    from aqn_tune.ledger.rows import LedgerRow


@dataclass(frozen=True)
class ScenarioEvidence:
    """Everything that is known about one scenario."""

    scenario: str
    regime: RegimeReport
    faults: tuple[FaultSummary, ...]
    arms: tuple[ArmEvidence, ...]
    contrasts: tuple[Judged, ...]
    """Its primary contrasts, named `scenario/arm-vs-reference`, judged in the whole family."""
    decision: Decision | None
    """The conclusion of the decision matrix; `None` when the study declares none."""
    margin: ScenarioMargin
    """The margin that its contrasts are held to, or why there is none."""


@dataclass(frozen=True)
class Evidence:
    """The evidence of a study. Intervals hold over training seeds, given this test set."""

    declared: Declared
    """What it was judged by; where looks are declared, the seeds and the alpha of `look`."""
    base_clean_loss: float | None
    """Clean loss of the untrained base on the test split."""
    scenarios: tuple[ScenarioEvidence, ...]
    mde_in_sd: float
    """Minimum detectable effect at n and alpha / m, in sd of the paired difference."""
    costs: tuple[Cost, ...]
    look: Look | None = None
    """The look whose results these are; `None` where no looks are declared."""


def assemble(rows: Iterable[LedgerRow], declared: Declared) -> Evidence:
    """Return the evidence that a ledger holds on what was declared.

    May be called at any time: what has not been run yet is inconclusive, with its reason. Where looks are
    declared it is the evidence of the last one whose runs have all ended, and holds nothing of the seeds
    beyond it.

    Raises:
        ValueError: the ledger breaks the pairing of seeds (see `Tables`).
    """
    tables = Tables(rows)
    if declared.looks:
        return look_reached(declared, lambda at: _assemble(tables, at))
    return _assemble(tables, declared)


def _assemble(tables: Tables, declared: Declared) -> Evidence:
    cells = {
        (scenario, arm): tables.cells(
            "confirm",
            scenario,
            arm,
            replicates=declared.replicates,
            generation=declared.generation,
        )
        for scenario in declared.scenarios
        for arm in _arms_of(tables, declared, scenario)
    }
    base = tables.base_clean_loss("test")
    regimes = {
        scenario: regime_of(
            base,
            or_nan(result.clean_loss for result in cells[scenario, "clean"]),
            or_nan(result.loss for result in cells[scenario, "fault_only"]),
        )
        for scenario in declared.scenarios
    }
    margins = {
        scenario: _margin(declared, scenario, regimes[scenario]) for scenario in declared.scenarios
    }
    judged = judge(
        {
            f"{scenario}/{contrast_name(arm, reference)}": contrast_of(
                arm, cells[scenario, arm], reference, cells[scenario, reference], declared
            )
            for scenario, arm, reference in declared.family
        },
        alpha=declared.alpha,
        margin={
            f"{scenario}/{contrast_name(arm, reference)}": margins[scenario].nats
            for scenario, arm, reference in declared.family
        },
        power=declared.power,
    )
    by_scenario: dict[str, list[Judged]] = {scenario: [] for scenario in declared.scenarios}
    for (scenario, _, _), verdict in zip(declared.family, judged, strict=True):
        by_scenario[scenario].append(verdict)
    return Evidence(
        declared=declared,
        base_clean_loss=base,
        scenarios=tuple(
            _scenario(
                tables,
                declared,
                scenario,
                regimes[scenario],
                cells,
                by_scenario[scenario],
                margins[scenario],
            )
            for scenario in declared.scenarios
        ),
        mde_in_sd=mde_sd_units(
            declared.replicates, declared.alpha / max(1, len(declared.family)), declared.power
        ),
        costs=tables.costs(),
    )


def _arms_of(tables: Tables, declared: Declared, scenario: str) -> tuple[str, ...]:
    named = [name for where, *pair in declared.family if where == scenario for name in pair]
    recorded = tables.arms("confirm", scenario, generation=declared.generation)
    return tuple(dict.fromkeys(["clean", "fault_only", *recorded, *named]))


def contrast_of(
    arm: str,
    results: Sequence[CellResult],
    reference: str,
    reference_results: Sequence[CellResult],
    declared: Declared,
) -> PairedContrast | Undetermined:
    """Return the contrast of two arms of a scenario, or why there is none.

    Args:
        arm: name of the arm, for the reason.
        results: its cells, one per declared replicate.
        reference: name of the reference.
        reference_results: its cells, replicate by replicate those of the same seeds.
        declared: gives alpha, and the seed of drawn sign flips.
    """
    for name, own in ((arm, results), (reference, reference_results)):
        problem = _problem(name, own)
        if problem:
            return Undetermined(problem)
    pairs = list(zip(results, reference_results, strict=True))
    if all(one.training_key == other.training_key for one, other in pairs):
        return Undetermined(f"{arm} and {reference} are one and the same training here")
    steps = {result.step for pair in pairs for result in pair}
    if len(steps) > 1:
        counts = ", ".join(str(step) for step in sorted(s for s in steps if s is not None))
        return Undetermined(f"runs of different length are never compared (steps {counts})")
    return paired_contrast(
        [one.loss for one, _ in pairs if one.loss is not None],
        [other.loss for _, other in pairs if other.loss is not None],
        alpha=declared.alpha,
        seed=declared.seed,
    )


def _problem(arm: str, results: Sequence[CellResult]) -> str:
    """Say what keeps an arm from having all of its losses; empty when nothing does."""
    lacking = [result for result in results if result.loss is None]
    failed = [result for result in lacking if result.failed]
    if failed:
        return f"{len(failed)} of {len(results)} seeds failed in arm {arm} ({failed[0].problem})"
    if lacking:
        return f"{len(lacking)} of {len(results)} seeds missing in arm {arm} ({lacking[0].problem})"
    return ""


def _margin(declared: Declared, scenario: str, regime: RegimeReport) -> ScenarioMargin:
    """Return the margin of a scenario; what was fixed before the first confirm run goes first."""
    rule = declared.margin_rule
    fixed = next((one for one in declared.margins if one.scenario == scenario), None)
    if fixed is not None:
        return fixed
    if declared.margin is not None:
        return ScenarioMargin(scenario=scenario, nats=declared.margin, measured="search")
    # An sd of the confirmed pairs is never taken: they would set the bar that they are held to.
    basis = {"gain": regime.gain, "gap": regime.gap}.get(rule.kind)
    missing = "the search did not measure it" if rule.kind == "sd" else regime.reason
    return scenario_margin(rule, scenario, basis, "confirmation", missing=missing)


def _scenario(
    tables: Tables,
    declared: Declared,
    scenario: str,
    regime: RegimeReport,
    cells: Mapping[tuple[str, str], tuple[CellResult, ...]],
    judged: Sequence[Judged],
    margin: ScenarioMargin,
) -> ScenarioEvidence:
    arms = tuple(
        summarise_arm(tables, declared, scenario, arm, regime.regime, cells)
        for where, arm in cells
        if where == scenario
    )
    decision = None
    if declared.decisions is not None:
        known = {one.name.removeprefix(f"{scenario}/"): one.verdict for one in judged}
        # A contrast that cannot exist here is as undecided as one that was not resolved.
        verdicts = {
            name: known.get(name, Verdict.INCONCLUSIVE) for name in declared.decisions.contrasts
        }
        decision = decide(declared.decisions, verdicts)
    return ScenarioEvidence(
        scenario=scenario,
        regime=regime,
        faults=summarise_faults(cells[scenario, "fault_only"]),
        arms=arms,
        contrasts=tuple(judged),
        decision=decision,
        margin=margin,
    )
