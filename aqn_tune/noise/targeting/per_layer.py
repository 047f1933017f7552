"""Numbers that a user writes for each layer: a list, or a map of layer to number."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from aqn_tune.errors import UserError


def _check(values: tuple[float, ...] | dict[int, float]) -> tuple[float, ...] | dict[int, float]:
    for number in values.values() if isinstance(values, dict) else values:
        if number < 0:
            raise ValueError(f"got {number}; the numbers are finite and not negative")
    return values


PerLayer = Annotated[tuple[float, ...] | dict[int, float], AfterValidator(_check)]
"""One number >= 0 per decoder layer, or a map of layer number to number. Resolve with `spread`."""


def spread(
    values: tuple[float, ...] | dict[int, float],
    layer_count: int,
    *,
    name: str,
    default: float | None,
) -> tuple[float, ...]:
    """Return one number for each of `layer_count` layers.

    Args:
        values: As written.
        layer_count: Number of decoder layers.
        name: What the message of an error begins with.
        default: Number of the layers that a map does not name; None when it must name all.

    Raises:
        UserError: A list of another length, a layer that does not exist, or one without a number.
    """
    if not isinstance(values, dict):
        if len(values) != layer_count:
            raise UserError(
                f"{name}: got {len(values)} numbers for {layer_count} layers; "
                "write one per layer, or a map of layer to number"
            )
        return values
    for layer in values:
        if not 0 <= layer < layer_count:
            raise UserError(
                f"{name}: there is no layer {layer} of {layer_count}; "
                f"allowed are 0 to {layer_count - 1}"
            )
    if default is None:
        missing = [str(layer) for layer in range(layer_count) if layer not in values]
        if missing:
            raise UserError(
                f"{name}: layers {', '.join(missing)} have no number; each of the {layer_count} "
                "layers needs one"
            )
        return tuple(values[layer] for layer in range(layer_count))
    return tuple(values.get(layer, default) for layer in range(layer_count))
