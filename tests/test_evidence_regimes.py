"""Gain, damage, regime and recovery."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aqn_tune.errors import UserError
from aqn_tune.evidence import Regime, gain, recovery, regime_of

BASE = 2.0
CLEAN = [0.9, 1.1]  # gain 1.0


@pytest.mark.parametrize(
    ("fault_only", "regime", "damage"),
    [
        ([0.5, 0.5], Regime.HARMLESS, -0.5),
        ([1.0, 1.0], Regime.HARMLESS, 0.0),
        ([1.04, 1.05], Regime.HARMLESS, 0.045),
        ([1.0625, 1.0625], Regime.DEGRADING, 0.0625),
        ([1.5, 1.7], Regime.DEGRADING, 0.6),
        ([2.0, 2.0], Regime.DEGRADING, 1.0),
        ([2.0, 2.5], Regime.CATASTROPHIC, 1.25),
        ([8.0, 8.0], Regime.CATASTROPHIC, 7.0),
    ],
)
def test_regimes(fault_only: list[float], regime: Regime, damage: float) -> None:
    report = regime_of(BASE, CLEAN, fault_only)
    assert report.regime is regime
    assert report.damage == pytest.approx(damage)
    assert report.gain == pytest.approx(1.0)
    assert report.reason == ""


@pytest.mark.parametrize(
    ("base", "clean", "fault_only", "reason"),
    [
        (None, CLEAN, [1.5], "no finite loss of: base"),
        (math.nan, CLEAN, [1.5], "no finite loss of: base"),
        (BASE, [], [1.5], "no finite loss of: clean"),
        (BASE, CLEAN, [1.5, math.nan], "no finite loss of: fault_only"),
        (BASE, [math.inf], [], "no finite loss of: clean, fault_only"),
        (1.0, CLEAN, [1.5], "no better than the untrained base"),
        (0.5, CLEAN, [1.5], "no better than the untrained base"),
    ],
)
def test_a_regime_is_never_made_up(
    base: float | None, clean: list[float], fault_only: list[float], reason: str
) -> None:
    report = regime_of(base, clean, fault_only)
    assert report.regime is Regime.UNDETERMINED
    assert report.damage is None
    assert reason in report.reason


@pytest.mark.parametrize(("base", "clean"), [(1.0, []), (math.nan, [1.0]), (1.0, [math.inf])])
def test_gain_refuses_missing_numbers(base: float, clean: list[float]) -> None:
    with pytest.raises(ValueError, match="gain needs"):
        gain(base, clean)


FAULT_ONLY = [1.50, 1.55, 1.45, 1.52, 1.48, 1.51]
ARM = [1.30, 1.36, 1.24, 1.31, 1.29, 1.30]
CLEAN6 = [1.00, 1.03, 0.97, 1.01, 0.99, 1.00]


def test_recovery_is_a_ratio_of_means() -> None:
    got = recovery(FAULT_ONLY, ARM, CLEAN6, regime=Regime.DEGRADING, seed=1)
    assert got.value == pytest.approx(
        (sum(FAULT_ONLY) - sum(ARM)) / (sum(FAULT_ONLY) - sum(CLEAN6))
    )
    assert got.low is not None
    assert got.high is not None
    assert got.value is not None
    assert got.low < got.value < got.high
    assert got == recovery(FAULT_ONLY, ARM, CLEAN6, regime=Regime.DEGRADING, seed=1)
    assert got != recovery(FAULT_ONLY, ARM, CLEAN6, regime=Regime.DEGRADING, seed=2)


def test_recovery_is_not_a_mean_of_ratios() -> None:
    """One seed on which the fault costs nearly nothing must not decide the answer."""
    fault_only, arm, clean = [1.001, 2.0], [0.9, 1.5], [1.0, 1.0]
    got = recovery(fault_only, arm, clean, regime=Regime.DEGRADING, seed=0)
    assert got.value == pytest.approx(0.601 / 1.001)  # the mean of ratios would be 50.7


@pytest.mark.parametrize(
    ("arm", "value"), [(CLEAN6, 1.0), (FAULT_ONLY, 0.0), ([2.0] * 6, -2.99 / 3.01)]
)
def test_recovery_scale(arm: list[float], value: float) -> None:
    got = recovery(FAULT_ONLY, arm, CLEAN6, regime=Regime.CATASTROPHIC, seed=0)
    assert got.value == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("fault_only", "arm", "clean", "regime", "reason"),
    [
        (FAULT_ONLY, ARM, CLEAN6, Regime.HARMLESS, "n/a: harmless regime"),
        (FAULT_ONLY, ARM, CLEAN6, Regime.UNDETERMINED, "n/a: undetermined regime"),
        ([math.nan], [1.0], [1.0], Regime.DEGRADING, "n/a: a loss is missing"),
        ([1.5], [math.inf], [1.0], Regime.DEGRADING, "n/a: a loss is missing"),
        ([], [], [], Regime.DEGRADING, "n/a: a loss is missing"),
        ([1.0], [0.9], [1.0], Regime.DEGRADING, "n/a: the fault did no damage"),
    ],
)
def test_recovery_not_applicable(
    fault_only: list[float], arm: list[float], clean: list[float], regime: Regime, reason: str
) -> None:
    got = recovery(fault_only, arm, clean, regime=regime, seed=0)
    assert (got.value, got.low, got.high) == (None, None, None)
    assert got.reason.startswith(reason)


def test_recovery_without_an_interval_says_why() -> None:
    few = recovery([1.5] * 4, [1.2] * 4, [1.0] * 4, regime=Regime.DEGRADING, seed=0)
    assert few.value == pytest.approx(0.6)
    assert (few.low, few.high) == (None, None)
    assert few.reason == "no interval: 4 seed(s), at least 5 needed"
    unsure = recovery(
        [1.5, 0.8, 1.6, 0.7, 1.4], [1.0] * 5, [1.0] * 5, regime=Regime.DEGRADING, seed=0
    )
    assert unsure.value is not None
    assert (unsure.low, unsure.high) == (None, None)
    assert "the damage itself is too uncertain" in unsure.reason


@pytest.mark.parametrize("n", [6, 8])
def test_recovery_interval_covers(n: int) -> None:
    """A plain percentile interval covers 84 % at n = 6; this one must stay near its 95 %."""
    rng = np.random.default_rng(6)
    studies, covered = 600, 0
    for study in range(studies):
        shared = rng.normal(0, 0.05, n)
        noise = rng.normal(0, 0.03, (3, n))
        got = recovery(
            (1.5 + shared + noise[0]).tolist(),
            (1.3 + shared + noise[1]).tolist(),
            (1.0 + shared + noise[2]).tolist(),
            regime=Regime.DEGRADING,
            seed=study,
            resamples=1_000,
        )
        assert got.low is not None
        assert got.high is not None
        covered += got.low <= 0.4 <= got.high
    assert 0.90 < covered / studies < 0.99


def test_recovery_pairs_the_seeds() -> None:
    """Noise shared by the three arms cancels; resampling each arm alone would lose that."""
    rng = np.random.default_rng(3)
    shared = rng.normal(0, 1.0, 8)
    wobble = rng.normal(0, 0.01, (3, 8))
    got = recovery(
        (9.0 + shared + wobble[0]).tolist(),
        (8.0 + shared + wobble[1]).tolist(),
        (7.0 + shared + wobble[2]).tolist(),
        regime=Regime.CATASTROPHIC,
        seed=0,
    )
    assert got.low is not None
    assert got.high is not None
    assert got.high - got.low < 0.05


def test_recovery_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="unequal lengths: 1, 2, 1"):
        recovery([1.0], [1.0, 2.0], [1.0], regime=Regime.DEGRADING, seed=0)
    with pytest.raises(UserError, match="level: got 1"):
        recovery([1.5], [1.2], [1.0], regime=Regime.DEGRADING, seed=0, level=1.0)
