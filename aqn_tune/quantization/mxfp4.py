"""MXFP4: four-bit floats in blocks of 32 that share a power of two."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import Field

from aqn_tune.quantization.base import Quantized, QuantizerSpec
from aqn_tune.quantization.rounding import (
    FloatLayout,
    largest,
    layout,
    magnitudes,
    reassemble,
    round_magnitude,
    spoil,
    spread,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ScaleMode = Literal["floor", "rceil", "even", "ceil"]


class MXFP4(QuantizerSpec):
    """E2M1 elements (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), one E8M0 scale 2**e per 32 of them.

    Elements round to nearest, ties to even, and saturate at 6 * 2**e. With a = the block's largest
    magnitude, `scale_mode` sets e, always held in -127 to 127:

    floor: floor(log2 a) - 2, the standard; clips the top of a block whose a / 2**floor(log2 a) > 1.5.
    rceil: ceil(log2(a / 6)), the smallest e that clips nothing (NVIDIA).
    even: floor(log2 of a rounded to one mantissa bit) - 2 (compressed-tensors, vLLM).
    ceil: ceil(log2 a) - 2; clips nothing and wastes the most range.

    Source: OCP Microscaling Formats (MX) Specification v1.0, section 6.3. Where it leaves a product
    beyond the float range open, the value saturates at the dtype's largest.
    """

    format: Literal["mxfp4"] = Field("mxfp4", description="MXFP4: E2M1 in blocks of 32.")
    scale_mode: ScaleMode = Field(
        "floor",
        description="How a block's scale follows from its maximum: floor (the standard), rceil, even, ceil.",
    )

    block: ClassVar[int] = 32
    uses_tensor_scale: ClassVar[bool] = False

    def quantize(self, x: Tensor, *, amax: Tensor | None = None) -> Quantized:
        """Quantize x [..., D] in blocks along D; see `QuantizerSpec.quantize`."""
        magnitude = magnitudes(x, self.block)
        block = magnitude.shape[-1]
        scale = self._scale(largest(magnitude))
        magnitude.div_(scale).clamp_max_(6.0)
        round_magnitude(magnitude, mantissa=1, smallest_exponent=0).mul_(scale)
        values = reassemble(magnitude, x, saturate=self.scale_mode != "floor")
        return Quantized(values, lambda: spread(scale * 6.0, block, x.shape))

    def _scale(self, amax: Tensor) -> Tensor:
        """Return the power of two of each block, from the bits of its largest magnitude.

        Each mode is the floor mode of a slightly larger number: what is added to the bits carries into
        the exponent exactly where the mode's own formula steps to the next one.
        """
        form, carry, two, lowest, highest = _constants(self.scale_mode, amax.dtype)
        bits = amax.view(form.integers)
        if carry:
            bits = bits + carry
        bits = bits.bitwise_and(form.exponent_mask).sub_(two).clamp_(lowest, highest)
        return spoil(bits.view(amax.dtype), amax)


class _Constants(NamedTuple):
    """What the scales of a mode and dtype are worked out with."""

    form: FloatLayout
    carry: int
    two: int
    """Two steps of the exponent."""
    lowest: int
    """The bits of 2**-127."""
    highest: int
    """The bits of 2**127."""


@cache
def _constants(mode: ScaleMode, dtype: torch.dtype) -> _Constants:
    form = layout(dtype)
    one = 1 << form.mantissa
    carry = {"floor": 0, "rceil": one // 2 - 1, "even": one // 4, "ceil": one - 1}
    return _Constants(form, carry[mode], 2 * one, form.power_bits(-127), form.power_bits(127))
