"""Stacked LoRA: K adapters on one frozen linear layer, applied with batched products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aqn_tune.errors import UserError, nearest
from aqn_tune.study.training import Lora
from aqn_tune.training.arena import Arena
from aqn_tune.training.streams import keyed_generator


class ReplicaLinear(nn.Module):
    """A frozen linear layer with one low-rank adapter per replica: x W^T + alpha_k / r_k * (x A_k) B_k.

    The input is [F * B, T, in]: F folds of B rows. Fold f uses the adapter of replica
    `replica_of_fold[f]`; in training fold and replica are the same, in evaluation one replica may
    fill several folds (one per condition).

    Args:
        base_layer: The frozen layer, unchanged; its hooks act on its own output, so a fault of the
            matrix unit does not touch the adapter branch.
        a: [K, in, r]; zero beyond the columns of a replica of smaller rank.
        b: [K, r, out]; zero beyond its rows.
        scaling: alpha / r, one number for all replicas or one for each. Numbers that differ multiply
            x A_k, which changes no bit of a result where they are powers of two.
        ranks: Of each replica; left out, all have the rank of `a`.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        a: nn.Parameter,
        b: nn.Parameter,
        scaling: float | Sequence[float],
        ranks: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a = a
        self.lora_b = b
        replicas, _, rank = a.shape
        scalings = tuple(scaling) if isinstance(scaling, Sequence) else (scaling,) * replicas
        self.scalings = scalings
        self.ranks = tuple(ranks) or (rank,) * replicas
        self._scaling = scalings[0]
        self._factors: Tensor | None = None
        if len(set(scalings)) > 1:
            self._scaling = 1.0
            self._factors = a.new_tensor(scalings).view(-1, 1, 1)
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
        if self._factors is not None:
            own = self._factors
            if self.replica_of_fold is not None:
                own = own[self.replica_of_fold]
            inner = inner * own.to(x.dtype)
        if y._base is None:
            # In place: the frozen layer's backward pass needs its input only, and a copy of every
            # projection is a tenth of a training step.
            y.baddbmm_(inner, b, alpha=self._scaling)
        else:  # A bias makes it a view, behind which autograd would copy twice.
            y = torch.baddbmm(y, inner, b, alpha=self._scaling)
        return y.view(*x.shape[:-1], -1)

    def merged_weight(self, fold: int) -> Tensor:
        """Return the weight [out, in] with the adapter of one fold merged in: W + alpha / r * (A B)^T."""
        replica = fold if self.replica_of_fold is None else int(self.replica_of_fold[fold])
        weight, rank = self.base_layer.weight, self.ranks[replica]
        own = self.lora_a[replica, :, :rank].contiguous()
        update = (own @ self.lora_b[replica, :rank]).T
        return weight + self.scalings[replica] * update.to(weight.dtype)


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
    arena: Arena, sites: list[AdapterSite], specs: Sequence[Lora], seeds: Sequence[int]
) -> None:
    """Draw A as peft does (Kaiming uniform with a = sqrt(5), that is +-1/sqrt(in)); B stays zero.

    Keyed by replicate seed and module name, in float32 on the CPU, for each replica at its own rank.
    """
    with torch.no_grad():
        for name, layer in sites:
            bound = 1.0 / math.sqrt(layer.in_features)
            target = arena.view(arena.weights, f"{name}.lora_A")
            for own, spec, seed in zip(target, specs, seeds, strict=True):
                draw = torch.empty(spec.rank, layer.in_features)
                draw.uniform_(-bound, bound, generator=keyed_generator(seed, "init", name))
                own[:, : spec.rank].copy_(draw.T)


def attach_adapters(
    model: nn.Module, arena: Arena, sites: list[AdapterSite], specs: Sequence[Lora]
) -> list[ReplicaLinear]:
    """Put a `ReplicaLinear` of the replicas' adapters in the place of every site and return them."""
    scalings, ranks = [spec.alpha / spec.rank for spec in specs], [spec.rank for spec in specs]
    wrapped: list[ReplicaLinear] = []
    for name, layer in sites:
        a = arena.parameter(f"{name}.lora_A")
        b = arena.parameter(f"{name}.lora_B")
        replica_linear = ReplicaLinear(layer, a, b, scalings, ranks)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, replica_linear)
        wrapped.append(replica_linear)
    return wrapped
