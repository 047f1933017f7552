"""Saturation: a unit that clips large values."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from aqn_tune.faults.base import Draws, TrueGradientFault
from aqn_tune.faults.references import Reference, reference_magnitude

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class Saturation(TrueGradientFault):
    """Values beyond +-L are clipped to it: clamp(x, -L, L) with L = limit * r(x).

    A smaller limit is a harsher fault. The gradient is one up to L and zero beyond it unless `ste` is
    set; r(x) is taken without gradient. An infinite value is clipped where r(x) is finite (reference
    `absolute`), NaN stays NaN.
    """

    kind: Literal["saturation"] = "saturation"
    limit: float = Field(
        gt=0.0,
        allow_inf_nan=False,
        description="Largest magnitude that the unit can hold, in units of r(x) (usual range 0.1-0.9).",
    )
    reference: Reference = Field(
        "token_max",
        description="r(x): token_max, tensor_max, rms, mean_abs, std, absolute (1).",
    )

    per_replica: ClassVar[tuple[str, ...]] = ("limit",)

    @model_validator(mode="after")
    def _clips_something(self) -> Saturation:
        if self.reference in ("token_max", "tensor_max") and self.limit > 1:
            raise ValueError(
                f"limit {self.limit} with reference {self.reference} clips nothing; "
                "allowed are values up to 1, at which the fault is off"
            )
        return self

    def is_off(self) -> bool:
        """Return whether nothing is clipped."""
        return self.reference in ("token_max", "tensor_max") and self.limit == 1

    def apply(self, x: Tensor, params: Mapping[str, Tensor], valid: Tensor, draws: Draws) -> Tensor:
        """Clip the large values; see `FaultSpec.apply` for shapes."""
        import torch

        with torch.no_grad():
            r = reference_magnitude(self.reference, x, valid)
            limit = (params["limit"] * r.double()).to(x.dtype)
            beyond = x.abs() > limit
            clipped = torch.copysign(limit.expand_as(x), x)
        return torch.where(beyond, clipped, x)
