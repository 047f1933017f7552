"""A multiplier written out for each layer."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator

from aqn_tune.errors import UserError
from aqn_tune.noise.targeting.base import TargetingSpec


class Multipliers(TargetingSpec):
    """Explicit multipliers: a list with one number per layer, or a map of layer to number with a default."""

    kind: Literal["multipliers"] = "multipliers"
    values: tuple[float, ...] | dict[int, float] = Field(
        description="One multiplier per layer, or a map of layer number to multiplier."
    )
    default: float = Field(
        0.0, ge=0.0, description="Multiplier of layers that a map does not name."
    )

    @field_validator("values")
    @classmethod
    def _finite(
        cls, values: tuple[float, ...] | dict[int, float]
    ) -> tuple[float, ...] | dict[int, float]:
        numbers = values.values() if isinstance(values, dict) else values
        for number in numbers:
            if not math.isfinite(number) or number < 0:
                raise ValueError(
                    f"got a multiplier of {number}; multipliers are finite and not negative"
                )
        return values

    def multipliers(self, layer_count: int, fault_layers: tuple[int, ...]) -> tuple[float, ...]:
        """Return the declared numbers; see `TargetingSpec.multipliers`."""
        if isinstance(self.values, dict):
            for layer in self.values:
                if not 0 <= layer < layer_count:
                    raise UserError(
                        f"targeting multipliers: there is no layer {layer} of {layer_count}; "
                        f"allowed are 0 to {layer_count - 1}"
                    )
            return tuple(self.values.get(layer, self.default) for layer in range(layer_count))
        if len(self.values) != layer_count:
            raise UserError(
                f"targeting multipliers: got {len(self.values)} numbers for {layer_count} layers; "
                "write one per layer, or a map of layer to multiplier"
            )
        return self.values
