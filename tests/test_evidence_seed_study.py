"""What the evidence makes of the original study's table: five arms, five seeds, p = 0.0126.

The table gives means and standard deviations alone. Five losses per arm are built that have exactly
those and the p-values printed beside them; the shape of their residuals is free, so several are used.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
from scipy import stats

from aqn_tune.evidence import (
    PairedContrast,
    Regime,
    Undetermined,
    Verdict,
    holm,
    judge,
    paired_contrast,
    regime_of,
)


class Noisy(NamedTuple):
    """A noisy arm of the original study's table: loss over its five seeds."""

    mean: float
    std: float
    """As `np.std` gives it: divided by n, not by n - 1."""
    p_against_global: float | None = None
    """Of a paired t-test against `global`, without any correction."""


SEEDS = 5
# The original study's table: one dead zone, inference only, answer loss. An arm without noise is the
# same on every seed and has no spread.
CLEAN, FAULT_ONLY = 3.1777, 12.8541
GLOBAL = Noisy(12.8606, 0.0105)
TARGETED = Noisy(12.8374, 0.0054, 0.0126)
HEALTHY = Noisy(12.8577, 0.0148, 0.73)


def correlation(arm: Noisy) -> float:
    """Return the correlation with `global` over the seeds at which the paired t-test gives its p."""
    assert arm.p_against_global is not None
    t = float(stats.t.isf(arm.p_against_global / 2, SEEDS - 1))
    variance_of_difference = (GLOBAL.mean - arm.mean) ** 2 * (SEEDS - 1) / t**2
    both = arm.std**2 + GLOBAL.std**2
    return (both - variance_of_difference) / (2 * arm.std * GLOBAL.std)


def table(shape: int) -> dict[str, list[float]]:
    """Return losses of the noisy arms with the table's means, standard deviations and p-values."""
    drawn = np.random.default_rng(shape).normal(size=(SEEDS, 3))
    # Orthogonal to one another and to the constant: residuals of mean zero.
    basis = np.linalg.qr(np.column_stack([np.ones(SEEDS), drawn]))[0][:, 1:] * math.sqrt(SEEDS)
    made = {"global": (GLOBAL.mean + GLOBAL.std * basis[:, 0]).tolist()}
    for column, (name, arm) in enumerate({"targeted": TARGETED, "healthy": HEALTHY}.items(), 1):
        r = correlation(arm)
        residual = r * basis[:, 0] + math.sqrt(1 - r**2) * basis[:, column]
        made[name] = (arm.mean + arm.std * residual).tolist()
    return made


def contrasts(shape: int) -> dict[str, PairedContrast]:
    """Return the two contrasts that the study tested."""
    made = table(shape)
    return {name: paired_contrast(made[name], made["global"]) for name in ("targeted", "healthy")}


SHAPES = pytest.mark.parametrize("shape", range(5))


@SHAPES
def test_the_losses_are_those_of_the_table(shape: int) -> None:
    made = table(shape)
    for name, arm in {"global": GLOBAL, "targeted": TARGETED, "healthy": HEALTHY}.items():
        assert len(made[name]) == SEEDS
        assert np.mean(made[name]) == pytest.approx(arm.mean, abs=1e-12)
        assert np.std(made[name]) == pytest.approx(arm.std, rel=1e-9)
        if arm.p_against_global is not None:
            p = stats.ttest_rel(made[name], made["global"]).pvalue
            assert p == pytest.approx(arm.p_against_global, rel=1e-9)


def test_the_seeds_of_the_study_hardly_paired() -> None:
    """A correlation of +0.2 saves a sixth of the variance and costs half the degrees of freedom."""
    made = table(0)
    targeted = contrasts(0)["targeted"]
    assert np.corrcoef(made["targeted"], made["global"])[0, 1] == pytest.approx(0.2, abs=0.01)
    assert targeted.pairing_gain == pytest.approx(0.83, abs=0.01)
    unpaired = stats.ttest_ind(made["targeted"], made["global"]).pvalue
    assert unpaired == pytest.approx(0.0044, abs=5e-5)
    assert targeted.t_p is not None
    assert unpaired < targeted.t_p


@SHAPES
def test_the_contrast_before_any_correction(shape: int) -> None:
    targeted, healthy = contrasts(shape).values()
    assert (targeted.n, targeted.degenerate) == (SEEDS, None)
    assert targeted.improvement == pytest.approx(0.0232, abs=1e-9)
    assert targeted.t_p == pytest.approx(0.0126, rel=1e-9)
    assert healthy.improvement == pytest.approx(0.0029, abs=1e-9)
    assert healthy.t_p == pytest.approx(0.73, rel=1e-9)


@SHAPES
def test_no_five_seeds_are_significant_by_their_signs(shape: int) -> None:
    """Whatever the residuals were: 2 of 2^5 flips are always as extreme."""
    for contrast in contrasts(shape).values():
        assert contrast.sign_flip_floor == 0.0625
        assert contrast.sign_flip_p >= 0.0625


@pytest.mark.parametrize(
    ("tests", "adjusted", "verdict"),
    [
        (1, 0.0126, Verdict.BETTER),
        (2, 0.0252, Verdict.BETTER),  # the two that it ran
        (3, 0.0378, Verdict.BETTER),
        (4, 0.0504, Verdict.INCONCLUSIVE),
    ],
)
def test_the_correction_for_the_tests_of_the_family(
    tests: int, adjusted: float, verdict: Verdict
) -> None:
    """Over its two tests 0.0126 becomes 0.0252 and stays below 0.05; over four it would not."""
    family: dict[str, PairedContrast | Undetermined] = dict(list(contrasts(0).items())[:tests])
    family |= {f"test {i}": Undetermined("not in the table") for i in range(2, tests)}
    judged = judge(family, margin=None)
    assert judged[0].holm_p == pytest.approx(adjusted, rel=1e-9)
    assert judged[0].verdict is verdict
    assert judged[0].family_size == tests
    if tests == 2:
        assert [one.holm_p for one in judged] == pytest.approx(holm([0.0126, 0.73]), rel=1e-9)
        assert judged[1].verdict is Verdict.INCONCLUSIVE


# The table has no gain of training to take 5 % of; these stand in for it.
MARGINS = {
    "5 % of the damage": 0.05 * (FAULT_ONLY - CLEAN),
    "5 % of the faulty loss": 0.05 * FAULT_ONLY,
    "5 % of the clean loss": 0.05 * CLEAN,
    "1.5 % of the clean loss": 0.015 * CLEAN,
}


@SHAPES
@pytest.mark.parametrize("margin", MARGINS)
def test_the_difference_is_real_and_below_every_practical_margin(margin: str, shape: int) -> None:
    targeted, healthy = judge(contrasts(shape), margin=MARGINS[margin])
    assert targeted.verdict is Verdict.EQUIVALENT
    assert targeted.real_but_below_margin
    assert targeted.words == "equivalent (real but below the margin)"
    assert healthy.verdict is Verdict.EQUIVALENT
    assert not healthy.real_but_below_margin


def test_the_difference_is_a_fraction_of_a_percent() -> None:
    targeted, _ = judge(contrasts(0), margin=0.03)
    assert targeted.verdict is Verdict.BETTER  # the interval reaches 0.038, beyond a margin of 0.03
    assert targeted.high == pytest.approx(0.038, abs=5e-4)
    assert targeted.contrast is not None
    assert targeted.contrast.improvement / GLOBAL.mean == pytest.approx(0.0018, abs=5e-5)
    assert targeted.contrast.improvement / (FAULT_ONLY - CLEAN) < 0.003


@pytest.mark.parametrize(
    ("base", "regime", "reason"),
    [
        # Nothing was trained, so the clean arm is the base and there is no gain to compare with.
        (CLEAN, Regime.UNDETERMINED, "the clean arm is no better than the untrained base"),
        (CLEAN + 1.0, Regime.CATASTROPHIC, ""),
        (2 * CLEAN, Regime.CATASTROPHIC, ""),
        (FAULT_ONLY - 0.001, Regime.CATASTROPHIC, ""),
        (FAULT_ONLY + 0.001, Regime.DEGRADING, ""),
    ],
)
def test_the_regime(base: float, regime: Regime, reason: str) -> None:
    """The faulty loss is four times the clean one: catastrophic for any base better than that."""
    assert math.isclose((FAULT_ONLY - CLEAN) / CLEAN, 3.045, abs_tol=5e-4)
    report = regime_of(base, [CLEAN] * SEEDS, [FAULT_ONLY] * SEEDS)
    assert report.regime is regime
    assert report.reason.startswith(reason)
    assert (report.reason == "") == (reason == "")
