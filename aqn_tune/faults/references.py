"""The magnitude r(x) that a relative fault is measured against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Reference = Literal["token_max", "tensor_max", "rms", "mean_abs", "std", "absolute"]


def reference_magnitude(reference: Reference, x: Tensor, valid: Tensor) -> Tensor:
    """Return r(x), without gradient, broadcastable to `x` [K, N, D].

    token_max: largest magnitude of each token's vector, [K, N, 1]; independent of batch mates.
    tensor_max: largest magnitude over a replicate's whole tensor, [K, 1, 1]; batch size and padding
        are part of the fault then, so compare only runs with the same ones.
    rms, mean_abs, std: root mean square, mean magnitude and standard deviation (of the population) of
        each token's vector, [K, N, 1].
    absolute: one, the level is in the units of x.

    `valid` [K, N, 1] is False at padding, which never enters a maximum over tokens.
    """
    import torch

    with torch.no_grad():
        x = x.detach()
        if reference == "token_max":
            return x.abs().amax(dim=2, keepdim=True)
        if reference == "tensor_max":
            largest = x.abs().amax(dim=2, keepdim=True)
            return largest.masked_fill(~valid, 0.0).amax(dim=1, keepdim=True)
        if reference == "rms":
            return x.square().mean(dim=2, keepdim=True).sqrt()
        if reference == "mean_abs":
            return x.abs().mean(dim=2, keepdim=True)
        if reference == "std":
            return x.std(dim=2, keepdim=True, correction=0)
        return torch.ones((1, 1, 1), dtype=x.dtype, device=x.device)
