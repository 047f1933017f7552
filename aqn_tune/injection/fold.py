"""A fold: the replicas that share one forward pass, and what each of them is injected with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aqn_tune.faults import FaultSpec
from aqn_tune.noise import EffectiveNoise
from aqn_tune.noise.carriers import CarrierSpec
from aqn_tune.study.keys import content_hash
from aqn_tune.study.layers import resolve_layers


class Entry(NamedTuple):
    """What one replica of a fold gets."""

    faults: tuple[FaultSpec, ...] = ()
    noise: EffectiveNoise | None = None


class FaultSlot(NamedTuple):
    """One fault of the fold: a static part shared by all replicas, numbers of their own."""

    spec: FaultSpec
    """Any of the merged faults; only its static part and address are read."""
    params: dict[str, Tensor]
    """Each per-replica field, float64 [K, 1, 1], at its off value where a replica lacks the fault."""
    active: Tensor
    """Boolean [K]: which replicas have the fault."""
    key: str
    """Keys the slot's draws: the same for this fault in every pack and at every level."""


class NoiseSlot(NamedTuple):
    """One carrier of the fold."""

    carrier: CarrierSpec
    sigma: Tensor
    """float64 [T, K]: sigma of each step and replica, 0 where a replica does not use this carrier."""
    multipliers: Tensor
    """float64 [L, K]."""


Draw = Callable[[int, tuple[str | int, ...], Tensor], None]
"""draw(replica, path, out): fill the contiguous float32 `out` with standard normal values keyed by
the replica, the step (or evaluation batch) and the path."""


def fault_slots(entries: Sequence[Entry], layer_count: int) -> list[FaultSlot]:
    """Merge the faults of all replicas into slots; equal static parts share one pass.

    Every replica's faults keep their declared order: a fault joins the first fitting slot behind the
    slot of the replica's fault before it, and gets a slot of its own at the end when there is none.
    """
    keys: list[tuple[str, tuple[int, ...]]] = []
    owners: list[list[FaultSpec | None]] = []
    for index, entry in enumerate(entries):
        seen: dict[str, int] = {}
        last = -1
        for fault in entry.faults:
            layers = resolve_layers(fault.layers, layer_count)
            static = content_hash({**fault.static(), "layers": None})
            nth = seen[static] = seen.get(static, 0) + 1
            key = (f"{static}.{nth}", layers)
            fitting = (i for i in range(last + 1, len(keys)) if keys[i] == key)
            last = next(fitting, len(keys))
            if last == len(keys):
                keys.append(key)
                owners.append([None] * len(entries))
            owners[last][index] = fault
    # The layers are no part of what keys the draws: layer 10 errs alike whichever others are faulty.
    return [_fault_slot(key, own) for (key, _), own in zip(keys, owners, strict=True)]


def _fault_slot(key: str, owners: Sequence[FaultSpec | None]) -> FaultSlot:
    spec = next(owner for owner in owners if owner is not None)
    params = {
        name: torch.tensor(
            [off if owner is None else float(getattr(owner, name)) for owner in owners],
            dtype=torch.float64,
        ).view(-1, 1, 1)
        for name, off in spec.per_replica.items()
    }
    return FaultSlot(spec, params, torch.tensor([owner is not None for owner in owners]), key)


def noise_slots(entries: Sequence[Entry], layer_count: int) -> list[NoiseSlot]:
    """Merge the noise of all replicas into one slot per carrier."""
    carriers: dict[str, CarrierSpec] = {}
    for entry in entries:
        if entry.noise is not None:
            carriers.setdefault(content_hash(entry.noise.carrier), entry.noise.carrier)
    slots = []
    for key, carrier in carriers.items():
        steps = max(len(e.noise.sigma) for e in entries if e.noise is not None)
        sigma = torch.zeros(steps, len(entries), dtype=torch.float64)
        multipliers = torch.zeros(layer_count, len(entries), dtype=torch.float64)
        for index, entry in enumerate(entries):
            if entry.noise is not None and content_hash(entry.noise.carrier) == key:
                sigma[: len(entry.noise.sigma), index] = torch.tensor(
                    entry.noise.sigma, dtype=torch.float64
                )
                multipliers[:, index] = torch.tensor(entry.noise.multipliers, dtype=torch.float64)
        slots.append(NoiseSlot(carrier, sigma, multipliers))
    return slots
