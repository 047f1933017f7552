"""Paired contrasts: known answers, degenerate cases, symmetries."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from aqn_tune.errors import UserError
from aqn_tune.evidence import Degenerate, benjamini_hochberg, holm, paired_contrast, sign_flip_floor

ARM = [1.02, 0.97, 1.10, 0.95, 1.01, 0.99, 1.05, 0.93]
REFERENCE = [1.10, 1.01, 1.15, 0.94, 1.08, 1.06, 1.07, 1.02]


def test_known_answer_by_hand() -> None:
    # reference - arm = 0.1, 0.3, 0.2: mean 0.2, sd 0.1, t = 2 sqrt 3, t(0.975, 2) = 4.302653
    c = paired_contrast([1.0, 1.0, 1.0], [1.1, 1.3, 1.2])
    assert (c.n, c.wins, c.ties, c.losses) == (3, 3, 0, 0)
    assert c.improvement == pytest.approx(0.2)
    assert c.sd == pytest.approx(0.1)
    assert c.se == pytest.approx(0.1 / math.sqrt(3))
    assert c.low == pytest.approx(0.2 - 4.302653 * 0.1 / math.sqrt(3), abs=1e-6)
    assert c.high == pytest.approx(0.2 + 4.302653 * 0.1 / math.sqrt(3), abs=1e-6)
    assert c.t_p == pytest.approx(0.0741799, abs=1e-6)
    assert c.sign_flip_p == 0.25  # of 8 flips only +++ and --- are as extreme
    assert c.pairing_gain == pytest.approx(1.0)  # the arm does not vary: nothing to pair away
    assert c.degenerate is None


@pytest.mark.parametrize("n", [2, 3, 5, 8, 10])
def test_agrees_with_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    shared = rng.normal(size=n)
    arm, reference = shared + rng.normal(size=n), shared + 0.5 + rng.normal(size=n)
    c = paired_contrast(arm.tolist(), reference.tolist(), alpha=0.1)
    expected = stats.ttest_rel(reference, arm)
    interval = expected.confidence_interval(0.9)
    assert c.t_p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (c.low, c.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert c.interval(0.9) == pytest.approx((c.low, c.high))
    flips = stats.permutation_test(
        (reference - arm,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert c.sign_flip_p == pytest.approx(flips.pvalue, abs=1e-12)
    if n > 2:
        assert c.skewness == pytest.approx(stats.skew(reference - arm, bias=False), rel=1e-9)


@pytest.mark.parametrize(("n", "floor"), [(2, 0.5), (5, 0.0625), (6, 0.03125), (8, 0.0078125)])
def test_exact_floor(n: int, floor: float) -> None:
    """Five pairs cannot go below 0.0625, however large and steady the effect."""
    c = paired_contrast([0.0] * n, [100.0 + i / 10 for i in range(n)])
    assert c.sign_flip_floor == sign_flip_floor(n) == floor
    assert c.sign_flip_p == floor
    assert c.t_p is not None
    assert c.t_p < 0.01


def test_ties_of_the_sign_flip_test_survive_rounding() -> None:
    # 0.1 + 0.2 - 0.3 is not 0 in floating point; on paper |0.1 + 0.2 - 0.3| ties with its flips.
    c = paired_contrast([0.0, 0.0, 0.0], [0.1, 0.2, -0.3])
    assert c.sign_flip_p == 1.0
    shifted = paired_contrast([7.0] * 4, [7.1, 7.2, 7.3, 6.9])
    # flips with |sum| >= 0.5 of +-0.1 +-0.2 +-0.3 +-0.1: six of sixteen
    assert shifted.sign_flip_p == 6 / 16


def test_monte_carlo_above_sixteen_pairs() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(0.3, 1.0, size=17)
    arm = np.zeros(17)
    first = paired_contrast(arm.tolist(), reference.tolist(), seed=3)
    again = paired_contrast(arm.tolist(), reference.tolist(), seed=3)
    other = paired_contrast(arm.tolist(), reference.tolist(), seed=4)
    assert first == again
    assert first.sign_flip_p != other.sign_flip_p
    signs = 1.0 - 2.0 * ((np.arange(2**17)[:, None] >> np.arange(17)) & 1)
    exact = float(np.mean(np.abs(signs @ reference) >= abs(reference.sum()) - 1e-9))
    assert first.sign_flip_p == pytest.approx(
        exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000)
    )
    sure = paired_contrast(arm.tolist(), (100 + reference).tolist())
    assert sure.sign_flip_p >= sure.sign_flip_floor > 0


def test_leaves_the_global_random_state_alone() -> None:
    np.random.seed(5)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    paired_contrast([0.0] * 20, list(map(float, range(20))))
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


@pytest.mark.parametrize(
    ("arm", "reference", "degenerate", "improvement"),
    [
        ([1.0], [1.5], Degenerate.TOO_FEW, 0.5),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], Degenerate.IDENTICAL, 0.0),
        ([0.1 + 0.2, 1.0], [0.3, 1.0], Degenerate.IDENTICAL, 0.0),
        ([1.0, 2.0, 3.0], [1.5, 2.5, 3.5], Degenerate.CONSTANT, 0.5),
        ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], Degenerate.CONSTANT, 0.3),
        ([1.0, 1.0], [2.0, 2.0], Degenerate.CONSTANT, 1.0),
        ([0.0, 0.0], [0.0, 0.0], Degenerate.IDENTICAL, 0.0),
    ],
)
def test_no_spread_gives_no_test(
    arm: list[float], reference: list[float], degenerate: Degenerate, improvement: float
) -> None:
    """Steps of 0.3 differ by rounding alone: without slack that is the surest claim of all."""
    c = paired_contrast(arm, reference)
    assert c.degenerate is degenerate
    assert c.improvement == pytest.approx(improvement, abs=1e-12)
    assert (c.t_p, c.low, c.high, c.skewness) == (None, None, None, None)
    assert c.interval(0.9) is None
    assert c.sd in (None, 0.0)
    assert len(c.notes) == 1
    numbers = [value for value in vars(c).values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in numbers)


def test_small_but_real_spread_is_kept() -> None:
    c = paired_contrast([1.0, 1.0, 1.0], [1.0 + 1e-9, 1.0 + 2e-9, 1.0 + 3e-9])
    assert c.degenerate is None


@pytest.mark.parametrize(
    ("arm", "reference"),
    [
        ([], []),
        ([1.0], [1.0, 2.0]),
        ([1.0, math.nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, math.inf]),
    ],
)
def test_refuses_what_is_no_pair(arm: list[float], reference: list[float]) -> None:
    with pytest.raises(ValueError, match=r"lists of one length|finite losses"):
        paired_contrast(arm, reference)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, -0.1, math.nan])
def test_refuses_a_meaningless_alpha(alpha: float) -> None:
    with pytest.raises(UserError, match="alpha: got"):
        paired_contrast(ARM, REFERENCE, alpha=alpha)


def test_skew_is_noted_and_symmetry_is_not() -> None:
    skewed = paired_contrast([0.0] * 8, [0.1, 0.11, 0.09, 0.1, 0.12, 0.1, 0.11, 3.0])
    assert any("skewed" in note for note in skewed.notes)
    assert paired_contrast(ARM, REFERENCE).notes == ()


def test_pairing_gain_tells_shared_noise_from_none() -> None:
    rng = np.random.default_rng(11)
    shared = rng.normal(size=400)
    own = rng.normal(size=(2, 400))
    paired = paired_contrast((shared + 0.1 * own[0]).tolist(), (shared + 0.1 * own[1]).tolist())
    unpaired = paired_contrast(own[0].tolist(), own[1].tolist())
    assert paired.pairing_gain == pytest.approx(0.01, rel=0.2)
    assert unpaired.pairing_gain == pytest.approx(1.0, rel=0.2)


losses = st.lists(
    st.tuples(st.integers(-1000, 1000), st.integers(-1000, 1000)), min_size=2, max_size=9
)


@settings(max_examples=60, deadline=None)
@given(losses, st.randoms(use_true_random=False))
def test_symmetries(pairs: list[tuple[int, int]], shuffler: object) -> None:
    """Swapping the arms mirrors everything; seed order and unit of the loss change nothing."""
    arm = [a / 16 for a, _ in pairs]
    reference = [r / 16 for _, r in pairs]
    c = paired_contrast(arm, reference)
    mirrored = paired_contrast(reference, arm)
    scaled = paired_contrast([4 * a for a in arm], [4 * r for r in reference])
    order = list(range(len(pairs)))
    shuffler.shuffle(order)  # type: ignore[attr-defined]
    shuffled = paired_contrast([arm[i] for i in order], [reference[i] for i in order])

    assert mirrored.improvement == -c.improvement
    assert (mirrored.wins, mirrored.ties, mirrored.losses) == (c.losses, c.ties, c.wins)
    for other in (mirrored, scaled, shuffled):
        assert other.degenerate is c.degenerate
        assert other.sign_flip_p == c.sign_flip_p
        assert other.t_p == (None if c.t_p is None else pytest.approx(c.t_p, rel=1e-9))
    if c.low is not None and c.high is not None:
        assert (mirrored.low, mirrored.high) == pytest.approx((-c.high, -c.low), rel=1e-9)
        assert scaled.low == pytest.approx(4 * c.low, rel=1e-9, abs=1e-9)
        assert c.low <= c.improvement <= c.high
    assert c.sign_flip_floor <= c.sign_flip_p <= 1


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.0126, 0.0044], [0.0126, 0.0088]),
        ([0.0126, 0.5], [0.0252, 0.5]),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.01, 0.01, 0.01], [0.03, 0.03, 0.03]),
        ([0.6, 0.9], [1.0, 1.0]),
    ],
)
def test_holm_by_hand(p_values: list[float], adjusted: list[float]) -> None:
    assert holm(p_values) == pytest.approx(adjusted)


def test_benjamini_hochberg_agrees_with_scipy() -> None:
    p = np.random.default_rng(2).uniform(size=40) ** 2
    assert benjamini_hochberg(p.tolist()) == pytest.approx(stats.false_discovery_control(p))
    assert benjamini_hochberg([]) == []


@pytest.mark.parametrize("adjust", [holm, benjamini_hochberg])
@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1])
def test_corrections_refuse_what_is_no_p_value(adjust: object, bad: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        adjust([0.5, bad])  # type: ignore[operator]


def test_importing_evidence_is_cheap() -> None:
    """`--help`, `plan` and `report` import this room, so the heavy libraries must stay out."""
    heavy = ["numpy", "scipy", "pandas", "torch", "ray", "transformers"]
    code = (
        f"import sys, aqn_tune.evidence.assemble; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
