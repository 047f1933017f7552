"""Decoder layers as a user writes them: `all`, `[10]`, `[0, "14-17", -1]`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator

from aqn_tune.errors import UserError

_RANGE = re.compile(r"^(\d+)-(\d+)$")


def _check(value: str | tuple[int | str, ...]) -> str | tuple[int | str, ...]:
    if isinstance(value, str):
        return value
    if not value:
        raise ValueError("got an empty list; write 'all' or at least one layer")
    for item in value:
        if isinstance(item, str):
            match = _RANGE.match(item.replace(" ", ""))
            if not match or int(match[1]) > int(match[2]):
                raise ValueError(
                    f"got {item!r}; a range is written 'first-last', for example '14-17'"
                )
    return value


Layers = Annotated[Literal["all"] | tuple[int | str, ...], AfterValidator(_check)]
"""Positions in the decoder's list of layers: `all`, or numbers and `first-last` ranges (both ends
included); negative numbers count from the end. Resolve with `resolve_layers`."""


def resolve_layers(layers: Layers, count: int) -> tuple[int, ...]:
    """Return the sorted layer numbers that `layers` names in a decoder of `count` layers.

    Raises UserError when one does not exist (layer 28 of 28) or is named twice.
    """
    if layers == "all":
        return tuple(range(count))
    numbers: list[int] = []
    for item in layers:
        if isinstance(item, str):
            first, last = (int(part) for part in item.replace(" ", "").split("-"))
            numbers.extend(range(first, last + 1))
        else:
            numbers.append(item + count if item < 0 else item)
    for number in numbers:
        if not 0 <= number < count:
            raise UserError(
                f"layers: there is no layer {number} of {count}; "
                f"allowed are 0 to {count - 1}, or -1 to -{count} from the end"
            )
    if len(set(numbers)) != len(numbers):
        raise UserError(f"layers: got {list(layers)}, which names a layer twice")
    return tuple(sorted(numbers))
