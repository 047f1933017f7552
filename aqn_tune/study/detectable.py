"""What a confirmation can detect, without scipy: `plan` has to start in well under a second."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

_INTERVALS = 400
"""Simpson intervals over the chi density; held to 1e-6 of scipy from 6 seeds up."""


@lru_cache(maxsize=256)
def detectable_effect(n: int, level: float, power: float) -> float:
    """Return the minimum detectable effect of `n` pairs in standard deviations of the difference.

    The same number as `aqn_tune.evidence.power.mde_sd_units`, by numerical integration.

    Args:
        n: Paired seeds, at least 6 as in every confirmation (below 3 the integral loses precision).
        level: Two-sided level of one contrast: alpha over the size of the family.
        power: Chance of finding an effect of this size in its true direction.
    """
    critical = t_quantile(1 - level / 2, n - 1)
    shift = _bisect(lambda d: noncentral_t_tail(critical, n - 1, d) - power, 0.0, 1.0)
    return shift / math.sqrt(n)


@lru_cache(maxsize=256)
def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t at `probability` > 0.5."""
    return _bisect(lambda x: 1 - noncentral_t_tail(x, degrees, 0.0) - probability, 0.0, 4.0)


def noncentral_t_tail(x: float, degrees: int, shift: float) -> float:
    """Return P(T > x) for Student's t with `degrees` of freedom and noncentrality `shift`.

    T = (Z + shift) / S with S = sqrt(chi2 / degrees), so the tail is the mean over S of
    P(Z > x * S - shift); the density of S is integrated by Simpson's rule.
    """
    half = degrees / 2
    log_constant = math.log(2) + half * math.log(half) - math.lgamma(half)
    spread = 12 / math.sqrt(2 * degrees)
    low, high = max(0.0, 1 - spread), 1 + spread
    step = (high - low) / _INTERVALS
    total = 0.0
    for i in range(_INTERVALS + 1):
        s = low + i * step
        if s <= 0:
            density = math.exp(log_constant) if degrees == 1 else 0.0
        else:
            density = math.exp(log_constant + (degrees - 1) * math.log(s) - half * s * s)
        weight = 1 if i in (0, _INTERVALS) else 4 if i % 2 else 2
        total += weight * density * math.erfc((x * s - shift) / math.sqrt(2)) / 2
    return total * step / 3


def _bisect(rising: Callable[[float], float], low: float, high: float) -> float:
    """Return where a rising function crosses zero; `high` doubles until it lies beyond."""
    while rising(high) < 0:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
