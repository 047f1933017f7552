"""A noise policy, and what it comes to in a given model and training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from aqn_tune.errors import UserError
from aqn_tune.noise.carriers import Carrier
from aqn_tune.noise.carriers.hidden import Hidden
from aqn_tune.noise.effective import EffectiveNoise as EffectiveNoise
from aqn_tune.noise.effective import LaterMultipliers, Redraw
from aqn_tune.noise.schedules import Schedule
from aqn_tune.noise.schedules.base import first_step
from aqn_tune.noise.schedules.geometric import Geometric
from aqn_tune.noise.targeting import Phase, Targeting
from aqn_tune.noise.targeting.uniform import Global
from aqn_tune.study.base import Spec


class NoisePolicy(Spec):
    """Adaptive Quantization Noise: what carries it, how sigma falls, which layers get it."""

    carrier: Carrier = Field(Hidden(), description="The quantity that carries the noise.")
    schedule: Schedule = Field(Geometric(), description="Sigma over the steps of the training.")
    targeting: Targeting = Field(Global(), description="Which layers get the noise.")
    normalise: Literal["none", "energy"] = Field(
        "none",
        description="energy rescales the multipliers so that the dose, their sum of squares, is global's.",
    )
    # Left out of dumps at its default, so that studies written before it existed keep their identity.
    redraw: Redraw = Field(
        "step",
        exclude_if=lambda redraw: redraw == "step",
        description="Draw afresh at every optimiser step, every microbatch or every forward pass.",
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

        It is in canonical form: sigma is 0 where every multiplier is, multipliers change at a step
        with noise, and a phase that no such step belongs to is left out. `normalise: energy` scales
        the multipliers of all phases by one factor.

        Raises UserError when the policy declares noise and would inject none.
        """
        phases = self.targeting.phases(layer_count, fault_layers)
        if self.targeting.kind == "none":
            return None
        table = self.schedule.table(steps)
        by_step = [_multipliers_at(phases, step, steps) for step in range(steps)]
        sigma = tuple(s if any(m) else 0.0 for s, m in zip(table, by_step, strict=True))
        changes: list[tuple[int, tuple[float, ...]]] = []
        for step, multipliers in enumerate(by_step):
            if sigma[step] > 0 and (not changes or changes[-1][1] != multipliers):
                changes.append((step, multipliers))
        noise = self._effective(sigma, changes) if changes else None
        if noise is None or noise.energy() == 0:
            raise UserError(
                f"noise: targeting {self.targeting.kind!r} with schedule {self.schedule.kind!r} injects "
                f"nothing in {steps} steps (every sigma or every multiplier is 0); "
                "write `targeting: none` if no noise is meant"
            )
        if not math.isfinite(noise.energy()):
            raise UserError("noise: the squares of the multipliers leave the range of numbers")
        if self.normalise == "energy":
            factor = math.sqrt(layer_count / noise.energy())
            scaled = [(step, tuple(m * factor for m in values)) for step, values in changes]
            return self._effective(sigma, scaled)
        return noise

    def cautions(self) -> tuple[str, ...]:
        """Return one sentence for each thing about the policy that is known to go wrong, for `plan`.

        They are about the declared schedule; multipliers above 1 come on top.
        """
        return () if self.targeting.kind == "none" else self.carrier.cautions(self.schedule.peak())

    def _effective(
        self, sigma: tuple[float, ...], changes: Sequence[tuple[int, tuple[float, ...]]]
    ) -> EffectiveNoise:
        (_, first), *rest = changes
        later = tuple(LaterMultipliers(step=step, multipliers=values) for step, values in rest)
        return EffectiveNoise(
            carrier=self.carrier, sigma=sigma, multipliers=first, later=later, redraw=self.redraw
        )


def _multipliers_at(phases: Sequence[Phase], step: int, steps: int) -> tuple[float, ...]:
    begun = [phase for phase in phases if first_step(phase.start, steps) <= step]
    return begun[-1].multipliers
