"""Hardware faults. A new kind is one file here and one line in `FAULTS`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from aqn_tune.faults.base import Faulted as Faulted
from aqn_tune.faults.base import FaultSpec as FaultSpec
from aqn_tune.faults.dead_zone import DeadZone
from aqn_tune.faults.relative_gaussian import RelativeGaussian

FAULTS: dict[str, type[FaultSpec]] = {
    "dead_zone": DeadZone,
    "relative_gaussian": RelativeGaussian,
}

Fault = Annotated[DeadZone | RelativeGaussian, Field(discriminator="kind")]
"""One entry of a scenario's list of faults."""
