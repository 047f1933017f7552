"""What a targeting is: one multiplier of sigma for every decoder layer."""

from __future__ import annotations

from abc import abstractmethod

from aqn_tune.study.base import Spec


class TargetingSpec(Spec):
    """Which layers get the noise and how much of it. Subclasses are pure arithmetic: no torch."""

    @abstractmethod
    def multipliers(self, layer_count: int, fault_layers: tuple[int, ...]) -> tuple[float, ...]:
        """Return m_k >= 0 for each of `layer_count` layers: layer k gets noise of m_k * sigma.

        `fault_layers` are the layers in which the scenario declares its faults. Raises UserError
        when the targeting cannot exist there (a layer out of range, no healthy layer left).
        """


def indicator(layers: tuple[int, ...], layer_count: int) -> tuple[float, ...]:
    """Return 1.0 at `layers` and 0.0 elsewhere."""
    chosen = set(layers)
    return tuple(1.0 if layer in chosen else 0.0 for layer in range(layer_count))
