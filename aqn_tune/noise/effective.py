"""The noise that a training really gets."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from aqn_tune.noise.carriers import Carrier
from aqn_tune.study.base import Spec

Redraw = Literal["step", "microbatch", "forward"]
"""How long a draw of the noise lasts.

step: one draw for all microbatches of an optimiser step; microbatch: a fresh draw for each
gradient-accumulation microbatch; forward: a fresh draw for every forward pass of the model.
"""


class LaterMultipliers(Spec):
    """The multipliers from one step of the training on."""

    step: int = Field(ge=1, description="First training step that has them.")
    multipliers: tuple[float, ...] = Field(description="Multiplier of each decoder layer.")


class EffectiveNoise(Spec):
    """The noise that a training really gets: what is injected, hashed and logged.

    Two policies that come to the same sigma and multipliers at every step are the same training.
    """

    carrier: Carrier = Field(description="The quantity that carries the noise.")
    sigma: tuple[float, ...] = Field(description="Sigma at each training step.")
    multipliers: tuple[float, ...] = Field(description="Multiplier of each decoder layer.")
    # Left out of dumps at their defaults, so that trainings recorded before they existed keep their keys.
    later: tuple[LaterMultipliers, ...] = Field(
        (),
        exclude_if=lambda later: not later,
        description="Multipliers that take the place of the first ones, in order of their steps.",
    )
    redraw: Redraw = Field(
        "step",
        exclude_if=lambda redraw: redraw == "step",
        description="How long a draw lasts: an optimiser step, a microbatch or a forward pass.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> EffectiveNoise:
        steps = [0, *(phase.step for phase in self.later)]
        if sorted(set(steps)) != steps or (self.later and steps[-1] >= len(self.sigma)):
            raise ValueError(
                f"got later multipliers from steps {steps[1:]}; allowed are increasing steps "
                f"from 1 to {len(self.sigma) - 1}"
            )
        for phase in self.later:
            if len(phase.multipliers) != len(self.multipliers):
                raise ValueError(
                    f"got {len(phase.multipliers)} multipliers from step {phase.step} on, and "
                    f"{len(self.multipliers)} before"
                )
        return self

    def multipliers_at(self, step: int) -> tuple[float, ...]:
        """Return the multiplier of each decoder layer at a training step."""
        current = self.multipliers
        for phase in self.later:
            if phase.step <= step:
                current = phase.multipliers
        return current

    def noised_layers(self) -> tuple[int, ...]:
        """Return the layers that have a multiplier above 0 at any step, sorted."""
        phases = (self.multipliers, *(phase.multipliers for phase in self.later))
        return tuple(layer for layer, column in enumerate(zip(*phases, strict=True)) if any(column))

    def energy(self) -> float:
        """Return the dose in units of one layer: sum_k sum_t sigma(t)^2 m_k(t)^2 / sum_t sigma(t)^2.

        With multipliers that stay the same it is the sum of their squares.
        """
        if not self.later:
            return math.fsum(m * m for m in self.multipliers)
        # Relative to the largest, so that the square of a tiny sigma does not vanish.
        top = max(self.sigma) or 1.0
        shares = [(sigma / top) ** 2 for sigma in self.sigma]
        dose = math.fsum(
            share * m * m
            for step, share in enumerate(shares)
            if share
            for m in self.multipliers_at(step)
        )
        total = math.fsum(shares)
        return dose / total if total else 0.0
