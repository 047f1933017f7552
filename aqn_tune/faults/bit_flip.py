"""Bit flips: upsets of the number format itself."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from aqn_tune.faults.base import Draws, FaultSpec, Persistence
from aqn_tune.faults.places import hit_values
from aqn_tune.quantization.straight_through import straight_through

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_RANGE = re.compile(r"^\s*(\d{1,3})\s*-\s*(\d{1,3})\s*$")
_ALLOWED = (
    "allowed are a list of bit numbers, a range like '0-22', 'sign', 'exponent' or 'mantissa'"
)

_MANTISSA_BITS = {"fp32": 23, "bf16": 7, "fp16": 10}
_BITS = {"fp32": 32, "bf16": 16, "fp16": 16}


class BitFlip(FaultSpec):
    """One bit of a value that is hit turns over, in the number format in which the unit holds it.

    Each value that is hit has one of `bits` flipped, drawn with equal chances. It is cast to `format`,
    flipped in the integer view, and cast back; every other value keeps its bits. How many are hit is
    either `rate` (a Binomial draw) or `count`; no value is hit twice in a call, so no flip is undone.
    With a `density` below 1 hits on sound places come to nothing, so fewer values change than that.

    Bit 0 is the last of the mantissa: fp32 has mantissa 0-22, exponent 23-30, sign 31; bf16 0-6, 7-14,
    15; fp16 0-9, 10-14, 15. A flip in the exponent may give infinity or NaN, which is handed on. In a
    model of a narrower type than `format` the cast back rounds: in bfloat16 the flip of an fp32 bit
    below 15 changes nothing. A value beyond the range of `format` is infinite before it is flipped.
    The gradient is the identity.
    """

    kind: Literal["bit_flip"] = "bit_flip"
    bits: tuple[int, ...] | str = Field(
        description="Bits of which one is flipped: a list like [30], a range like '0-22', sign, exponent "
        "or mantissa."
    )
    format: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Number format in which the unit holds the value."
    )
    rate: float | None = Field(
        None, ge=0.0, le=1.0, description="Probability that a value is hit, per value and call."
    )
    count: int | None = Field(
        None, ge=0, description="Number of values that are hit in each call and replicate."
    )
    persistence: Persistence = Field(
        "transient",
        description="transient: other values in every call; permanent: the same values and bits in every "
        "call; intermittent: the same ones, in some calls only.",
    )

    @model_validator(mode="after")
    def _one_way_to_count(self) -> BitFlip:
        if (self.rate is None) == (self.count is None):
            raise ValueError(f"rate {self.rate} with count {self.count}: give exactly one of them")
        return self

    @model_validator(mode="after")
    def _bits_exist(self) -> BitFlip:
        numbers, size = self.bit_numbers(), _BITS[self.format]
        if not numbers or len(set(numbers)) != len(numbers):
            raise ValueError(f"bits {self.bits!r} are none, or name one twice; {_ALLOWED}")
        if not all(0 <= number < size for number in numbers):
            mantissa = _MANTISSA_BITS[self.format]
            raise ValueError(
                f"bits {self.bits!r} with format {self.format}: its bits are 0 to {size - 1} "
                f"(mantissa 0-{mantissa - 1}, exponent {mantissa}-{size - 2}, sign {size - 1})"
            )
        return self

    def bit_numbers(self) -> tuple[int, ...]:
        """Return the numbers of the bits that may flip; bit 0 has the least weight."""
        if not isinstance(self.bits, str):
            return self.bits
        mantissa, size = _MANTISSA_BITS[self.format], _BITS[self.format]
        named = {
            "mantissa": range(mantissa),
            "exponent": range(mantissa, size - 1),
            "sign": range(size - 1, size),
        }
        if self.bits in named:
            return tuple(named[self.bits])
        match = _RANGE.match(self.bits)
        if match is None:
            raise ValueError(f"bits {self.bits!r}; {_ALLOWED}")
        return tuple(range(int(match[1]), int(match[2]) + 1))

    def is_stochastic(self) -> bool:
        """Return whether the values that are hit change from call to call."""
        return self.persistence != "permanent"

    def uses_device_seed(self) -> bool:
        """Return whether the values that are hit are the device's own."""
        return self.persistence != "transient"

    def may_rest(self) -> bool:
        """Return True: few hits may miss, fall on sound places or be rounded away."""
        return True

    def is_off(self) -> bool:
        """Return whether nothing is hit."""
        return not (self.rate or self.count)

    def apply(self, x: Tensor, params: Mapping[str, Tensor], valid: Tensor, draws: Draws) -> Tensor:
        """Flip the bits; see `FaultSpec.apply` for shapes."""
        import torch

        held_as, integer = {
            "fp32": (torch.float32, torch.int32),
            "bf16": (torch.bfloat16, torch.int16),
            "fp16": (torch.float16, torch.int16),
        }[self.format]
        sign = _BITS[self.format] - 1
        # The integers are signed: the pattern with the top bit alone is the most negative one.
        patterns = [-(1 << n) if n == sign else 1 << n for n in self.bit_numbers()]
        flips = torch.tensor(patterns, dtype=integer, device=x.device)
        with torch.no_grad():
            values = x.detach().clone(memory_format=torch.contiguous_format)
            rates = None if self.rate is None else [self.rate] * len(x)
            places = hit_values(self, valid, x.shape[2], draws, rates=rates, count=self.count or 0)
            sources = draws.generators("bits", fresh=self.persistence == "transient")
            for row, where, source in zip(values.flatten(1), places, sources, strict=True):
                hit = where.to(x.device)
                which = torch.randint(len(patterns), (len(where),), generator=source)
                held = row[hit].to(held_as).view(integer)
                row[hit] = (held ^ flips[which.to(x.device)]).view(held_as).to(x.dtype)
        return straight_through(x, values)
