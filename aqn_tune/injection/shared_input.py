"""Products that share their input: what has been quantized for one of them serves the others."""

from __future__ import annotations

from torch import Tensor

Slots = tuple[int, ...]
"""Identities of the quantizers of a site, in turn."""


class SharedInputs:
    """The last inputs of a pass, and what their quantizers made of them."""

    def __init__(self) -> None:
        self._quantized: dict[Slots, tuple[Tensor, Tensor]] = {}
        self._measured: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Forget the pass."""
        self._quantized.clear()
        self._measured.clear()

    def quantized(self, slots: Slots, x: Tensor) -> Tensor | None:
        """Return what the quantizers `slots` made of `x`, None where `x` is not what they saw last."""
        known = self._quantized.get(slots)
        return known[1] if known is not None and _is_same(known[0], x) else None

    def remember(self, slots: Slots, x: Tensor, quantized: Tensor) -> None:
        """Keep what the quantizers `slots` made of `x`."""
        self._quantized[slots] = (x, quantized)

    def is_new(self, slot: int, x: Tensor) -> bool:
        """Return whether one quantizer sees `x` for the first time, whatever else is quantized beside it."""
        last = self._measured.get(slot)
        self._measured[slot] = x
        return last is None or not _is_same(last, x)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are views of the same values: the q, k and v products share theirs."""
    if one is other:
        return True
    if one.is_inference() and other.is_inference():  # they know no base and no version
        is_shared = True
    else:
        is_shared = (
            one._base is not None and one._base is other._base and one._version == other._version
        )
    # Both are alive, so that one address is one memory.
    return (
        is_shared
        and one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )
