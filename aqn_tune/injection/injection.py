"""The composite hook: one per module, in the fixed order noise, input fault, module, output fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aqn_tune.injection.address import Address, AddressBook
from aqn_tune.injection.fold import (
    Draw,
    Entry,
    FaultSlot,
    NoiseSlot,
    fault_slots,
    noise_slots,
)
from aqn_tune.injection.measure import FaultTally, NoiseAudit


@dataclass
class _Site:
    """Everything that is injected at one module."""

    address: Address
    noise: list[NoiseSlot] = field(default_factory=list)
    input_faults: list[tuple[FaultSlot, FaultTally]] = field(default_factory=list)
    output_faults: list[tuple[FaultSlot, FaultTally]] = field(default_factory=list)


class Injection:
    """Faults and noise of a fold of K replicas, attached to a model while used as a context manager.

    The model sees the fold as a batch of K * B rows in replica order; every value here is viewed as
    [K, N, D] with N = B * T tokens, and no reduction crosses a replica. Outside the `with` block the
    model has no hook and no changed parameter: noise on a norm's weight shadows the parameter for
    the length of one call.

    Args:
        book: Addresses of the unwrapped model.
        entries: Faults and noise of each replica.
        draw: Source of standard normal values.
        measure: Measure affected fraction and relative error of every fault call (evaluation).
        shared_draws: All replicas use the draws of replica 0 (evaluation).

    Raises:
        UserError: A fault or a noised layer matches no module.
    """

    def __init__(
        self,
        book: AddressBook,
        entries: Sequence[Entry],
        *,
        draw: Draw,
        measure: bool = False,
        shared_draws: bool = False,
    ) -> None:
        self.replicas = len(entries)
        self.audit = NoiseAudit(self.replicas)
        self.tallies: list[FaultTally] = []
        self._draw = draw
        self._measure = measure
        self._shared = shared_draws
        self._handles: list[RemovableHandle] = []
        self._valid = torch.empty(0)
        self._step = 0
        self._audited: frozenset[int] = frozenset()
        self._sites: dict[str, _Site] = {}
        self.fault_sites: list[tuple[FaultSlot, tuple[Address, ...]]] = []
        self.noise_sites: list[tuple[NoiseSlot, Address]] = []
        for fault_slot in fault_slots(entries, book.layer_count):
            self._place_fault(fault_slot, book.find(fault_slot.spec))
        for noise_slot in noise_slots(entries, book.layer_count):
            for layer in torch.nonzero(noise_slot.multipliers.sum(dim=1)).flatten().tolist():
                self._place_noise(noise_slot, layer, book)

    def _site(self, address: Address) -> _Site:
        return self._sites.setdefault(address.name, _Site(address))

    def _place_fault(self, slot: FaultSlot, addresses: tuple[Address, ...]) -> None:
        tally = FaultTally(slot.spec.kind, torch.zeros(self.replicas, dtype=torch.int64))
        tally.sites = len(addresses)
        self.tallies.append(tally)
        self.fault_sites.append((slot, addresses))
        for address in addresses:
            site = self._site(address)
            faults = site.input_faults if slot.spec.site == "input" else site.output_faults
            faults.append((slot, tally))

    def _place_noise(self, slot: NoiseSlot, layer: int, book: AddressBook) -> None:
        addresses = book.carrier_sites(slot.carrier, layer)
        for address in addresses:
            self._site(address).noise.append(slot)
            self.noise_sites.append((slot, address))

    # -- one pass ----------------------------------------------------------------------------------

    def begin(self, valid: Tensor, *, step: int = 0, audited: frozenset[int] = frozenset()) -> None:
        """Set up the next forward pass.

        Args:
            valid: Boolean [K, N], False at padding.
            step: Optimiser step, which selects sigma.
            audited: Replicas whose realised noise is measured in this pass.
        """
        self._valid = valid.unsqueeze(2)
        self._step = step
        self._audited = audited

    def __enter__(self) -> Self:
        for site in self._sites.values():
            self._attach(site)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _attach(self, site: _Site) -> None:
        module = site.address.module
        hidden = [slot for slot in site.noise if slot.carrier.site == "layer_output"]
        weight = [slot for slot in site.noise if slot.carrier.site == "norm_weight"]
        if site.input_faults:
            self._handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs: self._on_input(site, args, kwargs), with_kwargs=True
                )
            )
        if weight:
            self._handles.append(
                module.register_forward_pre_hook(
                    lambda m, args: self._shadow(site, weight, m, args)
                )
            )
            self._handles.append(module.register_forward_hook(_unshadow, always_call=True))
        if hidden or site.output_faults:
            self._handles.append(
                module.register_forward_hook(
                    lambda m, args, out: self._on_output(site, hidden, out)
                )
            )

    # -- what happens at a site --------------------------------------------------------------------

    def _on_input(
        self, site: _Site, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self._apply_faults(site, site.input_faults, args[0]), *args[1:]), kwargs
        name = "hidden_states"
        return args, {**kwargs, name: self._apply_faults(site, site.input_faults, kwargs[name])}

    def _on_output(self, site: _Site, hidden: list[NoiseSlot], out: Any) -> Any:
        # A decoder layer returns a tensor in transformers 5 and a tuple in 4.
        x: Tensor = out[0] if isinstance(out, tuple) else out
        for slot in hidden:
            x = self._add_noise(site, slot, x.reshape(self.replicas, -1, x.shape[-1])).view_as(x)
        x = self._apply_faults(site, site.output_faults, x)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    def _shadow(
        self, site: _Site, slots: list[NoiseSlot], module: nn.Module, args: tuple[Any, ...]
    ) -> None:
        x = args[0]
        weight = module.get_parameter("weight").view(1, 1, -1).expand(self.replicas, 1, -1)
        for slot in slots:
            weight = self._add_noise(site, slot, weight)
        rows = weight.repeat_interleave(x.shape[0] // self.replicas, dim=0)
        # An instance attribute hides the parameter of the same name, which itself is not touched.
        module.__dict__["weight"] = rows.view(x.shape[0], *(1,) * (x.dim() - 2), -1)

    def _add_noise(self, site: _Site, slot: NoiseSlot, x: Tensor) -> Tensor:
        layer = site.address.layer
        sigma = slot.sigma[self._step] * slot.multipliers[layer]
        active = torch.nonzero(sigma).flatten().tolist()
        if not active:
            return x
        z = self._normal(active, x, ("noise", layer, site.address.name.rpartition(".")[2]))
        noised = slot.carrier.add(x, sigma.view(-1, 1, 1).to(x.device), z)
        for replica in active:
            self.audit.calls[replica] += 1
            if replica in self._audited:
                with torch.no_grad():
                    scale = noised.scale[replica].expand_as(x[replica])
                    keep = scale > 0
                    noise = (noised.values[replica] - x[replica])[keep] / scale[keep]
                self.audit.add(replica, layer, float(sigma[replica]), noise)
        return noised.values

    def _apply_faults(
        self, site: _Site, faults: list[tuple[FaultSlot, FaultTally]], x: Tensor
    ) -> Tensor:
        for slot, tally in faults:
            folded = x.reshape(self.replicas, -1, x.shape[-1])
            active = torch.nonzero(slot.active).flatten().tolist()
            path = ("fault", site.address.name, slot.key)
            params = {name: value.to(x.device) for name, value in slot.params.items()}
            normal = partial(self._normal, active, folded, path)
            result = slot.spec.apply(folded, params, self._valid, normal)
            tally.calls += slot.active
            if self._measure:
                tally.add(folded.detach(), result.values.detach(), result.affected, self._valid)
            x = result.values.view_as(x)
        return x

    def _normal(self, active: list[int], x: Tensor, path: tuple[str | int, ...]) -> Tensor:
        """Draw standard normal values [K, N, D] for the active replicas, zeros elsewhere.

        Drawn in float32 on the CPU, row by row, so that a replica's values depend neither on the
        pack it is in nor on the type or device of the model.
        """
        if self._shared:
            row = torch.empty(x.shape[1:], dtype=torch.float32)
            self._draw(0, path, row)
            return row.to(x.device, x.dtype).expand_as(x)
        z = torch.zeros(x.shape, dtype=torch.float32)
        for replica in active:
            self._draw(replica, path, z[replica])
        return z.to(x.device, x.dtype)


def _unshadow(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
    module.__dict__.pop("weight", None)
