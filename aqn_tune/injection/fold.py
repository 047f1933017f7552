"""A fold: the replicas that share one forward pass, and what each of them is injected with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aqn_tune.faults import FaultSpec
from aqn_tune.noise import EffectiveNoise
from aqn_tune.noise.carriers import CarrierSpec
from aqn_tune.quantization import QuantizerSpec
from aqn_tune.study.device import HEALTHY, Device
from aqn_tune.study.keys import content_hash
from aqn_tune.study.layers import resolve_layers


class Entry(NamedTuple):
    """What one replica of a fold gets."""

    device: Device = HEALTHY
    noise: EffectiveNoise | None = None
    skip: tuple[int, ...] = ()
    """Decoder layers that are left out: their output is their input, whatever is injected into them."""


@dataclass(frozen=True)
class FaultSlot:
    """One fault of the fold: a static part shared by its replicas, numbers of their own."""

    spec: FaultSpec
    """Any of the merged faults; only its static part and address are read."""
    params: dict[str, Tensor]
    """Each per-replica field, float64 [A, 1, 1], for the A replicas that have the fault."""
    active: tuple[int, ...]
    """The rows of the folded tensor that have the fault, ascending."""
    owners: tuple[int, ...]
    """The replica of each of them, whose streams it draws from."""
    device_seeds: tuple[int, ...]
    """Seed of the permanent draws of each of them."""
    outer: bool
    """Whether the adapter branch runs on the faulty unit too."""
    key: str
    """Keys the slot's draws: the same for this fault in every pack and at every level."""
    idle: tuple[int, ...] = ()
    """Those of `active` at whose level the fault is the identity."""

    @cached_property
    def acting(self) -> FaultSlot | None:
        """The slot of the replicas whose values the fault may change; None without any."""
        if not self.idle:
            return self
        rows = [at for at, replica in enumerate(self.active) if replica not in self.idle]
        if not rows:
            return None
        return replace(
            self,
            params={name: value[rows] for name, value in self.params.items()},
            active=tuple(self.active[at] for at in rows),
            owners=tuple(self.owners[at] for at in rows),
            device_seeds=tuple(self.device_seeds[at] for at in rows),
            idle=(),
        )

    @cached_property
    def is_masked(self) -> bool:
        """Whether the fault leaves out places or calls."""
        return self.spec.density < 1 or self.spec.activation_rate is not None

    @cached_property
    def ste(self) -> bool:
        """Whether the gradient passes as if the fault were not there."""
        return getattr(self.spec, "ste", False)

    def identity(self, replica: int) -> tuple[object, ...]:
        """Return all that the fault of a replica depends on at a given place, beside fresh draws."""
        at = self.active.index(replica)
        levels = tuple(float(value[at]) for value in self.params.values())
        seed = self.device_seeds[at] if self.spec.uses_device_seed() else 0
        return self.key, self.outer, levels, seed

    def alone(self, replica: int) -> FaultSlot:
        """Return the slot of one replica, for a tensor that holds that replica only."""
        at = self.active.index(replica)
        return replace(
            self,
            params={name: value[at : at + 1] for name, value in self.params.items()},
            active=(0,),
            owners=(self.owners[at],),
            device_seeds=(self.device_seeds[at],),
            idle=(0,) if replica in self.idle else (),
        )


@dataclass(frozen=True)
class QuantizerSlot:
    """One quantizer of the fold."""

    spec: QuantizerSpec
    active: tuple[int, ...]
    """The replicas that have the quantizer, ascending."""
    outer: bool
    """Whether the adapter branch runs on quantized activations too."""


@dataclass(frozen=True)
class NoiseSlot:
    """One carrier of the fold."""

    carrier: CarrierSpec
    sigma: Tensor
    """float64 [T, K]: sigma of each step and replica, 0 where a replica does not use this carrier."""
    multipliers: Tensor
    """float64 [T, L, K]."""
    redraw: str
    """When z is drawn anew: step, microbatch or forward."""

    def layers(self) -> list[int]:
        """Return the layers in which some replica has noise at some step."""
        return torch.nonzero(self.multipliers.amax(dim=(0, 2))).flatten().tolist()

    _levels: dict[object, Any] = field(default_factory=dict, init=False, compare=False)

    def level(self, step: int, layer: int) -> Tensor:
        """Return sigma * multiplier of each replica, float64 [K]."""
        return self.sigma[step] * self.multipliers[step, layer]

    def levels(self, step: int, layer: int) -> list[float]:
        """Return `level` as plain numbers; those of all layers are worked out together, once a step."""
        if step not in self._levels:
            self._levels.clear()
            self._levels[step] = (self.sigma[step] * self.multipliers[step]).tolist()
        numbers: list[float] = self._levels[step][layer]
        return numbers

    def sigmas(self, step: int, layer: int, like: Tensor) -> Tensor:
        """Return `level` [K, 1, 1] on the device of `like`, in its type or in float32 where that is finer."""
        self.levels(step, layer)
        key = (torch.promote_types(like.dtype, torch.float32), like.device)
        if key not in self._levels:
            levels = self.sigma[step] * self.multipliers[step]
            levels = levels.to(dtype=key[0], device=key[1])
            self._levels[key] = levels.view(*levels.shape, 1, 1).unbind()
        sigma: Tensor = self._levels[key][layer]
        return sigma


SeedOf = Callable[[int, tuple[str | int, ...]], int]
"""seed_of(replica, path): the 64-bit seed of the stream `path` of a replica in the current step (or
evaluation batch). Equal seeds give equal draws."""


def fault_slots(entries: Sequence[Entry], layer_count: int) -> list[FaultSlot]:
    """Merge the faults of all replicas into slots; equal static parts share one pass.

    Every replica's faults keep their declared order: a fault joins the first fitting slot behind the
    slot of the replica's fault before it, and gets a slot of its own at the end when there is none.
    """
    keys: list[tuple[str, tuple[int, ...], bool]] = []
    owners: list[dict[int, FaultSpec]] = []
    for index, entry in enumerate(entries):
        seen: dict[str, int] = {}
        last = -1
        for fault in entry.device.faults:
            layers = resolve_layers(fault.layers, layer_count)
            static = content_hash({**fault.static(), "layers": None})
            nth = seen[static] = seen.get(static, 0) + 1
            key = (f"{static}.{nth}", layers, _is_outer(entry.device))
            fitting = (i for i in range(last + 1, len(keys)) if keys[i] == key)
            last = next(fitting, len(keys))
            if last == len(keys):
                keys.append(key)
                owners.append({})
            owners[last][index] = fault
    # The layers are no part of what keys the draws: layer 10 errs alike whichever others are faulty.
    return [
        _fault_slot(key, outer, own, entries)
        for (key, _, outer), own in zip(keys, owners, strict=True)
    ]


def _is_outer(device: Device) -> bool:
    # Merged adapters are part of the weight: there is no branch left that could run elsewhere.
    return device.adapter_path == "faulty" or device.deploy == "merged"


def _fault_slot(
    key: str, outer: bool, owners: dict[int, FaultSpec], entries: Sequence[Entry]
) -> FaultSlot:
    spec = next(iter(owners.values()))
    params = {
        name: torch.tensor(
            [float(getattr(owner, name)) for owner in owners.values()], dtype=torch.float64
        ).view(-1, 1, 1)
        for name in spec.per_replica
    }
    seeds = tuple(entries[index].device.seed for index in owners)
    idle = tuple(index for index, owner in owners.items() if owner.is_off())
    return FaultSlot(spec, params, tuple(owners), tuple(owners), seeds, outer, key, idle)


def quantizer_slots(entries: Sequence[Entry]) -> list[QuantizerSlot]:
    """Merge the quantizers of all replicas into slots, one per quantizer."""
    specs: dict[tuple[str, bool], QuantizerSpec] = {}
    active: dict[tuple[str, bool], list[int]] = {}
    for index, entry in enumerate(entries):
        for quantizer in entry.device.quantization:
            key = (content_hash(quantizer), _is_outer(entry.device))
            specs.setdefault(key, quantizer)
            active.setdefault(key, []).append(index)
    return [QuantizerSlot(specs[key], tuple(active[key]), key[1]) for key in specs]


def noise_slots(entries: Sequence[Entry], layer_count: int) -> list[NoiseSlot]:
    """Merge the noise of all replicas into one slot per carrier."""
    noises = [(index, e.noise) for index, e in enumerate(entries) if e.noise is not None]
    groups: dict[tuple[str, str], list[tuple[int, EffectiveNoise]]] = {}
    for index, noise in noises:
        key = (content_hash(noise.carrier), noise.redraw)
        groups.setdefault(key, []).append((index, noise))
    slots = []
    for (_, redraw), members in groups.items():
        steps = max(len(noise.sigma) for _, noise in members)
        sigma = torch.zeros(steps, len(entries), dtype=torch.float64)
        phased = any(noise.later for _, noise in members)
        shape = (steps if phased else 1, layer_count, len(entries))
        multipliers = torch.zeros(shape, dtype=torch.float64)
        for index, noise in members:
            sigma[: len(noise.sigma), index] = torch.tensor(noise.sigma, dtype=torch.float64)
            for step in range(shape[0]):
                multipliers[step, :, index] = torch.tensor(
                    noise.multipliers_at(step), dtype=torch.float64
                )
        # Without phases one table serves every step, and takes the memory of one.
        table = multipliers.expand(steps, -1, -1)
        slots.append(NoiseSlot(members[0][1].carrier, sigma, table, redraw))
    return slots
