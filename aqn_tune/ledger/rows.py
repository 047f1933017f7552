"""The rows of the ledger: the only thing that evidence and report read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from aqn_tune.study.base import Spec
from aqn_tune.study.runs import ConditionName, Split
from aqn_tune.study.seeds import Stage


class FaultMeasure(Spec):
    """What one fault did during an evaluation, summed over its sites."""

    kind: str = Field(description="Kind of the fault.")
    calls: int = Field(description="Forward calls at which the fault was in place.")
    sites: int = Field(description="Modules that hold the fault.")
    affected_fraction: float = Field(
        description="Share of the values that the unit changed, padding excluded."
    )
    relative_error: float | None = Field(
        description="||delta|| / ||x|| over all calls; null when not finite."
    )


class EvaluationRow(Spec):
    """One evaluation: training x step x condition x split."""

    kind: Literal["evaluation"] = "evaluation"
    training_key: str = Field(description="The training that was evaluated.")
    step: int = Field(description="Optimiser steps taken; 0 is the untrained base.")
    final: bool = Field(description="Whether this is the last step of the training.")
    condition: ConditionName = Field(description="clean or faulty.")
    scenario: str = Field("", description="Scenario whose faults acted; empty for clean.")
    split: Split = Field(description="validation (search) or test (confirm).")
    rows: int = Field(description="Rows evaluated.")
    loss: float | None = Field(
        description="Answer cross-entropy, nats per answer token; null when not finite."
    )
    exact_match: float = Field(
        description="Share of rows whose whole answer is predicted, teacher-forced."
    )
    faults: tuple[FaultMeasure, ...] = Field(
        (), description="What each fault did; empty when clean."
    )


class NoiseMeasure(Spec):
    """The realised-noise audit of one layer, pooled over the audited steps (one per stage)."""

    layer: int = Field(description="Decoder layer.")
    looks: int = Field(description="Number of measurements.")
    scheduled: float = Field(description="Root mean square of sigma * multiplier at those steps.")
    realised: float = Field(description="Root mean square of the noise measured there.")
    draws: int = Field(description="Number of normal draws measured.")


class Audit(Spec):
    """What was really attached and injected in a training; a mismatch fails the training."""

    fault_sites: tuple[str, ...] = Field((), description="Modules that held a training fault.")
    noise_sites: tuple[str, ...] = Field((), description="Modules that carried noise.")
    noise: tuple[NoiseMeasure, ...] = Field((), description="Realised noise at the audited steps.")
    noise_calls: int = Field(0, description="Noise injections over the whole training.")
    fault_calls: int = Field(0, description="Fault applications over the whole training.")
    trainable_parameters: int = Field(0, description="Parameters that were trained.")
    weights_unchanged: bool = Field(
        True,
        description="LoRA: frozen weights have the same hash as before; full: no forward or backward "
        "pass changed a weight.",
    )


class TrainingRow(Spec):
    """The state of a training at a rung, whatever became of it; the last row holds."""

    kind: Literal["training"] = "training"
    training_key: str = Field(description="Identity of the training.")
    stage: Stage = Field(description="Stage that paid for it.")
    seed: int = Field(description="Replicate seed.")
    steps: int = Field(description="Steps it was meant to take.")
    step_reached: int = Field(description="Steps it took.")
    status: Literal["finished", "unfinished", "failed"] = Field(
        description="unfinished: reached a rung and waits, or was stopped there; failed: never a number."
    )
    error: str = Field("", description="Why it failed.")
    seconds: float = Field(
        description="Its share of its pack's wall time, training and evaluation, since the last row."
    )
    pack: str = Field(description="Pack it ran in.")
    pack_size: int = Field(description="Replicates in that pack.")
    train_losses: tuple[float, ...] = Field(
        (), description="Training loss at each step since the last row."
    )
    audit: Audit | None = Field(
        None, description="What was attached and injected; null when it failed."
    )
    adapter: str = Field("", description="Exported adapter folder, relative to the study's.")


class CellRow(Spec):
    """Which training a cell (stage, scenario, arm, replicate) uses; cells may share trainings."""

    kind: Literal["cell"] = "cell"
    stage: Stage = Field(description="search or confirm.")
    scenario: str = Field(description="Scenario the cell belongs to.")
    arm: str = Field(description="Name of the arm: a control, an own arm, a config or a twin.")
    config: str = Field("", description="Config id in the search (c000...), empty for controls.")
    replicate: int = Field(description="Index of the replicate, from 0.")
    seed: int = Field(description="Replicate seed.")
    generation: int = Field(0, description="Confirm generation; 0 in search.")
    training_key: str = Field(description="The training that gives the cell its numbers.")


class SearchRow(Spec):
    """One event of the search, in order: enough to rebuild the searcher and the scheduler exactly."""

    kind: Literal["search"] = "search"
    scenario: str = Field(description="Scenario whose search it belongs to.")
    event: Literal["asked", "rung", "finished", "stopped", "failed"] = Field(
        description="What happened."
    )
    config: str = Field(description="Config id.")
    number: int = Field(description="Trial number in the scenario's Optuna study.")
    params: dict[str, float | int | str | bool] = Field(
        default_factory=dict, description="Sampled parameters (asked)."
    )
    rung: int = Field(-1, description="Index of the rung (rung).")
    value: float | None = Field(
        None,
        description="Mean faulty validation loss over the replicates (rung); null when not finite.",
    )
    error: str = Field("", description="Why it failed (failed).")


LedgerRow = Annotated[
    EvaluationRow | TrainingRow | CellRow | SearchRow, Field(discriminator="kind")
]
