"""The unit of work: a run, its identity, and the pack of runs that advance in lockstep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from aqn_tune.models.spec import ModelSpec
from aqn_tune.noise.policy import EffectiveNoise
from aqn_tune.study.base import Spec
from aqn_tune.study.device import HEALTHY, Device
from aqn_tune.study.keys import content_hash
from aqn_tune.study.seeds import Stage
from aqn_tune.study.training import Lora, TrainingSpec
from aqn_tune.tasks import Task

Split = Literal["validation", "test"]
ConditionName = Literal["clean", "faulty"]
TRAINING_FORMAT = 3
"""Part of every training key: raised when the same specification would train differently."""
MIXED_RANKS = range(2, 65)
"""LoRA ranks that may share a pack, the smaller ones padded with zeros."""


class Condition(Spec):
    """What an evaluation runs under. Training noise is off in every one."""

    name: ConditionName = Field(
        description="clean: a healthy device; faulty: the scenario's deployed device."
    )
    scenario: str = Field("", description="Scenario whose device it is; empty for clean.")
    device: Device = Field(HEALTHY, description="The device that the evaluation runs on.")
    unseen: bool = Field(
        False, description="Evaluate on other devices with the same faults in other places."
    )
    draws: int = Field(1, ge=1, description="Draws of the random faults, or unseen devices.")


class Setting(Spec):
    """What all runs of a study share: the model, the task and how they are evaluated."""

    model: ModelSpec = Field(description="The model to fine-tune.")
    task: Task = Field(description="The data.")
    model_fingerprint: str = Field(description="Content hash of the model's files.")
    task_fingerprint: str = Field(
        "", description="Content hash of the rows; empty where the task's spec determines them."
    )
    eval_batch_size: int = Field(
        64, description="Rows per evaluation batch; part of a tensor_max fault."
    )
    device: Literal["cpu", "cuda"] = Field(
        "cpu",
        exclude_if=lambda device: device == "cpu",
        description="Where trainings run. Random draws are the device's own, so that numbers on a GPU are "
        "others than on a CPU.",
    )
    memory_share: float | None = Field(
        None,
        gt=0,
        le=1,
        exclude=True,
        description="Share of the free memory of its machine, or of its GPU, that a worker may plan with; "
        "null: as many equal parts as the machine has cores.",
    )


class Run(Spec):
    """One training (config x seed) and the conditions it is evaluated under."""

    training: TrainingSpec = Field(description="Method, size and optimiser.")
    device: Device = Field(HEALTHY, description="The device that training runs on.")
    noise: EffectiveNoise | None = Field(None, description="The noise that training gets.")
    skip: tuple[int, ...] = Field(
        (), description="Decoder layers that are left out, in training and in every evaluation."
    )
    train_layers: tuple[int, ...] | None = Field(
        None, description="Decoder layers that are trained; null trains all that the method does."
    )
    train_rest: bool = Field(
        True, description="Whether parameters outside the decoder layers are trained (method full)."
    )
    seed: int = Field(
        description="Replicate seed: initialisation, data order, fault and noise draws."
    )
    conditions: tuple[Condition, ...] = Field(
        description="Conditions to evaluate at every rung; the first is clean."
    )
    observed_steps: tuple[int, ...] = Field(
        (),
        description="Steps, from 0, at which gradients and activations are recorded; changes no number.",
    )

    def training_key(self, setting: Setting) -> str:
        """Return the identity of the training: everything that training sees, nothing else.

        Arms, scenarios and stages are names and do not enter, so equal trainings are found equal
        whatever they are called; the conditions do not enter because evaluation changes nothing.
        """
        elsewhere = {"computed_on": setting.device} if setting.device != "cpu" else {}
        return content_hash(
            {
                **elsewhere,
                "format": TRAINING_FORMAT,
                "model": setting.model_fingerprint,
                "dtype": setting.model.dtype,
                "task": setting.task_fingerprint or setting.task,
                "training": self.training,
                "device": self.device,
                "noise": self.noise,
                "skip": self.skip,
                "train_layers": self.train_layers,
                "train_rest": self.train_rest,
                "seed": self.seed,
            }
        )


class Pack(Spec):
    """Runs that advance in lockstep in one trial, from rung to rung."""

    name: str = Field(description="Unique in its stage; names the trial and its state file.")
    stage: Stage = Field(description="search or confirm.")
    runs: tuple[Run, ...] = Field(min_length=1, description="Runs of equal `pack_key`.")
    rungs: tuple[int, ...] = Field(
        min_length=1,
        description="Steps at which all runs are evaluated, increasing; 0 is the untrained base.",
    )
    split: Split = Field(description="validation in search, test in confirm.")
    export: dict[str, str] = Field(
        default_factory=dict,
        description="Training keys to export at the last rung, each with its adapter folder.",
    )
    generate: bool = Field(
        False, description="At the last rung, let every run write its answers as well."
    )
    lockstep: int | None = Field(
        None,
        ge=1,
        description="Most runs that share a forward pass; the others follow them to each rung. Null: "
        "as many as can.",
    )
    own: dict[str, str] = Field(
        default_factory=dict,
        description="Training keys of runs that serve one cell alone, each with that cell as "
        "stage/scenario/arm/replicate.",
    )

    def only(self, runs: Mapping[str, Run]) -> Pack:
        """Return the pack with some of its runs alone, given by training key in their order."""
        return self.model_copy(
            update={
                "runs": tuple(runs.values()),
                "export": {key: self.export[key] for key in runs if key in self.export},
                "own": {key: self.own[key] for key in runs if key in self.own},
            }
        )


def pack_key(run: Run) -> str:
    """Return what must be equal for runs to share a pack: whatever changes shapes or a static branch.

    Seeds, noise levels, targetings, fault thresholds, learning rates and most LoRA ranks may differ
    inside a pack.
    """
    free = {"learning_rate": True, "weight_decay": True, "max_grad_norm": True}
    method = run.training.method
    apart: dict[str, float] = {}
    if isinstance(method, Lora):
        scaling = method.alpha / method.rank
        # Zeros appended to a sum change no bit of it as long as its terms keep their order. They do with
        # AVX-512, but for wide layers in float64; other kernels choose it by the number of columns, and packs
        # differ by rounding. There too a product with one column goes another way, and one with more than 160
        # in other blocks.
        if method.rank not in MIXED_RANKS:
            apart["rank"] = method.rank
        # Scalings that differ multiply another factor of the product than one that all share does. Only
        # a power of two rounds nothing, so that it does not matter where it stands: nor to a compiled
        # layer, which merges the factors as it likes and leaves the products to the same kernels.
        if math.frexp(scaling)[0] != 0.5:
            apart["scaling"] = scaling
    return content_hash(
        {
            "training": run.training.model_dump(
                mode="json", exclude={**free, "method": {"rank": True, "alpha": True}}
            ),
            "apart": apart,
        }
    )
