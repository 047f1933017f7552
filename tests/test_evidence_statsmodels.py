"""The evidence against statsmodels and scipy, wherever they compute the same quantity."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW, ttost_paired

from aqn_tune.evidence import (
    Verdict,
    benjamini_hochberg,
    holm,
    judge,
    mde_sd_units,
    paired_contrast,
)
from aqn_tune.evidence.power import detection_power, equivalence_power
from aqn_tune.evidence.verdicts import FEWEST_SEEDS

RELATIVE = 1e-10
Losses = tuple[list[float], list[float]]


def p_values(kind: str, m: int) -> list[float]:
    """Return m seeded p-values of a kind."""
    rng = np.random.default_rng([m, len(kind)])
    p = rng.uniform(size=m) ** 3
    if kind == "tied":
        p = np.round(p, 1)
    if kind == "ends":
        p[:: max(1, m // 2)] = 0.0
        p[-1] = 1.0
    if kind == "small":
        p *= 1e-12
    return p.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("ours", "theirs"), [(holm, "holm"), (benjamini_hochberg, "fdr_bh")])
@pytest.mark.parametrize("kind", ["spread", "tied", "ends", "small"])
@pytest.mark.parametrize("m", [1, 2, 3, 12, 100])
def test_corrections(
    ours: Callable[[list[float]], list[float]], theirs: str, kind: str, m: int
) -> None:
    p = p_values(kind, m)
    rejected, adjusted, *_ = multipletests(p, alpha=0.05, method=theirs)
    assert ours(p) == pytest.approx(adjusted.tolist(), rel=RELATIVE, abs=0)
    assert [value <= 0.05 for value in ours(p)] == rejected.tolist()


def losses(n: int, kind: str) -> Losses:
    """Return seeded losses of an arm and of its reference: normal, with ties, or skewed."""
    rng = np.random.default_rng([n, len(kind)])
    shared = 3.0 + rng.normal(size=n)
    own = rng.normal(size=(2, n))
    if kind == "skewed":
        own[1] = np.exp(1.5 * own[1])
    arm, reference = shared + 0.3 * own[0], shared + 0.3 * own[1] + 0.1
    if kind == "tied":
        arm, reference = np.round(2 * arm) / 2, np.round(2 * reference) / 2
        reference[0] = arm[0] + 0.5  # there is a spread even where everything else is tied
        reference[1] = arm[1]
    return arm.tolist(), reference.tolist()


@pytest.mark.parametrize("kind", ["normal", "tied", "skewed"])
@pytest.mark.parametrize("n", [2, 3, 5, 8, 16, 40])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_paired_t(n: int, kind: str, alpha: float) -> None:
    arm, reference = losses(n, kind)
    ours = paired_contrast(arm, reference, alpha=alpha)
    scipys = stats.ttest_rel(reference, arm)
    interval = scipys.confidence_interval(1 - alpha)
    described = DescrStatsW(np.subtract(reference, arm))
    assert ours.t_p == pytest.approx(scipys.pvalue, rel=RELATIVE)
    assert ours.t_p == pytest.approx(described.ttest_mean(0.0)[1], rel=RELATIVE)
    assert ours.sd == pytest.approx(described.std_ddof(1), rel=RELATIVE)
    assert ours.se == pytest.approx(described.std_mean, rel=RELATIVE)
    # An end close to zero is a difference of larger numbers: relative to the interval's own width.
    slack = RELATIVE * (interval.high - interval.low)
    for expected in ((interval.low, interval.high), described.tconfint_mean(alpha)):
        assert (ours.low, ours.high) == pytest.approx(expected, rel=RELATIVE, abs=slack)
        assert ours.interval(1 - alpha) == pytest.approx(expected, rel=RELATIVE, abs=slack)


@pytest.mark.parametrize("kind", ["normal", "tied", "skewed"])
@pytest.mark.parametrize("n", range(2, 11))
def test_exact_sign_flips(n: int, kind: str) -> None:
    arm, reference = losses(n, kind)
    expected = stats.permutation_test(
        (np.subtract(reference, arm),), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert paired_contrast(arm, reference).sign_flip_p == pytest.approx(
        expected.pvalue, rel=RELATIVE
    )


@pytest.mark.parametrize("kind", ["normal", "tied", "skewed"])
@pytest.mark.parametrize("n", [3, 5, 8, 16, 40])
def test_skewness(n: int, kind: str) -> None:
    arm, reference = losses(n, kind)
    expected = float(stats.skew(np.subtract(reference, arm), bias=False))
    # Symmetric ties have a skewness of zero up to rounding.
    assert paired_contrast(arm, reference).skewness == pytest.approx(
        expected, rel=RELATIVE, abs=RELATIVE
    )


# Margins as multiples of the smallest at which both one-sided tests pass.
OF_THE_BOUNDARY = (0.2, 0.9, 1 - 1e-6, 1 - 1e-9, 1 + 1e-9, 1 + 1e-6, 1.1, 5.0)


@pytest.mark.parametrize("kind", ["normal", "tied", "skewed"])
@pytest.mark.parametrize("n", [3, 5, 8, 16, 40])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_equivalence_is_two_one_sided_tests(n: int, kind: str, alpha: float) -> None:
    """`~` of a single contrast, exactly where both one-sided tests pass at the margins."""
    arm, reference = losses(n, kind)
    contrast = paired_contrast(arm, reference)
    low, high = DescrStatsW(np.subtract(reference, arm)).tconfint_mean(2 * alpha)
    boundary = max(-low, high)
    found: list[bool] = []
    for share in OF_THE_BOUNDARY:
        margin = share * boundary
        p = float(ttost_paired(np.array(reference), np.array(arm), -margin, margin)[0])
        judged = judge({"c": contrast}, margin=margin, alpha=alpha)[0]
        assert (judged.verdict is Verdict.EQUIVALENT) == (p < alpha), (share, p)
        found.append(p < alpha)
    assert found == [share > 1 for share in OF_THE_BOUNDARY]


@pytest.mark.parametrize("seed", range(20))
def test_equivalence_over_random_margins(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 13))
    for _ in range(20):
        differences = rng.normal(rng.normal(0, 0.3), 1.0, size=n)
        margin = float(rng.uniform(0.1, 2.5))
        p = float(ttost_paired(differences, np.zeros(n), -margin, margin)[0])
        contrast = paired_contrast([0.0] * n, differences.tolist())
        judged = judge({"c": contrast}, margin=margin)[0]
        assert (judged.verdict is Verdict.EQUIVALENT) == (p < 0.05), (n, margin, p)


SIZES = [(n, level) for n in (2, 3, 5, 6, 8, 12, 20, 50) for level in (0.05, 0.05 / 3, 0.05 / 12)]


@pytest.mark.parametrize(("n", "level"), SIZES)
@pytest.mark.parametrize("effect", [0.0, 0.1, 0.5, 1.0, 2.0])
def test_power_in_the_true_direction(n: int, level: float, effect: float) -> None:
    """`detection_power` counts the true direction alone: a one-sided test at half the level.

    statsmodels' two-sided power adds the chance of a claim in the wrong direction.
    """
    theirs = TTestPower()
    ours = detection_power(n, effect, level)
    tail = theirs.power(effect, nobs=n, alpha=level / 2, alternative="larger")
    assert ours == pytest.approx(tail, rel=RELATIVE)
    assert detection_power(n, -effect, level) == ours
    if effect * math.sqrt(n) < 6:  # beyond, statsmodels' chance of the wrong direction is NaN
        wrong = theirs.power(effect, nobs=n, alpha=level / 2, alternative="smaller")
        both = theirs.power(effect, nobs=n, alpha=level, alternative="two-sided")
        assert ours + wrong == pytest.approx(both, rel=RELATIVE)


@pytest.mark.parametrize(("n", "level"), SIZES)
@pytest.mark.parametrize("margin", [0.1, 0.5, 1.0, 2.0])
def test_power_of_equivalence(n: int, level: float, margin: float) -> None:
    """Two one-sided tests at the whole level, each failing with statsmodels' one-sided chance."""
    one = TTestPower().power(margin, nobs=n, alpha=level, alternative="larger")
    assert equivalence_power(n, margin, level) == pytest.approx(
        max(0.0, 1 - 2 * (1 - one)), rel=RELATIVE, abs=RELATIVE
    )


@pytest.mark.parametrize(("n", "level"), SIZES)
@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
def test_smallest_effect_that_is_found(n: int, level: float, power: float) -> None:
    """At our smallest effect statsmodels' power is the one asked for, and a fine search agrees.

    To less than ten digits: scipy's inverse of the noncentral t stops its search early, and so does
    `solve_power`, which is therefore not asked.
    """
    ours = mde_sd_units(n, level, power)
    few = n < FEWEST_SEEDS

    def missing(effect: float) -> float:
        found = TTestPower().power(effect, nobs=n, alpha=level / 2, alternative="larger")
        return float(found) - power

    assert missing(ours) == pytest.approx(0.0, abs=1e-5 if few else 1e-7)
    found = optimize.brentq(missing, ours / 2, 1.5 * ours, xtol=1e-14)
    assert ours == pytest.approx(found, rel=1e-4 if few else 1e-6)
