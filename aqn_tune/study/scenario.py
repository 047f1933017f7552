"""What the hardware does: declared and swept, never optimised."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from aqn_tune.faults import Fault
from aqn_tune.faults.base import GRADIENT_SITES
from aqn_tune.quantization import Quantizer
from aqn_tune.study.base import Spec
from aqn_tune.study.device import HEALTHY, AdapterPath, Deploy, Device
from aqn_tune.study.layers import resolve_layers

During = Literal["both", "train", "eval"]
EvalDevices = Literal["same", "unseen"]


class ScenarioSpec(Spec):
    """A faulty device: its faults and number formats, and when they act.

    A search that could choose its own fault level would pick the mildest, so a scenario is an input
    of the study: one search and one family of verdicts per scenario.
    """

    faults: tuple[Fault, ...] = Field(
        (), description="Faults of the device, applied in this order where they share a site."
    )
    quantization: tuple[Quantizer, ...] = Field(
        (), description="Number formats of the device's matrix units: one quantizer, or a list."
    )
    during: During = Field(
        "both",
        description="both: train and deploy on the faulty device; eval: train on a healthy one; "
        "train: the reverse.",
    )
    adapter_path: AdapterPath = Field(
        "exact",
        description="faulty: the LoRA branches run on the faulty unit; exact: beside it, in full precision.",
    )
    deploy: Deploy = Field(
        "unmerged",
        description="merged: adapters are merged into the weights before the device is evaluated.",
    )
    device_seed: int = Field(
        0, ge=0, description="Which device it is: the seed of permanent masks, whatever is trained."
    )
    eval_devices: EvalDevices = Field(
        "same",
        description="unseen: evaluate on other devices with the same faults in other places.",
    )
    eval_draws: int = Field(
        1,
        ge=1,
        description="Draws of the random faults (or unseen devices) in each faulty evaluation.",
    )

    @field_validator("quantization", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        """Let a single quantizer stand for a list of one, and a format's name for its default."""
        many = (value,) if isinstance(value, dict | str) else value
        if not isinstance(many, list | tuple):
            return many
        return tuple({"format": one} if isinstance(one, str) else one for one in many)

    @model_validator(mode="after")
    def _does_something(self) -> ScenarioSpec:
        if not self.faults and not self.quantization:
            raise ValueError(
                "the device has neither faults nor quantization: declare at least one of them"
            )
        redrawn = any(fault.is_stochastic() for fault in self._acting("eval"))
        if self.eval_draws > 1 and not redrawn and self.eval_devices == "same":
            raise ValueError(
                f"eval_draws {self.eval_draws}: nothing is drawn in an evaluation of this device; "
                "only random faults and unseen devices have draws"
            )
        if self.eval_devices == "unseen" and not any(
            fault.uses_device_seed() for fault in self._acting("eval")
        ):
            raise ValueError(
                "eval_devices unseen: every device with these faults is the same; "
                "faults with permanent places (density below 1) differ between devices"
            )
        return self

    def _acting(self, stage: Literal["train", "eval"]) -> tuple[Fault, ...]:
        if self.during not in ("both", stage):
            return ()
        acting = tuple(fault for fault in self.faults if fault.when in ("both", stage))
        if stage == "eval":
            acting = tuple(fault for fault in acting if fault.site not in GRADIENT_SITES)
        return acting

    def _device(self, stage: Literal["train", "eval"]) -> Device:
        faults = self._acting(stage)
        quantization = tuple(
            quantizer
            for quantizer in self.quantization
            if self.during in ("both", stage) and quantizer.when in ("both", stage)
        )
        if not faults and not quantization:
            return HEALTHY
        deploy = self.deploy if stage == "eval" else "unmerged"
        return self.whole().model_copy(
            update={"faults": faults, "quantization": quantization, "deploy": deploy}
        )

    def whole(self) -> Device:
        """Return the device with every part it has, whenever each acts."""
        return Device(
            faults=self.faults,
            quantization=self.quantization,
            adapter_path=self.adapter_path,
            deploy=self.deploy,
            seed=self.device_seed,
        )

    def trained(self) -> Device:
        """Return the device that training sees."""
        return self._device("train")

    def deployed(self) -> Device:
        """Return the device of a `faulty` evaluation; errors of gradients do not act there."""
        return self._device("eval")

    def everything(self) -> ScenarioSpec:
        """Return the scenario as met in training and at deployment, whatever `during` says."""
        return self.model_copy(update={"during": "both"})

    def fault_layers(self, layer_count: int) -> tuple[int, ...]:
        """Return every layer that holds a fault, sorted; without faults, every quantized layer."""
        parts = self.faults or self.quantization
        layers = {n for part in parts for n in resolve_layers(part.layers, layer_count)}
        return tuple(sorted(layers))


class Scenario(NamedTuple):
    """One point of the sweep."""

    name: str
    """Unique in the study, for example `both-threshold0.2`."""
    spec: ScenarioSpec
    values: dict[str, str | int | float]
    """What the sweep set, by short key: {"threshold": 0.2, "during": "both"}."""
