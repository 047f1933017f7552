"""Arms: named ways to train under a scenario, and the controls that always run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from aqn_tune.noise.carriers import Carrier
from aqn_tune.noise.carriers.hidden import Hidden
from aqn_tune.noise.effective import Redraw
from aqn_tune.noise.policy import NoisePolicy
from aqn_tune.noise.schedules import Schedule
from aqn_tune.noise.schedules.geometric import Geometric
from aqn_tune.study.base import Spec
from aqn_tune.study.layers import Layers

ControlName = Literal["clean", "fault_only", "global", "targeted", "healthy", "random"]
ArmDevice = Literal["scenario", "healthy", "faulty"]
CONTROL_NAMES: tuple[ControlName, ...] = (
    "clean", "fault_only", "global", "targeted", "healthy", "random",
)  # fmt: skip


class ArmSpec(Spec):
    """A way to train: a noise policy, and what of the training it changes."""

    noise: NoisePolicy | None = Field(
        None, description="The noise policy; null trains without noise."
    )
    device: ArmDevice = Field(
        "scenario",
        description="What it trains on: scenario (as `during` says), healthy (as the clean arm), or "
        "faulty (fault-aware training, also where the scenario trains on a healthy device).",
    )
    skip: Literal["faulty"] | Layers | None = Field(
        None,
        description="Decoder layers to leave out for good: layers, or 'faulty'. What is injected into a "
        "skipped layer reaches nothing.",
    )
    train_layers: Literal["faulty", "healthy"] | Layers = Field(
        "all", description="Decoder layers that are trained: all, faulty, healthy, or layers."
    )
    learning_rate: float | None = Field(
        None, gt=0, description="Learning rate in place of the training's own."
    )
    rank: int | None = Field(None, ge=1, description="LoRA rank in place of the training's own.")
    weight_decay: float | None = Field(
        None, ge=0, description="Weight decay in place of the training's own."
    )


class ControlsSpec(Spec):
    """The arms that run in every scenario, in search and in confirmation, and are never stopped."""

    include: tuple[ControlName, ...] = Field(
        CONTROL_NAMES,
        description="Controls to run; clean and fault_only are needed for every claim.",
    )
    carrier: Carrier = Field(Hidden(), description="Carrier of the noise in the noised controls.")
    schedule: Schedule = Field(
        Geometric(), description="Schedule of the noise in the noised controls."
    )
    normalise: Literal["none", "energy"] = Field(
        "none", description="energy gives every noised control the dose of global."
    )
    # Left out of dumps at its default, so that studies written before it existed keep their identity.
    redraw: Redraw = Field(
        "step",
        exclude_if=lambda redraw: redraw == "step",
        description="How long a draw of the noise lasts in the noised controls: step, microbatch or forward.",
    )

    @field_validator("carrier", "schedule", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("include")
    @classmethod
    def _needed(cls, include: tuple[ControlName, ...]) -> tuple[ControlName, ...]:
        for name in ("clean", "fault_only"):
            if name not in include:
                raise ValueError(
                    f"the control {name!r} is missing; every claim is measured against it"
                )
        return include

    def arm(self, name: ControlName) -> ArmSpec:
        """Return the arm that the control `name` stands for."""
        if name == "clean":
            return ArmSpec(device="healthy")
        if name == "fault_only":
            return ArmSpec()
        policy = NoisePolicy.model_validate(
            {
                "carrier": self.carrier.model_dump(),
                "schedule": self.schedule.model_dump(),
                "targeting": {"kind": name},
                "normalise": self.normalise,
                "redraw": self.redraw,
            }
        )
        return ArmSpec(noise=policy)
