"""Where a number that is not finite came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def first_nonfinite(
    model: nn.Module, forward: Callable[[], Any], replica: int, of: int
) -> str | None:
    """Run `forward` once more and return the first module whose output for a replica is not finite.

    The model sees `of` replicas of equally many rows. Returns a name such as "model.layers.10", None
    when every module's output is finite. Draws are keyed, so the pass is the one that was made before.
    """
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            value = out[0] if isinstance(out, tuple) and out else out
            if found or not isinstance(value, Tensor) or not value.is_floating_point():
                return
            rows = value.shape[0] // of
            part = value[replica * rows : (replica + 1) * rows] if rows else value
            if not bool(torch.isfinite(part).all()):
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(look(name)) for name, module in model.named_modules() if name
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
