"""A multiplier written out for each layer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aqn_tune.noise.targeting.base import TargetingSpec
from aqn_tune.noise.targeting.per_layer import PerLayer, spread


class Multipliers(TargetingSpec):
    """Explicit multipliers: a list with one number per layer, or a map of layer to number with a default."""

    kind: Literal["multipliers"] = "multipliers"
    values: PerLayer = Field(
        description="One multiplier per layer, or a map of layer number to multiplier."
    )
    default: float = Field(
        0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Multiplier of layers that a map does not name.",
    )

    def multipliers(self, layer_count: int, fault_layers: tuple[int, ...]) -> tuple[float, ...]:
        """Return the declared numbers; see `TargetingSpec.multipliers`."""
        return spread(self.values, layer_count, name="targeting multipliers", default=self.default)
