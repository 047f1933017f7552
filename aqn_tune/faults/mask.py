"""Which places of a tensor are faulty: density, axis and persistence as a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aqn_tune.faults.places import distinct_places, draw_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from aqn_tune.faults.base import Draws, FaultSpec


def fault_mask(spec: FaultSpec, shape: Sequence[int], draws: Draws) -> Tensor | None:
    """Return where the fault acts in this call, None for everywhere.

    The mask is boolean on the CPU and broadcasts to `shape` [K, N, D]: [K, N, D] for elements,
    [K, 1, D] for channels, [K, N, 1] for tokens, [K, 1, 1] for an intermittent fault of density 1.
    round(density * places) places, but at least one, are chosen without replacement, so the realised
    density is the declared one up to that rounding; padding counts as a place like any other.

    permanent: the device's places, the same in every call and every replicate;
    transient: chosen anew in every call;
    intermittent: the device's places, and a coin for every call and replicate decides whether they act.

    Permanent places belong to a shape: elements and tokens of a longer batch are chosen anew, channels
    stay the same.
    """
    import torch

    replicas, tokens, features = shape
    mask: Tensor | None = None
    if spec.density < 1:
        rows = 1 if spec.axis == "channel" else tokens
        columns = 1 if spec.axis == "token" else features
        count = max(1, round(spec.density * rows * columns))
        mask = torch.zeros(replicas, rows * columns, dtype=torch.bool)
        generators = draws.generators("mask", fresh=spec.persistence == "transient")
        for replica, generator in enumerate(generators):
            mask[replica, distinct_places(rows * columns, count, generator)] = True
        mask = mask.view(replicas, rows, columns)
    if spec.activation_rate is not None:
        coins = [
            draw_count(1, spec.activation_rate, generator) == 1
            for generator in draws.generators("active", fresh=True)
        ]
        active = torch.tensor(coins).view(replicas, 1, 1)
        mask = active if mask is None else mask & active
    return mask
