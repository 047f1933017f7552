"""What a carrier is: the quantity that the noise is added to."""

from __future__ import annotations

from abc import abstractmethod
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import Field

from aqn_tune.study.base import Spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NoiseSite = Literal["layer_output", "norm_weight", "linear_weight"]
"""Where noise goes: the decoder layer's output, the weights of its RMSNorms, or the weights of its
linear layers (adapters excepted)."""


class Noised(NamedTuple):
    """A noised quantity, and the scale its noise is measured in."""

    values: Tensor
    """The quantity with its noise, same shape as without."""
    scale: Tensor
    """What sigma is relative to, broadcastable to `values`: (values - x) / scale must have a standard
    deviation of sigma wherever scale is not 0."""


def with_noise(x: Tensor, sigma: Tensor, z: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return x + sigma * z, or x + sigma * z * scale, in x's type.

    A type narrower than float32 is left for the sum and rounded to once: rounded at every step, sigma
    itself would be off.
    """
    import torch

    dtype = torch.promote_types(x.dtype, torch.float32)
    noise = z.to(dtype) * sigma.to(dtype)
    if scale is not None:
        noise.mul_(scale)
    return (x + noise).to(x.dtype)


def unit_scale(x: Tensor) -> Tensor:
    """Return the scale of absolute noise on `x`: one everywhere."""
    return _one(x.dtype, x.device).expand_as(x)


@cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    import torch

    return torch.ones((), dtype=dtype, device=device)


class CarrierSpec(Spec):
    """A quantity that can carry AQN. Noise is functional: nothing is ever written into a parameter."""

    kind: str = Field(description="Kind of the carrier.")
    site: ClassVar[NoiseSite]
    """Where the noise goes."""

    @abstractmethod
    def add(self, x: Tensor, sigma: Tensor, z: Tensor) -> Noised:
        """Return `x` with noise.

        Args:
            x: layer_output: hidden states [K, N, D]; norm_weight: the weight [K, 1, D];
                linear_weight: the weight [K, D_out, D_in].
            sigma: Standard deviation of each replicate, float32 or float64, [K, 1, 1]; 0 changes no bit.
            z: Standard normal draws of x's shape, fresh as often as the policy's `redraw` says.
        """

    def cautions(self, peak: float) -> tuple[str, ...]:
        """Return one sentence for each danger of this carrier at a largest sigma of `peak`."""
        return ()
