"""What a schedule is: sigma as a function of the step."""

from __future__ import annotations

import math
from abc import abstractmethod

from pydantic import Field

from aqn_tune.errors import UserError
from aqn_tune.study.base import Spec

TOLERANCE = 1e-9
"""Share of a training by which a boundary may be missed and still count as met: 1/10 + 9 * 1/10 must
not fall a rounding error short of 1."""


class ScheduleSpec(Spec):
    """A schedule of the noise level. Subclasses are pure arithmetic: no torch, no state."""

    # Left out of dumps at its default, so that schedules written before it existed keep their identity.
    stop_fraction: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        allow_inf_nan=False,
        exclude_if=lambda fraction: fraction == 0,
        description="Share of the steps at the end without noise; the schedule still spans all steps.",
    )

    @abstractmethod
    def level_at(self, step: int, total_steps: int) -> float:
        """Return sigma at `step` as the schedule lays it out over all steps, `stop_fraction` aside.

        `step` runs from 0 to `total_steps`; the last is the value the schedule ends on.
        """

    @abstractmethod
    def peak(self) -> float:
        """Return the largest sigma of the schedule, whatever the number of steps."""

    def sigma_at(self, step: int, total_steps: int) -> float:
        """Return sigma at `step`, where steps run from 0 to `total_steps` - 1 in training.

        `step` = `total_steps` is allowed and gives the value the schedule ends on. Noise is off from
        the first step t with t / total_steps >= 1 - stop_fraction; steps before it have the sigma
        that they would have without `stop_fraction`.
        """
        if self.stop_fraction and step >= first_step(1.0 - self.stop_fraction, total_steps):
            return 0.0
        sigma = self.level_at(step, total_steps)
        if not (math.isfinite(sigma) and sigma >= 0):
            raise UserError(
                f"noise: schedule {getattr(self, 'kind', type(self).__name__)!r} gives a sigma of "
                f"{sigma} at step {step} of {total_steps}; sigma is finite and not below 0"
            )
        return sigma

    def table(self, total_steps: int) -> tuple[float, ...]:
        """Return sigma for every training step, `total_steps` values."""
        return tuple(self.sigma_at(step, total_steps) for step in range(total_steps))


def first_step(share: float, total_steps: int) -> int:
    """Return the first step t with t / total_steps >= share."""
    return max(math.ceil((share - TOLERANCE) * max(total_steps, 1)), 0)


def stage_of(step: int, total_steps: int, warmup_fraction: float, stages: int) -> int | None:
    """Return which of `stages` equal stretches `step` lies in, None during warm-up.

    The warm-up takes the first `warmup_fraction` of the steps and the stages share the rest. At
    warmup_fraction = 1 / (stages + 1) this is QeRL's division of a run into K = stages + 1 intervals:
    step t lies in interval floor(t * K / T).
    """
    if step < first_step(warmup_fraction, total_steps):
        return None
    position = step / max(total_steps, 1)
    width = (1.0 - warmup_fraction) / stages
    return min(int((position - warmup_fraction) / width + TOLERANCE), stages - 1)


def check_decay(sigma_start: float, sigma_end: float) -> None:
    """Raise ValueError for a sigma that would rise.

    A rising sigma noises the model most when it should settle; nothing in the record of AQN does it.
    """
    if sigma_end > sigma_start:
        raise ValueError(
            f"sigma_end {sigma_end} is above sigma_start {sigma_start}; the schedule decays "
            "(for one level throughout set both to it, or use schedule constant)"
        )
