"""How numbers, tables and axes are printed."""

from __future__ import annotations

import math

import pytest

from aqn_tune.report import text
from aqn_tune.report.axes import bent, bent_ticks, linear, linear_ticks, log_ticks, logarithmic
from aqn_tune.report.table import Column, Mark, Table
from aqn_tune.report.text import Spread


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        (text.number(0.12345), "0.1235"),
        (text.number(-0.5, 2), "\N{MINUS SIGN}0.50"),
        (text.number(None), "n/a"),
        (text.signed(0.1, 2), "+0.10"),
        (text.signed(-0.1, 2), "\N{MINUS SIGN}0.10"),
        (text.signed(-0.00001), "0.0000"),
        (text.signed(None), "n/a"),
        (text.percent(0.123), "12.3\u202f%"),
        (text.percent(None), "n/a"),
        (text.confidence(0.05), "95\u202f%"),
        (text.confidence(0.001), "99.9\u202f%"),
        (text.confidence(0.05 / 3), "98.33\u202f%"),
        (text.with_sd(Spread(0.5, 0.01), 2), "0.50 ± 0.01"),
        (text.with_sd(Spread(0.5, None), 2), "0.50"),
        (text.with_sd(Spread(None, None)), "n/a"),
        (text.percent_with_sd(Spread(0.5, 0.012)), "50.0 ± 1.2\u202f%"),
        (text.interval(-0.1, 0.2, 1), "[\N{MINUS SIGN}0.1, +0.2]"),
        (text.interval(None, 0.2), "n/a"),
        (text.p_value(0.0312), "0.031"),
        (text.p_value(0.0), "< 0.001"),
        (text.p_value(None), "n/a"),
        (text.duration(4.25), "4.2\u202fs"),
        (text.duration(200), "3\u202fmin 20\u202fs"),
        (text.duration(7500), "2\u202fh 05\u202fmin"),
        (text.count(1, "seed"), "1 seed"),
        (text.count(1234, "seed"), "1\u202f234 seeds"),
        (text.plain(True), "true"),
        (text.plain(0.012345), "0.01235"),
    ],
)
def test_numbers_print_as(printed: str, expected: str) -> None:
    assert printed == expected


def test_a_mean_needs_every_seed() -> None:
    """Planted: the mean of the survivors flatters an arm that diverges often."""
    assert text.spread([1.0, 3.0]) == Spread(2.0, pytest.approx(math.sqrt(2)))
    assert text.spread([1.0, None]) == Spread(None, None)
    assert text.spread([]) == Spread(None, None)
    assert text.spread([1.0]) == Spread(1.0, None)


def test_markdown_keeps_symbols_and_bars_apart_from_its_own() -> None:
    table = Table(
        "t",
        (Column("a|b", align="left"), Column("loss", "nats")),
        (("fault_only *x*", Mark("equivalent", "equivalent", symbol="~")),),
        ("p < 0.05",),
    )
    assert table.markdown().splitlines() == [
        r"| a\|b | loss (nats) |",
        "| --- | ---: |",
        r"| fault\_only \*x\* | `~` equivalent |",
        "",
        r"p \< 0.05",
    ]


def test_a_row_that_does_not_fit_its_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        Table("t", (Column("a"), Column("b")), (("x",),))


@pytest.mark.parametrize(
    ("ticks", "expected"),
    [
        (linear_ticks(0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (linear_ticks(0.31, 2.6), [0.5, 1.0, 1.5, 2.0, 2.5]),
        (linear_ticks(3, 3), [3]),
        (log_ticks(0.4, 6), [0.5, 1, 2, 5]),
        (log_ticks(0.01, 0.01), [0.01]),
        (bent_ticks(1.0, 0.05), [-0.5, -0.2, -0.05, 0, 0.05, 0.2, 0.5]),
    ],
)
def test_ticks_are_round(ticks: list[float], expected: list[float]) -> None:
    assert ticks == pytest.approx(expected)


@pytest.mark.parametrize(
    "scale",
    [linear(2, 8, 100, 0), logarithmic(0.1, 10, 0, 50), bent(3, 0.1, 10, 90), linear(1, 1, 0, 9)],
)
def test_scales_are_monotone_and_hit_their_ends(scale: object) -> None:
    from aqn_tune.report.axes import Scale

    assert isinstance(scale, Scale)
    assert scale(scale.low) == pytest.approx(scale.start)
    assert scale(scale.high) == pytest.approx(scale.end)
    places = [scale(scale.low + i / 20 * (scale.high - scale.low)) for i in range(21)]
    assert places == sorted(places, reverse=scale.end < scale.start)
