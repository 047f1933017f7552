"""From a study's sweep to its scenarios."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from aqn_tune.errors import UserError, nearest
from aqn_tune.study.messages import as_user_error
from aqn_tune.study.scenario import Scenario, ScenarioSpec
from aqn_tune.study.schema import Study
from aqn_tune.study.source import Place, Source


def resolve_scenarios(study: Study) -> tuple[Scenario, ...]:
    """Return the scenarios of a study: every combination of its sweep, the last key fastest.

    Without a sweep there is one. Names read `<during>-<key><value>`, for example
    `both-threshold0.2`. Raises UserError for a key that the scenario does not have, a value that it
    does not allow, and two combinations that are the same scenario.
    """
    base = study.scenario.model_dump(mode="json")
    for key, offered in study.sweep.items():
        if not offered:
            raise UserError(f"sweep.{key}: got an empty list; give at least one value")
        _check_key(base, key)
    short = _short_keys(tuple(study.sweep))
    scenarios: list[Scenario] = []
    for combination in itertools.product(*study.sweep.values()):
        chosen = dict(zip(study.sweep, combination, strict=True))
        spec = _scenario(base, chosen)
        values = {short[key]: _label(value) for key, value in chosen.items()}
        parts = [f"{key}{value}" for key, value in values.items() if key != "during"]
        name = "-".join([spec.during, *parts])
        scenarios.append(Scenario(name=name, spec=spec, values=values))
    for name, count in Counter(scenario.name for scenario in scenarios).items():
        if count > 1:
            raise UserError(
                f"sweep: {count} combinations give the same scenario {name!r}; name each value once"
            )
    return tuple(scenarios)


def _scenario(base: dict[str, Any], chosen: Mapping[str, Any]) -> ScenarioSpec:
    data: Any = base
    for key, value in chosen.items():
        data = _with(data, key.split("."), value)
    try:
        return ScenarioSpec.model_validate(data)
    except ValidationError as error:
        source = Source(data, {(): Place("sweep", None)})
        problems = str(as_user_error(error, ScenarioSpec, source)).splitlines()
        message = problems[0].removeprefix("sweep: ")
        key = next((k for k in chosen if message.startswith(k)), next(iter(chosen), ""))
        raise UserError(f"sweep.{key}: {message.removeprefix(f'{key}: ')}") from None


def _with(data: Any, parts: list[str], value: Any) -> Any:
    """Return `data` with the value at a dotted key replaced; the key exists."""
    if not parts:
        return value
    if isinstance(data, list):
        index = int(parts[0])
        return [*data[:index], _with(data[index], parts[1:], value), *data[index + 1 :]]
    return {**data, parts[0]: _with(data[parts[0]], parts[1:], value)}


def _check_key(base: dict[str, Any], key: str) -> None:
    data: Any = base
    for part in key.split("."):
        allowed = [str(i) for i in range(len(data))] if isinstance(data, list) else list(data or ())
        if not isinstance(data, list | dict) or part not in allowed:
            known = sorted(_keys(base))
            raise UserError(
                f"sweep.{key}: the scenario has no key {key!r}; allowed are {', '.join(known)}"
                f"{nearest(key, known)}"
            )
        data = data[int(part)] if isinstance(data, list) else data[part]


def _keys(data: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of everything below a scenario that a sweep may set."""
    if isinstance(data, list) and any(isinstance(item, dict) for item in data):
        return [key for i, item in enumerate(data) for key in _keys(item, f"{prefix}{i}.")]
    if isinstance(data, dict):
        return [key for name in data for key in _keys(data[name], f"{prefix}{name}.")]
    name = prefix.removesuffix(".")
    return [] if name.endswith(".kind") else [name]


def _short_keys(keys: tuple[str, ...]) -> dict[str, str]:
    """Return the last part of each key, or all of it where the last parts are not all different."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    return {key: part if last[part := key.rpartition(".")[2]] == 1 else key for key in keys}


def _label(value: Any) -> str | int | float:
    if isinstance(value, list | tuple):
        return "+".join(str(item) for item in value).replace("/", "_")
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return value if isinstance(value, int | float) else str(value).replace("/", "_")
