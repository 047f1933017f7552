"""The rows of the ledger: the only thing that evidence and report read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from aqn_tune.study.base import Measured
from aqn_tune.study.runs import ConditionName, Split
from aqn_tune.study.seeds import Stage


class FaultMeasure(Measured):
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


Operand = Literal["weight", "activation"]


class QuantizerMeasure(Measured):
    """What one quantizer did to one operand of one layer during an evaluation."""

    format: str = Field(description="Format of the quantizer.")
    operand: Operand = Field(description="weight or activation.")
    layer: int = Field(description="Decoder layer.")
    sqnr_db: float | None = Field(
        description="Signal to quantization noise ratio in dB; null where it is infinite or not finite."
    )
    zero_fraction: float = Field(description="Share of the quantized values that are zero.")
    clipped_fraction: float = Field(
        description="Share of the values beyond the largest that their scale represents."
    )


class TakenRow(Measured):
    """A row that may have been taken over from the ledger of another study."""

    source: str = Field(
        "",
        exclude_if=lambda source: not source,
        description="Where it was taken from, `<folder of the study>/<pack>`; empty: made here.",
    )


class EvaluationRow(TakenRow):
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
        description="Answer cross-entropy, nats per answer token, mean over the draws; null when not finite."
    )
    exact_match: float = Field(
        description="Share of rows whose whole answer is predicted, teacher-forced; mean over the draws."
    )
    generated_exact_match: float | None = Field(
        None,
        exclude_if=lambda share: share is None,
        description="Share of rows whose whole answer the model writes by itself (greedy decoding), mean "
        "over the draws; null where it was not asked to.",
    )
    answer_match: float | None = Field(
        None,
        exclude_if=lambda share: share is None,
        description="Share of rows in whose written answer the task reads the right final answer.",
    )
    draws: int = Field(1, description="Draws of the random faults, or unseen devices.")
    loss_sd: float | None = Field(
        None, description="Standard deviation of the loss over the draws; null for a single draw."
    )
    exact_match_sd: float | None = Field(
        None, description="Standard deviation of exact match over the draws."
    )
    faults: tuple[FaultMeasure, ...] = Field(
        (), description="What each fault did, over all draws; empty when clean."
    )
    quantizers: tuple[QuantizerMeasure, ...] = Field(
        (), description="What each quantizer did, by operand and layer; empty when clean."
    )


class NoiseMeasure(Measured):
    """The realised-noise audit of one layer, pooled over the audited steps (one per stage)."""

    layer: int = Field(description="Decoder layer.")
    looks: int = Field(description="Number of measurements.")
    scheduled: float = Field(description="Root mean square of sigma * multiplier at those steps.")
    realised: float = Field(description="Root mean square of the noise measured there.")
    draws: int = Field(description="Number of normal draws measured.")


class Audit(Measured):
    """What was really attached and injected in a training; a mismatch fails the training."""

    fault_sites: tuple[str, ...] = Field((), description="Modules that held a training fault.")
    noise_sites: tuple[str, ...] = Field((), description="Modules that carried noise.")
    noise: tuple[NoiseMeasure, ...] = Field((), description="Realised noise at the audited steps.")
    quantizer_calls: int = Field(
        0, description="Products on a quantized operand over the whole training."
    )
    noise_calls: int = Field(0, description="Noise injections over the whole training.")
    fault_calls: int = Field(0, description="Fault applications over the whole training.")
    trainable_parameters: int = Field(0, description="Parameters that were trained.")
    weights_unchanged: bool = Field(
        True,
        description="LoRA: frozen weights have the same hash as before; full: no forward or backward "
        "pass changed a weight.",
    )


class LayerMechanism(Measured):
    """The gradient of one decoder layer at one step, beside its clean gradient.

    The gradient is that of all tensors of the layer that the run trains, of the whole batch, before
    clipping. The clean gradient is that of the same weights and the same batch with no fault, no
    quantizer and no noise: a counterfactual at equal weights. It separates what the device does to
    the gradient in this step from where the training has gone in the steps before.
    """

    layer: int = Field(description="Decoder layer.")
    gradient_norm: float | None = Field(
        description="Euclidean norm of the layer's gradient; null when not finite."
    )
    norm_ratio: float | None = Field(
        description="That norm over the clean gradient's; null when not finite or the latter is 0."
    )
    cosine: float | None = Field(
        description="Cosine between the gradient and the clean gradient, 0 where no gradient arrives; "
        "null when not finite or the clean gradient is 0."
    )


class Activation(Measured):
    """What the values of one place look like in one forward pass, padding excluded.

    All tokens and features of a replicate are pooled. A number that is not finite is null.
    """

    rms: float | None = Field(description="Root mean square.")
    max_abs: float | None = Field(description="Largest magnitude.")
    kurtosis: float | None = Field(
        description="Fisher's excess kurtosis, 0 for a normal distribution; null for constant values."
    )
    zero_fraction: float = Field(description="Share of the values that are exactly zero.")


Injected = Literal["nothing", "noise", "quantizer", "fault"]


class SiteActivation(Measured):
    """Activations at one place of one decoder layer, in the first microbatch of a step.

    One record per layer for its output as the next layer gets it, and one for everything that was
    injected into activations: noise of sigma 0 was not, weights and gradients are no activations.
    """

    layer: int = Field(description="Decoder layer.")
    module: str = Field(description="Name inside the layer; '.' is the layer itself.")
    site: Literal["input", "output"] = Field(description="Which side of the module.")
    injected: Injected = Field(description="What was injected here.")
    kind: str = Field("", description="Kind of the fault, carrier of the noise, or number format.")
    before: Activation | None = Field(
        None,
        exclude_if=lambda before: before is None,
        description="The values that it met; null where nothing was injected.",
    )
    after: Activation = Field(description="The values that went on from here.")


class Observation(Measured):
    """What was seen of one training at one step."""

    step: int = Field(
        description="Optimiser steps taken before: the step was the next one, with these weights."
    )
    layers: tuple[LayerMechanism, ...] = Field(
        description="Gradients by layer; without layers that the run leaves out or does not train."
    )
    sites: tuple[SiteActivation, ...] = Field(
        description="Activations by layer; without layers that the run leaves out."
    )


class MechanismRow(Observation, TakenRow):
    """What was seen of a training at one of its observed steps. It explains, and claims nothing."""

    kind: Literal["mechanism"] = "mechanism"
    training_key: str = Field(description="The training that was observed.")


class TrainingRow(TakenRow):
    """The state of a training at a rung, whatever became of it; the last row holds.

    One that was taken over names the pack that it ran in there, and no seconds: they were not spent
    here.
    """

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
    eval_seconds: float = Field(0.0, description="The part of `seconds` that evaluation took.")
    generate_seconds: float = Field(
        0.0, description="The part of `seconds` that writing answers took (`confirm.generate`)."
    )
    compile_seconds: float = Field(
        0.0,
        exclude_if=lambda seconds: not seconds,
        description="The part of `seconds` that compiling the layers took (`training.compile`).",
    )
    pack: str = Field(description="Pack it ran in.")
    pack_size: int = Field(description="Replicates in that pack.")
    lockstep: int = Field(
        1, ge=1, description="Runs that shared its forward passes, itself included."
    )
    lockstep_limit: str = Field(
        "",
        description="Why not the whole pack did: what keeps runs apart; empty where nothing does.",
    )
    train_losses: tuple[float, ...] = Field(
        (), description="Training loss at each step since the last row."
    )
    audit: Audit | None = Field(
        None, description="What was attached and injected; null when it failed."
    )
    adapter: str = Field("", description="Exported adapter folder, relative to the study's.")
    observations: tuple[Observation, ...] = Field(
        (),
        exclude_if=lambda observations: not observations,
        description="What was seen since the last row, on its way from the worker; the ledger holds it "
        "as mechanism rows.",
    )


class OwnTrainingRow(Measured):
    """How far a cell has trained a run of its own, though other cells share the training (`--no-reuse`).

    The numbers are those of the training and evaluation rows: of the runs that cells have trained for
    one training key, the first to reach a rung is recorded, and the others were found to equal it.
    """

    kind: Literal["own_training"] = "own_training"
    training_key: str = Field(description="Identity of the training.")
    cell: str = Field(description="The cell, as stage/scenario/arm/replicate.")
    stage: Stage = Field(description="Stage that paid for it.")
    step_reached: int = Field(description="Steps it took.")
    status: Literal["finished", "unfinished", "failed"] = Field(description="What became of it.")
    recorded: bool = Field(
        description="Whether the training row of this rung is its own; false: compared and equal."
    )
    seconds: float = Field(
        description="Its share of its pack's wall time since the last row; 0 where recorded, as the "
        "training row has it."
    )
    pack: str = Field(description="Pack it ran in.")
    pack_size: int = Field(description="Replicates in that pack.")
    error: str = Field("", description="Why it broke off; it is then tried again.")


class CellRow(Measured):
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


class SearchRow(Measured):
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
"""What results rest on, and all that evidence is given."""

RecordedRow = Annotated[
    EvaluationRow | TrainingRow | CellRow | SearchRow | MechanismRow | OwnTrainingRow,
    Field(discriminator="kind"),
]
"""Everything that a ledger holds."""


def lockstep_limits(trainings: Iterable[TrainingRow]) -> dict[str, int]:
    """Return how many of these trainings did not share every forward pass of their pack, by the reason."""
    return dict(Counter(row.lockstep_limit for row in trainings if row.lockstep_limit))


def reused_from(trainings: Iterable[TrainingRow]) -> dict[str, int]:
    """Return how many of these trainings were taken from each other study, by its folder."""
    found: dict[str, int] = {}
    for row in trainings:
        if row.source:
            folder = row.source.partition("/")[0]
            found[folder] = found.get(folder, 0) + 1
    return found
