"""Quantize and dequantize a tensor in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from aqn_tune.errors import UserError, nearest
from aqn_tune.quantization.formats import FORMATS
from aqn_tune.quantization.mxfp4 import ScaleMode
from aqn_tune.quantization.straight_through import straight_through

if TYPE_CHECKING:
    from torch import Tensor

    from aqn_tune.quantization.base import QuantizerSpec


def fake_quantize(
    x: Tensor, format: str = "mxfp4", scale_mode: str = "floor", axis: int = -1
) -> Tensor:
    """Return x as hardware with few bits would hold it, in x's own shape and dtype.

    For trying a format out, or for a model of one's own; a study attaches its `quantizer` to the
    modules by itself.

    Args:
        x: Any tensor of at least one dimension: float32, float64, bfloat16 or float16.
        format: `mxfp4`, `nvfp4`, `fp8_e4m3` or `int8`; each one's class says what it does.
        scale_mode: How MXFP4 chooses a block's scale: `floor`, `rceil`, `even` or `ceil`. The
            other formats have no such choice and refuse anything but the default.
        axis: The dimension along which blocks run (or that a row's scale spans): the one that a
            product sums over, the last of activations [..., D] and of a weight [out, D].

    The gradient is the identity (straight through). Whatever shares a scale with an infinity or a NaN
    becomes NaN: a block of MXFP4, a row of the eight-bit formats, the whole tensor of NVFP4.
    Raises UserError for an unknown format or scale mode, an axis that x has not, or another dtype.

    >>> import torch
    >>> fake_quantize(torch.tensor([0.2, -0.3, 2.4, 5.0]))
    tensor([ 0.0000, -0.5000,  2.0000,  4.0000])
    """
    import torch

    spec = _spec(format, scale_mode)
    if not -x.dim() <= axis < x.dim():
        raise UserError(
            f"axis: got {axis} for a tensor of shape {tuple(x.shape)}; "
            + (f"allowed are {-x.dim()} to {x.dim() - 1}" if x.dim() else "it has no dimension")
        )
    with torch.no_grad():
        values = spec.quantize(x.detach().movedim(axis, -1).contiguous()).values
        values = values.movedim(-1, axis)
    return straight_through(x, values)


def _spec(format: str, scale_mode: str) -> QuantizerSpec:
    if format not in FORMATS:
        raise UserError(
            f"format: got {format!r}; allowed are {', '.join(FORMATS)}{nearest(format, FORMATS)}"
        )
    modes = get_args(ScaleMode)
    if scale_mode not in modes:
        raise UserError(
            f"scale_mode: got {scale_mode!r}; allowed are {', '.join(modes)}{nearest(scale_mode, modes)}"
        )
    options = {"scale_mode": scale_mode} if "scale_mode" in FORMATS[format].model_fields else {}
    if not options and scale_mode != "floor":
        raise UserError(
            f"scale_mode: got {scale_mode!r} with format {format!r}, which has no scale mode; leave it out"
        )
    return FORMATS[format].model_validate(options)
