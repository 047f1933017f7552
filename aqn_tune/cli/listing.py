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

app = typer.Typer(
    help="List what a study may name: faults, quantization, noise, targeting, schedules, tasks, margins.",
    no_args_is_help=True,
)


@app.command()
def faults(json: Json = False) -> None:
    """The kinds of hardware faults and their parameters."""
    from aqn_tune.faults import FAULTS

    _show("faults", FAULTS, json)


@app.command()
def quantization(json: Json = False) -> None:
    """The number formats of quantizers and their parameters."""
    from aqn_tune.quantization import FORMATS

    _show("quantization formats", FORMATS, json)


@app.command()
def noise(json: Json = False) -> None:
    """The carriers of noise and their parameters."""
    from aqn_tune.noise.carriers import CARRIERS

    _show("noise carriers", CARRIERS, json)


@app.command()
def targeting(json: Json = False) -> None:
    """The targetings: which layers get how much noise."""
    from aqn_tune.noise.targeting import TARGETINGS

    _show("targetings", TARGETINGS, json)


@app.command()
def schedules(json: Json = False) -> None:
    """The schedules of the noise level."""
    from aqn_tune.noise.schedules import SCHEDULES

    _show("schedules", SCHEDULES, json)


@app.command()
def tasks(json: Json = False) -> None:
    """The tasks: where the data comes from."""
    from aqn_tune.tasks import TASKS

    _show("tasks", TASKS, json)


@app.command()
def margins(json: Json = False) -> None:
    """The kinds of equivalence margins (confirm.margin) and their parameters."""
    from aqn_tune.study.margin import MARGINS

    _show("margins", MARGINS, json)


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
    grid.add_column(max_width=14)
    grid.add_column()
    for parameter in parameters:
        facts = Text.assemble((parameter["type"], "green"), "\n", parameter["description"])
        grid.add_row("", Text(parameter["name"], "bold"), Text(parameter["default"]), facts)
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
    bounds = [
        f"{sign} {getattr(item, name):g}"
        for item in field.metadata
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if getattr(item, name, None) is not None
    ]
    return ", ".join([_type_name(field.annotation), *bounds])


def _type_name(hint: Any) -> str:
    if hint in _ALIASES:
        return _ALIASES[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (Union, types.UnionType):
        parts = [part for part in arguments if part is not type(None)]
        words = all(typing.get_origin(part) is typing.Literal for part in parts)
        return (", " if words else ", or ").join(_type_name(part) for part in parts)
    if origin is typing.Literal:
        return ", ".join(str(part) for part in arguments)
    if origin is tuple:
        one = _type_name(arguments[0])
        return f"list of {one}s" if one.endswith("number") else f"list of {one}"
    if origin is dict:
        return f"map of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)).lower())


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "-"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    if isinstance(field.default, tuple):
        return "[" + ", ".join(str(part) for part in field.default) + "]"
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
