"""Bias: a unit that errs in the same direction every time."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from aqn_tune.faults.base import Draws, FaultSpec
from aqn_tune.faults.references import Reference, reference_magnitude

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_DEFAULT_REFERENCES: dict[str, Reference] = {"offset": "rms", "sign": "absolute"}


class Bias(FaultSpec):
    """A systematic error: an offset, a push away from zero, or a wrong gain.

    offset: x + scale * r(x), the same shift for all values of a token; with the default reference
        `rms` the relative error of each token's vector is abs(scale).
    sign: x + scale * r(x) * sign(x), which leaves zeros alone; by default r(x) = 1, a shift in the
        units of x.
    gain: (1 + scale) * x, with relative error abs(scale).

    A negative scale turns the error round. The gradient of offset and sign is the identity (r(x) and
    sign(x) are taken without gradient), that of gain is 1 + scale. In bfloat16 a gain below about
    0.002 is lost to rounding.
    """

    kind: Literal["bias"] = "bias"
    scale: float = Field(
        allow_inf_nan=False,
        description="Size of the error in units of r(x), of x itself for gain; may be negative.",
    )
    form: Literal["offset", "sign", "gain"] = Field(
        "offset",
        description="offset: x + scale * r(x); sign: x + scale * r(x) * sign(x); gain: (1 + scale) * x.",
    )
    reference: Reference | None = Field(
        None,
        description="r(x): rms (the default of offset), absolute (1, the default of sign), mean_abs, std, "
        "token_max, tensor_max; gain has none.",
    )

    per_replica: ClassVar[tuple[str, ...]] = ("scale",)

    @model_validator(mode="after")
    def _gain_has_no_reference(self) -> Bias:
        if self.form == "gain" and self.reference is not None:
            raise ValueError(
                f"form gain with reference {self.reference}: a gain is relative to x itself; "
                "leave the reference out"
            )
        return self

    def measured_by(self) -> Reference | None:
        """Return the reference in use: the declared one, or the form's default; None for a gain."""
        return self.reference or _DEFAULT_REFERENCES.get(self.form)

    def static(self) -> dict[str, object]:
        """Return what must be equal to share a pass; a default and the same reference spelt out are."""
        return {**super().static(), "reference": self.measured_by()}

    def is_off(self) -> bool:
        """Return whether there is no error."""
        return self.scale == 0

    def apply(self, x: Tensor, params: Mapping[str, Tensor], valid: Tensor, draws: Draws) -> Tensor:
        """Add the error; see `FaultSpec.apply` for shapes."""
        import torch

        reference = self.measured_by()
        if reference is None:
            # Not x * (1 + scale): in bfloat16 that would round the scale to a multiple of 2^-7.
            return x + params["scale"].to(x.dtype) * x
        with torch.no_grad():
            level = params["scale"] * reference_magnitude(reference, x, valid).double()
            error = level.to(x.dtype)
            if self.form == "sign":
                error = error * x.sign()
        return x + error
