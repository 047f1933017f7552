"""Choosing places: how many and which, each at most once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aqn_tune.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from aqn_tune.faults.base import Draws, FaultSpec


def distinct_places(places: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` different numbers below `places`, int64; every subset is equally likely.

    Raises UserError when there are not as many.
    """
    import torch

    if count > places:
        raise UserError(
            f"a fault hits {count} places of a call, which has {places} in each replicate; "
            f"allowed are 0 to {places}"
        )
    if 32 * count > places:
        return torch.randperm(places, generator=generator)[:count]
    # A permutation of millions for a handful would be slow. This is drawing one at a time and ignoring
    # repetitions, in rounds: never more are drawn than are missing.
    chosen = torch.empty(0, dtype=torch.int64)
    while len(chosen) < count:
        drawn = torch.randint(places, (count - len(chosen),), generator=generator)
        chosen = torch.cat([chosen, drawn]).unique()  # type: ignore[no-untyped-call]
    return chosen


def draw_count(places: int, rate: float, generator: torch.Generator) -> int:
    """Return how many of `places` are hit, each with probability `rate`: Binomial(places, rate).

    Comparing a uniform float32 with the rate would not do: it is a multiple of 2^-24, so every rate
    below 6e-8 would act as the same one.
    """
    import torch

    trials = torch.tensor(float(places), dtype=torch.float64)
    chance = torch.tensor(rate, dtype=torch.float64)
    return int(torch.binomial(trials, chance, generator=generator))


def hit_values(
    spec: FaultSpec,
    valid: Tensor,
    features: int,
    draws: Draws,
    *,
    rates: Sequence[float] | None = None,
    count: int = 0,
) -> list[Tensor]:
    """Return, for each replicate, the values that a fault hits: flat positions in [N, D].

    A transient fault hits other values in every call, and never padding, so that a count is met; where
    all is padding it hits nothing. Any other hits the device's own places in every call of the same
    shape; those may lie in padding.

    Args:
        spec: The fault, for its persistence.
        valid: Boolean [K, N, 1], False at padding.
        features: D.
        draws: Random numbers of the call.
        rates: Probability per value, one for each replicate.
        count: Number of values in each replicate, where there are no `rates`.
    """
    transient = spec.persistence == "transient"
    hits = []
    for replica, generator in enumerate(draws.generators("places", fresh=transient)):
        tokens = valid[replica].flatten().cpu()
        rows = (tokens if transient else tokens.new_ones(len(tokens))).nonzero().flatten()
        places = len(rows) * features
        wanted = count if places else 0
        number = wanted if rates is None else draw_count(places, rates[replica], generator)
        chosen = distinct_places(places, number, generator)
        hits.append(rows[chosen // features] * features + chosen % features)
    return hits
