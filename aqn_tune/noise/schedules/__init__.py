"""Noise schedules: sigma over the steps of a training. A new one is one file and one line in `SCHEDULES`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from aqn_tune.noise.schedules.base import ScheduleSpec as ScheduleSpec
from aqn_tune.noise.schedules.constant import Constant
from aqn_tune.noise.schedules.epoch_aware import EpochAware
from aqn_tune.noise.schedules.geometric import Geometric
from aqn_tune.noise.schedules.linear import Linear

SCHEDULES: dict[str, type[ScheduleSpec]] = {
    "geometric": Geometric,
    "linear": Linear,
    "constant": Constant,
    "epoch_aware": EpochAware,
}

Schedule = Annotated[Geometric | Linear | Constant | EpochAware, Field(discriminator="kind")]
"""The schedule of a noise policy."""
