"""From a study's sweep to its scenarios."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from aqn_tune.errors import UserError, nearest
from aqn_tune.study.messages import TAGS, as_user_error
from aqn_tune.study.scenario import Scenario, ScenarioSpec
from aqn_tune.study.schema import Study
from aqn_tune.study.source import Place, Source


def resolve_scenarios(study: Study) -> tuple[Scenario, ...]:
    """Return the scenarios of a study: every combination of its sweep, the last key fastest.

    Without a sweep there is one. Names read `<during>-<key><value>`, for example
    `both-threshold0.2` or `both-deploy_merged`; a kind of fault and a number format stand for
    themselves, `both-mxfp4`. Raises UserError for a key that the scenario does not have, a value that
    it does not allow, and two combinations that are the same scenario.
    """
    base = study.scenario.model_dump(mode="json")
    for key, offered in study.sweep.items():
        if not offered:
            raise UserError(f"sweep.{key}: got an empty list; give at least one value")
        _check_key(base, key)
    short = _short_keys(tuple(study.sweep))
    labels = {key: _labels(offered) for key, offered in study.sweep.items()}
    scenarios: list[Scenario] = []
    for places in itertools.product(*(range(len(offered)) for offered in study.sweep.values())):
        at = dict(zip(study.sweep, places, strict=True))
        chosen = {key: study.sweep[key][place] for key, place in at.items()}
        spec = _scenario(study.scenario, base, chosen)
        values = {short[key]: labels[key][place] for key, place in at.items()}
        parts = [_part(short[k], v, values[short[k]]) for k, v in chosen.items() if k != "during"]
        name = "-".join([spec.during, *parts])
        scenarios.append(Scenario(name=name, spec=spec, values=values))
    for name, count in Counter(scenario.name for scenario in scenarios).items():
        if count > 1:
            raise UserError(
                f"sweep: {count} combinations give the same scenario {name!r}; name each value once"
            )
    return tuple(scenarios)


def _scenario(spec: ScenarioSpec, base: dict[str, Any], chosen: Mapping[str, Any]) -> ScenarioSpec:
    data: Any = base
    for key, value in chosen.items():
        room = _swept_kind(key)
        if room:
            # Another kind has other parameters: what the user wrote has to fit it, defaults do not.
            data = _with(data, room.split("."), _written(spec, room))
        data = _with(data, key.split("."), value)
    try:
        return ScenarioSpec.model_validate(data)
    except ValidationError as error:
        source = Source(data, {(): Place("sweep", None)})
        problems = str(as_user_error(error, ScenarioSpec, source)).splitlines()
        message = problems[0].removeprefix("sweep: ")
        key = next((k for k in chosen if message.startswith(k)), next(iter(chosen), ""))
        raise UserError(f"sweep.{key}: {message.removeprefix(f'{key}: ')}") from None


def study_content(study: Study) -> dict[str, Any]:
    """Return a study as plain data, every default spelled out, which reads back as the same study.

    Of a fault or quantizer whose kind is swept there is what was written: defaults are those of
    each kind, and spelled out they would have to fit all of them.
    """
    content = study.model_dump(mode="json")
    for key in study.sweep:
        room = _swept_kind(key)
        if room:
            parts = ["scenario", *room.split(".")]
            content = _with(content, parts, _written(study.scenario, room))
    return content


def _swept_kind(key: str) -> str:
    """Return the fault or quantizer, `faults.0`, whose kind or format a swept key sets; else ""."""
    room, _, tag = key.rpartition(".")
    is_kind = tag == {"faults": "kind", "quantization": "format"}.get(room.partition(".")[0])
    return room if is_kind else ""


def _written(spec: ScenarioSpec, room: str) -> dict[str, Any]:
    """Return what the user wrote of one fault or quantizer, `faults.0`."""
    name, _, index = room.partition(".")
    part: BaseModel = getattr(spec, name)[int(index)]
    return part.model_dump(mode="json", exclude_unset=True)


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
    """Return the last part of each key, or all of it where that says too little or is not unique."""
    last = {key: key.rpartition(".")[2] for key in keys}
    count = Counter(last.values())
    return {
        key: part if count[part] == 1 and not part.isdigit() else key for key, part in last.items()
    }


def _part(key: str, value: Any, label: str | int | float) -> str:
    """Return a value's part of a scenario's name: threshold0.2, deploy_merged, mxfp4."""
    if key in TAGS:
        return str(label)
    items = value if isinstance(value, list | tuple) and value else [value]
    return f"{key}_{label}" if any(_is_word(item) for item in items) else f"{key}{label}"


def _is_word(item: Any) -> bool:
    """Return whether `item` is neither a number nor layers, which follow their key at once."""
    if isinstance(item, str):
        return item != "all" and not item[:1].isdigit()
    return isinstance(item, bool) or not isinstance(item, int | float)


def _labels(offered: Sequence[Any]) -> list[str | int | float]:
    """Return what each of the values of a key is called; of mappings, that in which they differ."""
    mappings = [value for value in offered if isinstance(value, dict)]
    shared = {
        key: value
        for key, value in (mappings[0] if mappings else {}).items()
        if all(key in other and other[key] == value for other in mappings)
    }
    return [_label(value, shared) for value in offered]


def _label(value: Any, shared: Mapping[str, Any]) -> str | int | float:
    if isinstance(value, dict):
        tags = [str(value[tag]) for tag in TAGS if tag in value][:1]
        rest = [
            _part(key, own, _label(own, {}))
            for key, own in value.items()
            if key not in shared and own not in tags
        ]
        return "+".join([*tags, *rest])
    if isinstance(value, list | tuple):
        return "+".join(str(_label(item, shared)) for item in value) or "none"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return value if isinstance(value, int | float) else str(value).replace("/", "_")
