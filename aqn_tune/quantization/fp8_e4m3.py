"""FP8 E4M3: eight-bit floats with one scale per row."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aqn_tune.quantization.base import Quantized, QuantizerSpec
from aqn_tune.quantization.rounding import (
    SMALLEST_NORMAL,
    largest,
    magnitudes,
    reassemble,
    round_magnitude,
    spoil,
    spread,
)

if TYPE_CHECKING:
    from torch import Tensor


class FP8E4M3(QuantizerSpec):
    """E4M3 elements (`torch.float8_e4m3fn`: 3 mantissa bits, largest 448, smallest 2**-9), scaled by row.

    A row's scale is its largest magnitude / 448, at least the smallest normal float32; elements round to
    nearest, ties to even. Nothing is clipped. Each token (or output channel of a weight) has its own
    scale, so a token does not depend on its batch mates. Source: OCP OFP8 v1.0 for the element.
    """

    format: Literal["fp8_e4m3"] = Field("fp8_e4m3", description="FP8: E4M3 with one scale per row.")

    block: ClassVar[int] = 0
    uses_tensor_scale: ClassVar[bool] = False

    def quantize(self, x: Tensor, *, amax: Tensor | None = None) -> Quantized:
        """Quantize x [..., D] with one scale per row of D; see `QuantizerSpec.quantize`."""
        magnitude = magnitudes(x, self.block)
        block = magnitude.shape[-1]
        row_amax = largest(magnitude)
        scale = spoil((row_amax / 448.0).clamp_min_(SMALLEST_NORMAL), row_amax)
        magnitude.div_(scale)  # 448 at most, but for rounding, which the next line takes back
        # The same bits as a cast to torch.float8_e4m3fn and back, many times as fast on a CPU.
        round_magnitude(magnitude, mantissa=3, smallest_exponent=-6).mul_(scale)
        values = reassemble(magnitude, x)
        return Quantized(values, lambda: spread(spoil(row_amax, row_amax), block, x.shape))
