"""How small an effect a study can see, and how many seeds a verdict takes.

All of it is exact for normal differences (noncentral t), per contrast, at the level that the
contrast has to pass in its family. For a family of m contrasts hand in alpha / m: the first step of
Holm, hence the hardest case.
"""

from __future__ import annotations

import math
from functools import lru_cache

from aqn_tune.errors import UserError
from aqn_tune.evidence.contrasts import check_alpha, t_quantile

MOST_SEEDS = 10_000
"""`seeds_needed` answers `None` beyond this many: out of reach for any study."""


def _check(n: int, power: float) -> None:
    if n < 2:
        raise UserError(f"seeds: got {n}, a paired contrast needs at least 2")
    if not 0.5 <= power < 1:
        raise UserError(f"power: got {power}, must be at least 0.5 and below 1 (usual: 0.8)")


@lru_cache(maxsize=1024)
def mde_sd_units(n: int, alpha_over_m: float, power: float = 0.8) -> float:
    """Return the minimum detectable effect of `n` pairs, in standard deviations of the difference.

    Use it before any sd is known, and times the sd once one is: that is the effect in the unit of
    the metric. A true effect of this size is found, in the right direction, with probability
    `power`.

    Args:
        n: confirm seeds (at least 2).
        alpha_over_m: two-sided level of one contrast, alpha divided by the size of the family.
        power: in [0.5, 1).

    Raises:
        UserError: a value out of range.

    Source: noncentral t; Colas et al. 2018, "How many random seeds?".
    """
    check_alpha(alpha_over_m)
    _check(n, power)
    from scipy.special import nctdtrinc

    critical = t_quantile(n - 1, 1 - alpha_over_m / 2)
    return float(nctdtrinc(n - 1, 1 - power, critical)) / math.sqrt(n)


def detection_power(n: int, effect_in_sd: float, alpha_over_m: float) -> float:
    """Return the chance that a two-sided paired t-test finds an effect, in its true direction."""
    check_alpha(alpha_over_m)
    _check(n, 0.8)
    critical = t_quantile(n - 1, 1 - alpha_over_m / 2)
    return 1 - _chance_below(critical, n - 1, abs(effect_in_sd) * math.sqrt(n))


def equivalence_power(n: int, margin_in_sd: float, alpha_over_m: float) -> float:
    """Return a lower bound of the chance of `~` when there is no difference at all.

    Two one-sided tests must both pass; 1 - 2 * P(one fails) bounds that from below and is nearly
    exact wherever the answer is above one half.
    """
    check_alpha(alpha_over_m)
    _check(n, 0.8)
    critical = t_quantile(n - 1, 1 - alpha_over_m)
    return max(0.0, 1 - 2 * _chance_below(critical, n - 1, margin_in_sd * math.sqrt(n)))


def _chance_below(x: float, degrees: int, shift: float) -> float:
    """Return P(T <= x) for Student's t with `degrees` of freedom and noncentrality `shift`."""
    from scipy.special import nctdtr

    from aqn_tune.study.detectable import noncentral_t_tail

    chance = float(nctdtr(degrees, shift, x))
    # scipy has no value where exp(-shift^2 / 2) underflows (shift near 38).
    return chance if math.isfinite(chance) else 1 - noncentral_t_tail(x, degrees, shift)


def seeds_needed(
    sd: float, *, margin: float, alpha_over_m: float, power: float = 0.8
) -> int | None:
    """Return how many fresh seeds a new confirm generation needs for a verdict other than `?`.

    With that many seeds an effect as large as the margin is found with probability `power`, and so
    is equivalence when there is no difference. The margin is planned for and not the effect just
    observed: a study that ended in `?` says little about its size. Between zero and the margin a
    study of this size may still end in `?`.

    Args:
        sd: of the paired difference; an estimate, so the answer is "about".
        margin: smallest difference worth acting on, same unit as sd.
        alpha_over_m: level of one contrast, alpha divided by the size of the family.
        power: in [0.5, 1).

    Returns:
        The number of pairs (at least 2), or `None` if more than 10 000 would be needed. It knows
        nothing of seeds already spent; a new generation stands alone.

    Raises:
        UserError: sd or margin not positive and finite, or another value out of range.
    """
    for name, value in (("sd of the paired difference", sd), ("margin", margin)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name}: got {value}, must be finite and positive")
    check_alpha(alpha_over_m)
    _check(2, power)
    ratio = margin / sd

    def enough(n: int) -> bool:
        return (
            detection_power(n, ratio, alpha_over_m) >= power
            and equivalence_power(n, ratio, alpha_over_m) >= power
        )

    if not enough(MOST_SEEDS):
        return None
    too_few, sufficient = 1, MOST_SEEDS
    while sufficient - too_few > 1:
        middle = (too_few + sufficient) // 2
        if enough(middle):
            sufficient = middle
        else:
            too_few = middle
    return sufficient
