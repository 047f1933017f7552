"""`aqn-tune list`: every parameter of every kind, from its schema, readable in a narrow terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from aqn_tune.cli.app import main
from aqn_tune.faults import FAULTS
from aqn_tune.noise.carriers import CARRIERS
from aqn_tune.noise.schedules import SCHEDULES
from aqn_tune.noise.targeting import TARGETINGS
from aqn_tune.quantization import FORMATS
from aqn_tune.study.margin import MARGINS
from aqn_tune.study.space import DIMENSIONS
from aqn_tune.tasks import TASKS

LISTS: dict[str, dict[str, type[Any]]] = {
    "faults": dict(FAULTS),
    "quantization": dict(FORMATS),
    "noise": dict(CARRIERS),
    "targeting": dict(TARGETINGS),
    "schedules": dict(SCHEDULES),
    "tasks": dict(TASKS),
    "margins": dict(MARGINS),
}


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["list", *arguments])
    assert not stopped.value.code
    return capsys.readouterr().out


def shown_within(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(capsys, what)
    assert max(len(line) for line in text.splitlines()) <= columns
    assert "…" not in text, "something is cut off"
    return text


def parameters(capsys: pytest.CaptureFixture[str], what: str, kind: str) -> dict[str, Any]:
    found = json.loads(shown(capsys, what, "--json"))[kind]["parameters"]
    return {parameter["name"]: parameter for parameter in found}


@pytest.mark.parametrize("what", LISTS)
def test_json_has_every_parameter_of_every_kind(
    what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(shown(capsys, what, "--json"))
    assert set(found) == set(LISTS[what])
    for kind, entry in found.items():
        assert entry["summary"], kind
        model: type[BaseModel] = LISTS[what][kind]
        names = [parameter["name"] for parameter in entry["parameters"]]
        selector = "format" if what == "quantization" else "kind"
        assert names == [name for name in model.model_fields if name != selector]
        for parameter in entry["parameters"]:
            assert parameter["description"], (kind, parameter)
            assert parameter["type"], (kind, parameter)
            assert parameter["default"], (kind, parameter)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("what", LISTS)
def test_text_has_every_parameter_and_keeps_to_the_width(
    what: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown_within(columns, capsys, monkeypatch, what)
    words = " ".join(text.split())
    for kind, model in LISTS[what].items():
        assert f"\n{kind}\n" in text
        for name, field in model.model_fields.items():
            if name not in ("kind", "format"):
                assert f"   {name} " in text, (kind, name)
                assert str(field.description).split()[0] in words


@pytest.mark.parametrize(
    ("what", "kind", "name", "allowed", "default"),
    [
        ("schedules", "geometric", "sigma_start", "number, >= 0", "0.05"),
        ("schedules", "geometric", "warmup_fraction", "number, >= 0, < 1", "-"),
        ("schedules", "linear", "stop_fraction", "number, >= 0, < 1", "0"),
        ("faults", "dead_zone", "threshold", "number, >= 0", "required"),
        (
            "faults", "dead_zone", "reference",
            "token_max, tensor_max, rms, mean_abs, std, absolute, quantile", "token_max",
        ),
        ("faults", "relative_gaussian", "modules", "list of text", "[linear]"),
        ("faults", "bit_flip", "bits", "list of whole numbers, or text", "required"),
        ("faults", "bit_flip", "format", "fp32, bf16, fp16", "fp32"),
        (
            "faults", "spike", "layers",
            "all, or list of layers such as [0, 14-17, -1]", "required",
        ),
        ("quantization", "mxfp4", "scale_mode", "floor, rceil, even, ceil", "floor"),
        ("quantization", "int8", "operands", "weight, activation, both", "both"),
        ("targeting", "scores", "values", "list of numbers, or map of layer to number", "-"),
        ("targeting", "zone", "edge", "all, or list of layers such as [0, 14-17, -1]", "-"),
        ("tasks", "jsonl", "train", "path", "required"),
        ("margins", "gain", "share", "number, > 0", "0.05"),
        ("margins", "gap", "share", "number, > 0, <= 1", "required"),
        ("tasks", "word_problems", "largest_total", "whole number, >= 20, <= 999", "99"),
    ],
)  # fmt: skip
def test_what_is_allowed_and_the_default(
    what: str,
    kind: str,
    name: str,
    allowed: str,
    default: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parameter = parameters(capsys, what, kind)[name]
    assert (parameter["type"], parameter["default"]) == (allowed, default)


def test_what_all_kinds_share_is_shown_once_and_exceptions_where_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = shown(capsys, "faults")
    assert text.count("   mask_seed ") == 1
    assert text.count("   persistence ") == 3, "two kinds have another default"
    own, _, last = text.partition("\nstuck_at\n")[2].partition("\nspike\n")
    assert "   density " in own
    assert "   density " in last.partition("\nall of them")[2]


def test_required_parameters_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "faults").partition("\ndead_zone\n")[2]
    assert text.index("   threshold ") < text.index("   ste ")


# -- the study itself ------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
NAMED = {"arms": "arms.<name>", "search.space.dimensions": "search.space.dimensions.<name>: int"}
KINDS = {"training.method": "training.method: lora"}
LISTED = ("task", "carrier", "schedule", "targeting", "margin", "faults", "quantization")
"""Keys whose content has a list of its own."""


def keys(section: str, content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every key of a study file with its section, as the list names it."""
    for key, value in content.items():
        if section.startswith("search.space.dimensions") and key == "kind":
            continue
        yield section, key
        below = f"{section.partition(':')[0]}.{key}".lstrip(".")
        if key in LISTED or key == "sweep":
            continue
        if below in NAMED:
            for entry in value.values():
                yield from keys(NAMED[below], entry)
        elif isinstance(value, dict):
            yield from keys(KINDS.get(below, below), value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for entry in value:
                yield from keys(below, entry)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda f: f.stem
)
def test_every_key_of_the_shipped_studies_is_listed(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = json.loads(shown(capsys, "study", "--json"))
    names = {s: [p["name"] for p in entry["parameters"]] for s, entry in listed.items()}
    found = list(keys("", yaml.safe_load(file.read_text())))
    assert len(found) > 15
    assert [(s, key) for s, key in found if key not in names[s]] == []


@pytest.mark.parametrize(
    ("section", "key", "allowed", "default"),
    [
        ("", "study", "text", "required"),
        ("", "task", "one of aqn-tune list tasks", "word_problems"),
        ("", "arms", "map of text to a section", "-"),
        ("", "sweep", "map of text to list of any", "-"),
        ("training", "method", "lora, or full", "lora"),
        ("training.method: lora", "alpha", "number, > 0", "16"),
        ("scenario", "faults", "list of kinds in aqn-tune list faults", "[]"),
        ("arms.<name>", "noise", "a section", "-"),
        ("arms.<name>.noise", "targeting", "one of aqn-tune list targeting", "global"),
        ("search", "rungs", "list of numbers", "[0.25, 0.5, 1.0]"),
        ("search.space.dimensions.<name>: float", "low", "number", "required"),
        ("confirm", "margin", "one of aqn-tune list margins", "gain"),
        ("decisions", "contrasts", "list of lists of text", "required"),
        ("decisions.rows", "say", "text", "required"),
        ("compute", "workers", "whole number, >= 1, or auto", "auto"),
    ],
)
def test_what_a_key_of_the_study_takes(
    section: str, key: str, allowed: str, default: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parameter = parameters(capsys, "study", section)[key]
    assert (parameter["type"], parameter["default"]) == (allowed, default)
    assert parameter["description"]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("what", ["study", "dimensions"])
def test_the_study_and_the_space_keep_to_the_width(
    what: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shown_within(columns, capsys, monkeypatch, what)


def test_every_dimension_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, "dimensions", "--json"))
    assert set(found) == {*DIMENSIONS, "multiplier_<layer>", "score_<layer>"}
    assert all(found.values())
