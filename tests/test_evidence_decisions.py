"""The decision matrix: what it concludes, and every way to write one that cannot be trusted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from aqn_tune.errors import UserError
from aqn_tune.evidence import Verdict, check_decisions, decide, parse_decisions

ROWS: list[dict[str, Any]] = [
    {"when": {"noise": ">", "targeting": "~"}, "say": "noise on all layers"},
    {"when": {"noise": ">", "targeting": ">"}, "say": "targeted noise"},
    {"when": {"noise": ">", "targeting": "<"}, "say": "global noise"},
    {"when": {"noise": ["~", "<"], "targeting": "any"}, "say": "no benefit"},
]


def verdicts(symbols: str) -> dict[str, Verdict]:
    return dict(zip(("noise", "targeting"), map(Verdict, symbols), strict=True))


@pytest.mark.parametrize(
    ("symbols", "say", "row"),
    [
        (">~", "noise on all layers", 1),
        (">>", "targeted noise", 2),
        ("><", "global noise", 3),
        ("~>", "no benefit", 4),
        ("<<", "no benefit", 4),
        ("~?", "no benefit", 4),
        (">?", "not decided", None),
        ("?>", "not decided", None),
        ("??", "not decided", None),
    ],
)
def test_decisions(symbols: str, say: str, row: int | None) -> None:
    decision = decide(parse_decisions(ROWS), verdicts(symbols))
    assert (decision.say, decision.row) == (say, row)


def test_the_first_row_that_fits_wins() -> None:
    rows = [
        {"when": {"noise": "?"}, "say": "more seeds"},
        {"when": {"noise": "any"}, "say": "anything else"},
    ]
    matrix = parse_decisions(rows)
    assert decide(matrix, {"noise": Verdict.INCONCLUSIVE}).say == "more seeds"
    assert decide(matrix, {"noise": Verdict.WORSE}).say == "anything else"


def test_an_inconclusive_verdict_never_counts_as_equivalent() -> None:
    matrix = parse_decisions(ROWS)
    for noise, targeting in itertools.product(Verdict, repeat=2):
        decision = decide(matrix, {"noise": noise, "targeting": targeting})
        if noise is Verdict.INCONCLUSIVE:
            assert decision.say == "not decided"


def with_row(position: int, row: dict[str, Any]) -> list[dict[str, Any]]:
    return [*ROWS[:position], row, *ROWS[position + 1 :]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:-1], 'no row answers noise "<", targeting ">"'),
        (ROWS[1:], 'no row answers noise ">", targeting "~"'),
        ([*ROWS, {"when": {"noise": "~"}, "say": "late"}], r"row 5 \('late'\) is never reached"),
        ([{"when": {}, "say": "always"}, *ROWS], r"row 2 \('noise on all layers'\) is never"),
        (
            with_row(0, {"when": {"noise": ">", "targeting": None}, "say": "x"}),
            'write "~" in quote',
        ),
        (with_row(0, {"when": {"noise": [">", None]}, "say": "x"}), 'write "~" in quotes'),
        (with_row(0, {"when": {"noise": "="}, "say": "x"}), "contrast 'noise': got '='"),
        (with_row(0, {"when": {"noise": [">", "any"]}, "say": "x"}), "contrast 'noise': got 'any'"),
        (with_row(0, {"when": {"noise": []}, "say": "x"}), "so the row never fits"),
        (with_row(0, {"when": {"nois": ">"}, "say": "x"}), "unknown contrast 'nois'.*mean 'noise'"),
        (with_row(0, {"when": {"noise": ">"}, "says": "x"}), "rows.0.say: Field required"),
        (with_row(0, {"when": {"noise": ">"}, "say": ""}), "rows.0.say: String should have"),
        (with_row(0, {"when": ">", "say": "x"}), "rows.0.when: Input should be a valid dict"),
        ([], "rows: Tuple should have at least 1 item"),
        ([{"when": {f"c{i}": "any" for i in range(7)}, "say": "x"}], "7 contrasts in one matrix"),
    ],
)
def test_refuses_a_matrix_that_cannot_be_trusted(rows: list[dict[str, Any]], message: str) -> None:
    names = ["noise", "targeting", *(f"c{i}" for i in range(7))]
    with pytest.raises(UserError, match=message):
        parse_decisions(rows, contrasts=names)


def test_a_row_may_be_silent_about_a_declared_contrast() -> None:
    matrix = parse_decisions([{"when": {"noise": "any"}, "say": "x"}], contrasts=["noise", "other"])
    check_decisions(matrix, contrasts=["noise", "other"])
    assert matrix.contrasts == ("noise",)
    assert decide(matrix, {"noise": Verdict.BETTER, "other": Verdict.WORSE}).say == "x"


def test_a_missing_verdict_is_an_error() -> None:
    with pytest.raises(KeyError, match="no verdict for contrast 'targeting'"):
        decide(parse_decisions(ROWS), {"noise": Verdict.BETTER})
