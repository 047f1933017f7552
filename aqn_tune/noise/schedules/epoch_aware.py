"""A geometric staircase that begins anew, with a pause, in every epoch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from aqn_tune.noise.schedules.base import ScheduleSpec, check_decay


class EpochAware(ScheduleSpec):
    """A pause without noise and then a geometric staircase in each of `epochs` equal parts of the training.

    Epoch e of E starts on b_e = sigma_start * (sigma_end / sigma_start) ** (e / E) and falls to
    b_(e+1) over `stages_per_epoch` = m values in equal ratios (a single one is b_e); the first
    1 / (m + 1) of each epoch has no noise. So the last value of an epoch is the first of the next.
    With one epoch it is `geometric` with m stages and its default warm-up.

    The epochs are those of the schedule: equal shares of the training's steps, whatever the size of
    the data. With fewer than (m + 1) * E steps some values are skipped.
    """

    kind: Literal["epoch_aware"] = "epoch_aware"
    sigma_start: float = Field(
        0.05,
        ge=0.0,
        allow_inf_nan=False,
        description="Standard deviation at the start of the first epoch.",
    )
    sigma_end: float = Field(
        0.0005,
        gt=0.0,
        allow_inf_nan=False,
        description="Standard deviation at the end of the last epoch.",
    )
    epochs: int = Field(2, ge=1, description="Number of equal parts of the training.")
    stages_per_epoch: int = Field(5, ge=1, description="Number of sigma values in each epoch.")

    @model_validator(mode="after")
    def _decays(self) -> EpochAware:
        if self.sigma_start > 0:
            check_decay(self.sigma_start, self.sigma_end)
        return self

    def level_at(self, step: int, total_steps: int) -> float:
        """Return sigma at `step`; see `ScheduleSpec.level_at`."""
        intervals = self.stages_per_epoch + 1
        last = self.epochs * intervals - 1
        epoch, stage = divmod(min(step * (last + 1) // max(total_steps, 1), last), intervals)
        if stage == 0 or self.sigma_start == 0:
            return 0.0
        inside = (stage - 1) / (self.stages_per_epoch - 1) if self.stages_per_epoch > 1 else 0.0
        exponent = (epoch + inside) / self.epochs
        return float(self.sigma_start * (self.sigma_end / self.sigma_start) ** exponent)

    def peak(self) -> float:
        """Return sigma_start; see `ScheduleSpec.peak`."""
        return self.sigma_start
