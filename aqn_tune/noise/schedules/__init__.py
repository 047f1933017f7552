"""Noise schedules: sigma over the steps of a training. A new one is one file and its name in `Schedule`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from aqn_tune.kinds import by_kind
from aqn_tune.noise.schedules.base import ScheduleSpec as ScheduleSpec
from aqn_tune.noise.schedules.constant import Constant
from aqn_tune.noise.schedules.epoch_aware import EpochAware
from aqn_tune.noise.schedules.geometric import Geometric
from aqn_tune.noise.schedules.linear import Linear

Schedule = Annotated[Geometric | Linear | Constant | EpochAware, Field(discriminator="kind")]
"""The schedule of a noise policy."""

SCHEDULES: dict[str, type[ScheduleSpec]] = by_kind(Schedule)
"""All of them by kind."""
