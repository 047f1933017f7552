"""Error rates of the whole protocol, measured on simulated studies with a known truth.

Losses are normal; arms share the seed's part of the loss, as paired replicates do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from aqn_tune.evidence import PairedContrast, Verdict, judge, paired_contrast

ALPHA = 0.05
STUDIES = 1_000
SCENARIOS = 4
N = 8
CLAIMS = (Verdict.BETTER, Verdict.WORSE)
ARMS = ("fault_only", "global", "healthy", "targeted")
CONTRASTS = [("targeted", "fault_only"), ("targeted", "global"), ("targeted", "healthy")]
MOST = ALPHA + 2 * math.sqrt(ALPHA * (1 - ALPHA) / STUDIES)
"""0.05 and two standard errors of a rate counted in 1,000 studies: 0.0638."""


Draw = Callable[[np.random.Generator, tuple[int, ...]], Any]


def normal(rng: np.random.Generator, size: tuple[int, ...]) -> Any:
    return rng.normal(size=size)


def heavy_tailed(rng: np.random.Generator, size: tuple[int, ...]) -> Any:
    return rng.standard_t(3, size=size) / math.sqrt(3)


def simulated_family(
    rng: np.random.Generator, *, own: float, n: int = N, gain: float = 0.0, draw: Draw = normal
) -> dict[str, PairedContrast]:
    """Return the contrasts of one study, `targeted` being better than the others by `gain`.

    The seed's part of a loss has sd 1 and is shared by the arms; `own` is the sd of an arm's part.
    """
    family = {}
    for scenario in range(SCENARIOS):
        losses = rng.normal(size=n) + own * draw(rng, (len(ARMS), n))
        losses[ARMS.index("targeted")] -= gain
        by_arm = dict(zip(ARMS, losses.tolist(), strict=True))
        for arm, reference in CONTRASTS:
            name = f"{scenario}/{arm}-vs-{reference}"
            family[name] = paired_contrast(by_arm[arm], by_arm[reference])
    return family


@pytest.mark.parametrize(("n", "draw"), [(8, normal), (6, normal), (8, heavy_tailed)])
def test_null_studies_claim_nothing_more_often_than_alpha(n: int, draw: Draw) -> None:
    """Any `>` or `<` among 12 contrasts that are all null: at most 5 % of 1,000 studies."""
    rng = np.random.default_rng(2026)
    own = 0.3
    margin = 0.5 * math.sqrt(2) * own  # half an sd of the paired difference
    any_claim = any_raw = equivalents = 0
    for _ in range(STUDIES):
        family = simulated_family(rng, own=own, n=n, draw=draw)
        verdicts = [judged.verdict for judged in judge(family, alpha=ALPHA, margin=margin)]
        any_claim += any(verdict in CLAIMS for verdict in verdicts)
        equivalents += verdicts.count(Verdict.EQUIVALENT)
        any_raw += any(c.t_p is not None and c.t_p < ALPHA for c in family.values())
    assert any_claim / STUDIES <= MOST
    # The bug this guards against: reading twelve uncorrected p-values.
    assert any_raw / STUDIES > 0.25
    # And a null that was not resolved stays `?`: few seeds seldom prove equivalence at half an sd.
    assert equivalents / (STUDIES * len(CONTRASTS) * SCENARIOS) < 0.02


def test_studies_with_a_planted_effect_find_it() -> None:
    rng = np.random.default_rng(7)
    studies = 50
    found = wrong = 0
    for _ in range(studies):
        family = simulated_family(rng, own=0.3, gain=1.5)
        verdicts = [judged.verdict for judged in judge(family, alpha=ALPHA, margin=0.2)]
        found += all(verdict is Verdict.BETTER for verdict in verdicts)
        wrong += any(verdict is Verdict.WORSE for verdict in verdicts)
    assert found / studies > 0.9
    assert wrong == 0


def test_a_planted_small_effect_is_real_but_below_the_margin() -> None:
    rng = np.random.default_rng(8)
    family = simulated_family(rng, own=0.03, gain=0.2)
    judged = judge(family, alpha=ALPHA, margin=1.0)
    assert {j.verdict for j in judged} == {Verdict.EQUIVALENT}
    assert all(j.real_but_below_margin for j in judged)


@pytest.mark.parametrize(
    ("fresh", "low", "high"), [(False, 0.20, 1.0), (True, 0.0, MOST)], ids=["search", "fresh"]
)
def test_winners_curse(fresh: bool, low: float, high: float) -> None:
    """The best of 50 equal configs, tested on the seeds that chose it, 'beats' the control.

    With as many seeds either way, so that only their being fresh differs: on its search seeds more
    than one study in five makes a false claim, on fresh seeds one in twenty.
    """
    rng = np.random.default_rng(50)
    configs = 50
    false_positives = 0
    for _ in range(STUDIES):
        search = rng.normal(size=(configs, N))
        best = search[search.mean(axis=1).argmin()]
        arm = rng.normal(size=N) if fresh else best
        control = rng.normal(size=arm.size)
        contrast = paired_contrast(arm.tolist(), control.tolist())
        verdict = judge({"best-vs-control": contrast}, alpha=ALPHA, margin=0.01)[0].verdict
        false_positives += verdict in CLAIMS
    assert low < false_positives / STUDIES <= high


def test_five_seeds_cannot_prove_equivalence_of_a_true_null() -> None:
    """n = 5, margin half an sd: nearly every null is `?`, which must not be sold as `~`."""
    rng = np.random.default_rng(5)
    verdicts = [
        judge(
            {"c": paired_contrast([0.0] * 5, rng.normal(size=5).tolist())}, alpha=ALPHA, margin=0.5
        )[0].verdict
        for _ in range(STUDIES)
    ]
    assert verdicts.count(Verdict.INCONCLUSIVE) / STUDIES > 0.9
    assert verdicts.count(Verdict.EQUIVALENT) / STUDIES < 0.06
