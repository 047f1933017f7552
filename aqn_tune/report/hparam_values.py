"""What an arm or a config of the search has in the columns of the HParams table.

Everything goes by the names of the search space, whoever chose it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aqn_tune.noise.carriers import CARRIERS
from aqn_tune.noise.policy import NoisePolicy
from aqn_tune.noise.schedules import Schedule
from aqn_tune.noise.schedules.constant import Constant
from aqn_tune.noise.schedules.geometric import Geometric
from aqn_tune.noise.targeting import Targeting
from aqn_tune.noise.targeting.multipliers import Multipliers
from aqn_tune.noise.targeting.scores import Scores
from aqn_tune.study.arms import ArmSpec
from aqn_tune.study.cells import twin
from aqn_tune.study.layers import Layers
from aqn_tune.study.space import Params, Value, arm_of

DEFAULTS: Params = {
    "carrier_relative": "false",
    "stop_fraction": 0.0,
    "redraw": "step",
    "device": "scenario",
    "skip": "none",
    "train_layers": "all",
}
"""Parameters that few studies touch. At these values they are no parameter of their own: an arm
leaves them out, and where another has a column for one, `with_defaults` fills it in."""
_OF_NOISE = ("carrier_relative", "stop_fraction", "redraw")

_TARGETING_COLUMNS: dict[str, dict[str, str]] = {
    "targeted": {"layers": "layers"},
    "healthy": {"layers": "layers"},
    "window": {"centre": "window_centre", "width": "window_width"},
    "random": {"count": "random_count"},
    "multipliers": {},
    "scores": {
        "file": "scores_file",
        "map": "scores_map",
        "alpha": "scores_alpha",
        "ceiling": "scores_ceiling",
    },
    "zone": {
        "middle": "layers",
        "edge": "zone_edge_layers",
        "edge_multiplier": "zone_edge",
        "middle_multiplier": "zone_middle",
        "boundary": "zone_boundary",
        "middle_multiplier_after": "zone_middle_after",
    },
    "depth": {"low": "depth_low", "high": "depth_high"},
}
"""The fields of a targeting, and the dimensions of a search space that set them."""


def is_number(value: object) -> bool:
    """Return whether a column can hold `value` as a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def arm_params(arm: ArmSpec) -> Params:
    """Return what an arm has in the columns: its whole noise policy and what it trains otherwise.

    An arm without noise has targeting `none` and no policy. Left blank are what the study's
    training decides, and the layers that follow from the scenario's faults; left out is what is at
    its value in `DEFAULTS`.
    """
    params: Params = {"targeting": "none"} if arm.noise is None else _policy_params(arm.noise)
    params["device"] = arm.device
    params["skip"] = "none" if arm.skip is None else _layers(arm.skip)
    params["train_layers"] = _layers(arm.train_layers)
    for name in ("learning_rate", "rank", "weight_decay"):
        value = getattr(arm, name)
        if value is not None:
            params[name] = value
    return {name: value for name, value in params.items() if DEFAULTS.get(name) != value}


def config_params(params: Params, *, targeting: str | None = None) -> Params:
    """Return the columns of a config of the search, or of its twin with another targeting.

    Args:
        params: as sampled.
        targeting: `none` or `global` for the twin, None for the config itself.
    """
    arm = arm_of(params)
    sampled = {name: _shown(value) for name, value in params.items()}
    if targeting is None:
        # The sampled numbers last: sigma_ratio is not to come back from a division.
        return {**arm_params(arm), **sampled}
    changed = twin(arm, targeting)
    if changed is None:
        return {}
    shown = arm_params(changed)
    return {name: sampled.get(name, value) for name, value in shown.items()} | {
        "targeting": targeting
    }


def with_defaults(values: Mapping[str, Value]) -> Params:
    """Return `values` with those of `DEFAULTS` that a line has: the ones of noise only with noise."""
    carrier = CARRIERS.get(str(values.get("carrier", "")))
    absent = set() if carrier else set(_OF_NOISE)
    if carrier and "relative" not in carrier.model_fields:
        absent = {"carrier_relative"}
    return {**{k: v for k, v in DEFAULTS.items() if k not in absent}, **values}


def _policy_params(policy: NoisePolicy) -> Params:
    params: Params = {"carrier": policy.carrier.kind}
    if "relative" in type(policy.carrier).model_fields:
        params["carrier_relative"] = _shown(policy.carrier.model_dump()["relative"])
    params.update(_schedule_params(policy.schedule))
    params.update(_targeting_params(policy.targeting))
    params["normalise"] = policy.normalise
    params["redraw"] = policy.redraw
    return params


def _schedule_params(schedule: Schedule) -> Params:
    params: Params = {"schedule": schedule.kind, "stop_fraction": schedule.stop_fraction}
    if isinstance(schedule, Constant):
        return params | {
            "sigma_start": schedule.sigma,
            "sigma_ratio": 1.0,
            "stages": 1,
            "warmup_fraction": schedule.warmup_fraction,
        }
    # Everything else that a schedule has is a dimension under its own name.
    own = schedule.model_dump(mode="json", exclude={"kind", "sigma_end"}, exclude_none=True)
    params.update(own)
    if isinstance(schedule, Geometric) and schedule.warmup_fraction is None:
        params["warmup_fraction"] = 1 / (schedule.stages + 1)
    if schedule.sigma_start > 0:
        params["sigma_ratio"] = schedule.sigma_end / schedule.sigma_start
    return params


def _targeting_params(targeting: Targeting) -> Params:
    params: Params = {"targeting": targeting.kind}
    for field, name in _TARGETING_COLUMNS.get(targeting.kind, {}).items():
        value = getattr(targeting, field)
        if value is not None:
            layers = field in ("layers", "middle", "edge")
            params[name] = _layers(value) if layers else _shown(value)
    if targeting.kind == "random" and targeting.seed:
        params["random_seed"] = targeting.seed
    elif isinstance(targeting, Multipliers):
        params.update(_per_layer("multiplier", targeting.values))
        if isinstance(targeting.values, dict):
            params["multiplier_default"] = targeting.default
    elif isinstance(targeting, Scores):
        params.update(_per_layer("score", targeting.values or {}))
        if targeting.map == "power" and targeting.alpha is None:
            params["scores_alpha"] = 1.0
    return params


def _per_layer(name: str, values: Sequence[float] | Mapping[int, float]) -> Params:
    """Return a column for each layer of a map, and one text for a list."""
    if isinstance(values, Mapping):
        return {f"{name}_{layer}": value for layer, value in sorted(values.items())}
    return {f"{name}s": ",".join(f"{value:g}" for value in values)}


def _layers(layers: Layers | str) -> str:
    return layers if isinstance(layers, str) else ",".join(str(layer) for layer in layers)


def _shown(value: Any) -> Value:
    return str(value).lower() if isinstance(value, bool) else value
