"""Absolute Gaussian error: a noise floor under all values alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aqn_tune.faults.base import Draws, FaultSpec
from aqn_tune.faults.references import Reference, reference_magnitude

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class AbsoluteGaussian(FaultSpec):
    """Every value carries an error that does not depend on itself: x + scale * r(x) * z, z standard normal.

    Unlike `relative_gaussian` it drowns the small values first, as the noise floor of an analog unit
    does. With the default reference `rms`, `scale` is the relative error of each token's vector,
    norm of the error / norm of x, so one level means the same in every layer; with `absolute` it is a
    standard deviation in the units of x, the same for a layer of small values and one of large ones. z is
    drawn afresh at every training step. The gradient is the identity (r(x) is taken without gradient).
    """

    kind: Literal["absolute_gaussian"] = "absolute_gaussian"
    scale: float = Field(
        ge=0.0,
        allow_inf_nan=False,
        description="Standard deviation of the error in units of r(x) (usual range 0.01-0.5).",
    )
    reference: Reference = Field(
        "rms",
        description="r(x): rms, mean_abs, std or token_max of each token, tensor_max, absolute (1).",
    )

    per_replica: ClassVar[tuple[str, ...]] = ("scale",)

    def is_stochastic(self) -> bool:
        """Return True: z is drawn afresh."""
        return True

    def is_off(self) -> bool:
        """Return whether there is no error."""
        return self.scale == 0

    def apply(self, x: Tensor, params: Mapping[str, Tensor], valid: Tensor, draws: Draws) -> Tensor:
        """Add the error; see `FaultSpec.apply` for shapes."""
        import torch

        with torch.no_grad():
            level = params["scale"] * reference_magnitude(self.reference, x, valid).double()
            error = level.to(x.dtype) * draws.normal()
        return x + error
