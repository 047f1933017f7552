"""`aqn-tune list`: what a study may name, read from the schemas themselves."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from aqn_tune.cli.keys import models, sections, word
from aqn_tune.cli.options import Json
from aqn_tune.cli.output import console, print_json
from aqn_tune.noise.targeting.per_layer import PerLayer
from aqn_tune.study.layers import Layers

if TYPE_CHECKING:
    from rich.table import Table

_NAMES: dict[Any, str] = {
    int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path",
}  # fmt: skip
_ALIASES: dict[Any, str] = {
    typing.get_args(Layers)[0]: "all, or list of layers such as [0, 14-17, -1]",
    typing.get_args(PerLayer)[0]: "list of numbers, or map of layer to number",
}
"""Types whose parts would say less than the whole."""
_WIDEST = 14
"""Characters of a line in the column of defaults; what needs more than two lines stands with the meaning."""

app = typer.Typer(
    help="List what a study may say: its keys, and the kinds of faults, noise and others it may name.",
    no_args_is_help=True,
)


@app.command()
def study(json: Json = False) -> None:
    """Every key of a study, with its default and what it means."""
    from aqn_tune.study.schema import Study

    listed = {model for kinds in _registries().values() for model in kinds.values()}
    found = {name: describe(model) for name, model in sections(Study, listed=listed)}
    if json:
        print_json(found)
        return
    from rich.text import Text

    out = console()
    for name, entry in found.items():
        out.print(f"\n[bold cyan]{name or 'a study'}[/bold cyan]")
        out.print(Text(entry["summary"]))
        if entry["parameters"]:
            out.print(_parameters(entry["parameters"]))


@app.command()
def dimensions(json: Json = False) -> None:
    """What a search space may search: the names of its dimensions."""
    from aqn_tune.study.space import DIMENSIONS, NUMBERED

    numbered = {
        f"{name}_<layer>": f"The {name} of one layer (targeting {kind})."
        for name, kind in NUMBERED.items()
    }
    found = {**DIMENSIONS, **numbered}
    if json:
        print_json(found)
        return
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    grid.add_column(no_wrap=True)
    grid.add_column()
    for name, meaning in found.items():
        grid.add_row(Text(name, "bold"), Text(meaning))
    console().print(grid)


@app.command()
def faults(json: Json = False) -> None:
    """The kinds of hardware faults and their parameters."""
    _show("faults", _registries()["faults"], json)


@app.command()
def quantization(json: Json = False) -> None:
    """The number formats of quantizers and their parameters."""
    _show("quantization formats", _registries()["quantization"], json)


@app.command()
def noise(json: Json = False) -> None:
    """The carriers of noise and their parameters."""
    _show("noise carriers", _registries()["noise"], json)


@app.command()
def targeting(json: Json = False) -> None:
    """The targetings: which layers get how much noise."""
    _show("targetings", _registries()["targeting"], json)


@app.command()
def schedules(json: Json = False) -> None:
    """The schedules of the noise level."""
    _show("schedules", _registries()["schedules"], json)


@app.command()
def tasks(json: Json = False) -> None:
    """The tasks: where the data comes from."""
    _show("tasks", _registries()["tasks"], json)


@app.command()
def margins(json: Json = False) -> None:
    """The kinds of equivalence margins (confirm.margin) and their parameters."""
    _show("margins", _registries()["margins"], json)


def _registries() -> dict[str, Mapping[str, type[BaseModel]]]:
    """Return the kinds that have a list of their own, by its command."""
    from aqn_tune.faults import FAULTS
    from aqn_tune.noise.carriers import CARRIERS
    from aqn_tune.noise.schedules import SCHEDULES
    from aqn_tune.noise.targeting import TARGETINGS
    from aqn_tune.quantization import FORMATS
    from aqn_tune.study.margin import MARGINS
    from aqn_tune.tasks import TASKS

    return {
        "faults": FAULTS,
        "quantization": FORMATS,
        "noise": CARRIERS,
        "targeting": TARGETINGS,
        "schedules": SCHEDULES,
        "tasks": TASKS,
        "margins": MARGINS,
    }


def _show(title: str, kinds: Mapping[str, type[BaseModel]], json: bool) -> None:
    described = {name: describe(model) for name, model in kinds.items()}
    if json:
        print_json(described)
        return
    from rich.text import Text

    out = console()
    shared = _shared(described)
    out.print(f"[bold]{len(kinds)} {title}[/bold]")
    out.print("Of each parameter: its default, what is allowed, and what it means.")
    if shared:
        out.print(f"What all of them take stands at the end: {', '.join(shared)}.")
    for name, entry in described.items():
        out.print(f"\n[bold cyan]{name}[/bold cyan]")
        out.print(Text(entry["summary"]))
        own = [p for p in entry["parameters"] if p != shared.get(p["name"])]
        if own:
            out.print(_parameters(sorted(own, key=lambda p: p["default"] != "required")))
    if shared:
        out.print("\n[bold cyan]all of them[/bold cyan], where nothing else is said above")
        out.print(_parameters(list(shared.values())))


def _shared(described: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return the parameters that all kinds have and most of them in the same words."""
    kinds = [{p["name"]: p for p in entry["parameters"]} for entry in described.values()]
    shared = {}
    for name in kinds[0]:
        variants = [kind[name] for kind in kinds if name in kind]
        commonest = max(variants, key=variants.count)
        if len(variants) == len(kinds) and variants.count(commonest) > len(kinds) / 2:
            shared[name] = commonest
    return shared


def _parameters(parameters: Sequence[Mapping[str, str]]) -> Table:
    """Return a table of parameters that is easy to read in 80 columns: facts above, meaning below."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    grid.add_column(width=1)
    grid.add_column(no_wrap=True, width=max(len(p["name"]) for p in parameters))
    grid.add_column(max_width=_WIDEST)
    grid.add_column()
    for parameter in parameters:
        default, meaning = parameter["default"], parameter["description"]
        if len(default) > 2 * _WIDEST:
            default, meaning = "", f"{meaning} Default: {default}"
        facts = Text.assemble((parameter["type"], "green"), "\n", meaning)
        grid.add_row("", Text(parameter["name"], "bold"), Text(default), facts)
    return grid


def describe(model: type[BaseModel]) -> dict[str, Any]:
    """Return a kind's summary and its parameters: name, what is allowed, default, meaning.

    The word that selects the kind itself is no parameter.
    """
    parameters = [
        {
            "name": name,
            "type": _allowed(field),
            "default": _default(field),
            "description": field.description or "",
        }
        for name, field in model.model_fields.items()
        if not _selects(field)
    ]
    summary = inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return {"summary": summary, "parameters": parameters}


def _selects(field: FieldInfo) -> bool:
    """Return whether a field can have one value only, as `kind: dead_zone` of a dead zone."""
    return (
        typing.get_origin(field.annotation) is typing.Literal
        and len(typing.get_args(field.annotation)) == 1
    )


def _allowed(field: FieldInfo) -> str:
    return ", ".join([_type_name(field.annotation), *_bounds(field)])


def _bounds(field: FieldInfo) -> list[str]:
    return [
        f"{sign} {getattr(item, name):g}"
        for item in field.metadata
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if getattr(item, name, None) is not None
    ]


def _type_name(hint: Any) -> str:
    if hint in _ALIASES:
        return _ALIASES[hint]
    kinds = models(hint)
    for command, registry in _registries().items():
        if kinds and set(kinds) == set(registry.values()):
            many = "list of kinds in" if typing.get_origin(hint) is tuple else "one of"
            return f"{many} aqn-tune list {command}"
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return word(hint) or "a section"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = [
            found
            for item in arguments[1:]
            if isinstance(item, FieldInfo)
            for found in _bounds(item)
        ]
        return ", ".join([_type_name(arguments[0]), *bounds])
    if origin in (Union, types.UnionType):
        parts = [part for part in arguments if part is not type(None)]
        words = all(typing.get_origin(part) is typing.Literal for part in parts)
        return (", " if words else ", or ").join(_type_name(part) for part in parts)
    if origin is typing.Literal:
        return ", ".join(str(part) for part in arguments)
    if origin is tuple:
        one = _type_name(arguments[0])
        if one.startswith("list of "):
            return f"list of lists of {one.removeprefix('list of ')}"
        return f"list of {one}s" if one.endswith("number") else f"list of {one}"
    if origin is dict:
        return f"map of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)).lower())


def _list(items: tuple[Any, ...]) -> str:
    parts = (_list(item) if isinstance(item, tuple) else str(item) for item in items)
    return f"[{', '.join(parts)}]"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None or field.default is PydanticUndefined:
        return "-"
    if isinstance(field.default, BaseModel):
        return word(type(field.default)) or "-"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    if isinstance(field.default, tuple):
        return _list(field.default)
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
