"""How a model is fine-tuned: method, optimiser, size."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from aqn_tune.study.base import Spec

SEVEN_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Lora(Spec):
    """Low-rank adapters on frozen weights (LoRA, arXiv 2106.09685), initialised and scaled as peft does."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1, description="Rank r of each adapter.")
    alpha: float = Field(
        16.0, gt=0, description="Adapter scale: the update is multiplied by alpha / rank."
    )
    target_modules: tuple[str, ...] = Field(
        SEVEN_LINEARS, min_length=1, description="Names of the linear layers that get an adapter."
    )


class Full(Spec):
    """All parameters are trained, those of each replicate its own."""

    kind: Literal["full"] = "full"


Method = Annotated[Lora | Full, Field(discriminator="kind")]


class TrainingSpec(Spec):
    """One training: what is trained, for how long, with which optimiser settings."""

    method: Method = Field(Lora(), description="lora or full fine-tuning.")
    steps: int = Field(100, ge=1, description="Optimiser steps.")
    batch_size: int = Field(16, ge=1, description="Rows per optimiser step and replicate.")
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        description="Microbatches that a step's rows are split into; their gradients add up.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    # Left out of dumps at its default, so that trainings recorded before it existed keep their keys.
    compile: bool = Field(
        False,
        exclude_if=lambda compiled: not compiled,
        description="Compile the decoder layers (method lora; needs a C++ compiler): less time per step, "
        "after up to minutes for the first pack of a shape. Not with faults, quantizers or noise "
        "inside a layer. Numbers differ in rounding.",
    )
    max_length: int = Field(
        64,
        ge=8,
        description="Tokens that every row is padded to; a longer row is an error, never cut.",
    )
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate of AdamW.")
    warmup_steps: int = Field(10, ge=0, description="Steps of linear warm-up from 0.")
    final_lr_fraction: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Learning rate at the end of the cosine decay, as a share of the peak.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of AdamW.")
    beta1: float = Field(0.9, ge=0, lt=1, description="First-moment decay of AdamW.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Second-moment decay of AdamW.")
    max_grad_norm: float = Field(
        1.0, gt=0, description="Each replicate's gradient is clipped to this norm."
    )

    @model_validator(mode="after")
    def _warmup_fits(self) -> TrainingSpec:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        return self

    @model_validator(mode="after")
    def _compiles_what_runs_once(self) -> TrainingSpec:
        if self.compile and self.gradient_checkpointing:
            raise ValueError(
                "compile with gradient_checkpointing: a compiled layer keeps what its backward pass "
                "needs; give one of the two"
            )
        return self

    @model_validator(mode="after")
    def _splits_evenly(self) -> TrainingSpec:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} does not divide "
                f"batch_size {self.batch_size}; microbatches hold equally many rows"
            )
        return self
