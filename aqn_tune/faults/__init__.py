"""Hardware faults. A new kind is one file here and its name in `Fault`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from aqn_tune.faults.absolute_gaussian import AbsoluteGaussian
from aqn_tune.faults.base import FaultSpec as FaultSpec
from aqn_tune.faults.bias import Bias
from aqn_tune.faults.bit_flip import BitFlip
from aqn_tune.faults.dead_zone import DeadZone
from aqn_tune.faults.relative_gaussian import RelativeGaussian
from aqn_tune.faults.saturation import Saturation
from aqn_tune.faults.spike import Spike
from aqn_tune.faults.stuck_at import StuckAt
from aqn_tune.kinds import by_kind

Fault = Annotated[
    DeadZone | RelativeGaussian | AbsoluteGaussian | Bias | Saturation | StuckAt | Spike | BitFlip,
    Field(discriminator="kind"),
]
"""One entry of a scenario's list of faults."""

FAULTS: dict[str, type[FaultSpec]] = by_kind(Fault)
"""All of them by kind."""
