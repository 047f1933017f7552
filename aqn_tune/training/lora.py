"""Stacked LoRA: K adapters on one frozen linear layer, applied with batched products."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aqn_tune.errors import UserError, nearest
from aqn_tune.study.training import Lora
from aqn_tune.training.arena import Arena
from aqn_tune.training.streams import keyed_generator


class ReplicaLinear(nn.Module):
    """A frozen linear layer with one low-rank adapter per replica: x W^T + alpha / r * (x A_k) B_k.

    The input is [F * B, T, in]: F folds of B rows. Fold f uses the adapter of replica
    `replica_of_fold[f]`; in training fold and replica are the same, in evaluation one replica may
    fill several folds (one per condition).

    Args:
        base_layer: The frozen layer, unchanged; its hooks act on its own output, so a fault of the
            matrix unit does not touch the adapter branch.
        a: [K, in, r].
        b: [K, r, out].
        scaling: alpha / r.
    """

    def __init__(
        self, base_layer: nn.Linear, a: nn.Parameter, b: nn.Parameter, scaling: float
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a = a
        self.lora_b = b
        self.scaling = scaling
        self.replica_of_fold: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return [F * B, T, out]."""
        a: Tensor = self.lora_a
        b: Tensor = self.lora_b
        if self.replica_of_fold is not None:
            a, b = a[self.replica_of_fold], b[self.replica_of_fold]
        a, b = a.to(x.dtype), b.to(x.dtype)
        folded = x.reshape(a.shape[0], -1, x.shape[-1])
        y: Tensor = self.base_layer(folded)
        inner = torch.bmm(folded, a)
        if y._base is None:
            # In place: the frozen layer's backward pass needs its input only, and a copy of every
            # projection is a tenth of a training step.
            y.baddbmm_(inner, b, alpha=self.scaling)
        else:  # A bias makes it a view, behind which autograd would copy twice.
            y = torch.baddbmm(y, inner, b, alpha=self.scaling)
        return y.view(*x.shape[:-1], -1)

    def merged_weight(self, fold: int) -> Tensor:
        """Return the weight [out, in] with the adapter of one fold merged in: W + alpha / r * (A B)^T."""
        replica = fold if self.replica_of_fold is None else int(self.replica_of_fold[fold])
        weight = self.base_layer.weight
        update = (self.lora_a[replica] @ self.lora_b[replica]).T
        return weight + self.scaling * update.to(weight.dtype)


class AdapterSite(NamedTuple):
    """A linear layer that gets adapters."""

    name: str
    """Name in the unwrapped model, as in a PEFT adapter file."""
    layer: nn.Linear


def adapter_sites(model: nn.Module, spec: Lora) -> list[AdapterSite]:
    """Return the linear layers whose last name is in `spec.target_modules`, in model order.

    Raises UserError when a name matches nothing, or something that is not a linear layer.
    """
    sites: list[AdapterSite] = []
    hits = dict.fromkeys(spec.target_modules, 0)
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last not in hits:
            continue
        if not isinstance(module, nn.Linear):
            raise UserError(
                f"training.method.target_modules: {name} is a {type(module).__name__}; "
                "adapters go on torch.nn.Linear layers"
            )
        hits[last] += 1
        sites.append(AdapterSite(name, module))
    for target, count in hits.items():
        if count == 0:
            linears = {
                n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)
            }
            raise UserError(
                f"training.method.target_modules: {target!r} matches no module"
                f"{nearest(target, linears)}; linear layers here: {', '.join(sorted(linears))}"
            )
    return sites


def adapter_shapes(sites: list[AdapterSite], rank: int) -> dict[str, torch.Size]:
    """Return the arena entries of the adapters, `<site>.lora_A` [in, r] and `<site>.lora_B` [r, out]."""
    shapes: dict[str, torch.Size] = {}
    for name, layer in sites:
        shapes[f"{name}.lora_A"] = torch.Size([layer.in_features, rank])
        shapes[f"{name}.lora_B"] = torch.Size([rank, layer.out_features])
    return shapes


def initialise_adapters(
    arena: Arena, sites: list[AdapterSite], rank: int, seeds: list[int]
) -> None:
    """Draw A as peft does (Kaiming uniform with a = sqrt(5), that is +-1/sqrt(in)); B stays zero.

    Keyed by replicate seed and module name, in float32 on the CPU.
    """
    with torch.no_grad():
        for name, layer in sites:
            bound = 1.0 / math.sqrt(layer.in_features)
            target = arena.view(arena.weights, f"{name}.lora_A")
            for replica, seed in enumerate(seeds):
                draw = torch.empty(rank, layer.in_features)
                draw.uniform_(-bound, bound, generator=keyed_generator(seed, "init", name))
                target[replica].copy_(draw.T)


def attach_adapters(
    model: nn.Module, arena: Arena, sites: list[AdapterSite], spec: Lora
) -> list[ReplicaLinear]:
    """Put a `ReplicaLinear` in the place of every site and return them."""
    wrapped: list[ReplicaLinear] = []
    for name, layer in sites:
        a = arena.parameter(f"{name}.lora_A")
        b = arena.parameter(f"{name}.lora_B")
        replica_linear = ReplicaLinear(layer, a, b, spec.alpha / spec.rank)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, replica_linear)
        wrapped.append(replica_linear)
    return wrapped
