"""All layers, or none."""

from __future__ import annotations

from typing import Literal

from aqn_tune.noise.targeting.base import TargetingSpec


class NoTargeting(TargetingSpec):
    """No layer gets noise: the arm trains without it."""

    kind: Literal["none"] = "none"

    def multipliers(self, layer_count: int, fault_layers: tuple[int, ...]) -> tuple[float, ...]:
        """Return zeros; see `TargetingSpec.multipliers`."""
        return (0.0,) * layer_count


class Global(TargetingSpec):
    """Every layer gets the same noise."""

    kind: Literal["global"] = "global"

    def multipliers(self, layer_count: int, fault_layers: tuple[int, ...]) -> tuple[float, ...]:
        """Return ones; see `TargetingSpec.multipliers`."""
        return (1.0,) * layer_count
