"""Search spaces: which numbers the search may choose, and the arm that a choice stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from aqn_tune.errors import UserError, nearest
from aqn_tune.noise.carriers import CARRIERS
from aqn_tune.noise.policy import NoisePolicy
from aqn_tune.noise.schedules import SCHEDULES
from aqn_tune.noise.targeting import TARGETINGS
from aqn_tune.study.arms import ArmSpec
from aqn_tune.study.base import Spec
from aqn_tune.study.layers import Layers

Value = float | int | str | bool
Params = dict[str, Value]


class _Dimension(Spec):
    when: dict[str, tuple[Value, ...]] = Field(
        default_factory=dict,
        description="The dimension exists only when each named, earlier one has one of these values.",
    )


class FloatDimension(_Dimension):
    """A real number between two bounds."""

    kind: Literal["float"] = "float"
    low: float = Field(allow_inf_nan=False, description="Lower bound, included.")
    high: float = Field(allow_inf_nan=False, description="Upper bound, included.")
    log: bool = Field(False, description="Sample the logarithm uniformly.")

    @model_validator(mode="after")
    def _ordered(self) -> FloatDimension:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log sampling needs low > 0, got {self.low}")
        return self


class IntDimension(_Dimension):
    """A whole number between two bounds."""

    kind: Literal["int"] = "int"
    low: int = Field(description="Lower bound, included.")
    high: int = Field(description="Upper bound, included.")
    log: bool = Field(False, description="Sample the logarithm uniformly.")

    @model_validator(mode="after")
    def _ordered(self) -> IntDimension:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log sampling needs low > 0, got {self.low}")
        return self


class ChoiceDimension(_Dimension):
    """One of a list of names or numbers."""

    kind: Literal["choice"] = "choice"
    values: tuple[Value, ...] = Field(min_length=1, description="The values to choose from.")


class FixedDimension(_Dimension):
    """A value that is not searched."""

    kind: Literal["fixed"] = "fixed"
    value: Value = Field(description="The value.")


Dimension = Annotated[
    FloatDimension | IntDimension | ChoiceDimension | FixedDimension, Field(discriminator="kind")
]

DIMENSIONS: dict[str, str] = {
    "carrier": f"Carrier of the noise: {', '.join(CARRIERS)}.",
    "carrier_relative": "Scale the noise by the weight (carriers rmsnorm_weight and linear_weight).",
    "schedule": f"{', '.join(SCHEDULES)}; default geometric.",
    "sigma_start": "Standard deviation at the start (constant: throughout).",
    "sigma_ratio": "sigma_end / sigma_start, in (0, 1].",
    "stages": "Number of sigma values (schedule geometric).",
    "epochs": "Number of equal parts of the training (schedule epoch_aware).",
    "stages_per_epoch": "Number of sigma values in each epoch (schedule epoch_aware).",
    "warmup_fraction": "Share of the steps before the noise begins (all but epoch_aware).",
    "stop_fraction": "Share of the steps at the end without noise.",
    "targeting": f"{', '.join(TARGETINGS)}; default global.",
    "window_centre": "Layer in the middle of the window (targeting window).",
    "window_width": "Number of layers in the window (targeting window).",
    "layers": "Layers of targeted and healthy, middle layers of zone, as text: '10' or '14-17'.",
    "random_count": "Number of layers (targeting random).",
    "multiplier_default": "Multiplier of layers without a multiplier_<layer> of their own.",
    "scores_file": "JSON file with the scores (targeting scores), where no score_<layer> is given.",
    "scores_map": "power or inverse_linear (targeting scores).",
    "scores_alpha": "Exponent of the scores (targeting scores, map power).",
    "scores_ceiling": "Divide by the largest multiplier (targeting scores).",
    "zone_edge": "Multiplier of the edge layers (targeting zone).",
    "zone_middle": "Multiplier of the middle layers, up to the boundary (targeting zone).",
    "zone_middle_after": "Multiplier of the middle layers from the boundary on (targeting zone).",
    "zone_boundary": "Share of the steps after which the middle changes (targeting zone).",
    "depth_low": "Smallest relative depth (targeting depth).",
    "depth_high": "Largest relative depth (targeting depth).",
    "normalise": "none or energy.",
    "redraw": "How long a draw of the noise lasts: step, microbatch or forward.",
    "learning_rate": "Peak learning rate.",
    "rank": "LoRA rank.",
}
"""The names a space may use, beside the ones in `NUMBERED`."""

NUMBERED = {"multiplier": "multipliers", "score": "scores"}
"""Dimensions of one layer each, `<name>_<layer>`, and the targeting that reads them."""

_SCHEDULE_FIELDS = ("stages", "epochs", "stages_per_epoch", "warmup_fraction", "stop_fraction")

_TARGETING_FIELDS: dict[str, dict[str, str]] = {
    "window": {"window_centre": "centre", "window_width": "width"},
    "targeted": {"layers": "layers"},
    "healthy": {"layers": "layers"},
    "random": {"random_count": "count"},
    "multipliers": {"multiplier_default": "default"},
    "scores": {
        "scores_file": "file",
        "scores_map": "map",
        "scores_alpha": "alpha",
        "scores_ceiling": "ceiling",
    },
    "zone": {
        "layers": "middle",
        "zone_edge": "edge_multiplier",
        "zone_middle": "middle_multiplier",
        "zone_middle_after": "middle_multiplier_after",
        "zone_boundary": "boundary",
    },
    "depth": {"depth_low": "low", "depth_high": "high"},
}
"""The dimensions that a targeting reads, and the field that each of them sets."""


class SpaceSpec(Spec):
    """A search space: named dimensions, some of which exist only under a condition."""

    dimensions: dict[str, Dimension] = Field(
        min_length=1, description="The dimensions by name, in the order in which they are sampled."
    )

    @model_validator(mode="after")
    def _known(self) -> SpaceSpec:
        seen: set[str] = set()
        for name, dimension in self.dimensions.items():
            if name not in DIMENSIONS and not any(_layer(name, p) is not None for p in NUMBERED):
                numbered = " and ".join(f"{prefix}_<layer>" for prefix in NUMBERED)
                raise ValueError(
                    f"unknown dimension {name!r}{nearest(name, DIMENSIONS)}; "
                    f"allowed are {', '.join(DIMENSIONS)}, {numbered}"
                )
            for parent in dimension.when:
                if parent not in seen:
                    raise ValueError(
                        f"{name}: `when` names {parent!r}, which is not a dimension before it"
                    )
            seen.add(name)
        return self

    def active(self, name: str, params: Params) -> bool:
        """Return whether the dimension `name` exists given the values chosen before it."""
        return all(
            parent in params and params[parent] in allowed
            for parent, allowed in self.dimensions[name].when.items()
        )


def _layer(name: str, prefix: str) -> int | None:
    """Return the layer of a name like `multiplier_14`, None for any other name."""
    head, _, number = name.partition("_")
    return int(number) if head == prefix and number.isdigit() else None


def arm_of(params: Params) -> ArmSpec:
    """Return the arm that a point of a search space stands for.

    Every parameter must have an effect: one that the chosen carrier, schedule or targeting does not
    read raises UserError (a parameter that nobody reads is how equal runs get different names), and
    so does one that they need and do not get.
    """
    try:
        return _arm_of(params)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"search space: {where}: {first['msg']} (params: {params})") from None


def _arm_of(params: Params) -> ArmSpec:
    unread = dict(params)
    targeting = str(unread.pop("targeting", "global"))
    learning_rate, rank = unread.pop("learning_rate", None), unread.pop("rank", None)
    noise = None
    chosen = f"targeting {targeting!r}"
    if targeting != "none":
        carrier, schedule = _carrier(unread), _schedule(unread)
        chosen += f", schedule {schedule['kind']!r} and carrier {carrier['kind']!r}"
        noise = NoisePolicy.model_validate(
            {
                "carrier": carrier,
                "schedule": schedule,
                "targeting": _targeting(targeting, unread),
                "normalise": unread.pop("normalise", "none"),
                "redraw": unread.pop("redraw", "step"),
            }
        )
    if unread:
        raise UserError(
            f"search space: {', '.join(sorted(unread))} has no effect with {chosen}; "
            "give it a `when` that says where it exists"
        )
    return ArmSpec.model_validate({"noise": noise, "learning_rate": learning_rate, "rank": rank})


def _carrier(unread: Params) -> dict[str, object]:
    kind = str(unread.pop("carrier", "hidden"))
    spec: dict[str, object] = {"kind": kind}
    if kind in CARRIERS and "relative" in CARRIERS[kind].model_fields:
        _move(unread, spec, {"carrier_relative": "relative"})
    return spec


def _schedule(unread: Params) -> dict[str, object]:
    kind = str(unread.pop("schedule", "geometric"))
    start = unread.pop("sigma_start", 0.05)
    spec: dict[str, object] = {"kind": kind}
    if kind == "constant":
        spec["sigma"] = start
    else:
        spec["sigma_start"] = start
        spec["sigma_end"] = float(start) * float(unread.pop("sigma_ratio", 0.01))
    if kind in SCHEDULES:
        fields = SCHEDULES[kind].model_fields
        _move(unread, spec, {name: name for name in _SCHEDULE_FIELDS if name in fields})
    return spec


def _targeting(kind: str, unread: Params) -> dict[str, object]:
    spec: dict[str, object] = {"kind": kind}
    if "layers" in unread and "layers" in _TARGETING_FIELDS.get(kind, ()):
        spec[_TARGETING_FIELDS[kind]["layers"]] = parse_layers(str(unread.pop("layers")))
    _move(unread, spec, _TARGETING_FIELDS.get(kind, {}))
    if kind == "multipliers":
        spec["values"] = _numbered(unread, "multiplier")
    elif kind == "scores":
        spec["values"] = _numbered(unread, "score") or None
    return spec


def _move(unread: Params, spec: dict[str, object], fields: Mapping[str, str]) -> None:
    """Move the parameters that `fields` names into the fields of `spec` that they set."""
    for name, field in fields.items():
        if name in unread:
            spec[field] = unread.pop(name)


def _numbered(unread: Params, prefix: str) -> dict[int, Value]:
    """Take the parameters of single layers, `<prefix>_<layer>`, out of `unread`."""
    layers = {name: _layer(name, prefix) for name in unread}
    return {n: unread.pop(name) for name, n in layers.items() if n is not None}


def parse_layers(text: str) -> Layers:
    """Return the layers that `"10"`, `"0,14-17"` or `"all"` names."""
    if text == "all":
        return "all"
    parts = [part.strip() for part in text.split(",")]
    return tuple(int(part) if part.lstrip("-").isdigit() else part for part in parts)
