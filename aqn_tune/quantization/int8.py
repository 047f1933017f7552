"""INT8: symmetric eight-bit integers with one scale per row."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aqn_tune.quantization.base import Quantized, QuantizerSpec
from aqn_tune.quantization.rounding import (
    SMALLEST_NORMAL,
    largest,
    magnitudes,
    reassemble,
    spoil,
    spread,
)

if TYPE_CHECKING:
    from torch import Tensor


class Int8(QuantizerSpec):
    """Integers -127 to 127, scaled by row.

    A row's scale is its largest magnitude / 127, at least the smallest normal float32; elements round to
    nearest, ties to even. Nothing is clipped, and one outlier costs its whole row: the steps between
    codes are equal. -128 is not used, so that a value and its negative have codes of equal size.
    """

    format: Literal["int8"] = Field(
        "int8", description="INT8: symmetric integers, one scale per row."
    )

    block: ClassVar[int] = 0
    uses_tensor_scale: ClassVar[bool] = False

    def quantize(self, x: Tensor, *, amax: Tensor | None = None) -> Quantized:
        """Quantize x [..., D] with one scale per row of D; see `QuantizerSpec.quantize`."""
        magnitude = magnitudes(x, self.block)
        block = magnitude.shape[-1]
        row_amax = largest(magnitude)
        scale = spoil((row_amax / 127.0).clamp_min_(SMALLEST_NORMAL), row_amax)
        magnitude.div_(scale).round_().mul_(scale)  # 127 at most: amax / scale rounds to it
        values = reassemble(magnitude, x)
        return Quantized(values, lambda: spread(spoil(row_amax, row_amax), block, x.shape))
