"""One fault or quantizer applied to one folded tensor, for the replicas that have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from aqn_tune.faults.base import Draws
from aqn_tune.faults.mask import fault_mask
from aqn_tune.injection.fold import FaultSlot, QuantizerSlot
from aqn_tune.injection.measure import FaultTally, QuantizerTally
from aqn_tune.ledger.rows import Operand
from aqn_tune.quantization import Quantized, straight_through


def select(x: Tensor, active: Sequence[int]) -> Tensor:
    """Return the rows of the active replicas; `x` itself when that is all of them."""
    return x if len(active) == x.shape[0] else x[list(active)]


def put_back(x: Tensor, values: Tensor, active: Sequence[int]) -> Tensor:
    """Return `x` with the rows of the active replicas replaced; the others keep every bit."""
    if len(active) == x.shape[0]:
        return values
    index = torch.tensor(active, device=x.device)
    return x.index_copy(0, index, values)


def apply_fault(
    slot: FaultSlot,
    x: Tensor,
    valid: Tensor,
    draws_of: Callable[[FaultSlot, Tensor], Draws],
    tally: FaultTally | None = None,
    masks: dict[tuple[int, ...], Tensor | None] | None = None,
) -> Tensor:
    """Return `x` [K, N, D] with the fault of `slot`; `valid` is [K, N, 1], False at padding.

    `draws_of` gives the random numbers of a call on the values [A, N, D] of the A active replicas.

    Places that are not faulty (density, axis, intermittence) and replicas without the fault keep every
    bit, in the values and in the gradient. With a `tally` what the fault did is measured;
    `masks` remembers the permanent places of a site by shape.
    """
    part, known = select(x, slot.active), select(valid, slot.active)
    draws = draws_of(slot, part)
    params = {name: value.to(x.device) for name, value in slot.params.items()}
    mask = _mask(slot, part, draws, masks) if slot.is_masked else None
    with torch.no_grad() if slot.ste else nullcontext():
        values = slot.spec.apply(part, params, known, draws)
        if mask is not None:
            values = torch.where(mask.to(x.device), values, part)
    if slot.ste:
        values = straight_through(part, values)
    out = put_back(x, values, slot.active)
    if tally is not None:  # of all replicas: one without the fault must come out unchanged
        tally.add(x, out, valid)
    return out


def _mask(
    slot: FaultSlot,
    part: Tensor,
    draws: Draws,
    known: dict[tuple[int, ...], Tensor | None] | None,
) -> Tensor | None:
    """Return where the fault acts; a device's permanent places are found once per site and shape."""
    if known is None or slot.spec.persistence != "permanent":
        return fault_mask(slot.spec, part.shape, draws)
    if part.shape not in known:
        known[part.shape] = fault_mask(slot.spec, part.shape, draws)
    return known[part.shape]


def quantize(slot: QuantizerSlot, part: Tensor, known: Tensor) -> Quantized:
    """Return the quantized values of the active replicas, `part` [A, N, D], without gradient.

    A scale of the whole tensor is each replica's own, and padding does not enter it.
    """
    part = part.detach()
    amax = None
    if slot.spec.uses_tensor_scale:
        largest = part.abs().amax(dim=2, keepdim=True)
        amax = largest.masked_fill(~known, 0.0).amax(dim=1, keepdim=True)
    return slot.spec.quantize(part, amax=amax)


def quantizer_defect(quantize: Callable[[Tensor], Tensor], replicas: int) -> str:
    """Return what is wrong with a way to quantize [replicas, N, D], tried on numbers of its own, or "".

    It has to let gradients through unchanged, or nothing below it learns, and must not make a finite
    number of an infinity, or a divergence never shows.
    """
    row = torch.linspace(-3.0, 3.0, 64)
    with torch.enable_grad():
        x = row.expand(replicas, 1, -1).clone().requires_grad_()
        out = quantize(x)
        if not out.requires_grad:
            return "passes no gradient"
        (gradient,) = torch.autograd.grad(out.sum(), x)
    if not bool((gradient == 1).all()):
        return "changes the gradient, which has to pass straight through"
    broken = row.index_fill(0, torch.tensor([5]), torch.inf).expand(replicas, 1, -1)
    if bool(quantize(broken).isfinite().flatten(1).all(dim=1).any()):
        return "hides a value that is not finite"
    return ""


def apply_quantizer(
    slot: QuantizerSlot,
    x: Tensor,
    valid: Tensor,
    operand: Operand,
    layer: int,
    tally: QuantizerTally | None = None,
) -> Tensor:
    """Return `x` [K, N, D] quantized along its last dimension, with a straight-through gradient."""
    part, known = select(x, slot.active), select(valid, slot.active)
    quantized = quantize(slot, part, known)
    out = put_back(x, straight_through(part, quantized.values), slot.active)
    if tally is not None:
        tally.add(operand, layer, slot.active, part, quantized, known)
        tally.watch(slot.active, x, out)
    return out
