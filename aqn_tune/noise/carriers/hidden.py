"""Noise on hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from aqn_tune.noise.carriers.base import CarrierSpec, Noised, NoiseSite, with_noise

if TYPE_CHECKING:
    from torch import Tensor


class Hidden(CarrierSpec):
    """Noise on the decoder layer's output, relative to each element: h + sigma * abs(h) * z.

    It is added before any fault of that output (after a dead zone it would be useless), and abs(h)
    is taken without gradient.
    """

    kind: Literal["hidden"] = "hidden"
    site: ClassVar[NoiseSite] = "layer_output"

    def add(self, x: Tensor, sigma: Tensor, z: Tensor) -> Noised:
        """Return h + sigma * abs(h) * z; see `CarrierSpec.add` for shapes."""
        scale = x.detach().abs()
        return Noised(with_noise(x, sigma, z, scale), scale)
