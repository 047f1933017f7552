"""What is known about one arm under one scenario: means, recovery, and search beside confirm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from aqn_tune.evidence.declared import Declared
from aqn_tune.evidence.regimes import Recovery, Regime, recovery
from aqn_tune.evidence.tables import CellResult, Tables


@dataclass(frozen=True)
class FaultSummary:
    """What one fault did to the fault_only arm, averaged over seeds."""

    kind: str
    affected_fraction: float
    """Share of the values that the fault changed."""
    relative_error: float | None
    """||delta|| / ||x||."""


@dataclass(frozen=True)
class Shrinkage:
    """How much of a finalist's win in the search was luck: improvements over fault_only."""

    config: str
    search_improvement: float | None
    """Mean on the search seeds (validation split); too high, for the winner was chosen by it."""
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
    """Search beside confirm, for finalists: their twins were not searched."""

    @property
    def failed(self) -> int:
        """Number of failed seeds."""
        return sum(result.failed for result in self.seeds)


def summarise_arm(
    tables: Tables,
    declared: Declared,
    scenario: str,
    arm: str,
    regime: Regime,
    cells: Mapping[tuple[str, str], tuple[CellResult, ...]],
) -> ArmEvidence:
    """Return what is known about one arm under one scenario, from the results of all its arms."""
    results = cells[scenario, arm]
    fault_only = cells[scenario, "fault_only"]
    losses = or_nan(result.loss for result in results)
    if arm == "clean":
        won_back = Recovery(
            None, None, None, level=1 - declared.alpha, n=len(results), reason="n/a: clean arm"
        )
    else:
        won_back = recovery(
            or_nan(result.loss for result in fault_only),
            losses,
            or_nan(result.clean_loss for result in cells[scenario, "clean"]),
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
        shrinkage=_shrinkage(tables, scenario, arm, results, fault_only),
    )


def _shrinkage(
    tables: Tables,
    scenario: str,
    arm: str,
    results: Sequence[CellResult],
    fault_only: Sequence[CellResult],
) -> Shrinkage | None:
    config = results[0].config if results else ""
    # A twin is recorded with the config of its finalist, whose numbers in the search are not its own.
    if not config or arm.endswith(("_none", "_global")):
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


def summarise_faults(results: Sequence[CellResult]) -> tuple[FaultSummary, ...]:
    """Return what each fault did, averaged over the seeds that have measured it."""
    measured = [result.faults for result in results if result.faults]
    if not measured:
        return ()
    return tuple(
        FaultSummary(
            kind=per_seed[0].kind,
            affected_fraction=fmean(one.affected_fraction for one in per_seed),
            relative_error=_mean(one.relative_error for one in per_seed),
        )
        for per_seed in zip(*measured, strict=True)
    )


def _mean(values: Iterable[float | None]) -> float | None:
    # A mean over the seeds that survived would flatter an arm that fails often.
    found = list(values)
    present = [value for value in found if value is not None]
    return fmean(present) if present and len(present) == len(found) else None


def or_nan(values: Iterable[float | None]) -> list[float]:
    """Return the values with NaN for missing ones, for functions that then refuse to compute."""
    return [math.nan if value is None else value for value in values]
