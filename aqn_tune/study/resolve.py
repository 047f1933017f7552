"""From an arm in a scenario to its run: on which device it trains, which layers, with which noise."""

from __future__ import annotations

from collections.abc import Iterable

from aqn_tune.errors import UserError
from aqn_tune.noise.policy import EffectiveNoise
from aqn_tune.study.arms import ArmSpec
from aqn_tune.study.device import HEALTHY, Device
from aqn_tune.study.layers import Layers, resolve_layers
from aqn_tune.study.runs import Condition, Run
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study
from aqn_tune.study.training import Full, TrainingSpec


def training_of(study: Study, arm: ArmSpec) -> TrainingSpec:
    """Return the study's training with what `arm` changes of it."""
    changes: dict[str, object] = {}
    if arm.learning_rate is not None:
        changes["learning_rate"] = arm.learning_rate
    if arm.weight_decay is not None:
        changes["weight_decay"] = arm.weight_decay
    if arm.rank is not None:
        if isinstance(study.training.method, Full):
            raise UserError(
                "rank: full fine-tuning has no rank; remove it, or train with method lora"
            )
        changes["method"] = study.training.method.model_copy(update={"rank": arm.rank})
    return study.training.model_copy(update=changes)


def conditions_of(scenario: Scenario, layer_count: int) -> tuple[Condition, ...]:
    """Return the two conditions of a scenario: clean, and faulty on its deployed device."""
    # Companions join in `resolved`, and some of them are faults of gradients.
    device = scenario.spec.deployed().resolved(layer_count, weights_trained=False).forward_only()
    drawn = not device.is_healthy()
    return (
        Condition(name="clean"),
        Condition(
            name="faulty",
            scenario=scenario.name,
            device=device,
            unseen=drawn and scenario.spec.eval_devices == "unseen",
            draws=scenario.spec.eval_draws if drawn else 1,
        ),
    )


def resolve_run(
    study: Study, scenario: Scenario, arm: ArmSpec, *, seed: int, layer_count: int
) -> Run:
    """Return the run of `arm` under `scenario` with one replicate seed.

    Raises UserError when the arm cannot exist there (healthy when every layer is faulty).
    """
    training = training_of(study, arm)
    fault_layers = scenario.spec.fault_layers(layer_count)
    skip = _skipped(arm, fault_layers, layer_count)
    noise = None
    if arm.noise is not None:
        noise = arm.noise.resolve(
            steps=training.steps, layer_count=layer_count, fault_layers=fault_layers
        )
    if noise is not None:
        _refuse_skipped_noise(noise, skip)
        if study.model.dtype == "bfloat16":
            _refuse_lost_noise(noise)
        noise = _with_redraw_as_met(noise, training)
    return Run(
        training=training,
        device=_trained_device(scenario, arm).resolved(
            layer_count, weights_trained=isinstance(training.method, Full)
        ),
        noise=noise,
        skip=skip,
        train_layers=_trained_layers(arm, fault_layers, skip, layer_count),
        train_rest=arm.train_layers in ("all", "healthy"),
        seed=seed,
        conditions=conditions_of(scenario, layer_count),
        observed_steps=study.observed_steps(),
    )


def _trained_device(scenario: Scenario, arm: ArmSpec) -> Device:
    if arm.device == "healthy":
        return HEALTHY
    if arm.device == "scenario":
        return scenario.spec.trained()
    device = scenario.spec.everything().trained()
    if device.is_healthy():
        raise UserError(
            "device: got 'faulty', but every part of the scenario's device has `when: eval` and none "
            "would act in training; give one `when: both`, or remove the key"
        )
    return device


def _skipped(arm: ArmSpec, fault_layers: tuple[int, ...], layer_count: int) -> tuple[int, ...]:
    if arm.skip is None:
        return ()
    layers = fault_layers if arm.skip == "faulty" else _named("skip", arm.skip, layer_count)
    if len(layers) == layer_count:
        raise UserError("skip: every layer would be left out; name the layers to skip")
    return layers


def _trained_layers(
    arm: ArmSpec, fault_layers: tuple[int, ...], skip: tuple[int, ...], layer_count: int
) -> tuple[int, ...] | None:
    """Return the layers that an arm trains, None for all that its method does."""
    if arm.train_layers == "all":
        return None
    if arm.train_layers == "faulty":
        chosen = fault_layers
    elif arm.train_layers == "healthy":
        chosen = tuple(layer for layer in range(layer_count) if layer not in set(fault_layers))
    else:
        chosen = _named("train_layers", arm.train_layers, layer_count)
        lost = [layer for layer in chosen if layer in skip]
        if lost:
            raise UserError(
                f"train_layers: layers {_listed(lost)} are left out by `skip` and cannot learn; "
                "name each layer in one of the two"
            )
    chosen = tuple(sorted(set(chosen) - set(skip)))
    if not chosen:
        raise UserError(f"train_layers: {arm.train_layers!r} leaves no layer to train here")
    return chosen


def _named(key: str, layers: Layers, layer_count: int) -> tuple[int, ...]:
    """Return the layers that an arm names under `key`, which an error begins with."""
    try:
        return resolve_layers(layers, layer_count)
    except UserError as error:
        raise UserError(f"{key}: {str(error).removeprefix('layers: ')}") from None


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(str(layer) for layer in layers)


def _refuse_skipped_noise(noise: EffectiveNoise, skip: tuple[int, ...]) -> None:
    lost = [layer for layer in noise.noised_layers() if layer in skip]
    if lost:
        raise UserError(
            f"noise: layers {_listed(lost)} are left out by `skip`, so that noise there is lost; "
            "target other layers, for example with targeting healthy"
        )


def _with_redraw_as_met(noise: EffectiveNoise, training: TrainingSpec) -> EffectiveNoise:
    """Return `noise` with the coarsest `redraw` that gives this training the same draws.

    Fine-tuning runs the model forward once in each microbatch, so `forward` is `microbatch`, and both
    are `step` where a step is one microbatch: equal trainings under three names.
    """
    if noise.redraw == "step":
        return noise
    one = training.gradient_accumulation_steps == 1
    return noise.model_copy(update={"redraw": "step" if one else "microbatch"})


BFLOAT16_SIGMA = 2.0**-6
"""Smallest relative noise that bfloat16 carries: two to four times the distance of neighbouring numbers."""


def _refuse_lost_noise(noise: EffectiveNoise) -> None:
    levels = [
        sigma * multiplier
        for step, sigma in enumerate(noise.sigma)
        for multiplier in set(noise.multipliers_at(step))
    ]
    smallest = min(level for level in levels if level > 0)
    if smallest < BFLOAT16_SIGMA:
        raise UserError(
            f"noise: a standard deviation of {smallest:.3g} is lost in bfloat16, which resolves "
            f"{BFLOAT16_SIGMA:.3g}; use model.dtype float32, or a schedule that ends above it"
        )
