"""Noise carriers. A new one is one file and one line in `CARRIERS`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from aqn_tune.noise.carriers.base import CarrierSpec as CarrierSpec
from aqn_tune.noise.carriers.base import Noised as Noised
from aqn_tune.noise.carriers.base import NoiseSite as NoiseSite
from aqn_tune.noise.carriers.hidden import Hidden
from aqn_tune.noise.carriers.linear_weight import LinearWeight
from aqn_tune.noise.carriers.rmsnorm_weight import RmsnormWeight

CARRIERS: dict[str, type[CarrierSpec]] = {
    "hidden": Hidden,
    "rmsnorm_weight": RmsnormWeight,
    "linear_weight": LinearWeight,
}

Carrier = Annotated[Hidden | RmsnormWeight | LinearWeight, Field(discriminator="kind")]
"""The carrier of a noise policy."""
