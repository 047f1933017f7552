"""What a schedule is: sigma as a function of the step."""

from __future__ import annotations

from abc import abstractmethod

from aqn_tune.study.base import Spec


class ScheduleSpec(Spec):
    """A schedule of the noise level. Subclasses are pure arithmetic: no torch, no state."""

    @abstractmethod
    def sigma_at(self, step: int, total_steps: int) -> float:
        """Return sigma at `step`, where steps run from 0 to `total_steps` - 1 in training.

        `step` = `total_steps` is allowed and gives the value the schedule ends on.
        """

    def table(self, total_steps: int) -> tuple[float, ...]:
        """Return sigma for every training step, `total_steps` values."""
        return tuple(self.sigma_at(step, total_steps) for step in range(total_steps))


def stage_of(step: int, total_steps: int, warmup_fraction: float, stages: int) -> int | None:
    """Return which of `stages` equal stretches `step` lies in, None during warm-up.

    The warm-up takes the first `warmup_fraction` of the steps and the stages share the rest. At
    warmup_fraction = 1 / (stages + 1) this is QeRL's division of a run into K = stages + 1 intervals:
    step t lies in interval floor(t * K / T).
    """
    tolerance = 1e-9  # 1/10 + 9 * 1/10 must not fall a rounding error short of a boundary
    position = step / max(total_steps, 1)
    if position < warmup_fraction - tolerance:
        return None
    width = (1.0 - warmup_fraction) / stages
    return min(int((position - warmup_fraction) / width + tolerance), stages - 1)
