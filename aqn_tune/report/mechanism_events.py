"""What TensorBoard shows of an observed step: profiles over layers, and scalars by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from aqn_tune.ledger.rows import MechanismRow

HISTOGRAMS = ("grad_norm", "grad_cosine")
SCALARS = ("grad_ratio", "grad_cosine", "rms", "max_abs", "kurtosis", "zero_fraction")

Profiles = Mapping[str, Mapping[int, float]]
"""By name and layer: the numbers of one step; a layer without a number is absent."""


def profiles(row: MechanismRow) -> Profiles:
    """Return the numbers of each layer's gradient and of its output."""
    outputs = {site.layer: site.after for site in row.sites if site.injected == "nothing"}
    found: dict[str, Mapping[int, float | None]] = {
        "grad_norm": {one.layer: one.gradient_norm for one in row.layers},
        "grad_ratio": {one.layer: one.norm_ratio for one in row.layers},
        "grad_cosine": {one.layer: one.cosine for one in row.layers},
        "rms": {layer: one.rms for layer, one in outputs.items()},
        "max_abs": {layer: one.max_abs for layer, one in outputs.items()},
        "kurtosis": {layer: one.kurtosis for layer, one in outputs.items()},
        "zero_fraction": {layer: one.zero_fraction for layer, one in outputs.items()},
    }
    return {
        name: {layer: value for layer, value in values.items() if value is not None}
        for name, values in found.items()
    }


def mean_profiles(members: Sequence[Profiles]) -> Profiles:
    """Return the means of seeds; a layer that one of them lacks has none."""
    return {
        name: {
            layer: math.fsum(one[name][layer] for one in members) / len(members)
            for layer in members[0][name]
            if all(layer in one[name] for one in members)
        }
        for name in members[0]
    }


def summary(found: Profiles) -> Any:
    """Return everything that TensorBoard gets of one step, as one summary."""
    from tensorboard.compat.proto import summary_pb2

    values = [histogram(f"mechanism/{name}", found[name]) for name in HISTOGRAMS if found[name]]
    values += [
        summary_pb2.Summary.Value(tag=f"mechanism/{name}/layer{layer:02d}", simple_value=value)
        for name in SCALARS
        for layer, value in found[name].items()
    ]
    return summary_pb2.Summary(value=values)


def histogram(tag: str, values: Mapping[int, float]) -> Any:
    """Return a value that TensorBoard draws as one histogram per step: a bucket per layer.

    Its height is the layer's number, so that the layers lie along the axis and the steps behind one
    another. A histogram has no negative heights: a negative cosine is drawn as 0, and is to be found
    among the scalars.
    """
    from tensorboard.compat.proto import summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
    from tensorboard.plugins.histogram import metadata

    buckets = [
        number
        for layer, value in sorted(values.items())
        for number in (layer - 0.5, layer + 0.5, max(value, 0.0))
    ]
    size = tensor_shape_pb2.TensorShapeProto.Dim
    shape = tensor_shape_pb2.TensorShapeProto(dim=[size(size=len(values)), size(size=3)])
    tensor = tensor_pb2.TensorProto(
        dtype=types_pb2.DT_DOUBLE, tensor_shape=shape, double_val=buckets
    )
    described = "One bucket per decoder layer; the height is the layer's number."
    return summary_pb2.Summary.Value(
        tag=tag,
        tensor=tensor,
        metadata=metadata.create_summary_metadata(display_name=None, description=described),
    )
