"""The rule table of the verdicts, and the power calculations behind `?` and `plan`."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from aqn_tune.errors import UserError
from aqn_tune.evidence import (
    Judged,
    PairedContrast,
    Undetermined,
    Verdict,
    holm,
    judge,
    mde_sd_units,
    paired_contrast,
    seeds_needed,
)
from aqn_tune.evidence.power import detection_power, equivalence_power

N = 8


def contrast(mean: float, sd: float, n: int = N) -> PairedContrast:
    """Return a contrast whose paired differences have exactly this mean and sd."""
    shape = np.linspace(-1.0, 1.0, n)
    differences = mean + sd * shape / shape.std(ddof=1)
    return paired_contrast([0.0] * n, differences.tolist())


def one(mean: float, sd: float, margin: float | None, **options: float) -> Judged:
    return judge({"c": contrast(mean, sd)}, margin=margin, **options)[0]


# With n = 8 and m = 1: significant if |mean| > 0.836 sd; the 90 % interval is mean +- 0.670 sd.
RULES = [
    # mean, sd, margin, verdict, real but below the margin
    (2.0, 1.0, 0.5, ">", False),
    (-2.0, 1.0, 0.5, "<", False),
    (0.84, 1.0, 0.5, ">", False),
    (0.83, 1.0, 0.5, "?", False),
    (-0.84, 1.0, 0.5, "<", False),
    (-0.83, 1.0, 0.5, "?", False),
    (0.0, 1.0, 0.5, "?", False),
    (0.0, 1.0, 0.66, "?", False),
    (0.0, 1.0, 0.68, "~", False),
    (0.3, 1.0, 0.98, "~", False),
    (0.3, 1.0, 0.96, "?", False),
    (1.0, 1.0, 1.68, "~", True),
    (-1.0, 1.0, 1.68, "~", True),
    (1.0, 1.0, 1.66, ">", False),
    (0.0, 1.0, None, "?", False),
    (2.0, 1.0, None, ">", False),
]


@pytest.mark.parametrize(("mean", "sd", "margin", "verdict", "below"), RULES)
def test_rule_table(
    mean: float, sd: float, margin: float | None, verdict: str, below: bool
) -> None:
    judged = one(mean, sd, margin)
    assert judged.verdict == verdict
    assert judged.real_but_below_margin is below
    assert (judged.seeds_needed is not None) == (verdict == "?" and margin is not None)


def test_words_never_render_inconclusive_as_equivalent() -> None:
    """At n = 5 a true null is nearly always `?`; printed as "no difference" it would be a lie."""
    assert one(2.0, 1.0, 0.5).words == "better"
    assert one(-2.0, 1.0, 0.5).words == "worse"
    assert one(0.0, 1.0, 0.68).words == "equivalent"
    assert one(1.0, 1.0, 1.68).words == "equivalent (real but below the margin)"
    undecided = one(0.0, 1.0, 0.5)
    assert undecided.verdict is Verdict.INCONCLUSIVE
    assert str(undecided.verdict) == "?"
    assert undecided.words == (
        f"inconclusive: about {undecided.further_seeds} further seeds (a new generation of "
        f"{undecided.seeds_needed}; an effect between zero and the margin may take more)"
    )
    assert one(0.0, 1.0, None).words.startswith("inconclusive: no margin")
    assert one(0.0, 1.0, 1e-6).words.startswith("inconclusive: no feasible number")
    assert [v.word for v in Verdict] == ["better", "worse", "equivalent", "inconclusive"]


def test_a_larger_family_needs_stronger_evidence() -> None:
    alone = judge({"a": contrast(1.0, 1.0)}, margin=0.5)[0]
    family = {"a": contrast(1.0, 1.0)} | {f"null{i}": contrast(0.0, 1.0) for i in range(11)}
    among = judge(family, margin=0.5)[0]
    assert (alone.verdict, among.verdict) == (Verdict.BETTER, Verdict.INCONCLUSIVE)
    assert among.family_size == 12
    assert alone.holm_p is not None
    assert among.holm_p == pytest.approx(12 * alone.holm_p)
    assert alone.low is not None
    assert among.low is not None
    assert among.low < alone.low


@pytest.mark.parametrize("m", [1, 12])
def test_the_seeds_of_an_inconclusive_verdict_count_the_family(m: int) -> None:
    judged = judge({f"c{i}": contrast(0.1, 1.0) for i in range(m)}, margin=0.5)[0]
    assert judged.seeds_needed == seeds_needed(1.0, margin=0.5, alpha_over_m=0.05 / m)
    assert judged.seeds_needed is not None
    assert judged.further_seeds == judged.seeds_needed - N


@pytest.mark.parametrize(
    ("n", "mean", "margin", "planned", "needed"),
    # Each ends in `?` with a spread at which the power calculation asks for `planned` seeds.
    [
        (8, 0.79, 1.3, 7, 9),
        (12, 0.60, 1.1, 9, 13),
        (12, 0.60, 1.0, 11, 13),
        (5, 1.18, 2.0, 5, 6),
        (3, 2.36, 3.0, 4, 6),
        (5, 1.18, 1.0, 11, 11),
    ],
)
def test_an_inconclusive_verdict_needs_more_seeds_than_it_had(
    n: int, mean: float, margin: float, planned: int, needed: int
) -> None:
    """Planted: `about 0 further seeds` where the plan asks for no more than were spent."""
    judged = judge({"c": contrast(mean, 1.0, n)}, margin=margin)[0]
    assert seeds_needed(1.0, margin=margin, alpha_over_m=0.05) == planned
    assert judged.verdict is Verdict.INCONCLUSIVE
    assert (judged.seeds_needed, judged.further_seeds) == (needed, needed - n)
    seeds = "seed" if needed - n == 1 else "seeds"
    assert judged.words.startswith(
        f"inconclusive: about {needed - n} further {seeds} (a new generation of {needed};"
    )


def test_holm_takes_the_paired_t_p_values_in_the_order_given() -> None:
    family = {"a": contrast(0.9, 1.0), "b": contrast(3.0, 1.0), "c": contrast(-1.1, 1.0)}
    judged = judge(family, margin=0.1)
    assert [j.name for j in judged] == ["a", "b", "c"]
    assert [j.holm_p for j in judged] == pytest.approx(holm([c.t_p for c in family.values()]))


@pytest.mark.parametrize("m", [1, 3, 12])
def test_equivalence_uses_the_one_minus_two_alpha_over_m_interval(m: int) -> None:
    family = {f"c{i}": contrast(0.1, 1.0) for i in range(m)}
    judged = judge(family, margin=5.0, alpha=0.05)[0]
    half = float(stats.t.ppf(1 - 0.05 / m, N - 1)) / math.sqrt(N)
    assert (judged.low, judged.high) == pytest.approx((0.1 - half, 0.1 + half))
    assert judged.verdict is Verdict.EQUIVALENT


def test_a_failed_contrast_stays_in_the_family_and_gets_no_number() -> None:
    """Leaving it out would turn the `?` of its neighbour (p = 0.03) into `>`."""
    p_03 = 2.715 / math.sqrt(N)
    reason = "2 of 8 seeds failed in arm global"
    judged = judge({"a": contrast(p_03, 1.0), "b": Undetermined(reason)}, margin=0.1)
    assert judge({"a": contrast(p_03, 1.0)}, margin=0.1)[0].verdict is Verdict.BETTER
    assert judged[0].verdict is Verdict.INCONCLUSIVE
    failed = judged[1]
    assert failed.verdict is Verdict.INCONCLUSIVE
    assert (failed.contrast, failed.holm_p, failed.low, failed.high) == (None, None, None, None)
    assert (failed.seeds_needed, failed.further_seeds) == (None, None)
    assert failed.words == f"inconclusive: {reason}"


@pytest.mark.parametrize(
    ("arm", "reference", "said"),
    [
        ([1.0, 2.0], [1.0, 2.0], "probably one configuration"),
        ([1.0, 2.0], [2.0, 3.0], "the seed probably changes nothing"),
        ([1.0], [9.0], "fewer than two pairs"),
    ],
)
def test_no_spread_is_never_a_claim(arm: list[float], reference: list[float], said: str) -> None:
    """Neither a sure `>` nor a sure `~` follows from differences without any spread."""
    judged = judge({"c": paired_contrast(arm, reference)}, margin=5.0)[0]
    assert judged.verdict is Verdict.INCONCLUSIVE
    assert judged.holm_p is None
    assert said in judged.words


def test_margins_may_differ_between_contrasts() -> None:
    family = {"a": contrast(1.0, 1.0), "b": contrast(1.0, 1.0)}
    judged = judge(family, margin={"a": 3.0, "b": 0.1}, alpha=0.2)
    assert [j.verdict for j in judged] == [Verdict.EQUIVALENT, Verdict.BETTER]
    with pytest.raises(KeyError):
        judge(family, margin={"a": 1.0})


def test_an_empty_family_has_no_verdicts() -> None:
    assert judge({}, margin=1.0) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 0.0}, "margin of contrast 'c'"),
        ({"margin": -1.0}, "margin of contrast 'c'"),
        ({"margin": math.nan}, "margin of contrast 'c'"),
        ({"margin": math.inf}, "margin of contrast 'c'"),
        ({"margin": 1.0, "alpha": 0.5}, "alpha: got 0.5"),
        ({"margin": 1.0, "power": 1.0}, "power: got 1.0"),
    ],
)
def test_refuses_bad_settings(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        judge({"c": contrast(1.0, 1.0)}, **options)  # type: ignore[arg-type]


# ---- power -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "alpha", "power", "mde"),
    # G*Power 3.1, t-test on matched pairs, two-sided: the effect d found with this power.
    [(8, 0.05, 0.8, 1.156), (5, 0.05, 0.8, 1.677), (34, 0.05, 0.8, 0.4950)],
)
def test_mde_known_values(n: int, alpha: float, power: float, mde: float) -> None:
    assert mde_sd_units(n, alpha, power) == pytest.approx(mde, rel=5e-3)


@pytest.mark.parametrize("n", [2, 6, 8, 30, 500])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 12])
@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
def test_mde_has_its_power(n: int, alpha: float, power: float) -> None:
    effect = mde_sd_units(n, alpha, power)
    critical = stats.t.ppf(1 - alpha / 2, n - 1)
    assert stats.nct.sf(critical, n - 1, effect * math.sqrt(n)) == pytest.approx(power, abs=1e-5)
    assert detection_power(n, effect, alpha) == pytest.approx(power, abs=1e-5)


def test_power_of_the_protocol() -> None:
    """Paired with correlation 0.8 an effect of one seed sd is found 96 % of the time at n = 8."""
    effect_in_sd_of_difference = 1 / math.sqrt(2 * (1 - 0.8))
    assert detection_power(8, effect_in_sd_of_difference, 0.05) == pytest.approx(0.96, abs=0.01)
    assert detection_power(5, effect_in_sd_of_difference, 0.05) == pytest.approx(0.76, abs=0.01)


@pytest.mark.parametrize("margin_in_sd", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("m", [1, 12])
def test_seeds_needed_is_the_smallest_number_that_suffices(margin_in_sd: float, m: int) -> None:
    n = seeds_needed(2.0, margin=2.0 * margin_in_sd, alpha_over_m=0.05 / m)
    assert n is not None

    def enough(k: int) -> bool:
        return (
            min(
                detection_power(k, margin_in_sd, 0.05 / m),
                equivalence_power(k, margin_in_sd, 0.05 / m),
            )
            >= 0.8
        )

    assert enough(n)
    assert not enough(n - 1)


@pytest.mark.parametrize(("margin_in_sd", "needed"), [(1.3, 7), (1.5, 6), (2.0, 5), (6.0, 3)])
def test_a_wide_margin_needs_few_seeds(margin_in_sd: float, needed: int) -> None:
    """Planted: scipy's NaN at a noncentrality near 38 made 626 seeds of 6."""
    assert seeds_needed(1.0, margin=margin_in_sd, alpha_over_m=0.05) == needed
    for n in range(2, 2000):
        shift = margin_in_sd * math.sqrt(n)
        if 37 < shift < 40:
            assert detection_power(n, margin_in_sd, 0.05) == pytest.approx(1.0, abs=1e-6)
            assert equivalence_power(n, margin_in_sd, 0.05) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("n", "margin_in_sd"), [(8, 1.2), (12, 0.9), (40, 0.5)])
def test_equivalence_power_is_a_tight_lower_bound(n: int, margin_in_sd: float) -> None:
    rng = np.random.default_rng(n)
    d = rng.normal(size=(20_000, n))
    half = stats.t.ppf(0.95, n - 1) * d.std(axis=1, ddof=1) / math.sqrt(n)
    rate = float((np.abs(d.mean(axis=1)) + half < margin_in_sd).mean())
    assert equivalence_power(n, margin_in_sd, 0.05) == pytest.approx(rate, abs=0.012)


def test_seeds_needed_keeps_its_promise() -> None:
    """A study of that size ends in `~` without, and in `>` with an effect of one margin."""
    n = seeds_needed(1.0, margin=0.8, alpha_over_m=0.05)
    assert n is not None
    rng = np.random.default_rng(21)
    studies = 400
    for effect, wanted in [(0.0, Verdict.EQUIVALENT), (0.8, Verdict.BETTER)]:
        zeros = [0.0] * n
        found = 0
        for _ in range(studies):
            c = paired_contrast(zeros, rng.normal(effect, 1.0, size=n).tolist())
            found += judge({"c": c}, margin=0.8)[0].verdict is wanted
        assert found / studies >= 0.8 - 2 * math.sqrt(0.8 * 0.2 / studies)


def test_out_of_reach_is_none() -> None:
    assert seeds_needed(1.0, margin=0.01, alpha_over_m=0.05) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mde_sd_units(1, 0.05), "seeds: got 1"),
        (lambda: mde_sd_units(8, 0.0), "alpha: got"),
        (lambda: mde_sd_units(8, 0.05, 0.2), "power: got 0.2"),
        (lambda: seeds_needed(0.0, margin=1.0, alpha_over_m=0.05), "sd of the paired"),
        (lambda: seeds_needed(1.0, margin=0.0, alpha_over_m=0.05), "margin: got"),
    ],
)
def test_power_refuses_bad_input(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()  # type: ignore[operator]
