"""Relative Gaussian error: a noisy matrix unit."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aqn_tune.faults.base import Faulted, FaultSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor


class RelativeGaussian(FaultSpec):
    """Every value carries an error proportional to itself: x + scale * abs(x) * z, z standard normal.

    z is drawn afresh at every training step; an evaluation batch has its own fixed draw, the same
    for all arms. The gradient is the identity (abs(x) is taken without gradient).
    """

    kind: Literal["relative_gaussian"] = "relative_gaussian"
    modules: tuple[str, ...] = Field(
        ("*_proj",),
        description="Globs over module names; the default is every projection of the decoder layer.",
    )
    scale: float = Field(
        0.05,
        ge=0.0,
        allow_inf_nan=False,
        description="Standard deviation of the relative error (0.05 is the '5 %' setting).",
    )

    per_replica: ClassVar[dict[str, float]] = {"scale": 0.0}

    def apply(
        self,
        x: Tensor,
        params: Mapping[str, Tensor],
        valid: Tensor,
        normal: Callable[[], Tensor],
    ) -> Faulted:
        """Add the error; see `FaultSpec.apply` for shapes."""
        import torch

        with torch.no_grad():
            error = x.detach().abs() * normal() * params["scale"].to(x.dtype)
            touched = (error != 0) & valid
        return Faulted(x + error, touched)
