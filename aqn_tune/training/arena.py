"""The arena: all trainable state of K replicas in one [K, P] block, one row per replica."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aqn_tune.study.training import TrainingSpec
from aqn_tune.training.padding import OwnPart


class _Slice(NamedTuple):
    start: int
    shape: torch.Size


class _Owned(NamedTuple):
    """A parameter of the model that lives in the arena."""

    parameter: nn.Parameter
    address: int
    """Where its memory begins."""
    gradient: Tensor
    """The part of the arena's gradients that is its own, [K, *shape]."""


class Arena:
    """Weights, gradients and AdamW state of K replicas.

    The model's trainable tensors are views [K, *shape] into the weights, so one fused AdamW call per
    replica updates everything it owns; clipping and the learning rate are per row, and nothing is
    ever reduced across rows.

    Weights named in `transposed` lie in memory as [in, out] and are shown as the [out, in] that they are;
    their gradients come out of a batched product in that order, and are moved here as they lie.

    A replica may own less than its row (`pad`). What it computes, reports and saves is then what an arena
    made for it alone gives; the rest of the row is zero and stays so.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        replicas: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        transposed: Collection[str] = (),
    ) -> None:
        self._slices: dict[str, _Slice] = {}
        self._transposed = frozenset(transposed)
        size = 0
        for name, shape in shapes.items():
            self._slices[name] = _Slice(size, shape)
            size += shape.numel()
        self.size = size
        self.replicas = replicas
        self.weights = torch.zeros(replicas, size, dtype=dtype, device=device)
        self.gradients = torch.zeros(replicas, size, dtype=dtype, device=device)
        self.optimizers: list[torch.optim.AdamW] = []
        self._owned: list[_Owned] = []
        self._padded: dict[int, OwnPart] = {}
        self._own_shapes: dict[int, Mapping[str, torch.Size]] = {}
        self._trained: dict[int, Tensor] = {}
        self._left_out: dict[int, frozenset[str]] = {}

    def names(self) -> tuple[str, ...]:
        """Return the names of all trainable tensors."""
        return tuple(self._slices)

    def view(self, block: Tensor, name: str) -> Tensor:
        """Return the part of `block` [K, P] that belongs to `name`, as a view [K, *shape]."""
        start, shape = self._slices[name]
        part = block[:, start : start + shape.numel()]
        if name in self._transposed:
            turned = shape[1], shape[0]
            return part.view(self.replicas, *turned).transpose(1, 2)
        return part.view(self.replicas, *shape)

    def own(self, block: Tensor, name: str, replica: int) -> Tensor:
        """Return what of `block` [K, P] one replica owns of `name`, contiguous, of its own shape.

        A view where the replica is not padded and the tensor not transposed, else a copy.
        """
        view = self.view(block, name)[replica]
        if replica in self._padded:
            view = _corner(view, self._own_shapes[replica][name])
        return view.contiguous()

    def pad(self, replica: int, shapes: Mapping[str, torch.Size]) -> None:
        """Let one replica own tensors of `shapes`, each the leading corner of its entry.

        Call it before `freeze` and `start_optimizers`. Raises ValueError where a shape does not fit.
        """
        is_own = torch.zeros_like(self.weights, dtype=torch.bool)
        for name in self._slices:
            corner = _corner(self.view(is_own, name)[replica], shapes[name])
            if corner.shape != shapes[name]:
                raise ValueError(f"{name}: {shapes[name]} does not fit {self._slices[name].shape}")
            corner.fill_(True)
        self._padded[replica] = OwnPart(is_own[replica], self.weights[replica])
        self._own_shapes[replica] = shapes

    def parameter(self, name: str) -> nn.Parameter:
        """Return the trainable tensor `name` [K, *shape], a view of the arena's weights."""
        return self.adopt(name, nn.Parameter(self.view(self.weights, name)))

    def adopt(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """Collect the gradient of `parameter`, [K, *shape] or for K = 1 [*shape], under `name`."""
        address = self.view(self.weights, name).data_ptr()
        self._owned.append(_Owned(parameter, address, self.view(self.gradients, name)))
        return parameter

    def holds_its_parameters(self) -> bool:
        """Return whether the model still computes with the arena's memory, not with a copy of it."""
        return all(owned.parameter.data_ptr() == owned.address for owned in self._owned)

    def freeze(self, replica: int, names: Sequence[str]) -> None:
        """Keep the tensors `names` of one replica as they are: no update and no weight decay."""
        trained = torch.ones_like(self.weights, dtype=torch.bool)
        for name in names:
            self.view(trained, name)[replica] = False
        part = self._padded.get(replica)
        own = trained[replica]
        self._trained[replica] = own.clone() if part is None else part.take(own)
        self._left_out[replica] = frozenset(names)

    def trained_size(self, replica: int) -> int:
        """Return the number of parameters that one replica trains."""
        trained, part = self._trained.get(replica), self._padded.get(replica)
        if trained is not None:
            return int(trained.sum())
        return self.size if part is None else part.size

    def is_trained(self, replica: int, name: str) -> bool:
        """Return whether one replica trains the tensor `name`."""
        return name not in self._left_out.get(replica, ())

    def backward(self, total: Tensor, *, add: bool = False) -> None:
        """Write the gradients of `total`, a scalar, into the arena; with `add` add them to what it holds.

        A tensor that `total` does not depend on has a gradient of zero.
        """
        parameters = [owned.parameter for owned in self._owned]
        # Not into `.grad`: on the way there a gradient that lies transposed would be copied once more.
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        targets, sources = [], []
        for owned, gradient in zip(self._owned, found, strict=True):
            if gradient is not None:
                targets.append(owned.gradient)
                sources.append(gradient.view_as(owned.gradient))
            elif not add:
                owned.gradient.zero_()
        (torch._foreach_add_ if add else torch._foreach_copy_)(targets, sources)

    def start_optimizers(self, trainings: Sequence[TrainingSpec]) -> None:
        """Give each replica an AdamW of its own over what it owns of its row."""
        for replica, spec in enumerate(trainings):
            part = self._padded.get(replica)
            if part is None:
                row = nn.Parameter(self.weights[replica])
                row.grad = self.gradients[replica]
            else:
                row = part.parameter
            self.optimizers.append(
                torch.optim.AdamW(
                    [row],
                    lr=spec.learning_rate,
                    betas=(spec.beta1, spec.beta2),
                    weight_decay=spec.weight_decay,
                    fused=True,
                )
            )

    def clip_and_step(self, replica: int, learning_rate: float, max_norm: float) -> float:
        """Clip one replica's gradient to `max_norm`, take one AdamW step, return the norm before."""
        weights, row = self.weights[replica], self.gradients[replica]
        part = self._padded.get(replica)
        if part is not None:
            part.load(weights, row)
            weights, row = part.weights, part.gradient
        trained = self._trained.get(replica)
        if trained is not None:
            row.masked_fill_(~trained, 0.0)
            before = weights.clone()
        norm = float(torch.linalg.vector_norm(row))
        if norm > max_norm:
            row.mul_(max_norm / (norm + 1e-6))
        optimizer = self.optimizers[replica]
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
        if trained is not None:  # decoupled weight decay moves a weight without any gradient
            weights.copy_(torch.where(trained, weights, before))
        if part is not None:
            part.put(self.weights[replica], weights)
        return norm

    def state(self, replica: int) -> dict[str, Tensor]:
        """Return a copy of what one replica owns, on the CPU: weights and AdamW moments, without padding."""
        part, weights = self._padded.get(replica), self.weights[replica]
        own = weights if part is None else part.take(weights)
        state = {"weights": own.to("cpu", copy=True)}
        for moments in self.optimizers[replica].state.values():
            state.update({key: value.to("cpu", copy=True) for key, value in moments.items()})
        return state

    def restore(self, replica: int, state: Mapping[str, Tensor]) -> None:
        """Write back what `state` returned, of this arena or of another, padded or not."""
        part = self._padded.get(replica)
        if part is None:
            self.weights[replica].copy_(state["weights"])
        else:
            part.put(self.weights[replica], state["weights"].to(self.weights.device))
        optimizer = self.optimizers[replica]
        row = optimizer.param_groups[0]["params"][0]
        moments = {
            key: value.to(row.device, copy=True) for key, value in state.items() if key != "weights"
        }
        if moments:
            optimizer.state[row] = moments

    def named_row(self, replica: int) -> dict[str, Tensor]:
        """Return one replica's tensors by name, of its own shapes, copies on the CPU."""
        own = {name: self.own(self.weights, name, replica) for name in self._slices}
        return {name: tensor.to("cpu", copy=True) for name, tensor in own.items()}


def _corner(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Return the leading part of `tensor` that has `shape`, as a view."""
    return tensor[tuple(slice(size) for size in shape)]
