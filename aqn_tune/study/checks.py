"""What a study must hold beyond its schema: checks that need the model, the data and the disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from aqn_tune.errors import UserError, nearest
from aqn_tune.study.arms import ArmSpec, ControlName
from aqn_tune.study.cautions import policies
from aqn_tune.study.device import WEIGHT_SITES
from aqn_tune.study.layers import resolve_layers
from aqn_tune.study.resolve import resolve_run
from aqn_tune.study.scenario import Scenario, ScenarioSpec
from aqn_tune.study.schema import Study
from aqn_tune.study.space import SpaceSpec, arm_of
from aqn_tune.study.space_checks import corners, dimension_problem
from aqn_tune.study.training import Full, Lora


def check_study(
    study: Study, scenarios: Sequence[Scenario], layer_count: int, widths: Sequence[int] = ()
) -> None:
    """Check everything that would otherwise fail after hours: layers, arms, space, data, output.

    Raises UserError whose message begins with the dotted key it is about. A control that cannot
    exist (healthy when every layer is faulty) is no error: `plan` lists it. `widths` are the features of the
    model's layers, its hidden states first; empty where they are not known.
    """
    for scenario in scenarios:
        _check_device(study, scenario, layer_count)
        _check_adapters(study, scenario)
    check_compile(study, scenarios)
    _check_counts(study, scenarios, widths)
    for name, arm in study.arms.items():
        for scenario in scenarios:
            _check_arm(study, name, arm, scenario, layer_count)
    for control in ("global", "targeted"):
        _check_control(study, scenarios[0], control, layer_count)
    if study.search is not None:
        _check_space(study, study.search.space, scenarios, layer_count)
    _check_decisions(study)
    _check_files(study)
    _check_output(study)


def _check_device(study: Study, scenario: Scenario, layer_count: int) -> None:
    """Check that every part of a device has its place in this model, and acts at some time."""
    spec = scenario.spec
    parts = {"faults": spec.faults, "quantization": spec.quantization}
    for name, group in parts.items():
        for index, part in enumerate(group):
            try:
                resolve_layers(part.layers, layer_count)
            except UserError as error:
                message = str(error).removeprefix("layers: ")
                raise UserError(f"{_key(study, f'{name}.{index}.layers')}: {message}") from None
    for index, fault in enumerate(spec.faults):
        key = _key(study, f"faults.{index}.site")
        if fault.site in WEIGHT_SITES and "." in fault.modules:
            raise UserError(
                f"{key}: got {fault.site!r}, but the decoder layer itself ('.') has no weight; name "
                "modules that have one, for example modules: [linear]"
            )
        if fault.site == "grad_weight" and isinstance(study.training.method, Lora):
            raise UserError(
                f"{key}: got 'grad_weight', but method lora freezes the weights, which have no "
                "gradient then; use site grad_input, or train with method full"
            )
    if spec.trained().is_healthy() and spec.deployed().is_healthy():
        raise UserError(
            f"{_key(study, 'during')}: got {spec.during!r}, at which no part of the device acts; "
            "see `when` and `site` of each part (errors of gradients act in training only)"
        )


def _check_adapters(study: Study, scenario: Scenario) -> None:
    """Refuse keys about adapters where full fine-tuning has none."""
    if not isinstance(study.training.method, Full):
        return
    for key in ("adapter_path", "deploy"):
        got, default = getattr(scenario.spec, key), ScenarioSpec.model_fields[key].default
        if got != default:
            raise UserError(
                f"{_key(study, key)}: got {got!r}, but full fine-tuning has no adapters; allowed is "
                f"{default!r}, or train with method lora"
            )


def check_compile(study: Study, scenarios: Sequence[Scenario]) -> None:
    """Raise UserError for compiled layers where something acts inside them, which would be compiled away."""
    if not study.training.compile:
        return
    key = "training.compile: got true, but"
    if isinstance(study.training.method, Full):
        raise UserError(f"{key} full fine-tuning runs its layers as they are; leave it out")
    for where, policy in policies(study):
        if policy.carrier.site != "layer_output":
            raise UserError(
                f"{key} {where} has noise on {policy.carrier.kind}, inside the decoder layers, which "
                "have to stay as they are then; leave it out, or use carrier hidden alone"
            )
    always = any(arm.device == "faulty" for arm in study.arms.values())
    for scenario in scenarios:
        device = (scenario.spec.everything() if always else scenario.spec).trained()
        inside: list[str] = [fault.kind for fault in device.faults if fault.modules != (".",)]
        inside += [quantizer.format for quantizer in device.quantization]
        if inside:
            raise UserError(
                f"{key} in scenario {scenario.name} {inside[0]} acts inside the decoder layers, which "
                "have to stay as they are then; leave it out"
            )


def _check_counts(study: Study, scenarios: Sequence[Scenario], widths: Sequence[int]) -> None:
    """Refuse a fault that hits so many values of a call where a model that writes has calls with fewer."""
    if not study.confirm.generate:
        return
    for scenario in scenarios:
        for index, fault in enumerate(scenario.spec.faults):
            count = getattr(fault, "count", None)
            deployed = scenario.spec.during in ("both", "eval") and fault.when in ("both", "eval")
            if count is None or not widths or not deployed:
                continue
            # The first is that of the hidden states, which is all that a decoder layer gives.
            narrowest = widths[0] if fault.modules == (".",) else min(widths)
            if count > narrowest:
                raise UserError(
                    f"{_key(study, f'faults.{index}.count')}: got {count} with confirm.generate, but the "
                    f"last answer that is being written passes one token at a time, {narrowest} values in "
                    f"the narrowest place; give at most {narrowest}, or a rate"
                )


def _key(study: Study, key: str) -> str:
    """Return where the user wrote a key of a scenario: in the sweep, if that sets it."""
    swept = [k for k in study.sweep if key == k or key.startswith(f"{k}.")]
    return f"sweep.{swept[0]}" if swept else f"scenario.{key}"


def _check_arm(study: Study, name: str, arm: ArmSpec, scenario: Scenario, layer_count: int) -> None:
    """Refuse an own arm that cannot exist, under the key of the arm that is to blame."""
    try:
        resolve_run(study, scenario, arm, seed=0, layer_count=layer_count)
    except UserError as error:
        message = str(error)
        first, sign, rest = message.partition(": ")
        key = f"arms.{name}"
        if sign and first in ArmSpec.model_fields:
            key, message = f"{key}.{first}", rest
        raise UserError(f"{key}: in scenario {scenario.name}: {message}") from None


def _check_control(study: Study, scenario: Scenario, name: ControlName, layer_count: int) -> None:
    """Refuse a schedule of the controls that injects nothing, which would make them all n/a."""
    if name not in study.controls.include:
        return
    try:
        resolve_run(study, scenario, study.controls.arm(name), seed=0, layer_count=layer_count)
    except UserError as error:
        raise UserError(f"controls.schedule: {error}") from None


_MEND = "; the search may draw this: change what is offered, or give it a `when`"


def _check_space(
    study: Study, space: SpaceSpec, scenarios: Sequence[Scenario], layer_count: int
) -> None:
    for name, dimension in space.dimensions.items():
        problem = dimension_problem(name, dimension, layer_count)
        if problem:
            raise UserError(f"search.space.dimensions.{name}: {problem}")
    for params in corners(space):
        shown = ", ".join(f"{name}={value}" for name, value in params.items())
        try:
            arm = arm_of(params)
        except UserError as error:
            raise UserError(f"search.space.dimensions: {error} (for {shown}){_MEND}") from None
        for scenario in scenarios:
            try:
                resolve_run(study, scenario, arm, seed=0, layer_count=layer_count)
            except UserError as error:
                raise UserError(
                    f"search.space.dimensions: {error} (for {shown} in scenario {scenario.name})"
                    f"{_MEND}"
                ) from None


def _check_decisions(study: Study) -> None:
    if study.decisions is None:
        return
    from aqn_tune.evidence.decisions import matrix_of

    primary = study.primary_contrasts()
    for pair in study.decisions.contrasts:
        if pair not in primary:
            allowed = "; ".join(", ".join(p) for p in primary)
            raise UserError(
                f"decisions.contrasts: [{', '.join(pair)}] is no primary contrast of this study; "
                f"allowed are {allowed}"
            )
    matrix_of(study.decisions)


def _check_files(study: Study) -> None:
    for key in ("train", "validation", "test"):
        path = getattr(study.task, key, None)
        if path is None:
            continue
        file = Path(path).expanduser()
        if not file.is_file():
            names = [p.name for p in file.parent.glob("*.jsonl")] if file.parent.is_dir() else []
            raise UserError(
                f"task.{key}: there is no file {file} (relative paths start at {Path.cwd()})"
                f"{nearest(file.name, names)}"
            )


def _check_output(study: Study) -> None:
    folder = Path(study.output).expanduser().resolve()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not existing.is_dir():
        raise UserError(f"output: {existing} is a file; a folder is needed for {folder}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output: {existing} cannot be written to; name another folder")
