"""Decoder layers as compiled functions: fewer and larger operations in a training step."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from aqn_tune.injection.swap import ForwardSwap

_SHAPES = 64
"""How many shapes of packs a worker may meet; each is compiled once, and read from a cache after that."""


def compile_seconds() -> float:
    """Return the seconds that this process has spent compiling so far, or reading what was compiled before.

    Compiling happens inside the first steps of a pack; the difference over a stretch of training is what
    of it was no training.
    """
    # Where nothing was compiled the compiler is not imported either: that takes a second.
    if "torch._dynamo.utils" not in sys.modules:
        return 0.0
    return torch._dynamo.utils.calculate_time_spent()["total_wall_time"]


class CompiledLayers:
    """Runs decoder layers compiled while used as a context; outside it the model is as it was.

    Hooks on the layers themselves stay outside what is compiled and act as always. Nothing may be
    attached to what is inside a layer.

    Args:
        layers: Decoder layers of one kind.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        # On a GPU the wrapper would need a CUDA toolkit beside torch's own libraries.
        is_on_cpu = next(layers[0].parameters()).device.type == "cpu"
        options: dict[str, str | int | bool | Any] | None = (
            {"cpp_wrapper": True} if is_on_cpu else None
        )
        self._compiled = [
            torch.compile(layer.forward, fullgraph=True, dynamic=False, options=options)
            for layer in layers
        ]
        self._forwards = ForwardSwap()
        self._limits: Any = None

    def __enter__(self) -> Self:
        for layer, compiled in zip(self._layers, self._compiled, strict=True):
            self._forwards.put(layer, compiled)
        self._limits = torch._dynamo.config.patch(
            recompile_limit=2 * _SHAPES, accumulated_recompile_limit=2 * _SHAPES
        )
        self._limits.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._limits.__exit__(kind, error, trace)
        self._forwards.restore()
