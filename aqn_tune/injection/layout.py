"""What is injected where: the sites of a model, and the slots of a fold at each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import nn

from aqn_tune.errors import UserError
from aqn_tune.injection.address import Address, AddressBook
from aqn_tune.injection.fold import (
    Entry,
    FaultSlot,
    NoiseSlot,
    QuantizerSlot,
    fault_slots,
    noise_slots,
    quantizer_slots,
)
from aqn_tune.injection.measure import FaultTally, QuantizerTally
from aqn_tune.injection.weights import Mergeable, WeightSite

Faults = list[tuple[FaultSlot, FaultTally]]


@dataclass
class Site:
    """What is injected at the input and output of one module."""

    address: Address
    module: nn.Module
    noise: list[NoiseSlot] = field(default_factory=list)
    quantizers: list[tuple[QuantizerSlot, QuantizerTally]] = field(default_factory=list)
    input: Faults = field(default_factory=list)
    output: Faults = field(default_factory=list)
    grad_input: Faults = field(default_factory=list)
    grad_output: Faults = field(default_factory=list)
    skips: tuple[int, ...] = ()

    @cached_property
    def rests(self) -> bool:
        """Whether nothing changes the output: every fault is at a level at which it is the identity."""
        acting = any(slot.acting is not None for slot, _ in self.output)
        return not (acting or self.noise or self.grad_output or self.skips)


class PlacedFault(NamedTuple):
    """A fault of the fold, where it acts, and what it did."""

    slot: FaultSlot
    addresses: tuple[Address, ...]
    tally: FaultTally


class PlacedQuantizer(NamedTuple):
    """A quantizer of the fold, the modules whose product it enters, and what it did."""

    slot: QuantizerSlot
    addresses: tuple[Address, ...]
    tally: QuantizerTally


class Layout:
    """The slots of a fold of K replicas, each at the modules of a model that it names.

    Says where things are and counts what they do; what happens there is the injection's.

    Args:
        book: Addresses of the model.
        entries: What each replica gets.

    Raises:
        UserError: A fault, quantizer or noised layer matches no module, or a weight fault a module
            without a weight.
    """

    def __init__(self, book: AddressBook, entries: Sequence[Entry]) -> None:
        self.replicas = len(entries)
        self.sites: dict[tuple[str, bool], Site] = {}
        """By name and by whether it is the wrapper of an adapter."""
        self.weights: dict[str, WeightSite] = {}
        self.faults: list[PlacedFault] = []
        self.quantizers: list[PlacedQuantizer] = []
        self.noise: list[tuple[NoiseSlot, Address]] = []
        merged = [entry.device.deploy == "merged" for entry in entries]
        if any(merged) and not all(merged):
            raise ValueError("merged and unmerged adapters cannot share a pass")
        self.is_merged = all(merged)
        """Whether adapters are merged into the weights in every pass."""
        self._book = book
        self.layer_count = book.layer_count
        for fault_slot in fault_slots(entries, book.layer_count):
            self._place_fault(fault_slot)
        for slot in quantizer_slots(entries):
            self._place_quantizer(slot)
        for noise_slot in noise_slots(entries, book.layer_count):
            for layer in noise_slot.layers():
                self._place_noise(noise_slot, layer)
        for layer in sorted({layer for entry in entries for layer in entry.skip}):
            site = self._site(book.layer_output(layer), outer=False)
            site.skips = tuple(i for i, entry in enumerate(entries) if layer in entry.skip)
        if self.is_merged:
            self._place_merged_adapters()

    def reaches_inside(self) -> bool:
        """Return whether anything acts inside a decoder layer, not on its input or output alone."""
        layers = {self._book.layer_output(layer).name for layer in range(self.layer_count)}
        return bool(self.weights) or any(name not in layers for name, _ in self.sites)

    def depth(self, address: Address, site: str) -> int:
        """Return how deep in the decoder a site lies, 0 to the number of layers.

        Layer l and all that is in it lie at depth l, but the output of layer l as a whole at l + 1: what
        is done to it comes after the last product of its layer.
        """
        whole = self._book.layer_output(address.layer).module is address.module
        return address.layer + (whole and site in ("output", "grad_output"))

    def _place_merged_adapters(self) -> None:
        book = self._book
        for layer in range(book.layer_count):
            for address in book.linears(layer):
                outer = book.outer(address)
                if hasattr(outer, "merged_weight"):
                    self._weight(address)
                elif outer is not address.module:
                    raise UserError(
                        f"deploy merged: the adapter of {address.name} is a "
                        f"{type(outer).__name__}; merge it beforehand (merge_and_unload)"
                    )

    def _site(self, address: Address, *, outer: bool) -> Site:
        module = self._book.outer(address) if outer else address.module
        outer = module is not address.module
        return self.sites.setdefault((address.name, outer), Site(address, module))

    def _weight(self, address: Address) -> WeightSite:
        if "weight" not in dict(address.module.named_parameters(recurse=False)):
            raise UserError(
                f"faults: site weight: {address.name} has no weight of its own; "
                "name modules that have one, for example 'linear'"
            )
        if address.name not in self.weights:
            outer = self._book.outer(address) if self.is_merged else None
            host = cast(Mergeable, outer) if hasattr(outer, "merged_weight") else None
            self.weights[address.name] = WeightSite(address, self.replicas, host)
        return self.weights[address.name]

    def _place_fault(self, slot: FaultSlot) -> None:
        addresses = self._book.find(slot.spec)
        tally = FaultTally(slot.spec.kind, torch.zeros(self.replicas, dtype=torch.int64))
        tally.sites = len(addresses)
        tally.unseen = set(slot.active) - set(slot.idle)
        self.faults.append(PlacedFault(slot, addresses, tally))
        for address in addresses:
            if slot.spec.site == "weight":
                self._weight(address).faults.append((slot, tally))
            elif slot.spec.site == "grad_weight":
                weight = self._weight(address)
                if not weight.module.get_parameter("weight").requires_grad:
                    raise UserError(
                        f"faults: site grad_weight: the weight of {address.name} is frozen and has no "
                        "gradient; train with method full, or use site grad_input"
                    )
                weight.gradients.append((slot, tally))
            else:
                site = self._site(address, outer=slot.outer)
                place: Faults = getattr(site, slot.spec.site)
                place.append((slot, tally))

    def _place_quantizer(self, slot: QuantizerSlot) -> None:
        addresses = self._book.find(slot.spec, "quantization")
        tally = QuantizerTally(slot, self.replicas)
        self.quantizers.append(PlacedQuantizer(slot, addresses, tally))
        for address in addresses:
            if slot.spec.operands in ("weight", "both"):
                quantizers = self._weight(address).quantizers
                self._refuse_second(quantizers, slot, address, "weight")
                quantizers.append((slot, tally))
                tally.sites += 1
            if slot.spec.operands in ("activation", "both"):
                quantizers = self._site(address, outer=slot.outer).quantizers
                self._refuse_second(quantizers, slot, address, "activation")
                quantizers.append((slot, tally))
                tally.sites += 1

    def _refuse_second(
        self,
        there: list[tuple[QuantizerSlot, QuantizerTally]],
        slot: QuantizerSlot,
        address: Address,
        operand: str,
    ) -> None:
        for other, _ in there:
            if set(other.active) & set(slot.active):
                raise UserError(
                    f"quantization: the {operand} of {address.name} is quantized twice, as "
                    f"{other.spec.format} and as {slot.spec.format}; exclude it from one of them"
                )

    def _place_noise(self, slot: NoiseSlot, layer: int) -> None:
        for address in self._book.carrier_sites(slot.carrier, layer):
            self.noise.append((slot, address))
            if slot.carrier.site == "layer_output":
                self._site(address, outer=False).noise.append(slot)
            else:
                self._weight(address).noise.append(slot)
