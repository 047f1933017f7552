"""Search spaces: which numbers the search may choose, and the arm that a choice stands for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from aqn_tune.errors import UserError, nearest
from aqn_tune.noise.policy import NoisePolicy
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
    "carrier": "Carrier of the noise: hidden or rmsnorm_weight.",
    "schedule": "geometric (default) or constant.",
    "sigma_start": "Standard deviation in the first stage (constant: throughout).",
    "sigma_ratio": "sigma_end / sigma_start, in (0, 1].",
    "stages": "Number of sigma values.",
    "warmup_fraction": "Share of the steps before the noise begins.",
    "targeting": "none, global, targeted, healthy, multipliers, window or random.",
    "window_centre": "Layer in the middle of the window (targeting window).",
    "window_width": "Number of layers in the window (targeting window).",
    "layers": "Layers of targeted and healthy, as text: '10' or '14-17'.",
    "random_count": "Number of layers (targeting random).",
    "multiplier_default": "Multiplier of layers without a multiplier_<layer> of their own.",
    "normalise": "none or energy.",
    "learning_rate": "Peak learning rate.",
    "rank": "LoRA rank.",
}
"""The names a space may use, beside multiplier_<layer> (targeting multipliers)."""


class SpaceSpec(Spec):
    """A search space: named dimensions, some of which exist only under a condition."""

    dimensions: dict[str, Dimension] = Field(
        min_length=1, description="The dimensions by name, in the order in which they are sampled."
    )

    @model_validator(mode="after")
    def _known(self) -> SpaceSpec:
        seen: set[str] = set()
        for name, dimension in self.dimensions.items():
            if name not in DIMENSIONS and _multiplier_layer(name) is None:
                raise ValueError(
                    f"unknown dimension {name!r}{nearest(name, DIMENSIONS)}; "
                    f"allowed are {', '.join(DIMENSIONS)} and multiplier_<layer>"
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


def _multiplier_layer(name: str) -> int | None:
    """Return the layer of a name like `multiplier_14`, None for any other name."""
    prefix, _, number = name.partition("_")
    return int(number) if prefix == "multiplier" and number.isdigit() else None


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
    carrier = str(unread.pop("carrier", "hidden"))
    targeting = str(unread.pop("targeting", "global"))
    learning_rate, rank = unread.pop("learning_rate", None), unread.pop("rank", None)
    noise = None
    if targeting != "none":
        noise = NoisePolicy.model_validate(
            {
                "carrier": carrier,
                "schedule": _schedule(unread),
                "targeting": _targeting(targeting, unread),
                "normalise": unread.pop("normalise", "none"),
            }
        )
    if unread:
        raise UserError(
            f"search space: {', '.join(sorted(unread))} has no effect with targeting {targeting!r}; "
            "give it a `when` that says where it exists"
        )
    return ArmSpec.model_validate({"noise": noise, "learning_rate": learning_rate, "rank": rank})


def _schedule(unread: Params) -> dict[str, object]:
    kind = unread.pop("schedule", "geometric")
    start = unread.pop("sigma_start", 0.05)
    spec: dict[str, object] = {"kind": kind}
    if kind == "constant":
        spec["sigma"] = start
    else:
        spec["sigma_start"] = start
        spec["sigma_end"] = float(start) * float(unread.pop("sigma_ratio", 0.01))
        if "stages" in unread:
            spec["stages"] = unread.pop("stages")
    if "warmup_fraction" in unread:
        spec["warmup_fraction"] = unread.pop("warmup_fraction")
    return spec


def _targeting(kind: str, unread: Params) -> dict[str, object]:
    spec: dict[str, object] = {"kind": kind}
    if kind == "window":
        for name in ("centre", "width"):
            if f"window_{name}" in unread:
                spec[name] = unread.pop(f"window_{name}")
    elif kind in ("targeted", "healthy") and "layers" in unread:
        spec["layers"] = parse_layers(str(unread.pop("layers")))
    elif kind == "random" and "random_count" in unread:
        spec["count"] = unread.pop("random_count")
    elif kind == "multipliers":
        layers = {name: _multiplier_layer(name) for name in unread}
        named = {name: layer for name, layer in layers.items() if layer is not None}
        spec["values"] = {layer: unread.pop(name) for name, layer in named.items()}
        spec["default"] = unread.pop("multiplier_default", 0.0)
    return spec


def parse_layers(text: str) -> Layers:
    """Return the layers that `"10"`, `"0,14-17"` or `"all"` names."""
    if text == "all":
        return "all"
    parts = [part.strip() for part in text.split(",")]
    return tuple(int(part) if part.lstrip("-").isdigit() else part for part in parts)
