"""Dose and response: does something rise or fall with the fault level, and where does the regime turn?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from aqn_tune.evidence.regimes import Regime

FEWEST_LEVELS = 3
"""Two levels make a contrast, not a trend."""


class Trend(NamedTuple):
    """Whether a number rises or falls with the level, over seeds that met every level."""

    seeds: int
    levels: int
    statistic: float
    """Page's L for a rising order."""
    rises: bool
    """Whether L lies above what it is on average without a trend."""
    p: float
    """Two-sided p-value."""


class Turn(NamedTuple):
    """Two neighbouring levels between which the regime changes."""

    below: float
    before: Regime
    above: float
    after: Regime


def trend(values: Sequence[Sequence[float]]) -> Trend | None:
    """Return Page's test for ordered alternatives: seeds are blocks, levels are treatments.

    Use it where the same seeds met several levels of one number. It ranks the levels within each seed, so it
    asks for no shape of the curve and no spread that is the same at all levels.

    Args:
        values: one sequence per seed, its entries by rising level; all finite.

    Returns:
        None with fewer than three levels or two seeds, or where all values of every seed are equal.

    Raises:
        ValueError: seeds with different numbers of levels, or a value that is not finite.

    Source: Page, JASA 58 (1963), "Ordered hypotheses for multiple treatments"; scipy.stats.page_trend_test,
    exact for small tables without ties. Two-sided: twice the smaller of both one-sided p-values.
    """
    if len({len(own) for own in values}) > 1:
        raise ValueError("every seed needs a value at every level")
    if not all(math.isfinite(value) for own in values for value in own):
        raise ValueError("a trend needs finite values")
    if len(values) < 2 or len(values[0]) < FEWEST_LEVELS:
        return None
    if all(len(set(own)) == 1 for own in values):
        return None
    from scipy.stats import page_trend_test

    up = page_trend_test([list(own) for own in values])
    down = page_trend_test([list(reversed(own)) for own in values])
    seeds, levels = len(values), len(values[0])
    average = seeds * levels * (levels + 1) ** 2 / 4
    statistic = float(up.statistic)
    p = min(1.0, 2 * min(float(up.pvalue), float(down.pvalue)))
    return Trend(seeds, levels, statistic, statistic > average, p)


def turns(regimes: Sequence[tuple[float, Regime]]) -> tuple[Turn, ...]:
    """Return every change of the regime between neighbouring levels, which are given in rising order.

    Levels at which the regime is undetermined are left out: it is not known on which side of them it turned.
    """
    known = [(level, regime) for level, regime in regimes if regime is not Regime.UNDETERMINED]
    return tuple(
        Turn(below, before, above, after)
        for (below, before), (above, after) in itertools.pairwise(known)
        if before is not after
    )
