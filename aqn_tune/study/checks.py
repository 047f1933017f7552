"""What a study must hold beyond its schema: checks that need the model, the data and the disk."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from aqn_tune.errors import UserError, nearest
from aqn_tune.noise.carriers import CARRIERS
from aqn_tune.noise.schedules import SCHEDULES
from aqn_tune.noise.targeting import TARGETINGS
from aqn_tune.study.arms import ControlName
from aqn_tune.study.cells import resolve_run
from aqn_tune.study.layers import resolve_layers
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study
from aqn_tune.study.space import (
    ChoiceDimension,
    Dimension,
    FixedDimension,
    Params,
    SpaceSpec,
    Value,
    arm_of,
    parse_layers,
)

MOST_CORNERS = 4096
"""Corners of a search space that are tried; a space with more parents than that is refused."""


def check_study(study: Study, scenarios: Sequence[Scenario], layer_count: int) -> None:
    """Check everything that would otherwise fail after hours: layers, arms, space, data, output.

    Raises UserError whose message begins with the dotted key it is about. A control that cannot
    exist (healthy when every layer is faulty) is no error: `plan` lists it.
    """
    _check_layers(study, scenarios, layer_count)
    for name, arm in study.arms.items():
        for scenario in scenarios:
            try:
                resolve_run(study, scenario, arm, seed=0, layer_count=layer_count)
            except UserError as error:
                raise UserError(f"arms.{name}: in scenario {scenario.name}: {error}") from None
    for control in ("global", "targeted"):
        _check_control(study, scenarios[0], control, layer_count)
    if study.search is not None:
        _check_space(study, study.search.space, scenarios, layer_count)
    _check_decisions(study)
    _check_files(study)
    _check_output(study)


def _check_layers(study: Study, scenarios: Sequence[Scenario], layer_count: int) -> None:
    for scenario in scenarios:
        for index, fault in enumerate(scenario.spec.faults):
            try:
                resolve_layers(fault.layers, layer_count)
            except UserError as error:
                key = f"faults.{index}.layers"
                root = "sweep" if key in study.sweep else "scenario"
                message = str(error).removeprefix("layers: ")
                raise UserError(f"{root}.{key}: {message}") from None


def _check_control(study: Study, scenario: Scenario, name: ControlName, layer_count: int) -> None:
    """Refuse a schedule of the controls that injects nothing, which would make them all n/a."""
    if name not in study.controls.include:
        return
    try:
        resolve_run(study, scenario, study.controls.arm(name), seed=0, layer_count=layer_count)
    except UserError as error:
        raise UserError(f"controls.schedule: {error}") from None


def _check_space(
    study: Study, space: SpaceSpec, scenarios: Sequence[Scenario], layer_count: int
) -> None:
    for name, dimension in space.dimensions.items():
        problem = _dimension_problem(name, dimension, layer_count)
        if problem:
            raise UserError(f"search.space.dimensions.{name}: {problem}")
    for params in corners(space):
        shown = ", ".join(f"{name}={value}" for name, value in params.items())
        for scenario in scenarios:
            try:
                arm = arm_of(params)
                resolve_run(study, scenario, arm, seed=0, layer_count=layer_count)
            except UserError as error:
                raise UserError(
                    f"search.space.dimensions: {error} (for {shown} in scenario {scenario.name})"
                ) from None
            except ValidationError as error:
                text = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
                raise UserError(f"search.space.dimensions: {text} (for {shown})") from None


_NAMES: dict[str, tuple[str, ...]] = {
    "carrier": tuple(CARRIERS),
    "schedule": tuple(SCHEDULES),
    "targeting": tuple(TARGETINGS),
    "normalise": ("none", "energy"),
}


def _dimension_problem(name: str, dimension: Dimension, layer_count: int) -> str | None:
    """Return what is wrong with the values that a dimension offers, None when nothing is."""
    for value in _values(dimension):
        if name in _NAMES:
            if value not in _NAMES[name]:
                allowed = ", ".join(_NAMES[name])
                return f"got {value!r}; allowed are {allowed}{nearest(str(value), _NAMES[name])}"
        elif name == "layers":
            try:
                resolve_layers(parse_layers(str(value)), layer_count)
            except (UserError, ValueError) as error:
                return str(error).removeprefix("layers: ")
        elif isinstance(value, str | bool):
            return f"got {value!r}; allowed are numbers"
        else:
            low, high, whole = _range(name, layer_count)
            if not low <= value <= high or (whole and value != int(value)):
                kind = "whole numbers" if whole else "numbers"
                top = "" if high == float("inf") else f" to {high:g}"
                above = "from " if top else "of at least "
                return f"got {value:g}; allowed are {kind} {above}{low:g}{top}"
    if name.startswith("multiplier_") and name != "multiplier_default":
        layer = int(name.removeprefix("multiplier_"))
        if layer >= layer_count:
            return f"there is no layer {layer} of {layer_count}; allowed are 0 to {layer_count - 1}"
    return None


def _range(name: str, layer_count: int) -> tuple[float, float, bool]:
    """Return the smallest and largest value of a numeric dimension, and whether it is whole."""
    infinite = float("inf")
    ranges: dict[str, tuple[float, float, bool]] = {
        "sigma_ratio": (1e-12, 1.0, False),
        "stages": (1, infinite, True),
        "warmup_fraction": (0.0, 1 - 1e-9, False),
        "window_centre": (0, layer_count - 1, True),
        "window_width": (1, infinite, True),
        "random_count": (1, layer_count, True),
        "learning_rate": (1e-12, infinite, False),
        "rank": (1, infinite, True),
    }
    return ranges.get(name, (0.0, infinite, False))


def _values(dimension: Dimension) -> tuple[Value, ...]:
    """Return the values of a dimension to check: all of a choice, both ends of a range."""
    if isinstance(dimension, ChoiceDimension):
        return dimension.values
    if isinstance(dimension, FixedDimension):
        return (dimension.value,)
    return (dimension.low, dimension.high)


def corners(space: SpaceSpec) -> Iterator[Params]:
    """Yield points of a space that reach every value of every choice and both ends of every range.

    All combinations of the dimensions that others depend on; the others run through their values
    together.
    """
    parents = {p for dimension in space.dimensions.values() for p in dimension.when}
    offered = {name: _values(dimension) for name, dimension in space.dimensions.items()}
    combinations = 1
    for name in parents:
        combinations *= len(offered[name])
    if combinations > MOST_CORNERS:
        raise UserError(
            f"search.space.dimensions: {combinations} combinations of the dimensions that `when` "
            f"names; at most {MOST_CORNERS} can be checked"
        )
    rounds = max(2, *(len(v) for n, v in offered.items() if n not in parents), 2)
    names = [name for name in space.dimensions if name in parents]
    for combination in itertools.product(*(offered[name] for name in names)):
        fixed = dict(zip(names, combination, strict=True))
        for turn in range(rounds):
            params: Params = {}
            for name in space.dimensions:
                if space.active(name, params):
                    values = offered[name]
                    params[name] = fixed.get(name, values[turn % len(values)])
            yield params


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
