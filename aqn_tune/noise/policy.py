"""A noise policy, and what it comes to in a given model and training."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator

from aqn_tune.errors import UserError
from aqn_tune.noise.carriers import Carrier
from aqn_tune.noise.carriers.hidden import Hidden
from aqn_tune.noise.schedules import Schedule
from aqn_tune.noise.schedules.geometric import Geometric
from aqn_tune.noise.targeting import Targeting
from aqn_tune.noise.targeting.uniform import Global
from aqn_tune.study.base import Spec


class EffectiveNoise(Spec):
    """The noise that a training really gets: what is injected, hashed and logged.

    Two policies that come to the same noise are the same training.
    """

    carrier: Carrier = Field(description="The quantity that carries the noise.")
    sigma: tuple[float, ...] = Field(description="Sigma at each training step.")
    multipliers: tuple[float, ...] = Field(description="Multiplier of each decoder layer.")

    def energy(self) -> float:
        """Return the sum of squared multipliers: the dose, in units of one layer."""
        return math.fsum(m * m for m in self.multipliers)


class NoisePolicy(Spec):
    """Adaptive Quantization Noise: what carries it, how sigma falls, which layers get it."""

    carrier: Carrier = Field(Hidden(), description="The quantity that carries the noise.")
    schedule: Schedule = Field(Geometric(), description="Sigma over the steps of the training.")
    targeting: Targeting = Field(Global(), description="Which layers get the noise.")
    normalise: Literal["none", "energy"] = Field(
        "none",
        description="energy rescales the multipliers so that their sum of squares is that of global.",
    )

    @field_validator("carrier", "schedule", "targeting", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """Let `targeting: global` stand for `targeting: {kind: global}`."""
        return {"kind": value} if isinstance(value, str) else value

    def resolve(
        self, *, steps: int, layer_count: int, fault_layers: tuple[int, ...]
    ) -> EffectiveNoise | None:
        """Return the effective noise of a training, None for targeting `none`.

        Raises UserError when the policy declares noise and would inject none.
        """
        multipliers = self.targeting.multipliers(layer_count, fault_layers)
        if self.targeting.kind == "none":
            return None
        sigma = self.schedule.table(steps)
        energy = math.fsum(m * m for m in multipliers)
        if energy == 0 or max(sigma) == 0:
            raise UserError(
                f"noise: targeting {self.targeting.kind!r} with schedule {self.schedule.kind!r} injects "
                f"nothing in {steps} steps (every sigma or every multiplier is 0); "
                "write `targeting: none` if no noise is meant"
            )
        if self.normalise == "energy":
            factor = math.sqrt(layer_count / energy)
            multipliers = tuple(m * factor for m in multipliers)
        return EffectiveNoise(carrier=self.carrier, sigma=sigma, multipliers=multipliers)
