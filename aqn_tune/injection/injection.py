"""The composite hook: per module, noise, quantizer, input fault, product, noise, output fault."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aqn_tune.faults.base import Draws
from aqn_tune.injection.address import Address, AddressBook
from aqn_tune.injection.apply import apply_fault, apply_quantizer, quantizer_defect
from aqn_tune.injection.draws import CallDraws, Scratch, keyed_normal
from aqn_tune.injection.fold import Entry, FaultSlot, NoiseSlot, SeedOf
from aqn_tune.injection.layout import Layout, Site
from aqn_tune.injection.measure import FaultTally, NoiseAudit, QuantizerTally
from aqn_tune.injection.observe import ActivationWatch
from aqn_tune.injection.shared_input import SharedInputs
from aqn_tune.injection.swap import ForwardSwap
from aqn_tune.injection.view import FoldView
from aqn_tune.injection.weights import WeightSite, forward_with
from aqn_tune.quantization import straight_through
from aqn_tune.study.seeds import stream_seed


class Injection:
    """Faults, quantizers and noise of a fold of K replicas, attached to a model while used as a context.

    The model sees the fold as a batch of K * B rows in replica order; every value here is viewed as
    [K, N, D] with N = B * T tokens, and no reduction crosses a replica. Outside the `with` block the
    model has no hook and no changed parameter.

    At a module: stored value -> noise -> activation quantizer -> input fault -> product with (weight ->
    noise -> weight fault -> weight quantizer) -> noise on the output -> output fault. In the backward
    pass the faults of gradients come last.

    Args:
        book: Addresses of the model.
        entries: What each replica gets.
        seed_of: Seeds of the random draws.
        measure: Measure what every fault and quantizer does (evaluation).
        part: Depths (`Layout.depth`) at which anything is attached: for a pass that runs this part of
            the decoder only. None: all of them.

    Raises:
        UserError: A fault, quantizer or noised layer matches no module, or a weight fault a module
            without a weight.
    """

    def __init__(
        self,
        book: AddressBook,
        entries: Sequence[Entry],
        *,
        seed_of: SeedOf,
        measure: bool = False,
        part: range | None = None,
    ) -> None:
        self.replicas = len(entries)
        self.audit = NoiseAudit(self.replicas)
        self.measures = measure
        self.watch: ActivationWatch | None = None
        """Is shown activations before and after everything that is injected into them."""
        self.number = 0
        self.layout = Layout(book, entries)
        self._seed_of = seed_of
        self._part = part
        self._handles: list[RemovableHandle] = []
        self._forwards = ForwardSwap()
        self._valid = torch.empty(0)
        self._view = FoldView(self.replicas, 0)
        self._step = 0
        self._microbatch = 0
        self._audited: frozenset[int] = frozenset()
        self._counting = True
        self._inputs = SharedInputs()
        self._scratch = Scratch(next(book.model.parameters()).device)
        self._masks: dict[tuple[str, int], dict[tuple[int, ...], Tensor | None]] = {}

    def inherit(self, replica: int, earlier: Injection, its: int) -> None:
        """Add what `earlier`, on an earlier part of the decoder, did to its replica `its`.

        A fault has to act in one of the two parts only: then its measure is what one injection on both
        would have come to, bit for bit. What is not declared alike for both replicas is not inherited.
        """
        faults = {
            slot.identity(its): tally
            for slot, _, tally in earlier.layout.faults
            if its in slot.active
        }
        for slot, _, tally in self.layout.faults:
            if replica in slot.active and slot.identity(replica) in faults:
                tally.inherit(replica, faults[slot.identity(replica)], its)
        formats = {
            (slot.spec, slot.outer): tally
            for slot, _, tally in earlier.layout.quantizers
            if its in slot.active
        }
        for quantizer, _, total in self.layout.quantizers:
            key = (quantizer.spec, quantizer.outer)
            if replica in quantizer.active and key in formats:
                total.inherit(replica, formats[key], its)

    def quantizer_defects(self) -> dict[int, str]:
        """Return what is wrong with the quantizers of a replica, by replica; see `quantizer_defect`."""
        found: dict[int, str] = {}
        valid = torch.ones(self.replicas, 1, dtype=torch.bool)
        for slot, addresses, _ in self.layout.quantizers:
            tally = QuantizerTally(slot, self.replicas)
            site = Site(addresses[0], addresses[0].module, quantizers=[(slot, tally)])
            ways = {
                "activation": partial(self._quantize, site),
                "weight": partial(
                    apply_quantizer, slot, valid=valid.unsqueeze(2), operand="weight", layer=0
                ),
            }
            for operand, way in ways.items():
                if slot.spec.operands not in (operand, "both"):
                    continue
                self.begin(valid)
                self.forward_done()  # nothing is counted
                defect = quantizer_defect(way, self.replicas)
                for replica in slot.active if defect else ():
                    found.setdefault(replica, f"{slot.spec.format} on {operand}s {defect}")
        return found

    # -- one pass ----------------------------------------------------------------------------------

    def begin(
        self,
        valid: Tensor,
        *,
        step: int = 0,
        microbatch: int = 0,
        audited: frozenset[int] = frozenset(),
    ) -> None:
        """Set up the next forward pass.

        Args:
            valid: Boolean [K, N], False at padding.
            step: Optimiser step, which selects sigma.
            microbatch: Number of the pass within its optimiser step.
            audited: Replicas whose realised noise is measured in this pass.
        """
        self._valid = valid.unsqueeze(2)
        self._view = FoldView(*valid.shape)
        self._step = step
        self._microbatch = microbatch
        self._audited = audited
        self._counting = True
        self._inputs.clear()
        self.number += 1

    def forward_done(self) -> None:
        """Say that what follows is the backward pass: modules that it runs again (gradient
        checkpointing) get the same draws and are not counted a second time."""
        self._counting = False
        self.number += (
            1  # trained weights are prepared again: a checkpoint must save the same twice
        )

    def __enter__(self) -> Self:
        for site in self.layout.sites.values():
            self._attach(site)
        for weight in self.layout.weights.values():
            if not self._has(weight.address, "weight"):
                continue
            host = cast(nn.Module, weight.host or weight.module)
            self._forwards.put(host, partial(self._forward, weight))
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
        self._forwards.restore()
        self._inputs.clear()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Take everything off the model for the length of the block, inside the injection's own context.

        Counters, draws and what was computed for the pass stay as they are.
        """
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def _attach(self, site: Site) -> None:
        module = site.module
        entered = site.grad_input or site.quantizers or site.input
        if entered and self._has(site.address, "input"):
            self._handles.append(
                module.register_forward_pre_hook(partial(self._on_input, site), with_kwargs=True)
            )
        left = site.noise or site.output or site.grad_output or site.skips
        if left and self._has(site.address, "output"):
            self._handles.append(
                module.register_forward_hook(partial(self._on_output, site), with_kwargs=True)
            )

    def _has(self, address: Address, site: str) -> bool:
        return self._part is None or self.layout.depth(address, site) in self._part

    # -- what happens at a site --------------------------------------------------------------------

    def _on_input(
        self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        name = "hidden_states"
        given = args[0] if args else kwargs[name]
        x = self._view.folded(given)
        # The last hook is the first that a gradient meets on its way back.
        for slot, tally in reversed(site.grad_input):
            x = self.watched(site.address, slot, tally, x)
        if site.quantizers:
            before, x = x, self._quantize(site, x)
            if self.watch is not None:
                for quantizer, _ in site.quantizers:
                    kind, active = quantizer.spec.format, quantizer.active
                    self.watch.see(site.address, "input", "quantizer", kind, active, before, x)
        for slot, tally in site.input:
            before, x = x, self._fault(site.address, slot, tally, x)
            if self.watch is not None:
                kind, active = slot.spec.kind, slot.active
                self.watch.see(site.address, "input", "fault", kind, active, before, x)
        if site.skips:  # what passes a layer by does not enter it
            x = _with_rows(x, site.skips, self._view.folded(given))
        x = self._view.unfolded(x, given)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, name: x})

    def _on_output(
        self,
        site: Site,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
    ) -> Any:
        if site.rests and self.watch is None:
            if self._counting:
                for fault, tally in site.output:
                    tally.count(fault.active)
            return None
        # A decoder layer returns a tensor in transformers 5 and a tuple in 4.
        given: Tensor = out[0] if isinstance(out, tuple) else out
        x = self._view.folded(given)
        everyone = range(self.replicas)
        for slot in site.noise:
            before, x = x, self.noised(site.address, slot, x, everyone)
            if self.watch is not None:
                level = slot.level(self._step, site.address.layer)
                active: Sequence[int] = torch.nonzero(level).flatten().tolist()
                kind = slot.carrier.kind
                self.watch.see(site.address, "output", "noise", kind, active, before, x)
        for fault, tally in site.output:
            before, x = x, self._fault(site.address, fault, tally, x)
            if self.watch is not None:
                kind, active = fault.spec.kind, fault.active
                self.watch.see(site.address, "output", "fault", kind, active, before, x)
        for fault, tally in reversed(site.grad_output):
            x = self.watched(site.address, fault, tally, x)
        if site.skips:
            entered = self._view.folded(args[0] if args else kwargs["hidden_states"])
            x = _with_rows(x, site.skips, entered)
        x = self._view.unfolded(x, given)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    def _forward(self, site: WeightSite, x: Tensor) -> Tensor:
        if self._counting:
            for fault, fault_tally in site.faults:
                fault_tally.count(fault.active)
            for slot, tally in site.quantizers:
                tally.count(slot.active)
        return forward_with(site.module, site.variants(self), self.replicas, x)

    def _quantize(self, site: Site, x: Tensor) -> Tensor:
        """Quantize the input of a product; products that share their input share the work."""
        if self._counting:
            for slot, tally in site.quantizers:
                tally.count(slot.active)
        slots = tuple(id(slot) for slot, _ in site.quantizers)
        known = self._inputs.quantized(slots, x)
        if known is not None:
            return straight_through(x, known)
        quantized = x.detach()
        for slot, tally in site.quantizers:
            quantized = apply_quantizer(
                slot,
                quantized,
                self._valid,
                "activation",
                site.address.layer,
                tally if self.measures and self._inputs.is_new(id(slot), x) else None,
            )
        # Values are shared, the way back is not: the gradient of each product is its own.
        self._inputs.remember(slots, x, quantized)
        return straight_through(x, quantized)

    def _fault(self, address: Address, slot: FaultSlot, tally: FaultTally, x: Tensor) -> Tensor:
        if self._counting:
            tally.count(slot.active)
        acting = slot.acting
        if acting is None:
            return x
        measured = tally if self.measures else None
        masks = self._masks.setdefault((address.name, id(slot)), {}) if slot.is_masked else None
        out = apply_fault(acting, x, self._valid, partial(self.draws, address), measured, masks)
        if not self.measures:
            tally.watch(acting, x, out, self._valid)
        return out

    # -- the context of a pass, for weights --------------------------------------------------------

    def draws(self, address: Address, slot: FaultSlot, x: Tensor) -> Draws:
        """Return the random numbers of a fault's call on `x` [A, N, D]."""
        place = (address.name, slot.spec.site, slot.key)
        path = ("fault", self._microbatch, *place)

        def fresh() -> list[int]:
            return [self._seed_of(owner, path) for owner in slot.owners]

        def permanent() -> list[int]:
            key = ("device", slot.spec.mask_seed, *place)
            return [stream_seed(seed, *key) for seed in slot.device_seeds]

        return CallDraws(x, fresh, permanent, self._scratch)

    def noised(self, address: Address, slot: NoiseSlot, x: Tensor, owners: Sequence[int]) -> Tensor:
        """Return `x` [A, N, D] with the noise of `slot`, row a that of replica owners[a]."""
        layer = address.layer
        level = slot.levels(self._step, layer)
        active = [row for row, owner in enumerate(owners) if level[owner]]
        if not active:
            return x
        sigma = slot.sigmas(self._step, layer, x)
        if len(active) != self.replicas:
            sigma = sigma[[owners[row] for row in active]]
        drawn = 0 if slot.redraw == "step" else self._microbatch
        path = ("noise", drawn, layer, address.inside)
        z_of = [self._seed_of(owners[row], path) for row in active]
        part = x if len(active) == x.shape[0] else x[active]
        noised = slot.carrier.add(part, sigma, keyed_normal(part, z_of, self._scratch)).values
        for at, row in enumerate(active):
            if self._counting:
                self.audit.calls[owners[row]] += 1
            if self._counting and owners[row] in self._audited:
                self.audit.look(
                    owners[row],
                    layer,
                    level[owners[row]],
                    slot.carrier,
                    part[at].detach(),
                    noised[at].detach(),
                )
        if len(active) == x.shape[0]:
            return noised
        return x.index_copy(0, torch.tensor(active, device=x.device), noised)

    def watched(self, address: Address, slot: FaultSlot, tally: FaultTally, x: Tensor) -> Tensor:
        """Return `x`, whose gradient passes through the fault of `slot` on its way back."""
        if not x.requires_grad:
            return x
        if self._counting:
            tally.due[list(slot.owners)] += 1
        valid = self._valid
        if slot.spec.site == "grad_weight":
            valid = torch.ones(x.shape[0], x.shape[1], 1, dtype=torch.bool, device=x.device)

        def on_gradient(gradient: Tensor) -> Tensor:
            tally.calls[list(slot.owners)] += 1
            gradient = gradient.contiguous()
            with torch.no_grad():
                out = apply_fault(slot, gradient, valid, partial(self.draws, address))
            tally.watch(slot, gradient, out, valid)
            return out

        # An output is copied: adapters add to it in place, and a hook on a view would be lost with it.
        x = x.clone() if slot.spec.site == "grad_output" else x.view_as(x)
        x.register_hook(on_gradient)  # type: ignore[no-untyped-call]
        return x


def _with_rows(x: Tensor, rows: Sequence[int], source: Tensor) -> Tensor:
    """Return `x` with some of its rows replaced by those of `source`."""
    return x.index_copy(0, torch.tensor(rows, device=x.device), source[list(rows)])
