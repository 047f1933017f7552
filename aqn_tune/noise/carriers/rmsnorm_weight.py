"""Noise on RMSNorm weights, as in QeRL."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aqn_tune.noise.carriers.base import CarrierSpec, Noised, NoiseSite, unit_scale, with_noise

if TYPE_CHECKING:
    from torch import Tensor


class RmsnormWeight(CarrierSpec):
    """Noise on the weights of every RMSNorm of a decoder layer: w + sigma * z (QeRL, arXiv 2510.11696).

    QeRL puts it into the model that samples rollouts; here, in supervised fine-tuning, it acts in
    the forward and backward pass of training.
    """

    kind: Literal["rmsnorm_weight"] = "rmsnorm_weight"
    relative: bool = Field(
        False, description="Scale the noise by the weight: w + sigma * abs(w) * z."
    )
    site: ClassVar[NoiseSite] = "norm_weight"

    def add(self, x: Tensor, sigma: Tensor, z: Tensor) -> Noised:
        """Return the noised weight of each replicate, [K, 1, D]; see `CarrierSpec.add`."""
        if not self.relative:
            return Noised(with_noise(x, sigma, z), unit_scale(x))
        scale = x.detach().abs()
        return Noised(with_noise(x, sigma, z, scale), scale)
