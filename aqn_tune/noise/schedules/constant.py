"""The same sigma throughout."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aqn_tune.noise.schedules.base import ScheduleSpec, stage_of


class Constant(ScheduleSpec):
    """One sigma for the whole training, after an optional warm-up of zero."""

    kind: Literal["constant"] = "constant"
    sigma: float = Field(
        0.05, ge=0.0, allow_inf_nan=False, description="Standard deviation of the noise."
    )
    warmup_fraction: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        allow_inf_nan=False,
        description="Share of the steps before the noise begins.",
    )

    def level_at(self, step: int, total_steps: int) -> float:
        """Return sigma at `step`; see `ScheduleSpec.level_at`."""
        stage = stage_of(step, total_steps, self.warmup_fraction, 1)
        return 0.0 if stage is None else self.sigma

    def peak(self) -> float:
        """Return sigma; see `ScheduleSpec.peak`."""
        return self.sigma
