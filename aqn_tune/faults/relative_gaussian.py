"""Relative Gaussian error: a noisy matrix unit."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from aqn_tune.faults.base import GRADIENT_SITES, Draws, FaultSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class RelativeGaussian(FaultSpec):
    """Every value carries an error proportional to itself: x + scale * abs(x) * z, z standard normal.

    z is drawn afresh at every training step; an evaluation batch has its own fixed draw, the same
    for all arms. The gradient is the identity (abs(x) is taken without gradient); `backward_scale`
    makes the products of the backward pass err too: the noisy-operations setting is
    `scale: 0.05, backward_scale: 0.05`.
    """

    kind: Literal["relative_gaussian"] = "relative_gaussian"
    modules: tuple[str, ...] = Field(
        ("linear",),
        description="Globs over module names; the default is every linear layer of the decoder layer.",
    )
    scale: float = Field(
        0.05,
        ge=0.0,
        allow_inf_nan=False,
        description="Standard deviation of the relative error (0.05 is the '5 %' setting).",
    )
    backward_scale: float = Field(
        0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Standard deviation of the relative error of the gradients that the module hands back.",
    )

    per_replica: ClassVar[tuple[str, ...]] = ("scale",)

    @model_validator(mode="after")
    def _one_backward_error(self) -> RelativeGaussian:
        if self.backward_scale and self.site in GRADIENT_SITES:
            raise ValueError(
                f"site {self.site} is a gradient already: give `scale` its error, not `backward_scale`"
            )
        return self

    def is_stochastic(self) -> bool:
        """Return True: z is drawn afresh."""
        return True

    def is_off(self) -> bool:
        """Return whether the forward values are exact."""
        return self.scale == 0

    def companions(self, *, weights_trained: bool) -> tuple[FaultSpec, ...]:
        """Return the errors of the backward products: of the input's gradient, and of the weight's."""
        if not self.backward_scale:
            return ()
        changes = {"scale": self.backward_scale, "backward_scale": 0.0}
        sites = ("grad_input", "grad_weight") if weights_trained else ("grad_input",)
        return tuple(self.model_copy(update={**changes, "site": site}) for site in sites)

    def apply(self, x: Tensor, params: Mapping[str, Tensor], valid: Tensor, draws: Draws) -> Tensor:
        """Add the error; see `FaultSpec.apply` for shapes."""
        import torch

        with torch.no_grad():
            error = x.detach().abs().mul_(draws.normal()).mul_(params["scale"].to(x.dtype))
        return x + error
