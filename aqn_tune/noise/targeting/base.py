"""What a targeting is: one multiplier of sigma for every decoder layer."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

from aqn_tune.study.base import Spec


class Phase(NamedTuple):
    """A part of the training with multipliers of its own."""

    start: float
    """Share of the steps after which it begins, at the first step t with t / T >= start."""
    multipliers: tuple[float, ...]


class TargetingSpec(Spec):
    """Which layers get the noise and how much of it. Subclasses are pure arithmetic: no torch."""

    @abstractmethod
    def multipliers(self, layer_count: int, fault_layers: tuple[int, ...]) -> tuple[float, ...]:
        """Return m_k >= 0 for each of `layer_count` layers: layer k gets noise of m_k * sigma.

        These are the multipliers that the training begins with. `fault_layers` are the layers in
        which the scenario declares its faults. Raises UserError when the targeting cannot exist
        there (a layer out of range, no healthy layer left).
        """

    def phases(self, layer_count: int, fault_layers: tuple[int, ...]) -> tuple[Phase, ...]:
        """Return the multipliers over the training: phases in order of their start, the first at 0.

        One phase unless the targeting changes on the way. Raises as `multipliers` does.
        """
        return (Phase(0.0, self.multipliers(layer_count, fault_layers)),)


def indicator(layers: tuple[int, ...], layer_count: int) -> tuple[float, ...]:
    """Return 1.0 at `layers` and 0.0 elsewhere."""
    chosen = set(layers)
    return tuple(1.0 if layer in chosen else 0.0 for layer in range(layer_count))
