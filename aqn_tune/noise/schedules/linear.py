"""A straight line from one sigma to another."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from aqn_tune.noise.schedules.base import ScheduleSpec, check_decay, first_step


class Linear(ScheduleSpec):
    """Sigma falls by the same amount at every step, after an optional warm-up of zero.

    The first step after the warm-up has sigma_start, and the end of the training (step T of T) has
    sigma_end, so the last training step, T - 1, lies one decrement above sigma_end. Unlike the
    geometric staircase it may end on 0.
    """

    kind: Literal["linear"] = "linear"
    sigma_start: float = Field(
        0.05,
        ge=0.0,
        allow_inf_nan=False,
        description="Standard deviation at the first step after the warm-up.",
    )
    sigma_end: float = Field(
        0.0005,
        ge=0.0,
        allow_inf_nan=False,
        description="Standard deviation at the end of the training; may be 0.",
    )
    warmup_fraction: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        allow_inf_nan=False,
        description="Share of the steps before the noise begins.",
    )

    @model_validator(mode="after")
    def _decays(self) -> Linear:
        check_decay(self.sigma_start, self.sigma_end)
        return self

    def level_at(self, step: int, total_steps: int) -> float:
        """Return sigma at `step`; see `ScheduleSpec.level_at`."""
        first = first_step(self.warmup_fraction, total_steps)
        if step < first:
            return 0.0
        if step >= total_steps:
            return self.sigma_end
        share = (step - first) / (total_steps - first)
        return self.sigma_start + (self.sigma_end - self.sigma_start) * share

    def peak(self) -> float:
        """Return sigma_start; see `ScheduleSpec.peak`."""
        return self.sigma_start
