"""Stuck-at: places that hold one value whatever is written to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aqn_tune.faults.base import Draws, TrueGradientFault

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class StuckAt(TrueGradientFault):
    """The faulty places hold `value`, in the units of x: x[mask] = value.

    `density` and `axis` say which places those are, and have to be thought about: with density 1
    nothing of the tensor is left. The gradient at a stuck place is zero unless `ste` is set.
    """

    kind: Literal["stuck_at"] = "stuck_at"
    value: float = Field(
        allow_inf_nan=False, description="What a faulty place holds, in the units of x."
    )
    density: float = Field(
        gt=0, le=1, description="Share of the places (see `axis`) that are stuck; 1 is every place."
    )

    per_replica: ClassVar[tuple[str, ...]] = ("value",)

    def apply(self, x: Tensor, params: Mapping[str, Tensor], valid: Tensor, draws: Draws) -> Tensor:
        """Return the value everywhere; see `FaultSpec.apply` for shapes."""
        import torch

        everywhere = torch.ones((1, 1, 1), dtype=torch.bool, device=x.device)
        # A choice, not a constant: the result stays in the graph, with a gradient of zero.
        return torch.where(everywhere, params["value"].to(x.dtype), x)
