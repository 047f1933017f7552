"""Full fine-tuning in lockstep: the modules of one model compute with the weights of K replicas."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from aqn_tune.injection.address import is_rmsnorm
from aqn_tune.training.arena import Arena


class Stacked(nn.Module):
    """A module each of whose parameters holds K replicas, [K, *shape], one fold of rows for each.

    Its input is [F * B, ...]: F folds of B rows. Fold f computes with the weights of replica
    `replica_of_fold[f]`; in training fold and replica are the same, in evaluation one replica may fill
    several folds (one per condition). A weight that an injection puts in the parameter's place for the
    length of a call has one row per fold already.
    """

    replica_of_fold: Tensor | None = None
    rounded_to: torch.dtype | None = None
    """Number format of the model, where its weights are trained in one of more bits."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; what it computes with is rounded for the length of the call."""
        if self.rounded_to is None:
            return super().__call__(*args, **kwargs)
        # In the parameters' place, where the architecture's own arithmetic finds them as well.
        placed = [name for name in self._parameters if name not in self.__dict__]
        for name in placed:
            self.__dict__[name] = self.stored(name)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            for name in placed:
                self.__dict__.pop(name, None)

    def stored(self, name: str) -> Tensor | None:
        """Return a parameter as the folds see it, [F, *shape]; None where the module has none."""
        parameter = self._parameters[name]
        if parameter is None:
            return None
        rows = parameter if self.replica_of_fold is None else parameter[self.replica_of_fold]
        return rows if self.rounded_to is None else rows.to(self.rounded_to)

    def of_folds(self, name: str) -> Tensor | None:
        """Return what the module computes with now: the stored parameter, or what is in its place."""
        placed: Tensor | None = self.__dict__.get(name)
        return self.stored(name) if placed is None else placed


class StackedLinear(Stacked, nn.Linear):
    """nn.Linear of K replicas: weight [K, out, in], bias [K, out]."""

    def forward(self, input: Tensor) -> Tensor:
        """Return [F * B, ..., out]."""
        weight = _present(self.of_folds("weight"))
        return _product(input, weight.transpose(1, 2), self.of_folds("bias"))


class StackedConv1D(Stacked, Conv1D):  # type: ignore[misc]
    """The linear layer of GPT-2 of K replicas: weight [K, in, out], bias [K, out]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [F * B, ..., out]."""
        return _product(x, _present(self.of_folds("weight")), self.of_folds("bias"))


class StackedEmbedding(Stacked, nn.Embedding):
    """nn.Embedding of K replicas: weight [K, V, D]."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the vectors of token numbers [F * B, T], as [F * B, T, D]."""
        weight = _present(self.of_folds("weight"))
        folds = zip(input.chunk(len(weight)), weight, strict=True)
        looked_up = [nn.functional.embedding(ids, own, self.padding_idx) for ids, own in folds]
        return torch.cat(looked_up)


class StackedLayerNorm(Stacked, nn.LayerNorm):
    """nn.LayerNorm of K replicas: weight and bias [K, D]."""

    def forward(self, input: Tensor) -> Tensor:
        """Return [F * B, ..., D]."""
        weight, bias = self.of_folds("weight"), self.of_folds("bias")
        x = nn.functional.layer_norm(input, self.normalized_shape, eps=self.eps)
        if weight is None:
            return x
        folded = x.reshape(len(weight), -1, x.shape[-1]) * weight.unsqueeze(1)
        if bias is not None:
            folded = folded + bias.unsqueeze(1)
        return folded.view_as(x)


class StackedRMSNorm(Stacked):
    """The RMSNorm of any architecture of K replicas: weight [K, D].

    It stands before the architecture's own class, whose arithmetic on one row of weights is used as it is.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return [F * B, ..., D]."""
        weight = _present(self.of_folds("weight"))
        folds, width = weight.shape[0], weight.shape[-1]
        placed = self.__dict__.get("weight")
        self.__dict__["weight"] = weight.view(folds, 1, width)
        try:
            folded = hidden_states.reshape(folds, -1, width)
            out: Tensor = super().forward(folded)
        finally:
            if placed is None:
                del self.__dict__["weight"]
            else:
                self.__dict__["weight"] = placed
        return out.view(hidden_states.shape)


_STACKED: dict[type[nn.Module], type[Stacked]] = {
    nn.Linear: StackedLinear,
    Conv1D: StackedConv1D,
    nn.Embedding: StackedEmbedding,
    nn.LayerNorm: StackedLayerNorm,
}


class Obstacle(NamedTuple):
    """What keeps a model from being trained in lockstep."""

    module: str
    why: str

    def __str__(self) -> str:
        return f"{self.module} {self.why}"


def obstacle(model: nn.Module) -> Obstacle | None:
    """Return the first module whose parameters cannot be stacked, None where all can."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if not module._parameters or all(p is None for p in module._parameters.values()):
            continue
        if _stacked_class(module) is None:
            return Obstacle(name, f"is a {type(module).__name__}, which has no stacked form")
        if isinstance(module, nn.Embedding):
            if module is not embeddings:
                return Obstacle(name, "embeds something other than the tokens of its rows")
            if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
                return Obstacle(name, "is an embedding with max_norm, sparse or scale_grad_by_freq")
    return None


def stack(model: nn.Module, arena: Arena) -> list[Stacked]:
    """Make every module of `model` that has parameters compute with those of the arena's replicas.

    The arena has an entry [K, *shape] for each name of `model.named_parameters()`; every replica gets
    the model's weights. Tied parameters stay tied. Where the arena keeps more bits than the model has, the
    modules compute with rounded copies. Call `obstacle` first.
    """
    formats = {id(parameter): parameter.dtype for parameter in model.parameters()}
    held: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        view = arena.view(arena.weights, name)
        view.copy_(parameter.detach().expand_as(view))
        held[id(parameter)] = arena.parameter(name)
    stacked: list[Stacked] = []
    for module in model.modules():
        own = {name: p for name, p in module._parameters.items() if p is not None}
        kind = _stacked_class(module) if own else None
        if kind is None:
            continue
        (dtype,) = {formats[id(parameter)] for parameter in own.values()}
        for name, parameter in own.items():
            module._parameters[name] = held[id(parameter)]
        module.__class__ = kind
        stacked.append(_as_stacked(module))
        if dtype != arena.weights.dtype:
            stacked[-1].rounded_to = dtype
    return stacked


def computes_in(model: nn.Module) -> torch.dtype:
    """Return the number format of a model's arithmetic; its weights may be kept in one of more bits."""
    kept = next(model.parameters()).dtype
    rounded = (module.rounded_to for module in model.modules() if isinstance(module, Stacked))
    return next((dtype for dtype in rounded if dtype is not None), kept)


def transposed_weights(model: nn.Module) -> frozenset[str]:
    """Return the names of the weights that belong transposed in the arena: those that only nn.Linear uses.

    A weight that an embedding shares is looked up row by row, and stays as it is.
    """
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(module)
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and all(type(user) is nn.Linear for user in users[id(parameter)])
    )


def _stacked_class(module: nn.Module) -> type[Stacked] | None:
    kind = type(module)
    if kind in _STACKED:
        return _STACKED[kind]
    if is_rmsnorm(module) and _is_vector_alone(module):
        return _beneath(StackedRMSNorm, kind)
    if isinstance(module, nn.Embedding):  # Gemma's scales what nn.Embedding looks up
        return _above(StackedEmbedding, kind)
    return None


def _is_vector_alone(module: nn.Module) -> bool:
    return [(n, p.dim()) for n, p in module.named_parameters()] == [("weight", 1)]


def _beneath(stacked: type[Stacked], kind: type[nn.Module]) -> type[Stacked]:
    """Return a class whose calls meet `stacked` first and then `kind`, under the name of `kind`."""
    return type(f"Stacked{kind.__name__}", (stacked, kind), {})


def _above(stacked: type[Stacked], kind: type[nn.Module]) -> type[Stacked]:
    """Return a class whose calls meet `kind` first, and `stacked` where that calls its parent."""
    return type(f"Stacked{kind.__name__}", (kind, stacked), {})


def _as_stacked(module: nn.Module) -> Stacked:
    assert isinstance(module, Stacked)
    return module


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the product of [F * B, ..., in] with [F, in, out], plus [F, out]."""
    folded = x.reshape(len(weight), -1, x.shape[-1])
    y = torch.bmm(folded, weight)
    if bias is not None:
        y = y + bias.unsqueeze(1)
    return y.view(*x.shape[:-1], -1)


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
