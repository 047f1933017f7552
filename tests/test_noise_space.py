"""The noise as search dimensions: every parameter reaches the policy, and none is left unread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from aqn_tune.errors import UserError
from aqn_tune.noise import NoisePolicy
from aqn_tune.noise.carriers import CARRIERS
from aqn_tune.noise.schedules import SCHEDULES
from aqn_tune.noise.targeting import TARGETINGS
from aqn_tune.study.space import DIMENSIONS, Params, SpaceSpec, arm_of

SCORES: Params = {"targeting": "scores", "score_0": 1.0, "score_1": 2.0, "score_2": 3.0}
ZONE: Params = {
    "targeting": "zone",
    "layers": "1-2",
    "zone_boundary": 0.5,
    "zone_middle_after": 0.5,
}


@pytest.mark.parametrize(
    ("params", "policy"),
    [
        ({}, {}),
        ({"schedule": "linear", "sigma_start": 0.1, "sigma_ratio": 0.5, "warmup_fraction": 0.2,
          "stop_fraction": 0.1},
         {"schedule": {"kind": "linear", "sigma_start": 0.1, "sigma_end": 0.05,
                       "warmup_fraction": 0.2, "stop_fraction": 0.1}}),
        ({"schedule": "epoch_aware", "epochs": 3, "stages_per_epoch": 4, "stop_fraction": 0.2},
         {"schedule": {"kind": "epoch_aware", "epochs": 3, "stages_per_epoch": 4,
                       "stop_fraction": 0.2}}),
        ({"schedule": "constant", "sigma_start": 0.2, "stop_fraction": 0.2},
         {"schedule": {"kind": "constant", "sigma": 0.2, "stop_fraction": 0.2}}),
        ({"stages": 4, "stop_fraction": 0.3},
         {"schedule": {"kind": "geometric", "stages": 4, "stop_fraction": 0.3}}),
        ({"carrier": "linear_weight", "carrier_relative": True},
         {"carrier": {"kind": "linear_weight", "relative": True}}),
        ({"carrier": "rmsnorm_weight", "carrier_relative": True},
         {"carrier": {"kind": "rmsnorm_weight", "relative": True}}),
        ({"redraw": "microbatch"}, {"redraw": "microbatch"}),
        (SCORES, {"targeting": {"kind": "scores", "values": {0: 1, 1: 2, 2: 3}}}),
        ({**SCORES, "scores_alpha": -0.5, "scores_ceiling": True},
         {"targeting": {"kind": "scores", "values": {0: 1, 1: 2, 2: 3}, "alpha": -0.5,
                        "ceiling": True}}),
        ({**SCORES, "scores_map": "inverse_linear"},
         {"targeting": {"kind": "scores", "values": {0: 1, 1: 2, 2: 3}, "map": "inverse_linear"}}),
        ({"targeting": "scores", "scores_file": "scores.json", "scores_alpha": 2.0},
         {"targeting": {"kind": "scores", "file": "scores.json", "alpha": 2.0}}),
        (ZONE, {"targeting": {"kind": "zone", "middle": ["1-2"], "boundary": 0.5,
                              "middle_multiplier_after": 0.5}}),
        ({**ZONE, "zone_edge": 0.5, "zone_middle": 2.0},
         {"targeting": {"kind": "zone", "middle": ["1-2"], "boundary": 0.5,
                        "middle_multiplier_after": 0.5, "edge_multiplier": 0.5,
                        "middle_multiplier": 2.0}}),
        ({"targeting": "depth", "depth_low": 0.2, "depth_high": 0.9},
         {"targeting": {"kind": "depth", "low": 0.2, "high": 0.9}}),
        ({"targeting": "healthy", "layers": "0,2-3"},
         {"targeting": {"kind": "healthy", "layers": [0, "2-3"]}}),
    ],
)  # fmt: skip
def test_the_point_of_a_space_becomes_the_policy_it_says(
    params: Params, policy: dict[str, Any]
) -> None:
    assert arm_of(params).noise == NoisePolicy.model_validate(policy)


@pytest.mark.parametrize(
    ("params", "unread"),
    [
        ({"schedule": "linear", "stages": 3}, "stages"),
        ({"schedule": "constant", "epochs": 3}, "epochs"),
        ({"schedule": "epoch_aware", "warmup_fraction": 0.1}, "warmup_fraction"),
        ({"schedule": "epoch_aware", "stages": 3}, "stages"),
        ({"schedule": "geometric", "stages_per_epoch": 3}, "stages_per_epoch"),
        ({"carrier": "hidden", "carrier_relative": True}, "carrier_relative"),
        ({"targeting": "global", "scores_alpha": 1.0}, "scores_alpha"),
        ({"targeting": "multipliers", "score_1": 1.0, "multiplier_0": 1.0}, "score_1"),
        ({**SCORES, "multiplier_1": 1.0}, "multiplier_1"),
        ({**SCORES, "multiplier_default": 1.0}, "multiplier_default"),
        ({"targeting": "window", "window_centre": 1, "window_width": 1, "depth_low": 0.1},
         "depth_low"),
        ({"targeting": "depth", "layers": "1-2"}, "layers"),
        ({**ZONE, "window_width": 2}, "window_width"),
        ({"targeting": "none", "redraw": "forward"}, "redraw"),
        ({"targeting": "none", "stop_fraction": 0.1}, "stop_fraction"),
        ({"targeting": "none", "carrier": "hidden"}, "carrier"),
        ({"targeting": "none", "schedule": "linear"}, "schedule"),
    ],
)  # fmt: skip
def test_a_parameter_that_nobody_reads_is_refused(params: Params, unread: str) -> None:
    with pytest.raises(UserError, match=f"search space: {unread} has no effect with targeting"):
        arm_of(params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"schedule": "linaer"}, "'geometric', 'linear', 'constant', 'epoch_aware'"),
        ({"carrier": "weights"}, "'hidden', 'rmsnorm_weight', 'linear_weight'"),
        ({"targeting": "zones"}, "'zone'"),
        ({"redraw": "often"}, "redraw: .*'step', 'microbatch' or 'forward'"),
        ({"stop_fraction": 1.0}, "stop_fraction: .*less than 1"),
        ({"targeting": "scores"}, "write exactly one of `values` and `file`"),
        ({**SCORES, "scores_file": "scores.json"}, "got both"),
        ({**SCORES, "score_1": -1.0}, "not negative"),
        ({**SCORES, "scores_map": "inverse_linear", "scores_alpha": 2.0}, "alpha has no effect"),
        ({"targeting": "zone"}, "name `middle`, `edge` or both"),
        ({**ZONE, "zone_boundary": 1.0}, "no effect with boundary 1"),
        ({"targeting": "depth", "depth_low": 0.9}, "low 0.9 is above high 0.6"),
        ({"schedule": "epoch_aware", "epochs": 0}, "epochs: .*greater than or equal to 1"),
    ],
)
def test_a_parameter_out_of_its_range_is_refused(params: Params, message: str) -> None:
    with pytest.raises(UserError, match=f"search space: .*{message}"):
        arm_of(params)


def test_a_space_over_the_whole_noise_is_read_and_its_conditions_hold() -> None:
    space = SpaceSpec.model_validate(
        {
            "dimensions": {
                "schedule": {"kind": "choice", "values": list(SCHEDULES)},
                "epochs": {
                    "kind": "int", "low": 1, "high": 4, "when": {"schedule": ["epoch_aware"]}
                },
                "targeting": {"kind": "choice", "values": list(TARGETINGS)},
                "score_3": {"kind": "fixed", "value": 0.5, "when": {"targeting": ["scores"]}},
                "scores_map": {
                    "kind": "choice", "values": ["power", "inverse_linear"],
                    "when": {"targeting": ["scores"]},
                },
                "scores_alpha": {
                    "kind": "float", "low": -2, "high": 2, "when": {"scores_map": ["power"]}
                },
                "redraw": {"kind": "choice", "values": ["step", "forward"]},
                "carrier": {"kind": "choice", "values": list(CARRIERS)},
                "carrier_relative": {
                    "kind": "choice", "values": [True, False],
                    "when": {"carrier": ["linear_weight", "rmsnorm_weight"]},
                },
            }
        }
    )  # fmt: skip
    assert space.active("scores_alpha", {"scores_map": "power"})
    assert not space.active("scores_alpha", {"scores_map": "inverse_linear"})
    assert not space.active("epochs", {"schedule": "linear"})
    assert space.dimensions["carrier_relative"].model_dump()["values"] == (True, False)


@pytest.mark.parametrize("name", ["score_", "score_x", "scores_3", "depth_from", "stop_fracton"])
def test_an_unknown_dimension_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=f"unknown dimension '{name}'.*score_<layer>"):
        SpaceSpec.model_validate({"dimensions": {name: {"kind": "fixed", "value": 1}}})


def test_every_registered_name_stands_in_the_description_of_its_dimension() -> None:
    for dimension, registry in (
        ("carrier", CARRIERS), ("schedule", SCHEDULES), ("targeting", TARGETINGS),
    ):  # fmt: skip
        assert all(name in DIMENSIONS[dimension] for name in registry)


def test_every_dimension_of_the_noise_is_read_somewhere(tmp_path: Path) -> None:
    """One name in `DIMENSIONS` that no choice of carrier, schedule and targeting reads is a trap."""
    file = tmp_path / "scores.json"
    file.write_text("[1, 2, 3]")
    full: tuple[Params, ...] = (
        {"carrier": "linear_weight", "carrier_relative": True, "schedule": "geometric",
         "sigma_start": 0.1, "sigma_ratio": 0.1, "stages": 2, "warmup_fraction": 0.1,
         "stop_fraction": 0.1, "normalise": "energy", "redraw": "step", "learning_rate": 0.1,
         "rank": 2, "targeting": "window", "window_centre": 1, "window_width": 1},
        {"schedule": "epoch_aware", "epochs": 2, "stages_per_epoch": 2, **ZONE, "zone_edge": 0.5,
         "zone_middle": 0.5},
        {"targeting": "random", "random_count": 1},
        {"targeting": "multipliers", "multiplier_default": 0.5},
        {"targeting": "scores", "scores_file": str(file), "scores_map": "power",
         "scores_alpha": 2.0, "scores_ceiling": True},
        {"targeting": "depth", "depth_low": 0.1, "depth_high": 0.9},
    )  # fmt: skip
    for params in full:
        noise = arm_of(params).noise
        assert noise is not None
        assert noise.resolve(steps=40, layer_count=3, fault_layers=(0,)) is not None
    assert {name for params in full for name in params} == set(DIMENSIONS)
