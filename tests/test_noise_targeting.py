"""Which layers get how much: known answers of every targeting that reads more than a list."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from aqn_tune.errors import UserError
from aqn_tune.noise.targeting import TARGETINGS, Phase, Targeting, TargetingSpec
from aqn_tune.noise.targeting.depth import Depth
from aqn_tune.noise.targeting.multipliers import Multipliers
from aqn_tune.noise.targeting.scores import Scores
from aqn_tune.noise.targeting.subset import Targeted
from aqn_tune.noise.targeting.zone import Zone

SPEC: TypeAdapter[TargetingSpec] = TypeAdapter(Targeting)


def multipliers_of(layer_count: int, **values: Any) -> tuple[float, ...]:
    return SPEC.validate_python(values).multipliers(layer_count, (0,))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"values": [1, 2, 3]}, (0.5, 1.0, 1.5)),
        ({"values": {2: 3, 0: 1, 1: 2}}, (0.5, 1.0, 1.5)),
        ({"values": [1, 2, 3], "alpha": 2}, (0.25, 1.0, 2.25)),
        ({"values": [1, 2, 3], "alpha": -1}, (2.0, 1.0, 2 / 3)),
        ({"values": [1, 2, 3], "alpha": 0}, (1.0, 1.0, 1.0)),
        ({"values": [1, 2, 3], "map": "inverse_linear"}, (1.5, 1.0, 0.5)),
        ({"values": [1, 2, 3], "map": "inverse_linear", "ceiling": True}, (1.0, 2 / 3, 1 / 3)),
        ({"values": [1, 2, 3], "alpha": 2, "ceiling": True}, (1 / 9, 4 / 9, 1.0)),
        ({"values": [0, 0, 3]}, (0.0, 0.0, 3.0)),
        ({"values": [0, 2, 1], "alpha": 0}, (1.0, 1.0, 1.0)),
        ({"values": [0, 4, 2], "map": "inverse_linear"}, (2.0, 0.0, 1.0)),
        ({"values": [7, 7, 7], "alpha": -3}, (1.0, 1.0, 1.0)),
    ],
)
def test_scores_by_hand(values: dict[str, Any], expected: tuple[float, ...]) -> None:
    assert multipliers_of(3, kind="scores", **values) == pytest.approx(expected)


def test_variable_and_inverse_multipliers_have_a_mean_of_one() -> None:
    scores = [0.8, 1.1, 0.9, 1.3]
    for mapped in ({}, {"map": "inverse_linear"}):
        found = multipliers_of(4, kind="scores", values=scores, **mapped)
        assert math.fsum(found) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"values": [1, 2]}, "got 2 numbers for 3 layers"),
        ({"values": []}, "got 0 numbers for 3 layers"),
        ({"values": {0: 1, 3: 2}}, "no layer 3 of 3"),
        ({"values": {-1: 1}}, "no layer -1 of 3"),
        ({"values": {1: 1}}, "layers 0, 2 have no number"),
        ({"values": {}}, "layers 0, 1, 2 have no number"),
        ({"values": [0, 0, 0]}, "every score is 0"),
        ({"values": [0, 1, 2], "alpha": -1}, "layer 0 is 0, which has no power -1; use map"),
        ({"values": [0, 0, 3], "map": "inverse_linear"}, "layer 2 is 3 times the mean.*at most 2"),
        ({"values": [1, 2, 3], "alpha": 1e6}, "alpha 1e.06 leave the range of numbers"),
        ({"values": [1e308, 1e308, 1e308]}, "leave the range of numbers"),
    ],
)
def test_scores_that_fit_no_model_or_map(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"targeting scores: .*{message}"):
        multipliers_of(3, kind="scores", **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "got neither; write exactly one of `values` and `file`"),
        ({"values": [1], "file": "scores.json"}, "got both; write exactly one"),
        ({"values": [1, -2]}, "got -2.0; the numbers are finite and not negative"),
        ({"values": {0: math.nan}}, "finite number"),
        ({"values": [math.inf]}, "finite number"),
        ({"values": [1], "alpha": math.nan}, "finite number"),
        ({"values": [1], "map": "inverse_linear", "alpha": 2}, "alpha has no effect"),
        ({"values": [1], "map": "tiered"}, "'power' or 'inverse_linear'"),
    ],
)
def test_scores_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Scores.model_validate(values)


@pytest.mark.parametrize("content", ["[1, 2, 3]", '{"0": 1, "1": 2.0, "2": 3}'])
def test_a_file_of_scores_is_its_content(content: str, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_text(content)
    spec = Scores(file=str(file))
    assert spec.multipliers(3, ()) == Scores(values=(1, 2, 3)).multipliers(3, ())
    file.write_text("[3, 2, 1]")
    assert spec.multipliers(3, ()) == (1.5, 1.0, 0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*scores.json .*relative paths start at"),
        ("[1, 2", "is no JSON"),
        ('"high"', "holds a str; allowed are a list"),
        ("[1, -2, 3]", "got -2.0; the numbers are finite and not negative"),
        ("[1, NaN, 3]", "at 1: needs a finite number"),
        ('[1, "high", 3]', "at 1: needs a valid number"),
        ('{"0": 1, "first": 1}', "at first: needs a valid integer"),
        ('{"0": 1, "1": null}', "at 1: needs a valid number"),
        ("[1, 2]", "got 2 numbers for 3 layers"),
        ("[0, 0, 0]", "every score is 0"),
    ],
)
def test_a_file_that_holds_no_scores(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=f"targeting scores: .*{message}"):
        Scores(file=str(file)).multipliers(3, ())


@pytest.mark.parametrize(
    ("layer_count", "bounds", "inside"),
    [
        (28, {}, {11, 12, 13, 14, 15, 16}),
        (5, {}, {2}),
        (10, {}, {4, 5}),
        (2, {"low": 0.0, "high": 0.5}, {0}),
        (4, {"low": 0.125, "high": 0.375}, {0, 1}),
        (5, {"low": 0.3, "high": 0.7}, {1, 2, 3}),
        (3, {"low": 0.0, "high": 1.0}, {0, 1, 2}),
        (1, {"low": 0.5, "high": 0.5}, {0}),
    ],
)
def test_depth_by_hand(layer_count: int, bounds: dict[str, float], inside: set[int]) -> None:
    expected = tuple(1.0 if layer in inside else 0.0 for layer in range(layer_count))
    assert multipliers_of(layer_count, kind="depth", **bounds) == expected


@pytest.mark.parametrize("layer_count", range(1, 40))
def test_depth_treats_both_ends_alike(layer_count: int) -> None:
    front = multipliers_of(layer_count, kind="depth", low=0.0, high=0.5)
    back = multipliers_of(layer_count, kind="depth", low=0.5, high=1.0)
    assert front == back[::-1]


def test_depth_between_two_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"none of 4 layers lies between 0.4 and 0.6; they lie at"):
        Depth().multipliers(4, ())


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"low": 0.7}, "low 0.7 is above high 0.6"),
        ({"low": -0.1}, "greater than or equal to 0"),
        ({"high": 1.1}, "less than or equal to 1"),
        ({"high": math.nan}, "finite number"),
    ],
)
def test_depths_that_make_no_sense_are_refused(bounds: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Depth.model_validate(bounds)


E14A = Zone(
    edge=("0-5", "23-27"), middle=("6-22",), boundary=0.5, middle_multiplier_after=0.5
)  # fmt: skip


def test_the_zones_of_e14a() -> None:
    before, after = E14A.phases(28, ())
    assert before == Phase(0.0, (1.0,) * 28)
    assert after == Phase(0.5, (1.0,) * 6 + (0.5,) * 17 + (1.0,) * 5)
    assert E14A.multipliers(28, ()) == before.multipliers


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"middle": ["2-3"], "middle_multiplier": 0.5}, (1, 1, 0.5, 0.5, 1, 1)),
        ({"edge": [0, -1], "edge_multiplier": 2}, (2, 1, 1, 1, 1, 2)),
        ({"edge": [0], "middle": [2], "middle_multiplier": 3}, (1, 0, 3, 0, 0, 0)),
        ({"edge": [0, 5], "edge_multiplier": 0}, (0, 1, 1, 1, 1, 0)),
    ],
)
def test_zones_by_hand(values: dict[str, Any], expected: tuple[float, ...]) -> None:
    assert multipliers_of(6, kind="zone", **values) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"middle": ["2-6"]}, "no layer 6 of 6"),
        ({"middle": ["1-3"], "edge": ["3-5"]}, "layers 3 are in `middle` and in `edge`"),
        ({"middle": "all"}, "no layer of 6 is left for `edge`"),
        ({"edge": "all"}, "no layer of 6 is left for `middle`"),
    ],
)
def test_zones_that_fit_no_model(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        multipliers_of(6, kind="zone", **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "got neither zone"),
        ({"middle": []}, "empty list"),
        ({"middle": [2], "boundary": 0.5}, "no effect without middle_multiplier_after"),
        ({"middle": [2], "middle_multiplier_after": 0.5}, "no effect with boundary 1"),
        ({"middle": [2], "boundary": 0.0}, "greater than 0"),
        ({"middle": [2], "boundary": 1.5}, "less than or equal to 1"),
        ({"middle": [2], "edge_multiplier": -1}, "greater than or equal to 0"),
        ({"middle": [2], "middle_multiplier": math.nan}, "finite number"),
        ({"middle": [2], "boundary": 0.5, "middle_multiplier_after": math.inf}, "finite number"),
    ],
)
def test_zones_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Zone.model_validate(values)


def test_a_targeting_that_does_not_change_has_one_phase() -> None:
    assert Targeted().phases(4, (1,)) == (Phase(0.0, (0.0, 1.0, 0.0, 0.0)),)


@pytest.mark.parametrize("number", [-1.0, math.nan, math.inf])
def test_multipliers_are_finite_and_not_negative(number: float) -> None:
    for values in (
        {"values": [1.0, number]},
        {"values": {1: number}},
        {"values": {}, "default": number},
    ):
        with pytest.raises(ValidationError):
            Multipliers.model_validate(values)


EXAMPLES: dict[str, dict[str, Any]] = {
    "multipliers": {"values": [1, 2]},
    "scores": {"values": [1, 2]},
    "window": {"centre": 0, "width": 1},
    "zone": {"middle": [0]},
}


@pytest.mark.parametrize("kind", TARGETINGS)
def test_every_targeting_is_registered_and_survives_its_own_dump(kind: str) -> None:
    spec = SPEC.validate_python({"kind": kind, **EXAMPLES.get(kind, {})})
    assert type(spec) is TARGETINGS[kind]
    assert SPEC.validate_python(json.loads(json.dumps(spec.model_dump(mode="json")))) == spec
    if kind != "none":
        assert any(spec.multipliers(5 if kind == "depth" else 2, (1,)))
