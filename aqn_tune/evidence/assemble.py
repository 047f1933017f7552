"""From the ledger of a study to its evidence: one family of verdicts over all scenarios.

What is judged is fixed by a `Declared` (the lock of the confirm stage), never by what the ledger
happens to hold: a declared contrast whose runs failed stays in the family as inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from aqn_tune.evidence.contrasts import PairedContrast, paired_contrast
from aqn_tune.evidence.decisions import Decision, DecisionMatrix, contrast_name, decide, matrix_of
from aqn_tune.evidence.power import mde_sd_units
from aqn_tune.evidence.regimes import Recovery, Regime, RegimeReport, recovery, regime_of
from aqn_tune.evidence.tables import CellResult, Cost, Tables
from aqn_tune.evidence.verdicts import Judged, Undetermined, Verdict, judge

if TYPE_CHECKING:
    from aqn_tune.ledger.rows import LedgerRow
    from aqn_tune.study.cells import NotAvailable
    from aqn_tune.study.scenario import Scenario
    from aqn_tune.study.schema import Study


@dataclass(frozen=True)
class Declared:
    """What was fixed before the first confirm run; evidence judges this and nothing else."""

    family: tuple[tuple[str, str, str], ...]
    """(scenario, arm, reference) of every primary contrast."""
    scenarios: tuple[str, ...]
    """Every scenario, in the order of the report."""
    replicates: int
    """Confirm seeds n."""
    generation: int
    """Generation of the confirm seeds."""
    alpha: float
    """Familywise error rate of the whole study."""
    margin: float | None
    """Margin in the unit of the metric, or `None`: `margin_share` of the confirm stage's own G."""
    margin_share: float
    """Margin as a share of G."""
    power: float
    """Power at which detectable effects are stated."""
    seed: int
    """Seed of the bootstrap of recoveries and of drawn sign flips."""
    decisions: DecisionMatrix | None
    """The decision matrix, applied in every scenario."""


@dataclass(frozen=True)
class FaultSummary:
    """What one fault did to the fault_only arm, averaged over seeds."""

    kind: str
    affected_fraction: float
    """Share of the values that the fault changed."""
    relative_error: float
    """||delta|| / ||x||."""


@dataclass(frozen=True)
class Shrinkage:
    """How much of a finalist's win in the search was luck: improvements over fault_only."""

    config: str
    search_improvement: float | None
    """Mean on the search seeds (validation split); biased upwards, for the winner was chosen by it."""
    confirm_improvement: float | None
    """Mean on fresh seeds (test split)."""


@dataclass(frozen=True)
class ArmEvidence:
    """One arm under one scenario. Means are `None` unless every seed has its number."""

    arm: str
    seeds: tuple[CellResult, ...]
    """One entry per declared replicate, failed and missing ones included."""
    mean_loss: float | None
    """Mean faulty loss."""
    sd_loss: float | None
    """Standard deviation (n - 1) of the faulty loss over seeds."""
    mean_clean_loss: float | None
    """Mean clean loss."""
    mean_exact_match: float | None
    """Mean exact match under the faults."""
    recovery: Recovery
    """Share of the damage won back; n/a for the clean arm."""
    shrinkage: Shrinkage | None
    """Search beside confirm, for searched arms."""

    @property
    def failed(self) -> int:
        """Number of failed seeds."""
        return sum(result.failed for result in self.seeds)


@dataclass(frozen=True)
class ScenarioEvidence:
    """Everything that is known about one scenario."""

    scenario: str
    regime: RegimeReport
    faults: tuple[FaultSummary, ...]
    arms: tuple[ArmEvidence, ...]
    contrasts: tuple[Judged, ...]
    """The primary contrasts of this scenario; named `arm-vs-reference`, judged in the whole family."""
    decision: Decision | None
    """The conclusion of the decision matrix; `None` when the study declares none."""


@dataclass(frozen=True)
class Evidence:
    """The evidence of a study. Intervals hold over training seeds, given this test set."""

    declared: Declared
    base_clean_loss: float | None
    """Clean loss of the untrained base on the test split."""
    scenarios: tuple[ScenarioEvidence, ...]
    mde_in_sd: float
    """Minimum detectable effect at n and alpha / m, in sd of the paired difference."""
    costs: tuple[Cost, ...]


def declare(
    study: Study,
    scenarios: Sequence[Scenario],
    missing: Sequence[NotAvailable],
    *,
    margin: float | None,
) -> Declared:
    """Return what a study commits itself to, for the lock.

    Call it before the first confirm run. The family is every primary contrast of every scenario
    less those with an arm that cannot exist there (`missing`, known from the study alone).

    Args:
        study: the resolved study.
        scenarios: its scenarios.
        missing: arms that cannot exist.
        margin: in the unit of the metric when G is known by now, else `None`.
    """
    absent = {(item.scenario, item.arm) for item in missing}
    family = tuple(
        (scenario.name, arm, reference)
        for scenario in scenarios
        for arm, reference in study.primary_contrasts()
        if not absent & {(scenario.name, arm), (scenario.name, reference)}
    )
    return Declared(
        family=family,
        scenarios=tuple(scenario.name for scenario in scenarios),
        replicates=study.confirm.replicates,
        generation=study.confirm.generation,
        alpha=study.confirm.alpha,
        margin=margin,
        margin_share=study.confirm.margin,
        power=study.confirm.power,
        seed=study.seed,
        decisions=None if study.decisions is None else matrix_of(study.decisions),
    )


def assemble(rows: Iterable[LedgerRow], declared: Declared) -> Evidence:
    """Return the evidence that a ledger holds on what was declared.

    May be called at any time: what has not been run yet is inconclusive, with its reason.

    Raises:
        ValueError: the ledger breaks the pairing of seeds (see `Tables`).
    """
    tables = Tables(rows)
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
            _or_nan(result.clean_loss for result in cells[scenario, "clean"]),
            _or_nan(result.loss for result in cells[scenario, "fault_only"]),
        )
        for scenario in declared.scenarios
    }
    judged = judge(
        {
            f"{scenario}/{contrast_name(arm, reference)}": _contrast(
                arm, cells[scenario, arm], reference, cells[scenario, reference], declared
            )
            for scenario, arm, reference in declared.family
        },
        alpha=declared.alpha,
        margin={
            f"{scenario}/{contrast_name(arm, reference)}": _margin(declared, regimes[scenario])
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
            _scenario(tables, declared, scenario, regimes[scenario], cells, by_scenario[scenario])
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


def _contrast(
    arm: str,
    results: Sequence[CellResult],
    reference: str,
    reference_results: Sequence[CellResult],
    declared: Declared,
) -> PairedContrast | Undetermined:
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


def _margin(declared: Declared, regime: RegimeReport) -> float | None:
    if declared.margin is not None:
        return declared.margin
    if regime.gain is None or regime.gain <= 0:
        return None
    return declared.margin_share * regime.gain


def _scenario(
    tables: Tables,
    declared: Declared,
    scenario: str,
    regime: RegimeReport,
    cells: Mapping[tuple[str, str], tuple[CellResult, ...]],
    judged: Sequence[Judged],
) -> ScenarioEvidence:
    arms = tuple(
        _arm(tables, declared, scenario, arm, regime.regime, cells)
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
        faults=_faults(cells[scenario, "fault_only"]),
        arms=arms,
        contrasts=tuple(judged),
        decision=decision,
    )


def _arm(
    tables: Tables,
    declared: Declared,
    scenario: str,
    arm: str,
    regime: Regime,
    cells: Mapping[tuple[str, str], tuple[CellResult, ...]],
) -> ArmEvidence:
    results = cells[scenario, arm]
    fault_only = cells[scenario, "fault_only"]
    losses = _or_nan(result.loss for result in results)
    if arm == "clean":
        won_back = Recovery(
            None, None, None, level=1 - declared.alpha, n=len(results), reason="n/a: clean arm"
        )
    else:
        won_back = recovery(
            _or_nan(result.loss for result in fault_only),
            losses,
            _or_nan(result.clean_loss for result in cells[scenario, "clean"]),
            regime=regime,
            seed=declared.seed,
            level=1 - declared.alpha,
        )
    mean = _mean(result.loss for result in results)
    spread = None
    if mean is not None and len(losses) > 1:
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in losses) / (len(losses) - 1))
    return ArmEvidence(
        arm=arm,
        seeds=results,
        mean_loss=mean,
        sd_loss=spread,
        mean_clean_loss=_mean(result.clean_loss for result in results),
        mean_exact_match=_mean(result.exact_match for result in results),
        recovery=won_back,
        shrinkage=_shrinkage(tables, scenario, results, fault_only),
    )


def _shrinkage(
    tables: Tables,
    scenario: str,
    results: Sequence[CellResult],
    fault_only: Sequence[CellResult],
) -> Shrinkage | None:
    config = results[0].config if results else ""
    if not config:
        return None
    n = tables.replicates("search", scenario, config)
    searched = tables.cells("search", scenario, config, replicates=n)
    control = tables.cells("search", scenario, "fault_only", replicates=n)
    return Shrinkage(
        config=config,
        search_improvement=_improvement(searched, control),
        confirm_improvement=_improvement(results, fault_only),
    )


def _improvement(arm: Sequence[CellResult], reference: Sequence[CellResult]) -> float | None:
    ours = _mean(result.loss for result in arm)
    theirs = _mean(result.loss for result in reference)
    return None if ours is None or theirs is None else theirs - ours


def _faults(results: Sequence[CellResult]) -> tuple[FaultSummary, ...]:
    measured = [result.faults for result in results if result.faults]
    if not measured:
        return ()
    return tuple(
        FaultSummary(
            kind=per_seed[0].kind,
            affected_fraction=fmean(one.affected_fraction for one in per_seed),
            relative_error=fmean(one.relative_error for one in per_seed),
        )
        for per_seed in zip(*measured, strict=True)
    )


def _mean(values: Iterable[float | None]) -> float | None:
    # A mean over the seeds that survived would flatter an arm that fails often.
    found = list(values)
    present = [value for value in found if value is not None]
    return fmean(present) if present and len(present) == len(found) else None


def _or_nan(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
