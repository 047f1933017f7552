"""Spikes: single values replaced by huge random ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aqn_tune.faults.base import Draws, Persistence, TrueGradientFault
from aqn_tune.faults.places import hit_values
from aqn_tune.faults.references import reference_magnitude

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class Spike(TrueGradientFault):
    """With `probability` a value is replaced by factor * max(abs(x)) * z, z standard normal.

    The maximum is that of the replicate's whole tensor without padding, so batch size and padding are
    part of the fault. z is drawn afresh at every training step. By default the values that are hit are
    too; a permanent or intermittent spike keeps its places. The gradient is zero where a value was
    replaced unless `ste` is set.
    """

    kind: Literal["spike"] = "spike"
    probability: float = Field(
        ge=0.0, le=1.0, description="Probability that a value is replaced, per value and call."
    )
    factor: float = Field(
        10.0,
        gt=0.0,
        allow_inf_nan=False,
        description="Standard deviation of a spike in units of the tensor's largest magnitude.",
    )
    persistence: Persistence = Field(
        "transient",
        description="transient: other values in every call; permanent: the same values in every call; "
        "intermittent: the same values, in some calls only.",
    )

    per_replica: ClassVar[tuple[str, ...]] = ("probability", "factor")

    def is_stochastic(self) -> bool:
        """Return True: z is drawn afresh."""
        return True

    def uses_device_seed(self) -> bool:
        """Return whether the values that are hit are the device's own."""
        return self.persistence != "transient"

    def may_rest(self) -> bool:
        """Return True: a rare spike may pass an evaluation by."""
        return True

    def is_off(self) -> bool:
        """Return whether nothing is replaced."""
        return self.probability == 0

    def apply(self, x: Tensor, params: Mapping[str, Tensor], valid: Tensor, draws: Draws) -> Tensor:
        """Replace the values that are hit; see `FaultSpec.apply` for shapes."""
        import torch

        with torch.no_grad():
            largest = reference_magnitude("tensor_max", x, valid)
            level = (params["factor"] * largest.double()).to(x.dtype)
            hit = torch.zeros(len(x), x[0].numel(), dtype=torch.bool, device=x.device)
            z = torch.zeros(hit.shape, dtype=x.dtype, device=x.device)
            rates = params["probability"].flatten().tolist()
            places = hit_values(self, valid, x.shape[2], draws, rates=rates)
            sources = draws.generators("values", fresh=True)
            for replica, (where, source) in enumerate(zip(places, sources, strict=True)):
                drawn = torch.randn(len(where), generator=source, dtype=torch.float32)
                hit[replica, where.to(x.device)] = True
                z[replica, where.to(x.device)] = drawn.to(x.device, x.dtype)
            spikes = level * z.view(x.shape)
        return torch.where(hit.view(x.shape), spikes, x)
