"""Noise carriers. A new one is one file and its name in `Carrier`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from aqn_tune.kinds import by_kind
from aqn_tune.noise.carriers.base import CarrierSpec as CarrierSpec
from aqn_tune.noise.carriers.base import Noised as Noised
from aqn_tune.noise.carriers.base import NoiseSite as NoiseSite
from aqn_tune.noise.carriers.hidden import Hidden
from aqn_tune.noise.carriers.linear_weight import LinearWeight
from aqn_tune.noise.carriers.rmsnorm_weight import RmsnormWeight

Carrier = Annotated[Hidden | RmsnormWeight | LinearWeight, Field(discriminator="kind")]
"""The carrier of a noise policy."""

CARRIERS: dict[str, type[CarrierSpec]] = by_kind(Carrier)
"""All of them by kind."""
