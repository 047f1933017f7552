"""Layers by their relative depth, whatever the size of the model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from aqn_tune.errors import UserError
from aqn_tune.noise.targeting.base import TargetingSpec, indicator


class Depth(TargetingSpec):
    """The layers whose relative depth lies between `low` and `high`, both included, get noise.

    Layer k of L lies at depth (k + 0.5) / L: the middle of its share of the model. That treats both
    ends alike, so 0.4 to 0.6 is a band around the centre: layers 11-16 of 28, layer 2 of 5.
    """

    kind: Literal["depth"] = "depth"
    low: float = Field(
        0.4,
        ge=0.0,
        le=1.0,
        allow_inf_nan=False,
        description="Smallest relative depth; 0 is the start of the first layer.",
    )
    high: float = Field(
        0.6,
        ge=0.0,
        le=1.0,
        allow_inf_nan=False,
        description="Largest relative depth; 1 is the end of the last layer.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Depth:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self

    def multipliers(self, layer_count: int, fault_layers: tuple[int, ...]) -> tuple[float, ...]:
        """Return 1 inside the band; see `TargetingSpec.multipliers`."""
        inside = tuple(
            layer
            for layer in range(layer_count)
            if self.low <= (layer + 0.5) / layer_count <= self.high
        )
        if not inside:
            raise UserError(
                f"targeting depth: none of {layer_count} layers lies between {self.low:g} and "
                f"{self.high:g}; they lie at {0.5 / layer_count:.3g} and every "
                f"{1 / layer_count:.3g} from there"
            )
        return indicator(inside, layer_count)
