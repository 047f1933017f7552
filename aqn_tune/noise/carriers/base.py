"""What a carrier is: the quantity that the noise is added to."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import Field

from aqn_tune.study.base import Spec

if TYPE_CHECKING:
    from torch import Tensor


class Noised(NamedTuple):
    """A noised quantity, and the scale its noise is measured in."""

    values: Tensor
    """The quantity with its noise, same shape as without."""
    scale: Tensor
    """What sigma is relative to, broadcastable to `values`: (values - x) / scale must have a standard
    deviation of sigma wherever scale is not 0."""


class CarrierSpec(Spec):
    """A quantity that can carry AQN. Noise is functional: nothing is ever written into a parameter."""

    kind: str = Field(description="Kind of the carrier.")
    site: ClassVar[Literal["layer_output", "norm_weight"]]
    """Where the noise goes: the decoder layer's output, or the weights of its RMSNorms."""

    @abstractmethod
    def add(self, x: Tensor, sigma: Tensor, z: Tensor) -> Noised:
        """Return `x` with noise.

        Args:
            x: layer_output: hidden states [K, N, D]; norm_weight: the weight [K, 1, D].
            sigma: Standard deviation of each replicate, float64 [K, 1, 1]; 0 changes no bit.
            z: Standard normal draws, [K, N, D] or [K, 1, D], fresh at every optimiser step.
        """
