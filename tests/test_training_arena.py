"""The arena: where weights lie, and how gradients get into it."""

from __future__ import annotations

import pytest
import torch
from test_injection_models import build
from tiny import tiny_training
from torch import nn

from aqn_tune.training.arena import Arena
from aqn_tune.training.stacked import stack, transposed_weights

SHAPES = {"w": torch.Size([3, 4]), "b": torch.Size([3]), "idle": torch.Size([2, 3])}


def an_arena(replicas: int = 2) -> Arena:
    arena = Arena(SHAPES, replicas, torch.float64, transposed=["w"])
    arena.weights.copy_(torch.arange(1.0, 1 + arena.weights.numel()).view_as(arena.weights))
    return arena


def test_a_transposed_weight_has_its_own_shape_and_lies_the_other_way() -> None:
    arena = an_arena()
    arena.start_optimizers([tiny_training()] * 2)
    own = arena.view(arena.weights, "w")
    assert own.shape == (2, 3, 4)
    assert own.stride() == (arena.size, 1, 3)
    assert own[1].T.flatten().tolist() == arena.weights[1, :12].tolist()
    saved = arena.named_row(1)["w"]
    assert saved.is_contiguous()
    assert torch.equal(saved, own[1])
    other = Arena(SHAPES, 1, torch.float64, transposed=["w"])
    other.start_optimizers([tiny_training()])
    other.restore(0, arena.state(1))
    assert torch.equal(other.named_row(0)["w"], saved)


@pytest.mark.parametrize("add", [False, True])
def test_gradients_are_written_or_added(add: bool) -> None:
    """Of several microbatches the first writes over what the step before left, the others add."""
    arena = an_arena()
    w, b, _ = (arena.parameter(name) for name in SHAPES)
    x = torch.arange(16.0, dtype=torch.float64).view(2, 2, 4)
    y = torch.bmm(x, w.transpose(1, 2)) + b.unsqueeze(1)
    arena.gradients.fill_(7.0)
    arena.backward(y.sum(), add=add)
    before = 7.0 if add else 0.0
    wanted = {
        "w": x.sum(dim=1, keepdim=True).expand(2, 3, 4),
        "b": torch.full((2, 3), 2.0, dtype=torch.float64),
        "idle": torch.zeros(2, 2, 3, dtype=torch.float64),
    }
    for name, gradient in wanted.items():
        assert torch.equal(arena.view(arena.gradients, name), before + gradient), name
    assert w.grad is None


@pytest.mark.parametrize("tied", [True, False])
def test_which_weights_lie_transposed(tied: bool) -> None:
    """A head that shares its weight with the embedding is looked up row by row."""
    model = build("qwen2")
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    head.weight = embedding.weight if tied else nn.Parameter(embedding.weight.detach().clone())
    linears = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (module is not head or not tied)
    }
    assert transposed_weights(model) == linears
    assert tied != ("lm_head.weight" in linears)


def test_a_gradient_lies_as_its_weight_does() -> None:
    """Else every step turns it over on its way into the arena, at the price of another pass."""
    model = build("qwen2")
    names = transposed_weights(model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    arena = Arena(shapes, 2, torch.float64, transposed=names)
    stack(model, arena)
    held = dict(model.named_parameters())
    ids = torch.arange(32).view(4, 8)
    loss = model(input_ids=ids).logits.square().mean()
    found = torch.autograd.grad(loss, [held[name] for name in sorted(names)])
    for name, gradient in zip(sorted(names), found, strict=True):
        assert gradient.stride()[1:] == held[name].stride()[1:], name
