"""What is attached to a model: read back from its hooks, not from what was declared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import nn

from aqn_tune.injection.address import Address, AddressBook
from aqn_tune.injection.fold import Entry, FaultSlot, NoiseSlot, QuantizerSlot
from aqn_tune.injection.injection import Injection
from aqn_tune.injection.layout import Faults
from aqn_tune.injection.weights import WeightSite

Where = Literal["input", "weight", "output", "grad_output", "grad_weight", "grad_input"]
What = Literal["adapter", "noise", "fault", "quantizer", "skip"]
AdapterPlace = Literal["inside", "beside", "none"]
_BASE = ".base_layer"
_ADDRESS = {"modules", "layers", "site", "exclude", "when"}


class Attached(NamedTuple):
    """One thing that happens at one module in every pass of the model."""

    layer: int
    module: str
    """Name inside the decoder layer; `.` is the layer itself."""
    order: int
    """Its turn among what happens at this module, from 1: forward pass, then backward pass."""
    site: Where
    what: What
    kind: str
    """Kind of the fault, carrier of the noise or format of the quantizer."""
    parameters: dict[str, Any]
    """Every parameter that has a value, levels as the replica gets them."""
    adapter: AdapterPlace
    """Whether the LoRA branch of the module passes through it (inside) or not (beside)."""

    @property
    def ends_layer(self) -> bool:
        """Whether it happens to a decoder layer itself, after everything inside the layer."""
        return self.module == "." and self.site not in ("input", "weight")


class Declared(NamedTuple):
    """One thing that should happen at one module."""

    layer: int
    module: str
    site: Where
    kind: str


class Inspection(NamedTuple):
    """What an injection attaches to a model."""

    sites: tuple[Attached, ...]
    """By layer, in a layer in model order with the layer's own output last, at a module in turn."""
    missing: tuple[Declared, ...]
    """What was declared and is not attached; empty when all is well."""
    sigma: tuple[float, ...]
    """Sigma of each training step, empty without noise."""
    multipliers: tuple[tuple[float, ...], ...]
    """Multiplier of each layer at each training step, 0 where no noise is attached."""


class _Place(NamedTuple):
    """Where in the model something hangs; see `Attached`."""

    layer: int
    module: str


class _Act(NamedTuple):
    """What a hook does; see `Attached`."""

    site: Where
    what: What
    kind: str
    parameters: dict[str, Any]
    adapter: AdapterPlace = "none"


class _Hook(NamedTuple):
    """One hook of an injection."""

    method: str
    """Name of the method of `Injection` that it calls."""
    site: Any
    """What the method is told to do: a site of the injection, or the `WeightSite` of a weight."""


_TURNS: dict[Where, int] = {
    "input": 0,
    "weight": 1,
    "output": 2,
    "grad_output": 3,
    "grad_weight": 4,
    "grad_input": 5,
}


def inspect_injection(book: AddressBook, injection: Injection, entry: Entry) -> Inspection:
    """Attach `injection` for the length of this call and return what hangs on the model then.

    The hooks are found by walking the model, so a module that lacks its hook, or has it at another
    place, shows as it is. `entry` is the one replica of the injection; it is read only to tell what is
    missing. No pass is run: what a hook computes is for the audits of training and evaluation to say.
    """
    if injection.replicas != 1:
        raise ValueError(f"got an injection of {injection.replicas} replicas, wanted one")
    chains: dict[_Place, list[_Act]] = {}
    ranks: dict[_Place, int] = {}
    noise: dict[int, NoiseSlot] = {}
    with injection:
        for place, module, raw in _modules(book):
            for hook in _hooks(injection, module):
                ranks.setdefault(place, len(ranks))
                acts = chains.setdefault(place, [])
                acts.extend(_acts(hook, place.layer, _adapter_place(raw, module)))
                if hook.method != "_on_input":
                    noise.update((place.layer, slot) for slot in hook.site.noise)
    sites = [
        Attached(
            layer=place.layer,
            module=place.module,
            order=turn,
            site=act.site,
            what=act.what,
            kind=act.kind,
            parameters=act.parameters,
            adapter=act.adapter,
        )
        for place, chain in chains.items()
        for turn, act in enumerate(sorted(chain, key=lambda act: _TURNS[act.site]), start=1)
    ]
    sites.sort(key=lambda s: (s.layer, s.ends_layer, ranks[_Place(s.layer, s.module)], s.order))
    there = Counter(Declared(s.layer, s.module, s.site, s.kind) for s in sites)
    missing = Counter(_declared(book, entry)) - there
    sigma = next(iter(noise.values())).sigma[:, 0].tolist() if noise else []
    multipliers = [
        noise[layer].multipliers[:, layer, 0].tolist() if layer in noise else [0.0] * len(sigma)
        for layer in range(book.layer_count)
    ]
    return Inspection(
        tuple(sites),
        tuple(sorted(missing.elements())),
        tuple(sigma),
        tuple(zip(*multipliers, strict=True)),
    )


# -- reading hooks ---------------------------------------------------------------------------------


def _hooks(injection: Injection, module: nn.Module) -> Iterator[_Hook]:
    """Yield what of `injection` hangs on a module."""
    own = module.__dict__.get("forward")
    for hook in (*module._forward_pre_hooks.values(), own, *module._forward_hooks.values()):
        if isinstance(hook, partial) and getattr(hook.func, "__self__", None) is injection:
            yield _Hook(hook.func.__name__, hook.args[0])


def _acts(hook: _Hook, layer: int, adapter: AdapterPlace) -> Iterator[_Act]:
    """Yield what a hook does, in turn."""
    for act in _acts_of(hook, layer):
        yield act._replace(adapter=adapter)


def _acts_of(hook: _Hook, layer: int) -> Iterator[_Act]:
    site = hook.site
    if isinstance(site, WeightSite):
        if site.host is not None:
            yield _Act("weight", "adapter", "merged", {})
        yield from (_noise("weight", slot, layer) for slot in site.noise)
        yield from _faults("weight", site.faults)
        yield from (_quantizer("weight", slot) for slot, _ in site.quantizers)
        yield from _faults("grad_weight", site.gradients)
    elif hook.method == "_on_input":
        yield from (_quantizer("input", slot) for slot, _ in site.quantizers)
        yield from _faults("input", site.input)
        yield from _faults("grad_input", site.grad_input)
    else:
        yield from (_noise("output", slot, layer) for slot in site.noise)
        yield from _faults("output", site.output)
        if site.skips:
            yield _Act("output", "skip", "skip", {})
        yield from _faults("grad_output", site.grad_output)


def _faults(site: Where, faults: Faults) -> Iterator[_Act]:
    for slot, _ in faults:
        yield _Act(site, "fault", slot.spec.kind, _fault_parameters(slot))


def _fault_parameters(slot: FaultSlot) -> dict[str, Any]:
    written = slot.spec.model_dump(mode="json", exclude={"kind", *_ADDRESS})
    real = {name: float(value[0]) for name, value in slot.params.items()}
    return {name: value for name, value in {**written, **real}.items() if value is not None}


def _quantizer(site: Where, slot: QuantizerSlot) -> _Act:
    hidden = {"format", "operands", *_ADDRESS}
    return _Act(
        site, "quantizer", slot.spec.format, slot.spec.model_dump(mode="json", exclude=hidden)
    )


def _noise(site: Where, slot: NoiseSlot, layer: int) -> _Act:
    """Return the noise of one layer: its sigma where there is noise, and its multipliers in turn."""
    steps = zip(slot.sigma[:, 0].tolist(), slot.multipliers[:, layer, 0].tolist(), strict=True)
    noised = [(sigma, multiplier) for sigma, multiplier in steps if sigma > 0]
    levels = [sigma for sigma, multiplier in noised if multiplier > 0]
    parameters = {
        **slot.carrier.model_dump(mode="json", exclude={"kind"}),
        "redraw": slot.redraw,
        "sigma_max": max(levels, default=0.0),
        "sigma_min": min(levels, default=0.0),
        "multipliers": list(dict.fromkeys(multiplier for _, multiplier in noised)),
    }
    return _Act(site, "noise", slot.carrier.kind, parameters)


# -- places in the model ---------------------------------------------------------------------------


def _modules(book: AddressBook) -> Iterator[tuple[_Place, nn.Module, str]]:
    """Yield every module of the decoder layers: its place, itself, and its name in the layer as it is."""
    for layer in range(book.layer_count):
        for raw, module in book.layer_output(layer).module.named_modules():
            yield _Place(layer, raw.removesuffix(_BASE) or "."), module, raw


def _adapter_place(raw: str, module: nn.Module) -> AdapterPlace:
    if raw.endswith(_BASE):
        return "beside"
    return "inside" if any(hasattr(part, "base_layer") for part in module.modules()) else "none"


# -- what should be there --------------------------------------------------------------------------


def _declared(book: AddressBook, entry: Entry) -> Iterator[Declared]:
    def at(address: Address, site: Where, kind: str) -> Declared:
        is_layer = address == book.layer_output(address.layer)
        return Declared(address.layer, "." if is_layer else address.inside, site, kind)

    for fault in entry.device.faults:
        yield from (at(a, fault.site, fault.kind) for a in book.find(fault))
    for quantizer in entry.device.quantization:
        for address in book.find(quantizer, "quantization"):
            if quantizer.operands in ("weight", "both"):
                yield at(address, "weight", quantizer.format)
            if quantizer.operands in ("activation", "both"):
                yield at(address, "input", quantizer.format)
    if entry.noise is not None:
        carrier = entry.noise.carrier
        where: Where = "output" if carrier.site == "layer_output" else "weight"
        for layer in entry.noise.noised_layers():
            yield from (at(a, where, carrier.kind) for a in book.carrier_sites(carrier, layer))
    for layer in entry.skip:
        yield at(book.layer_output(layer), "output", "skip")
