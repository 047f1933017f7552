"""What a quantizer is: an address in the model and a number format with a rule for its scales."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aqn_tune.study.base import Spec
from aqn_tune.study.layers import Layers

if TYPE_CHECKING:
    from torch import Tensor

Operands = Literal["weight", "activation", "both"]
When = Literal["both", "train", "eval"]


class Quantized:
    """What a quantizer did to one tensor; `values, limit = quantized` takes it apart.

    Args:
        values: The dequantized values, of x's shape and dtype, without gradient.
        limit: Works out `limit` when it is asked for; only a measurement asks.
    """

    def __init__(self, values: Tensor, limit: Callable[[], Tensor]) -> None:
        self.values = values
        self._limit = limit

    @cached_property
    def limit(self) -> Tensor:
        """The largest magnitude that each element's scale can represent, of x's shape: where
        `abs(x) > limit` the value was clipped. float32 for half-precision x; NaN where x is not finite."""
        return self._limit()

    def __iter__(self) -> Iterator[Tensor]:
        yield self.values
        yield self.limit


class QuantizerSpec(Spec):
    """A number format in which matrix units hold their operands, and which units those are.

    One subclass per format, in a file of its own; the file imports torch only inside `quantize`.
    Products and sums stay in the model's own precision: only the operands lose theirs.
    """

    format: str = Field(description="Number format of the operands.")
    operands: Operands = Field(
        "both",
        description="What is quantized in front of each product: weight, activation, or both (W4A4).",
    )
    modules: tuple[str, ...] = Field(
        ("linear",),
        description="Globs over module names; the word 'linear' means every linear layer of a decoder layer.",
    )
    layers: Layers = Field(
        "all", description="Decoder layers whose matrix units hold operands in this format."
    )
    exclude: tuple[str, ...] = Field(
        (), description="Globs of modules to leave out, beside lm_head, embeddings and adapters."
    )
    when: When = Field(
        "both",
        description="Whether the format acts in training, in the faulty evaluation, or in both.",
    )

    block: ClassVar[int]
    """Neighbouring elements of a row that share one scale; 0 where the whole row shares one."""
    uses_tensor_scale: ClassVar[bool]
    """Whether `quantize` reads `amax`: a further scale spans the whole tensor of a replicate."""

    @abstractmethod
    def quantize(self, x: Tensor, *, amax: Tensor | None = None) -> Quantized:
        """Return `x` as the format holds it; call it under `torch.no_grad()`.

        Args:
            x: Values [..., D], D the dimension that the product sums over. float32, float64, bfloat16
                or float16; half precision is quantized in float32 and rounded once at the end.
            amax: Largest magnitude of the tensor that each element belongs to, with last size 1 and
                broadcastable to x ([K, 1, 1] for [K, N, D] with K replicates): each replicate then
                gets bit for bit what it gets alone. None: the maximum over all of x. Formats
                without a tensor scale ignore it.

        No scale crosses a row. Zeros give zeros of the same sign. Where a scale would span an infinity
        or a NaN, everything that it spans becomes NaN. Never returns an infinity: a code times its
        scale beyond the range of x's dtype saturates there. Raises UserError for any other dtype.
        """
