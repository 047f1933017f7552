"""Noise targetings: which layers get how much. A new one is one file and its name in `Targeting`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from aqn_tune.kinds import by_kind
from aqn_tune.noise.targeting.base import Phase as Phase
from aqn_tune.noise.targeting.base import TargetingSpec as TargetingSpec
from aqn_tune.noise.targeting.depth import Depth
from aqn_tune.noise.targeting.multipliers import Multipliers
from aqn_tune.noise.targeting.scores import Scores
from aqn_tune.noise.targeting.subset import Healthy, Random, Targeted, Window
from aqn_tune.noise.targeting.uniform import Global, NoTargeting
from aqn_tune.noise.targeting.zone import Zone

Targeting = Annotated[
    NoTargeting
    | Global
    | Targeted
    | Healthy
    | Multipliers
    | Scores
    | Window
    | Zone
    | Depth
    | Random,
    Field(discriminator="kind"),
]
"""The targeting of a noise policy."""

TARGETINGS: dict[str, type[TargetingSpec]] = by_kind(Targeting)
"""All of them by kind."""
