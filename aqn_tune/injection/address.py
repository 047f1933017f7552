"""Addressing: from `modules` globs and layer numbers to the modules of a model."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from aqn_tune.errors import UserError, nearest
from aqn_tune.faults import FaultSpec
from aqn_tune.models.load import decoder_layers
from aqn_tune.noise.carriers import CarrierSpec
from aqn_tune.study.layers import resolve_layers

REFUSED = ("lm_head", "*embed*", "*wte", "*wpe", "*lora_*")
"""Never a site unless a glob names them literally: heads, embeddings and adapters."""


class Address(NamedTuple):
    """One module of the model."""

    name: str
    """Its name in `named_modules` of the unwrapped model."""
    layer: int
    """Position of its decoder layer in the decoder's list."""
    module: nn.Module


class AddressBook:
    """The modules of a model by layer, read once from the unwrapped model.

    The layer number is the position in the decoder's ModuleList, never parsed from a name. Modules
    keep their identity when adapters are put around them, so a site stays the leaf base module.
    """

    def __init__(self, model: nn.Module) -> None:
        names = {id(module): name for name, module in model.named_modules()}
        layers = decoder_layers(model)
        self.layer_count = len(layers)
        self._inside: list[dict[str, Address]] = []
        for number, layer in enumerate(layers):
            prefix = names[id(layer)]
            inside = {".": Address(prefix, number, layer)}
            for name, module in layer.named_modules():
                if name:
                    inside[name] = Address(f"{prefix}.{name}", number, module)
            self._inside.append(inside)

    def layer_output(self, layer: int) -> Address:
        """Return the decoder layer itself, whose output is a site."""
        return self._inside[layer]["."]

    def norms(self, layer: int) -> tuple[Address, ...]:
        """Return the RMSNorms directly inside a decoder layer (not those of attention heads)."""
        return tuple(
            address
            for name, address in self._inside[layer].items()
            if "." not in name and type(address.module).__name__.endswith("RMSNorm")
        )

    def carrier_sites(self, carrier: CarrierSpec, layer: int) -> tuple[Address, ...]:
        """Return the modules of a layer that carry the noise of `carrier`.

        Raises UserError when the layer has none.
        """
        if carrier.site == "layer_output":
            return (self.layer_output(layer),)
        norms = self.norms(layer)
        if not norms:
            raise UserError(
                f"noise: carrier {carrier.kind!r} matches no module in layer {layer}; "
                "the model's decoder layers hold no *RMSNorm: use carrier 'hidden'"
            )
        return norms

    def find(self, fault: FaultSpec) -> tuple[Address, ...]:
        """Return the modules that `fault` addresses, in model order.

        Raises UserError when a glob matches nothing in a declared layer: a fault that sits nowhere
        would otherwise look harmless.
        """
        found: list[Address] = []
        for layer in resolve_layers(fault.layers, self.layer_count):
            for pattern in fault.modules:
                hits = list(self._match(layer, pattern, fault.exclude))
                if not hits:
                    names = [name for name in self._inside[layer] if name != "."]
                    raise UserError(
                        f"faults: modules {pattern!r} matches nothing in layer {layer}"
                        f"{nearest(pattern, names)}; modules there: ., {', '.join(names)}"
                    )
                found.extend(hit for hit in hits if hit not in found)
        return tuple(found)

    def _match(self, layer: int, pattern: str, exclude: tuple[str, ...]) -> Iterable[Address]:
        for name, address in self._inside[layer].items():
            if not (fnmatchcase(name, pattern) or fnmatchcase(address.name, pattern)):
                continue
            is_literal = pattern in (name, address.name)
            if not is_literal and any(fnmatchcase(address.name, glob) for glob in REFUSED):
                continue
            if any(fnmatchcase(name, g) or fnmatchcase(address.name, g) for g in exclude):
                continue
            if name != "." and list(address.module.children()):
                continue  # a container's output is its last leaf's: only leaves and whole layers are units
            yield address
