"""Some layers and not others: the faulty ones, the healthy ones, a window, a random set."""

from __future__ import annotations

import random
from typing import Literal

from pydantic import Field

from aqn_tune.errors import UserError
from aqn_tune.noise.targeting.base import TargetingSpec, indicator
from aqn_tune.study.layers import Layers, resolve_layers
from aqn_tune.study.seeds import stream_seed


class Targeted(TargetingSpec):
    """Only the given layers get noise; by default the layers that hold the scenario's faults."""

    kind: Literal["targeted"] = "targeted"
    layers: Layers | None = Field(
        None, description="Layers to noise; by default the scenario's fault layers."
    )

    def multipliers(self, layer_count: int, fault_layers: tuple[int, ...]) -> tuple[float, ...]:
        """Return 1 at the chosen layers; see `TargetingSpec.multipliers`."""
        chosen = fault_layers if self.layers is None else resolve_layers(self.layers, layer_count)
        if not chosen:
            raise UserError("targeting targeted: the scenario has no fault layer; name `layers`")
        return indicator(chosen, layer_count)


class Healthy(TargetingSpec):
    """Every layer but the given ones gets noise; by default every layer without a fault."""

    kind: Literal["healthy"] = "healthy"
    layers: Layers | None = Field(
        None, description="Layers to spare; by default the scenario's fault layers."
    )

    def multipliers(self, layer_count: int, fault_layers: tuple[int, ...]) -> tuple[float, ...]:
        """Return 1 outside the spared layers; see `TargetingSpec.multipliers`."""
        spared = fault_layers if self.layers is None else resolve_layers(self.layers, layer_count)
        if len(spared) == layer_count:
            raise UserError("targeting healthy: every layer is faulty, none is left to noise")
        return tuple(1.0 - m for m in indicator(spared, layer_count))


class Window(TargetingSpec):
    """A run of `width` neighbouring layers around `centre` gets noise, cut off at the ends of the model."""

    kind: Literal["window"] = "window"
    centre: int = Field(ge=0, description="Layer in the middle of the window.")
    width: int = Field(
        ge=1, description="Number of layers; an even width reaches one further back."
    )

    def multipliers(self, layer_count: int, fault_layers: tuple[int, ...]) -> tuple[float, ...]:
        """Return 1 inside the window; see `TargetingSpec.multipliers`."""
        if self.centre >= layer_count:
            raise UserError(
                f"targeting window: there is no layer {self.centre} of {layer_count}; "
                f"allowed centres are 0 to {layer_count - 1}"
            )
        first = self.centre - self.width // 2
        inside = range(max(first, 0), min(first + self.width, layer_count))
        return indicator(tuple(inside), layer_count)


class Random(TargetingSpec):
    """A random set of layers gets noise: the control that tells 'these layers' from 'so few layers'.

    The set is drawn from the layers without a fault and is the same in every replicate: it belongs to
    the arm, not to the training seed.
    """

    kind: Literal["random"] = "random"
    count: int | None = Field(
        None,
        ge=1,
        description="Number of layers; by default as many as the scenario has fault layers.",
    )
    seed: int = Field(0, description="Seed of the choice of layers.")

    def multipliers(self, layer_count: int, fault_layers: tuple[int, ...]) -> tuple[float, ...]:
        """Return 1 at the drawn layers; see `TargetingSpec.multipliers`."""
        count = len(fault_layers) if self.count is None else self.count
        if not 1 <= count <= layer_count:
            raise UserError(f"targeting random: cannot choose {count} of {layer_count} layers")
        healthy = [layer for layer in range(layer_count) if layer not in set(fault_layers)]
        if len(healthy) < count:
            raise UserError(
                f"targeting random: cannot choose {count} of {len(healthy)} healthy layers"
            )
        draw = random.Random(stream_seed(self.seed, "targeting", "random"))
        return indicator(tuple(draw.sample(healthy, count)), layer_count)
