"""Noise on the weights of linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aqn_tune.noise.carriers.base import CarrierSpec, Noised, NoiseSite, unit_scale, with_noise

if TYPE_CHECKING:
    from torch import Tensor

STABLE_SIGMA = 0.001
"""Largest absolute sigma at which a 1.5B model was seen to train; at 0.005 it collapsed."""


class LinearWeight(CarrierSpec):
    """Noise on the weight of every linear layer of a decoder layer: w + sigma * z.

    Adapters, embeddings and the head get none. These weights are about 0.02 in size, so an absolute
    sigma that suits RMSNorm weights (about 1) destroys the model; `relative` gives every weight noise
    in its own measure, abs(w), which is taken without gradient.
    """

    kind: Literal["linear_weight"] = "linear_weight"
    relative: bool = Field(
        False, description="Scale the noise by the weight: w + sigma * abs(w) * z."
    )
    site: ClassVar[NoiseSite] = "linear_weight"

    def add(self, x: Tensor, sigma: Tensor, z: Tensor) -> Noised:
        """Return the noised weight of each replicate, [K, D_out, D_in]; see `CarrierSpec.add`."""
        if not self.relative:
            return Noised(with_noise(x, sigma, z), unit_scale(x))
        scale = x.detach().abs()
        return Noised(with_noise(x, sigma, z, scale), scale)

    def cautions(self, peak: float) -> tuple[str, ...]:
        """Warn of an absolute sigma above what is known to train; see `CarrierSpec.cautions`."""
        if self.relative or peak <= STABLE_SIGMA:
            return ()
        return (
            f"carrier linear_weight: an absolute sigma of {peak:g} is above {STABLE_SIGMA:g}; weights "
            "of linear layers are about 0.02 in size, and a 1.5B model collapsed at 0.005: lower "
            "sigma, or set `relative: true`",
        )
