"""Dead zone: a unit that flushes small values to zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from aqn_tune.faults.base import Draws, TrueGradientFault
from aqn_tune.faults.references import Reference, reference_magnitude

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class DeadZone(TrueGradientFault):
    """Values whose magnitude lies below `threshold * r(x)` become zero: x * 1[abs(x) >= threshold * r(x)].

    A larger threshold is a harsher fault, and the same threshold means different things in different
    layers: read the affected fraction beside it. The gradient is the mask's own unless `ste` is set.
    """

    kind: Literal["dead_zone"] = "dead_zone"
    threshold: float = Field(
        ge=0.0,
        allow_inf_nan=False,
        description="Values below threshold * r(x) are flushed to zero (fraction; usual range 0.01-0.5).",
    )
    reference: Reference | Literal["quantile"] = Field(
        "token_max",
        description="r(x): token_max, tensor_max, rms, absolute (1), quantile (threshold: zeroed fraction).",
    )

    @model_validator(mode="after")
    def _leaves_something(self) -> DeadZone:
        if self.reference in ("token_max", "tensor_max", "quantile") and self.threshold > 1:
            raise ValueError(
                f"threshold {self.threshold} with reference {self.reference} flushes every value; "
                "allowed are 0 to 1"
            )
        return self

    per_replica: ClassVar[tuple[str, ...]] = ("threshold",)

    def is_off(self) -> bool:
        """Return whether nothing is flushed."""
        return self.threshold == 0

    def apply(self, x: Tensor, params: Mapping[str, Tensor], valid: Tensor, draws: Draws) -> Tensor:
        """Zero the small values; see `FaultSpec.apply` for shapes."""
        import torch

        with torch.no_grad():
            magnitude = x.detach().abs()
            if self.reference == "quantile":
                cut = self._quantile(magnitude, params["threshold"])
            else:
                r = reference_magnitude(self.reference, x, valid)
                cut = (params["threshold"] * r.double()).to(x.dtype)
            dead = magnitude < cut
        return x.masked_fill(dead, 0.0)

    @staticmethod
    def _quantile(magnitude: Tensor, fraction: Tensor) -> Tensor:
        """Return per token the magnitude below which `fraction` of its values lie, [K, N, 1]."""
        import torch

        ordered = magnitude.sort(dim=2).values
        size = ordered.shape[2]
        index = (fraction * size).floor().clamp(0, size).long().expand(-1, ordered.shape[1], 1)
        beyond = torch.full_like(ordered[:, :, :1], float("inf"))
        cut = torch.cat([ordered, beyond], dim=2).gather(2, index)
        return torch.where(index == 0, torch.zeros_like(cut), cut)
