"""The geometric staircase of QeRL."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from aqn_tune.noise.schedules.base import ScheduleSpec, check_decay, stage_of


class Geometric(ScheduleSpec):
    """A staircase of `stages` values from sigma_start to sigma_end in equal ratios, after a warm-up of zero.

    Stage i has sigma_start * (sigma_end / sigma_start) ** (i / (stages - 1)); a single stage has
    sigma_start. `stages` = K - 1 with the default warm-up is QeRL's schedule of K stages (QeRL,
    arXiv 2510.11696): at 30 steps, K = 10, steps 0-2 have no noise, 3-5 have sigma_start.
    """

    kind: Literal["geometric"] = "geometric"
    sigma_start: float = Field(
        0.05, ge=0.0, allow_inf_nan=False, description="Standard deviation in the first stage."
    )
    sigma_end: float = Field(
        0.0005, gt=0.0, allow_inf_nan=False, description="Standard deviation in the last stage."
    )
    stages: int = Field(9, ge=1, description="Number of sigma values (QeRL's num_stages less one).")
    warmup_fraction: float | None = Field(
        None,
        ge=0.0,
        lt=1.0,
        allow_inf_nan=False,
        description="Share of the steps before the first stage, without noise; default 1 / (stages + 1).",
    )

    @model_validator(mode="after")
    def _decays(self) -> Geometric:
        if self.sigma_start > 0:
            check_decay(self.sigma_start, self.sigma_end)
        return self

    def level_at(self, step: int, total_steps: int) -> float:
        """Return sigma at `step`; see `ScheduleSpec.level_at`."""
        warmup = 1 / (self.stages + 1) if self.warmup_fraction is None else self.warmup_fraction
        stage = stage_of(step, total_steps, warmup, self.stages)
        if stage is None or self.sigma_start == 0:
            return 0.0
        exponent = stage / (self.stages - 1) if self.stages > 1 else 0.0
        return float(self.sigma_start * (self.sigma_end / self.sigma_start) ** exponent)

    def peak(self) -> float:
        """Return sigma_start; see `ScheduleSpec.peak`."""
        return self.sigma_start
