"""What each dimension of a search space may offer, and what a study that names it wrongly is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from aqn_tune.errors import UserError
from aqn_tune.study.checks import check_study
from aqn_tune.study.schema import Study
from aqn_tune.study.space import DIMENSIONS, Dimension
from aqn_tune.study.space_checks import dimension_problem
from aqn_tune.study.sweep import resolve_scenarios


def problem(name: str, value: Any) -> str | None:
    fixed: Dimension = TypeAdapter(Dimension).validate_python({"kind": "fixed", "value": value})
    return dimension_problem(name, fixed, 28)


# dimension: values that are allowed, values that are not, and what is said of those
CASES: dict[str, tuple[list[Any], list[Any], str]] = {
    "carrier": (["hidden", "linear_weight"], ["weight", 1], "hidden, rmsnorm_weight"),
    "carrier_relative": ([True, False], ["true", 1, 0.0], "allowed are true and false"),
    "schedule": (["linear", "epoch_aware"], ["linaer", True], "geometric, linear"),
    "sigma_start": ([0, 0.05, 3], [-0.1, "0.1", True], "numbers"),
    "sigma_ratio": ([1e-9, 1], [0, 1.1], "numbers above 0 to 1"),
    "stages": ([1, 9, 4.0], [0, 1.5], "whole numbers of at least 1"),
    "epochs": ([1, 4], [0, 2.5, True], ""),
    "stages_per_epoch": ([1, 4], [0, 2.5], "whole numbers of at least 1"),
    "warmup_fraction": ([0, 0.99], [1, -0.1], "numbers from 0 to below 1"),
    "stop_fraction": ([0, 0.99], [1, 1.0, -0.1], "numbers from 0 to below 1"),
    "targeting": (["zone", "depth"], ["zones"], "did you mean 'zone'?"),
    "window_centre": ([0, 27], [28, -1, 0.5], "whole numbers from 0 to 27"),
    "window_width": ([1, 99], [0], "whole numbers of at least 1"),
    "layers": (["10", "0,14-17", "all", 3, "-1"], ["28", "14-28"], "allowed are 0 to 27"),
    "layers of nonsense": ([], ["", "x", "5-3", "3 4"], "a range is written 'first-last'"),
    "random_count": ([1, 28], [0, 29], "whole numbers from 1 to 28"),
    "multiplier_default": ([0, 2.5], [-1, "1"], "numbers"),
    "multiplier_27": ([0, 2.5], [-1], "numbers of at least 0"),
    "multiplier_28": ([], [1], "there is no layer 28 of 28; allowed are 0 to 27"),
    "score_0": ([0, 2.5], [-1], "numbers of at least 0"),
    "score_28": ([], [1], "there is no layer 28 of 28; allowed are 0 to 27"),
    "scores_file": (["scores.json"], [3, True], "the path of a file"),
    "scores_map": (["power", "inverse_linear"], ["linear"], "power, inverse_linear"),
    "scores_alpha": ([-2, 0, 1e6], ["1", True], "numbers"),
    "scores_ceiling": ([True, False], ["yes", 0], "allowed are true and false"),
    "zone_edge": ([0, 2], [-0.1], "numbers of at least 0"),
    "zone_middle": ([0, 2], [-0.1], "numbers of at least 0"),
    "zone_middle_after": ([0, 2], [-0.1], "numbers of at least 0"),
    "zone_boundary": ([1e-9, 1], [0, 1.1], "numbers above 0 to 1"),
    "depth_low": ([0, 1], [-0.1, 1.1], "numbers from 0 to 1"),
    "depth_high": ([0, 1], [-0.1, 1.1], "numbers from 0 to 1"),
    "normalise": (["none", "energy"], ["dose"], "none, energy"),
    "redraw": (["step", "microbatch", "forward"], ["steps", 1], "step, microbatch, forward"),
    "learning_rate": ([1e-9, 2], [0, -1], "numbers above 0"),
    "rank": ([1, 64], [0, 1.5], "whole numbers of at least 1"),
}


def test_every_dimension_is_in_the_table() -> None:
    assert set(DIMENSIONS) <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_what_a_dimension_may_offer(name: str) -> None:
    good, bad, said = CASES[name]
    name = name.partition(" ")[0]
    for value in good:
        assert problem(name, value) is None, value
    for value in bad:
        found = problem(name, value)
        assert found is not None, value
        assert said in found, value


WHOLE = {
    "stages": "whole numbers of at least 1",
    "epochs": "whole numbers of at least 1",
    "stages_per_epoch": "whole numbers of at least 1",
    "window_centre": "whole numbers from 0 to 27",
    "window_width": "whole numbers of at least 1",
    "random_count": "whole numbers from 1 to 28",
    "rank": "whole numbers of at least 1",
}


@pytest.mark.parametrize("name", DIMENSIONS)
def test_a_range_of_fractions_is_refused_where_numbers_are_whole(name: str) -> None:
    """The original bug: both ends of `rank` from 4.0 to 16.0 are whole, and Optuna drew 7.31."""
    floats: Dimension = TypeAdapter(Dimension).validate_python(
        {"kind": "float", "low": 4.0, "high": 16.0}
    )
    found = dimension_problem(name, floats, 28)
    said = f"got kind float, which draws fractions; allowed are {WHOLE.get(name)}: use kind int"
    assert (found == said) is (name in WHOLE), found


@pytest.mark.parametrize(
    ("dimension", "bad"),
    [
        ({"kind": "float", "low": 0.1, "high": 1.0}, True),
        ({"kind": "float", "low": 0.0, "high": 0.9}, False),
        ({"kind": "choice", "values": [0.1, 0.2, 1.0]}, True),
        ({"kind": "choice", "values": [0.1, 0.2]}, False),
    ],
)
def test_both_ends_and_every_choice_are_looked_at(dimension: Any, bad: bool) -> None:
    made: Dimension = TypeAdapter(Dimension).validate_python(dimension)
    assert (dimension_problem("stop_fraction", made, 28) is not None) is bad


def searched(dimensions: dict[str, Any], **changes: Any) -> Study:
    return Study.model_validate(
        {
            "study": "s",
            "scenario": {"faults": [{"kind": "dead_zone", "layers": [3], "threshold": 0.2}]},
            "search": {"space": {"dimensions": dimensions}},
            **changes,
        }
    )


def span(low: float, high: float, kind: str = "float", **rest: Any) -> dict[str, Any]:
    return {"kind": kind, "low": low, "high": high, **rest}


def one_of(*values: Any) -> dict[str, Any]:
    return {"kind": "choice", "values": values}


DEPTH = {"targeting": {"kind": "fixed", "value": "depth"}}
INVERSE = {
    "targeting": {"kind": "fixed", "value": "scores"},
    "scores_map": {"kind": "fixed", "value": "inverse_linear"},
}
SCORES = {"targeting": {"kind": "fixed", "value": "scores"}}
ZONE = {
    "targeting": {"kind": "fixed", "value": "zone"},
    "layers": {"kind": "fixed", "value": "2-3"},
}


@pytest.mark.parametrize(
    ("dimensions", "message"),
    [
        ({"stop_fraction": {"kind": "float", "low": 0, "high": 1}},
         r"^search\.space\.dimensions\.stop_fraction: got 1; allowed are numbers from 0 to below 1"),
        ({**SCORES, "scores_file": {"kind": "fixed", "value": "nowhere.json"}},
         r"^search\.space\.dimensions: .*cannot read nowhere\.json"),
        ({**SCORES, "score_3": {"kind": "fixed", "value": 1}},
         r"^search\.space\.dimensions: .*layers 0, 1, 2, 4, 5, 6, 7 have no number"),
        ({**SCORES, "score_8": {"kind": "fixed", "value": 1}},
         r"^search\.space\.dimensions\.score_8: there is no layer 8 of 8"),
        ({**ZONE, "zone_boundary": {"kind": "float", "low": 0.5, "high": 1.0},
          "zone_middle_after": {"kind": "fixed", "value": 0.5}},
         r"^search\.space\.dimensions: .*no effect with boundary 1.*zone_boundary=1\.0"),
        # Accepted once, as both ends of one go with those of the other: four draws in ten have no band.
        ({**DEPTH, "depth_low": span(0.0, 0.9), "depth_high": span(0.1, 1.0)},
         r"^search\.space\.dimensions: .*low 0\.9 is above high 0\.1.*the search may draw this"),
        ({**DEPTH, "depth_low": one_of(0.2, 0.5, 0.1), "depth_high": one_of(0.4, 0.9, 1.0)},
         r"low 0\.5 is above high 0\.4"),
        ({**DEPTH, "depth_low": span(0.0, 0.5), "depth_high": span(0.5, 1.0)},
         r"none of 8 layers lies between 0\.5 and 0\.5"),
        ({**DEPTH, "depth_low": span(0.0, 0.4), "depth_high": span(0.6, 1.0)}, None),
        # with a choice of three beside them that neither has to fit
        ({"rank": one_of(2, 4, 8), **DEPTH, "depth_low": span(0.0, 0.4), "depth_high": span(0.3, 1.0)},
         r"low 0\.4 is above high 0\.3"),
        # a warm-up of 1 / (stages + 1) up to where the noise stops: the shortest with the earliest
        ({"stages": span(1, 9, "int"), "stop_fraction": span(0.0, 0.5)},
         r"^search\.space\.dimensions: .*injects nothing.*stages=1, stop_fraction=0\.5"),
        ({"stages": span(2, 9, "int"), "stop_fraction": span(0.0, 0.5)}, None),
        ({"warmup_fraction": one_of(0.6, 0.0), "stop_fraction": one_of(0.0, 0.5)},
         r"injects nothing.*warmup_fraction=0\.6, stop_fraction=0\.5"),
        ({"schedule": {"kind": "fixed", "value": "epoch_aware"}, "epochs": span(1, 4, "int"),
          "stages_per_epoch": span(1, 4, "int"), "stop_fraction": span(0.0, 0.5)},
         r"injects nothing.*epochs=1, stages_per_epoch=1, stop_fraction=0\.5"),
        # one score at its top among seven at the bottom; all at the top are all at the mean
        ({**INVERSE, **{f"score_{k}": span(0.1, 1.0) for k in range(8)}},
         r"^search\.space\.dimensions: .*the score of layer 0 is 4\.71 times the mean"),
        ({**INVERSE, **{f"score_{k}": span(0.5, 1.0) for k in range(8)}}, None),
        ({**SCORES, **{f"score_{k}": span(0.0, 1.0) for k in range(8)}},
         r"every score is 0"),
        # all multipliers 0 together, in whichever order they are offered
        ({"targeting": {"kind": "fixed", "value": "multipliers"}, "multiplier_3": one_of(1.0, 0.0),
          "multiplier_4": one_of(0.0, 1.0)}, r"injects nothing.*multiplier_3=0\.0, multiplier_4=0\.0"),
        # what exists inside the range of another alone
        ({"stages": span(2, 6, "int"),
          "random_count": {"kind": "fixed", "value": 2, "when": {"stages": [4]}}},
         r"random_count has no effect.*stages=4"),
        ({"targeting": {"kind": "fixed", "value": "depth"},
          "depth_low": {"kind": "fixed", "value": 0.5},
          "depth_high": {"kind": "fixed", "value": 0.55}},
         r"^search\.space\.dimensions: .*none of 8 layers lies between 0\.5 and 0\.55"),
        ({"carrier": {"kind": "choice", "values": ["hidden", "linear_weight"]},
          "carrier_relative": {"kind": "choice", "values": [True, False]}},
         r"^search\.space\.dimensions: .*carrier_relative has no effect"),
        ({"carrier": {"kind": "choice", "values": ["hidden", "linear_weight"]},
          "carrier_relative": {"kind": "choice", "values": [True, False],
                               "when": {"carrier": ["linear_weight"]}},
          "redraw": {"kind": "choice", "values": ["step", "forward"]}}, None),
    ],
)  # fmt: skip
def test_a_space_is_checked_before_anything_runs(
    dimensions: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    study = searched(dimensions, output=str(tmp_path))
    if message is None:
        check_study(study, resolve_scenarios(study), 8)
        return
    with pytest.raises(UserError, match=message):
        check_study(study, resolve_scenarios(study), 8)
