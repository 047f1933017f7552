"""Dose and response: known answers, and what is no trend."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from aqn_tune.evidence.regimes import Regime
from aqn_tune.evidence.trend import Turn, trend, turns

RATINGS = (
    (3, 4, 3), (2, 2, 4), (3, 3, 5), (1, 3, 2), (2, 3, 2),
    (2, 4, 5), (1, 2, 4), (3, 4, 4), (2, 4, 5), (1, 3, 4),
)  # fmt: skip
"""The example of scipy.stats.page_trend_test: ten students, three ways to teach; L is 133.5."""


def test_the_example_of_the_books() -> None:
    found = trend(RATINGS)
    assert found is not None
    assert (found.seeds, found.levels, found.statistic, found.rises) == (10, 3, 133.5, True)
    assert found.p == pytest.approx(2 * 0.0018191161948127822, rel=1e-10)


def test_the_other_way_round_it_falls_by_as_much() -> None:
    up, down = trend(RATINGS), trend([row[::-1] for row in RATINGS])
    assert up is not None
    assert down is not None
    assert (up.rises, down.rises) == (True, False)
    assert down.p == pytest.approx(up.p, rel=1e-12)


@pytest.mark.parametrize(("seeds", "levels"), [(2, 3), (3, 3), (2, 4)])
def test_the_p_value_counts_all_orders(seeds: int, levels: int) -> None:
    """Without ties the test is exact: of all tables of ranks, those with an L at least as far out."""
    orders = list(itertools.permutations(range(1, levels + 1)))

    def statistic(table: tuple[tuple[int, ...], ...]) -> int:
        return sum((j + 1) * sum(row[j] for row in table) for j in range(levels))

    tables = list(itertools.product(orders, repeat=seeds))
    values = tables[len(tables) // 3]
    found = trend([list(map(float, row)) for row in values])
    assert found is not None
    observed = statistic(values)
    above = sum(statistic(t) >= observed for t in tables) / len(tables)
    below = sum(statistic(t) <= observed for t in tables) / len(tables)
    assert found.statistic == observed
    assert found.p == pytest.approx(min(1.0, 2 * min(above, below)), rel=1e-12)


def test_without_a_trend_it_is_wrong_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [trend(rng.normal(size=(8, 5)).tolist()) for _ in range(600)]
    wrong = sum(one is not None and one.p < 0.05 for one in found) / len(found)
    assert wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(found))
    assert wrong > 0.01


@pytest.mark.parametrize(
    "values",
    [
        [[1.0, 2.0], [1.0, 2.0]],
        [[1.0, 2.0, 3.0]],
        [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]],
    ],
    ids=["two levels", "one seed", "no spread"],
)
def test_what_is_no_trend(values: list[list[float]]) -> None:
    assert trend(values) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [([[1.0, 2.0, 3.0], [1.0, 2.0]], "every level"), ([[1.0, math.nan, 3.0]] * 2, "finite")],
)
def test_what_cannot_be_ranked_is_refused(values: list[list[float]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trend(values)


H, D, C, U = Regime.HARMLESS, Regime.DEGRADING, Regime.CATASTROPHIC, Regime.UNDETERMINED


@pytest.mark.parametrize(
    ("regimes", "found"),
    [
        ([(0.1, H), (0.2, H)], ()),
        ([(0.1, H), (0.2, D), (0.3, D), (0.5, C)], (Turn(0.1, H, 0.2, D), Turn(0.3, D, 0.5, C))),
        ([(0.1, H), (0.2, U), (0.3, C)], (Turn(0.1, H, 0.3, C),)),
        ([(0.1, U)], ()),
        ([], ()),
    ],
)
def test_where_the_regime_turns(
    regimes: list[tuple[float, Regime]], found: tuple[Turn, ...]
) -> None:
    assert turns(regimes) == found
