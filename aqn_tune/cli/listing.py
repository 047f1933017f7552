"""`aqn-tune list`: what a study may name, read from the schemas themselves."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Union

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from aqn_tune.cli.options import Json
from aqn_tune.cli.output import console, print_json, table

app = typer.Typer(
    help="List what a study may name: faults, noise, targeting, schedules, tasks.",
    no_args_is_help=True,
)


@app.command()
def faults(json: Json = False) -> None:
    """The kinds of hardware faults and their parameters."""
    from aqn_tune.faults import FAULTS

    _show("faults", FAULTS, json)


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


def _show(title: str, kinds: Mapping[str, type[BaseModel]], json: bool) -> None:
    described = {name: describe(model) for name, model in kinds.items()}
    if json:
        print_json(described)
        return
    out = console()
    out.print(f"[bold]{len(kinds)} {title}[/bold]\n")
    for name, entry in described.items():
        out.print(f"[bold cyan]{name}[/bold cyan]")
        out.print(entry["summary"], markup=False, soft_wrap=True)
        rows = [(p["name"], p["type"], p["default"], p["description"]) for p in entry["parameters"]]
        out.print(table("", ("parameter", "allowed", "default", ""), rows) if rows else "")


def describe(model: type[BaseModel]) -> dict[str, Any]:
    """Return a kind's summary and its parameters: name, what is allowed, default, meaning."""
    parameters = [
        {
            "name": name,
            "type": _allowed(field),
            "default": _default(field),
            "description": field.description or "",
        }
        for name, field in model.model_fields.items()
        if name != "kind"
    ]
    summary = inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return {"summary": summary, "parameters": parameters}


def _allowed(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(item, name):g}"
        for item in field.metadata
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if getattr(item, name, None) is not None
    ]
    return ", ".join([_type_name(field.annotation), *bounds])


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(part) for part in arguments if part is not type(None))
    if origin is typing.Literal:
        return ", ".join(str(part) for part in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"map of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    names = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false"}
    return names.get(getattr(hint, "__name__", ""), getattr(hint, "__name__", str(hint)).lower())


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "-"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    if isinstance(field.default, tuple):
        return "[" + ", ".join(str(part) for part in field.default) + "]"
    return str(field.default)
