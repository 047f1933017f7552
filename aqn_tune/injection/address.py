"""Addressing: from `modules` globs and layer numbers to the modules of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from aqn_tune.errors import UserError, nearest
from aqn_tune.models.load import decoder_layers
from aqn_tune.noise.carriers import CarrierSpec
from aqn_tune.study.layers import Layers, resolve_layers

REFUSED = ("lm_head", "*embed*", "*wte", "*wpe", "*lora_*")
"""Never a site unless a glob names them literally: heads, embeddings and adapters."""
LINEAR = "linear"
"""The word that stands for every linear layer in a list of `modules`."""
_BASE = ".base_layer"


class Addressed(Protocol):
    """What faults and quantizers have in common: where they sit."""

    @property
    def modules(self) -> tuple[str, ...]: ...
    @property
    def layers(self) -> Layers: ...
    @property
    def exclude(self) -> tuple[str, ...]: ...


class Address(NamedTuple):
    """One module of the model."""

    name: str
    """Its name in `named_modules` of the model without adapters."""
    layer: int
    """Position of its decoder layer in the decoder's list."""
    module: nn.Module
    inside: str
    """Its name inside the decoder layer; for the layer itself its number. Keys the draws of noise."""


class AddressBook:
    """The modules of a model by layer.

    The layer number is the position in the decoder's ModuleList, never parsed from a name. Adapters
    that were or will be put around a module change neither its address nor its name: a site stays the
    leaf base module, and a wrapper is never a second site.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._raw = {id(module): name for name, module in model.named_modules()}
        wrapped = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
        wrapper = f"{self._raw[id(wrapped)]}." if wrapped is not model else ""
        layers = decoder_layers(model)
        self.layer_count = len(layers)
        self._inside: list[dict[str, Address]] = []
        self._other: list[dict[str, Address]] = []
        """The modules of each layer with a matrix of their own that are no linear layers."""
        for number, layer in enumerate(layers):
            prefix = self._raw[id(layer)].removeprefix(wrapper)
            inside = {".": Address(prefix, number, layer, str(number))}
            named = dict(layer.named_modules())
            for name, module in named.items():
                if not name or f"{name}{_BASE}" in named:
                    continue
                name = name.removesuffix(_BASE)
                inside[name] = Address(f"{prefix}.{name}", number, module, name)
            self._inside.append(inside)
            # Now, as stacking gives every parameter one dimension more.
            self._other.append({n: a for n, a in inside.items() if _holds_other_matrix(a)})

    def layer_output(self, layer: int) -> Address:
        """Return the decoder layer itself, whose output is a site."""
        return self._inside[layer]["."]

    def layers(self) -> list[nn.Module]:
        """Return the decoder layers."""
        return [inside["."].module for inside in self._inside]

    def norms(self, layer: int) -> tuple[Address, ...]:
        """Return the RMSNorms directly inside a decoder layer (not those of attention heads)."""
        return tuple(
            address
            for name, address in self._inside[layer].items()
            if "." not in name and is_rmsnorm(address.module)
        )

    def linears(self, layer: int) -> tuple[Address, ...]:
        """Return the linear layers of a decoder layer, adapters left out."""
        return tuple(self._match(layer, LINEAR, ()))

    def outer(self, address: Address) -> nn.Module:
        """Return the module that stands at an address now: its adapter wrapper, if it has one."""
        raw = self._raw[id(address.module)]
        return self.model.get_submodule(raw.removesuffix(_BASE))

    def carrier_sites(self, carrier: CarrierSpec, layer: int) -> tuple[Address, ...]:
        """Return the modules of a layer that carry the noise of `carrier`.

        Raises UserError when the layer has none.
        """
        if carrier.site == "layer_output":
            return (self.layer_output(layer),)
        what, found = (
            ("*RMSNorm", self.norms(layer))
            if carrier.site == "norm_weight"
            else ("linear layer", self.linears(layer))
        )
        if not found:
            raise UserError(
                f"noise: carrier {carrier.kind!r} matches no module in layer {layer}; "
                f"the model's decoder layers hold no {what}: use carrier 'hidden'"
            )
        other = self._other[layer]
        if other and carrier.site == "linear_weight":
            raise UserError(
                f"noise: carrier {carrier.kind!r} is for every linear layer, but layer {layer} computes "
                f"with other weights too, which would get none: {_listed(other)}; use carrier 'hidden'"
            )
        return found

    def find(self, where: Addressed, what: str = "faults") -> tuple[Address, ...]:
        """Return the modules that a fault or quantizer addresses, in model order.

        Raises UserError when a glob matches nothing in a declared layer: a fault that sits nowhere
        would otherwise look harmless. So it does where `linear` leaves weights out that nobody named,
        such as those of experts. `what` names the key in the message.
        """
        found: list[Address] = []
        for layer in resolve_layers(where.layers, self.layer_count):
            for pattern in where.modules:
                hits = list(self._match(layer, pattern, where.exclude))
                if not hits:
                    own = self.layer_output(layer)
                    names = [a.inside for a in self._match(layer, "*", ()) if a is not own]
                    raise UserError(
                        f"{what}: modules {pattern!r} matches nothing in layer {layer}"
                        f"{nearest(pattern, [*names, LINEAR])}; modules there: "
                        f"{LINEAR}, ., {', '.join(names)}"
                    )
                found.extend(hit for hit in hits if hit not in found)
            if LINEAR in where.modules:
                self._refuse_missed(layer, found, where.exclude, what)
        return tuple(found)

    def _refuse_missed(
        self, layer: int, found: list[Address], exclude: tuple[str, ...], what: str
    ) -> None:
        missed = {
            name: address
            for name, address in self._other[layer].items()
            if address not in found and not _is_named(name, address, exclude)
        }
        if missed:
            raise UserError(
                f"{what}: modules {LINEAR!r} is every linear layer, but layer {layer} computes with other "
                f"weights too, which it does not reach: {_listed(missed)}; to leave them as they are, "
                f"say exclude: [{', '.join(missed)}]"
            )

    def _match(self, layer: int, pattern: str, exclude: tuple[str, ...]) -> Iterable[Address]:
        for name, address in self._inside[layer].items():
            if pattern == LINEAR:
                if not is_linear(address.module):
                    continue
            elif not _is_named(name, address, (pattern,)):
                continue
            is_literal = pattern in (name, address.name)
            if not is_literal and any(fnmatchcase(address.name, glob) for glob in REFUSED):
                continue
            if _is_named(name, address, exclude):
                continue
            if name != "." and list(address.module.children()):
                continue  # a container's output is its last leaf's: only leaves and whole layers are units
            yield address


def _is_named(name: str, address: Address, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(known, glob) for known in (name, address.name) for glob in globs)


def _listed(addresses: Mapping[str, Address]) -> str:
    kinds = {name: type(address.module).__name__ for name, address in addresses.items()}
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())


def _holds_other_matrix(address: Address) -> bool:
    """Return whether a module holds a matrix itself and is no linear layer: experts, a router."""
    module = address.module
    is_known = is_linear(module) or isinstance(module, nn.Embedding)
    if is_known or "norm" in type(module).__name__.lower():
        return False
    if any(fnmatchcase(address.name, glob) for glob in REFUSED):
        return False
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a matrix product with a weight: nn.Linear, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def is_rmsnorm(module: nn.Module) -> bool:
    """Return whether a module is an RMSNorm of any architecture (told by its class name)."""
    return type(module).__name__.endswith("RMSNorm")
