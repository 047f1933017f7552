"""NVFP4: four-bit floats in blocks of 16 with an eight-bit scale, under one scale per tensor."""

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


class NVFP4(QuantizerSpec):
    """E2M1 elements, an E4M3 scale s per 16 of them and a float32 scale g per tensor.

    g = amax / (448 * 6) over the tensor, s = E4M3(a / 6 / g) over the block, held in 2**-9 to 448; a
    value is E2M1(x / (s * g)) * s * g, everything rounded to nearest, ties to even, saturating at 6.
    s may round down, so the largest value of a block can be clipped by up to 6 %.

    g ends at the smallest normal float32: tensors whose maximum lies below 3e-35 use smaller s
    instead. A value depends on its whole tensor; with replicates in one tensor, pass their maxima.

    Source: NVIDIA's NVFP4 (the block and tensor scales of its Transformer Engine and Model Optimizer).
    """

    format: Literal["nvfp4"] = Field("nvfp4", description="NVFP4: E2M1 in blocks of 16.")

    block: ClassVar[int] = 16
    uses_tensor_scale: ClassVar[bool] = True

    def quantize(self, x: Tensor, *, amax: Tensor | None = None) -> Quantized:
        """Quantize x [..., D] in blocks along D; see `QuantizerSpec.quantize`."""
        magnitude = magnitudes(x, self.block)
        block = magnitude.shape[-1]
        block_amax = largest(magnitude)
        if amax is not None:
            top = amax.to(magnitude.dtype).unsqueeze(-1)
        else:
            top = block_amax.amax() if block_amax.numel() else block_amax.sum()
        scale = self._scale(block_amax, top)
        magnitude.div_(scale).clamp_max_(6.0)
        round_magnitude(magnitude, mantissa=1, smallest_exponent=0).mul_(scale)
        values = reassemble(magnitude, x)
        # The scale of the tensor's largest block is off by rounding alone; that clips nothing.
        return Quantized(values, lambda: spread(scale * (6.0 * (1 + 2.0**-20)), block, x.shape))

    @staticmethod
    def _scale(block_amax: Tensor, top: Tensor) -> Tensor:
        """Return s * g for each block, NaN where the block or its tensor is not finite."""
        import torch

        largest_float = torch.finfo(torch.float32).max
        tensor_scale = (top / (448.0 * 6.0)).clamp_(SMALLEST_NORMAL, largest_float)
        tensor_scale = spoil(tensor_scale.float().to(top.dtype), top)
        scale = (block_amax / 6.0).div_(tensor_scale).clamp_(2.0**-9, 448.0)
        round_magnitude(scale, mantissa=3, smallest_exponent=-6).mul_(tensor_scale)
        return spoil(scale, block_amax)
