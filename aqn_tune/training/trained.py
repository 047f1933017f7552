"""What of a model is trained: adapters on frozen weights, or all weights, for each of K runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from aqn_tune.errors import UserError
from aqn_tune.injection.address import AddressBook
from aqn_tune.study.runs import Run
from aqn_tune.study.training import Lora
from aqn_tune.training.arena import Arena
from aqn_tune.training.lora import (
    adapter_shapes,
    adapter_sites,
    attach_adapters,
    initialise_adapters,
)
from aqn_tune.training.stacked import obstacle, stack, transposed_weights


class Folded(Protocol):
    """A module that holds something of each replica, and is told which replica fills which fold."""

    replica_of_fold: Tensor | None


class Trained(NamedTuple):
    """The trained state of K runs, and the rest of the model."""

    arena: Arena
    folded: Sequence[Folded]
    """The modules that hold something of each replica."""
    frozen: dict[str, nn.Parameter]
    """The weights that no run trains; none in full fine-tuning."""


def make_trained(model: nn.Module, runs: Sequence[Run], book: AddressBook) -> Trained:
    """Give K runs of equal pack key their trained tensors, on the device of `model`, which is changed.

    A bfloat16 model is trained in float32: the optimiser's weights and moments keep what rounding would lose.
    Raises ValueError for several runs of full fine-tuning whose model cannot be stacked (see
    `aqn_tune.training.stacked.obstacle`), UserError for adapters that match nothing, and for full fine-tuning
    of such a model in bfloat16.
    """
    methods = [run.training.method for run in runs]
    loras = [method for method in methods if isinstance(method, Lora)]
    trained = _adapters(model, runs, loras) if loras else _all(model, runs)
    for replica, run in enumerate(runs):
        names = _left_out(run, trained.arena, book)
        if names:
            trained.arena.freeze(replica, names)
    return trained


def _adapters(model: nn.Module, runs: Sequence[Run], methods: Sequence[Lora]) -> Trained:
    parameter = next(model.parameters())
    dtype = _trained_in(parameter.dtype)
    sites = adapter_sites(model, methods[0])
    # Zeros beyond a run's own rank in A and B give zeros in its product, and zero gradients there.
    rank = max(method.rank for method in methods)
    arena = Arena(adapter_shapes(sites, rank), len(runs), dtype, parameter.device)
    for replica, method in enumerate(methods):
        if method.rank < rank:
            arena.pad(replica, adapter_shapes(sites, method.rank))
    initialise_adapters(arena, sites, methods, [run.seed for run in runs])
    frozen = dict(model.named_parameters())
    return Trained(arena, attach_adapters(model, arena, sites, methods), frozen)


def _all(model: nn.Module, runs: Sequence[Run]) -> Trained:
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    first = next(iter(parameters.values()))
    blocked = obstacle(model)
    dtype = _trained_in(first.dtype)
    if blocked is not None and dtype != first.dtype:
        raise UserError(
            f"model.dtype: got {str(first.dtype).removeprefix('torch.')} with training.method full, and this "
            f"model is trained one run at a time ({blocked}), in its own number format: an update below a "
            "256th of a weight would be lost; give float32, or method lora"
        )
    transposed = transposed_weights(model) if blocked is None else ()
    arena = Arena(shapes, len(runs), dtype, first.device, transposed)
    if blocked is None:
        return Trained(arena, stack(model, arena), {})
    if len(runs) > 1:
        raise ValueError(f"this model takes one run per pack: {blocked}")
    for name, parameter in parameters.items():
        view = arena.view(arena.weights, name)[0]
        view.copy_(parameter.detach())
        parameter.data = view
        parameter.requires_grad_(True)
        arena.adopt(name, parameter)
    return Trained(arena, (), {})


def _trained_in(dtype: torch.dtype) -> torch.dtype:
    """Return the number format in which weights of a model of `dtype` are trained.

    In bfloat16, with eight bits, an update below a 256th of a weight would be lost: float32, as peft does.
    """
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _left_out(run: Run, arena: Arena, book: AddressBook) -> list[str]:
    """Return the tensors that the method would train and the run does not."""
    if run.train_layers is None:
        return []
    prefixes = tuple(f"{book.layer_output(layer).name}." for layer in run.train_layers)
    inside = tuple(f"{book.layer_output(layer).name}." for layer in range(book.layer_count))
    return [
        name
        for name in arena.names()
        if not name.startswith(prefixes) and (name.startswith(inside) or not run.train_rest)
    ]
