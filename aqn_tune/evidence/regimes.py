"""What a fault costs, which regime that is, and how much of it an arm wins back.

A question about noise can only be answered where the fault hurts and learning still works; the
regime says so beside every scenario. A number that cannot be computed is `None` with a reason, and
a regime that cannot be known is `undetermined`: never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from aqn_tune.errors import UserError
from aqn_tune.evidence.contrasts import t_quantile

HARMLESS_BELOW = 0.05
"""Damage below this share of the gain is harmless."""
CATASTROPHIC_ABOVE = 1.0
"""Damage above this share of the gain is worse than not training at all."""

FEWEST_FOR_INTERVAL = 5
"""Fewer seeds give no bootstrap interval: with 3 a nominal 95 % interval covers 76 %."""


class Regime(StrEnum):
    """What the scenario does to an arm without noise."""

    HARMLESS = "harmless"
    DEGRADING = "degrading"
    CATASTROPHIC = "catastrophic"
    UNDETERMINED = "undetermined"


@dataclass(frozen=True)
class RegimeReport:
    """Gain, damage and regime of one scenario."""

    regime: Regime
    """Undetermined when a loss is missing, not finite, or training gained nothing."""
    gain: float | None
    """G: clean loss of the untrained base - mean loss of the clean arm (unit of the metric)."""
    damage: float | None
    """(mean loss of fault_only - mean loss of clean) / G; 1 = all that training gained is lost."""
    reason: str
    """Why a number is missing; empty otherwise."""
    gap: float | None = None
    """Mean loss of fault_only - mean loss of clean (unit of the metric); needs no G."""


@dataclass(frozen=True)
class Recovery:
    """Share of the damage that an arm wins back: 0 = no help, 1 = as good as no fault."""

    value: float | None
    """(mean fault_only - mean arm) / (mean fault_only - mean clean)."""
    low: float | None
    """Lower end of the bootstrap interval."""
    high: float | None
    """Upper end of the bootstrap interval."""
    level: float
    """Nominal coverage of the interval."""
    n: int
    """Paired seeds."""
    reason: str
    """Why the value or the interval is missing ("n/a: harmless regime"); empty otherwise."""


def gain(base_clean_loss: float, clean: Sequence[float]) -> float:
    """Return G, what training gains without any fault: base loss - mean loss of the clean arm.

    Raises:
        ValueError: no clean losses, or a loss that is not finite.
    """
    if not clean or not _finite(clean) or not math.isfinite(base_clean_loss):
        raise ValueError("gain needs a finite base loss and at least one finite clean loss")
    return base_clean_loss - math.fsum(clean) / len(clean)


def gap(clean: Sequence[float], fault_only: Sequence[float]) -> float | None:
    """Return what the fault costs the arm without noise, `None` where a loss is missing or not finite.

    Args:
        clean: losses `[n]` of the clean arm, evaluated clean.
        fault_only: losses `[n]` of the fault_only arm, evaluated under the fault.
    """
    if not clean or not fault_only or not _finite([*clean, *fault_only]):
        return None
    return math.fsum(fault_only) / len(fault_only) - math.fsum(clean) / len(clean)


def regime_of(
    base_clean_loss: float | None, clean: Sequence[float], fault_only: Sequence[float]
) -> RegimeReport:
    """Classify a scenario by what its fault costs the arm without noise.

    Args:
        base_clean_loss: loss of the untrained base without fault, or `None` if not measured.
        clean: losses `[n]` of the clean arm, evaluated clean.
        fault_only: losses `[n]` of the fault_only arm, evaluated under the fault.

    Returns:
        harmless (damage < 5 %, an improvement included), catastrophic (> 100 %), else degrading;
        undetermined with its reason when a number is missing or the gain is not positive.

    Source: DESIGN section 2.
    """
    missing = [
        name
        for name, values in (
            ("base", [] if base_clean_loss is None else [base_clean_loss]),
            ("clean", clean),
            ("fault_only", fault_only),
        )
        if not values or not _finite(values)
    ]
    lost = gap(clean, fault_only)
    if missing or base_clean_loss is None or lost is None:
        reason = f"no finite loss of: {', '.join(missing)}"
        return RegimeReport(Regime.UNDETERMINED, gain=None, damage=None, reason=reason, gap=lost)
    g = gain(base_clean_loss, clean)
    if g <= 0:
        reason = f"the clean arm is no better than the untrained base (gain {g:.4g})"
        return RegimeReport(Regime.UNDETERMINED, gain=g, damage=None, reason=reason, gap=lost)
    damage = lost / g
    if damage < HARMLESS_BELOW:
        regime = Regime.HARMLESS
    elif damage > CATASTROPHIC_ABOVE:
        regime = Regime.CATASTROPHIC
    else:
        regime = Regime.DEGRADING
    return RegimeReport(regime, gain=g, damage=damage, reason="", gap=lost)


def recovery(
    fault_only: Sequence[float],
    arm: Sequence[float],
    clean: Sequence[float],
    *,
    regime: Regime,
    seed: int,
    level: float = 0.95,
    resamples: int = 5_000,
) -> Recovery:
    """Return the recovery of an arm as a ratio of means, with a paired bootstrap interval.

    A ratio of means and not a mean of ratios: a seed on which the fault happened to cost nothing
    would dominate the latter. The seeds are resampled together, so pairing is kept.

    Args:
        fault_only: losses `[n]`, evaluated under the fault.
        arm: losses `[n]` on the same seeds, evaluated under the fault.
        clean: losses `[n]` on the same seeds, evaluated clean.
        regime: of the scenario; in a harmless (or undetermined) one there is nothing to recover.
        seed: of the resampling; the same seed gives the same interval.
        level: coverage asked of the interval.
        resamples: bootstrap draws.

    Returns:
        A `Recovery`; the value is `None` (n/a) in a harmless or undetermined regime, when a loss is
        not finite or when the fault did no damage; the interval is `None` with fewer than five
        seeds, or when the damage is so uncertain that a resample has none.

    Raises:
        UserError: level outside (0, 1).
        ValueError: lists of unequal length.

    Limits: an interval over training seeds given this test set. A plain percentile interval is too
    narrow for few seeds (nominal 95 % covers 84 % at n = 6 and 88 % at n = 8, normal losses), so
    its tails are widened to those of t with n - 1 degrees of freedom (Hesterberg, "What teachers
    should know about the bootstrap", 2015): 93 % at both. No claim rests on it: claims are made by
    `verdicts.judge`.
    """
    import numpy as np

    if not 0 < level < 1:
        raise UserError(f"level: got {level}, must lie between 0 and 1 (usual: 0.95)")
    n = len(arm)
    if len(fault_only) != n or len(clean) != n:
        raise ValueError(f"unequal lengths: {len(fault_only)}, {n}, {len(clean)}")

    def without_value(reason: str) -> Recovery:
        return Recovery(None, None, None, level=level, n=n, reason=f"n/a: {reason}")

    if regime in (Regime.HARMLESS, Regime.UNDETERMINED):
        return without_value(f"{regime} regime")
    if n == 0 or not (_finite(fault_only) and _finite(arm) and _finite(clean)):
        return without_value("a loss is missing or not finite")
    losses = np.array([fault_only, arm, clean], dtype=np.float64)
    mean_fault, mean_arm, mean_clean = losses.mean(axis=1)
    if mean_fault <= mean_clean:
        return without_value("the fault did no damage on these seeds")
    value = float((mean_fault - mean_arm) / (mean_fault - mean_clean))

    def without_interval(reason: str) -> Recovery:
        return Recovery(value, None, None, level=level, n=n, reason=reason)

    if n < FEWEST_FOR_INTERVAL:
        return without_interval(f"no interval: {n} seed(s), at least {FEWEST_FOR_INTERVAL} needed")
    draws = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    faults, arms, cleans = losses[:, draws].mean(axis=2)
    if (faults <= cleans).any():
        return without_interval("no interval: the damage itself is too uncertain")
    tail = _widened_tail(n, (1 - level) / 2)
    low, high = np.quantile((faults - arms) / (faults - cleans), [tail, 1 - tail])
    return Recovery(value, float(low), float(high), level=level, n=n, reason="")


def _widened_tail(n: int, tail: float) -> float:
    from scipy.special import ndtr

    return float(ndtr(math.sqrt(n / (n - 1)) * t_quantile(n - 1, tail)))


def _finite(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) for value in values)
