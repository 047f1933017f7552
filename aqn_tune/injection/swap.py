"""Other `forward` methods in the place of a model's own, for a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class ForwardSwap:
    """Puts functions in the place of the `forward` of modules, and takes them away again.

    A function hides the method of the class, or another function that was put there before, which is
    back after `restore`. Hooks of the module stay and act around it.
    """

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, Any]] = []

    def put(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Let calls of `module` run `forward`."""
        self._before.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    def restore(self) -> None:
        """Let every module run what it ran before."""
        while self._before:
            module, before = self._before.pop()
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before
