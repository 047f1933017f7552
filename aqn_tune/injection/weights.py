"""Weights as the faulty unit holds them: stored value, noise, fault, quantizer, per group of replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from aqn_tune.faults.base import Draws
from aqn_tune.injection.address import Address, is_rmsnorm
from aqn_tune.injection.apply import apply_fault, apply_quantizer
from aqn_tune.injection.fold import FaultSlot, NoiseSlot, QuantizerSlot
from aqn_tune.injection.measure import FaultTally, QuantizerTally


class Mergeable(Protocol):
    """An adapter wrapper whose update can be merged into the weight it wraps."""

    base_layer: nn.Linear

    def merged_weight(self, fold: int) -> Tensor:
        """Return the weight [out, in] with the adapter of one fold merged in."""


@runtime_checkable
class HoldsReplicas(Protocol):
    """A module whose parameters have one row per replica: full fine-tuning in lockstep."""

    def stored(self, name: str) -> Tensor | None:
        """Return a parameter with one row per fold of the pass, [F, *shape]."""


class Variant(NamedTuple):
    """One version of a weight, and the neighbouring replicas that compute with it."""

    first: int
    last: int
    """Replicas `first` to `last` - 1."""
    weight: Tensor
    """In the parameter's own shape; where the module holds replicas, with one row for each."""


class PassContext(Protocol):
    """What a weight needs to know of the pass it is prepared for."""

    @property
    def number(self) -> int:
        """Counts the passes."""

    @property
    def measures(self) -> bool:
        """Whether what faults and quantizers do is measured."""

    def draws(self, address: Address, slot: FaultSlot, x: Tensor) -> Draws:
        """Return the random numbers of one call whose values are `x` [A, N, D]."""

    def noised(self, address: Address, slot: NoiseSlot, x: Tensor, owners: Sequence[int]) -> Tensor:
        """Return `x` [A, N, D] with noise, row a that of replica owners[a]."""

    def watched(self, address: Address, slot: FaultSlot, tally: FaultTally, x: Tensor) -> Tensor:
        """Return `x` [A, N, D], whose gradient passes through the fault of `slot`."""


@dataclass
class WeightSite:
    """One weight of the model and everything that changes it on the way into its product.

    Replicas whose weight comes out alike share one version, and a version that no draw and no training
    changes is computed once for the life of the injection. Nothing is ever written into the parameter:
    a version shadows it for the length of one call.
    """

    address: Address
    replicas: int
    host: Mergeable | None = None
    """The adapter wrapper to merge from; None leaves adapters beside the weight."""
    noise: list[NoiseSlot] = field(default_factory=list)
    faults: list[tuple[FaultSlot, FaultTally]] = field(default_factory=list)
    quantizers: list[tuple[QuantizerSlot, QuantizerTally]] = field(default_factory=list)
    gradients: list[tuple[FaultSlot, FaultTally]] = field(default_factory=list)
    _variants: list[Variant] = field(default_factory=list)
    _pass: int = -1

    @property
    def module(self) -> nn.Module:
        """The leaf that owns the parameter."""
        return self.address.module

    def is_fixed(self, context: PassContext) -> bool:
        """Return whether every pass computes with the same versions.

        What is trained stands still only in an evaluation, which is what measures.
        """
        if self._is_drawn:
            return False
        is_trained = self.host is not None or self._stored.requires_grad
        return context.measures or not is_trained

    @cached_property
    def _is_drawn(self) -> bool:
        """Whether what changes the weight differs from pass to pass."""
        return bool(self.noise) or any(slot.spec.is_stochastic() for slot, _ in self.faults)

    @property
    def _stored(self) -> nn.Parameter:
        """The parameter itself, also while a version hides it."""
        return cast(nn.Parameter, self.module._parameters["weight"])

    @cached_property
    def _holds_replicas(self) -> bool:
        return isinstance(self.module, HoldsReplicas)

    def variants(self, context: PassContext) -> list[Variant]:
        """Return the versions of this pass, in the order of the replicas."""
        if self._pass == context.number or (self._variants and self.is_fixed(context)):
            return self._variants
        self._pass = context.number
        if self._holds_replicas:
            self._variants = [Variant(0, self.replicas, self._rows_version(context))]
            return self._variants
        if self.replicas == 1:
            self._variants = [Variant(0, 1, self._version([0], context))]
            return self._variants
        versions: dict[object, Tensor] = {}
        signatures = self._signatures
        self._variants = []
        for replica, signature in enumerate(signatures):
            if signature not in versions:
                alike = [i for i, other in enumerate(signatures) if other == signature]
                versions[signature] = self._version(alike, context)
            if replica and signatures[replica - 1] == signature:
                self._variants[-1] = self._variants[-1]._replace(last=replica + 1)
            else:
                self._variants.append(Variant(replica, replica + 1, versions[signature]))
        return self._variants

    @cached_property
    def _signatures(self) -> list[object]:
        return [self._signature(replica) for replica in range(self.replicas)]

    def _signature(self, replica: int) -> object:
        """Return what the version of a replica depends on; replicas of equal signature share it."""
        own: list[object] = []
        if self.host is not None or any(bool(slot.sigma[:, replica].any()) for slot in self.noise):
            own.append(("own", replica))
        for number, (slot, _) in enumerate(self.faults):
            if replica in slot.active:
                # Of two slots with one fault each keeps a tally of its own.
                own.append((number, slot.identity(replica)))
                if slot.spec.is_stochastic():
                    own.append(("own", replica))
        own += [i for i, (slot, _) in enumerate(self.quantizers) if replica in slot.active]
        return tuple(own)

    def _version(self, alike: list[int], context: PassContext) -> Tensor:
        """Return the weight of the replicas `alike`, which differ in nothing that enters it."""
        replica = alike[0]
        stored: Tensor = self._stored
        if self.host is not None:
            stored = self.host.merged_weight(replica)
        weight = as_rows(self.module, stored)
        # The last hook is the first that a gradient meets on its way back.
        for slot, tally in reversed(self.gradients):
            if replica in slot.active:
                weight = context.watched(self.address, slot.alone(replica), tally, weight)
        for noise in self.noise:
            weight = context.noised(self.address, noise, weight, (replica,))
        if self.faults or self.quantizers:
            valid = torch.ones(1, weight.shape[1], 1, dtype=torch.bool, device=weight.device)
        for slot, tally in self.faults:
            if replica in slot.active:
                mine = FaultTally(tally.kind, torch.zeros(1, dtype=torch.int64))
                draws_of = partial(context.draws, self.address)
                alone, before = slot.alone(replica), weight
                weight = apply_fault(
                    alone, before, valid, draws_of, mine if context.measures else None
                )
                tally.absorb(mine, alike)
                if not context.measures:
                    tally.watch(alone, before, weight, valid, alike)
        for quantizer, total in self.quantizers:
            if replica in quantizer.active:
                only = replace(quantizer, active=(0,))
                own = QuantizerTally(only, 1)
                weight = apply_quantizer(
                    only,
                    weight,
                    valid,
                    "weight",
                    self.address.layer,
                    own if context.measures else None,
                )
                total.absorb(own, alike)
        return from_rows(self.module, weight).reshape(stored.shape)

    def _rows_version(self, context: PassContext) -> Tensor:
        """Return the weights of all folds of a module that holds replicas, each with what it declares."""
        stored = cast(HoldsReplicas, self.module).stored("weight")
        assert stored is not None
        is_turned = isinstance(self.module, Conv1D)
        rows = stored.unsqueeze(1) if stored.dim() == 2 else stored
        weight = rows.transpose(1, 2) if is_turned else rows
        for slot, tally in reversed(self.gradients):
            weight = context.watched(self.address, slot, tally, weight)
        for noise in self.noise:
            weight = context.noised(self.address, noise, weight, range(self.replicas))
        valid = torch.ones(*weight.shape[:2], 1, dtype=torch.bool, device=weight.device)
        for slot, tally in self.faults:
            draws_of = partial(context.draws, self.address)
            before = weight
            weight = apply_fault(slot, before, valid, draws_of, tally if context.measures else None)
            if not context.measures:
                tally.watch(slot, before, weight, valid)
        for quantizer, total in self.quantizers:
            measured = total if context.measures else None
            weight = apply_quantizer(
                quantizer, weight, valid, "weight", self.address.layer, measured
            )
        return (weight.transpose(1, 2) if is_turned else weight).reshape(stored.shape)


def as_rows(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight as [1, out, in], the contraction dimension last; a norm's as [1, 1, D]."""
    if weight.dim() == 1:
        return weight.view(1, 1, -1)
    return (weight.T if isinstance(module, Conv1D) else weight).unsqueeze(0)


def from_rows(module: nn.Module, rows: Tensor) -> Tensor:
    """Undo `as_rows`, up to dimensions of size one."""
    return rows[0].T if isinstance(module, Conv1D) else rows


def forward_with(module: nn.Module, variants: list[Variant], replicas: int, x: Tensor) -> Tensor:
    """Return `module(x)` with each replica's rows computed on its own version of the weight."""
    if len(variants) == 1:
        # Not even a slice of everything: it would change the order in which gradients add up.
        return _call(module, variants[0].weight, x)
    rows = x.shape[0] // replicas
    if is_rmsnorm(module):
        # A norm only multiplies by its weight: one row of weights per row of x does all replicas at once.
        stacked = torch.stack([v.weight for v in variants for _ in range(v.first, v.last)])
        shape = (x.shape[0], *(1,) * (x.dim() - 2), -1)
        return _call(module, stacked.repeat_interleave(rows, dim=0).view(shape), x)
    return torch.cat([_call(module, v.weight, x[v.first * rows : v.last * rows]) for v in variants])


def _call(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    # An instance attribute hides the parameter of the same name, which itself is not touched.
    module.__dict__["weight"] = weight
    try:
        out: Tensor = type(module).forward(module, x)
        return out
    finally:
        del module.__dict__["weight"]
