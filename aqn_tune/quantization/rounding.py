"""Exact arithmetic on magnitudes: split a row into blocks, round to a short float, put it together again."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from aqn_tune.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SMALLEST_NORMAL = 2.0**-126
"""Of float32. Tensor and row scales end here: below, a division by them would lose its digits."""


class FloatLayout(NamedTuple):
    """How the bits of a working dtype are read as integers."""

    integers: torch.dtype
    mantissa: int
    """Bits of the mantissa."""
    bias: int
    exponent_mask: int
    """The bits of the exponent; on a magnitude, what they leave is its power of two."""

    def power_bits(self, exponent: int) -> int:
        """Return the bits of 2**exponent, subnormal powers included."""
        biased = self.bias + exponent
        return biased << self.mantissa if biased > 0 else 1 << (self.mantissa - 1 + biased)


@cache
def layout(dtype: torch.dtype) -> FloatLayout:
    """Return the layout of float32 or float64, the two dtypes that the arithmetic runs in."""
    import torch

    if dtype == torch.float64:
        return FloatLayout(torch.int64, 52, 1023, 0x7FF << 52)
    return FloatLayout(torch.int32, 23, 127, 0xFF << 23)


def magnitudes(x: Tensor, block: int) -> Tensor:
    """Return abs(x) in the working dtype, a new tensor, its last dimension split into blocks.

    x [..., D] gives [..., B, block] with B = ceil(D / block), the last block filled up with zeros;
    `block` 0 gives [..., 1, D].
    """
    working = _working(x.dtype)
    size = x.shape[-1]
    block = block or size
    blocks = -(-size // block) if size else 0
    magnitude = (x if x.dtype == working else x.to(working)).abs()
    if blocks * block != size:
        import torch

        magnitude = torch.nn.functional.pad(magnitude, (0, blocks * block - size))
    return magnitude.view(*x.shape[:-1], blocks, block)


@cache
def _working(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that tensors of `dtype` are quantized in."""
    import torch

    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise UserError(
            f"quantization: got a tensor of {dtype}; "
            "allowed are torch.float32, torch.float64, torch.bfloat16 and torch.float16"
        )
    return dtype if dtype == torch.float64 else torch.float32


def largest(magnitude: Tensor) -> Tensor:
    """Return the largest magnitude of each block, [..., B, 1]; NaN where a block holds one."""
    if magnitude.numel() == 0:
        return magnitude[..., :1]
    # As integers, magnitudes keep their order with NaN on top, and reduce in half the time.
    bits = magnitude.view(layout(magnitude.dtype).integers)
    return bits.amax(dim=-1, keepdim=True).view(magnitude.dtype)


def spoil(scale: Tensor, amax: Tensor) -> Tensor:
    """Make `scale` NaN, in place, wherever `amax` is not finite: what it scales then shows the defect."""
    return scale.add_(amax, alpha=0)  # nothing times infinity is NaN


def round_magnitude(y: Tensor, mantissa: int, smallest_exponent: int) -> Tensor:
    """Round y >= 0 in place to the nearest short float, ties to even; return it.

    The short float has `mantissa` bits after the leading one, subnormals below 2**smallest_exponent
    and no upper end: the caller keeps y below the format's. NaN stays NaN. Adding and taking away
    p * 2**(M - mantissa), with p the power of two at or below y and M the working dtype's own mantissa,
    makes the hardware's addition do the rounding: its unit in the last place is then the step between
    two neighbouring codes.
    """
    form = layout(y.dtype)
    power = y.view(form.integers).bitwise_and(form.exponent_mask)
    power = power.clamp_min_(form.power_bits(smallest_exponent)).view(y.dtype)
    shift = 2.0 ** (form.mantissa - mantissa)
    return y.add_(power, alpha=shift).sub_(power, alpha=shift)


def reassemble(magnitude: Tensor, x: Tensor, *, saturate: bool = True) -> Tensor:
    """Return [..., B, block] magnitudes, which are overwritten, as values of x's shape, signs and dtype.

    `saturate` keeps magnitudes beyond the range of x's dtype from becoming infinite.
    """
    if saturate:
        magnitude.clamp_max_(_largest_value(x.dtype))
    magnitude = _joined(magnitude, x.shape)
    if magnitude.dtype != x.dtype:
        magnitude = magnitude.to(x.dtype)
    return magnitude.copysign_(x) if magnitude.is_contiguous() else magnitude.copysign(x)


@cache
def _largest_value(dtype: torch.dtype) -> float:
    import torch

    return torch.finfo(dtype).max


def spread(limit: Tensor, block: int, shape: torch.Size) -> Tensor:
    """Return one limit per block, [..., B, 1], as one for each element of a tensor of `shape`."""
    return _joined(limit.expand(*limit.shape[:-1], block), shape)


def _joined(blocks: Tensor, shape: torch.Size) -> Tensor:
    if blocks.numel() == shape.numel():
        return blocks.reshape(shape)
    return blocks.flatten(-2)[..., : shape[-1]]
