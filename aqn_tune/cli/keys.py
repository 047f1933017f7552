"""The keys of a study: each section by its dotted name, read from the schemas themselves."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel


class Section(NamedTuple):
    """A mapping in a study file."""

    name: str
    """Its dotted key, "" for the study itself; with the kind behind a colon where it has several."""
    model: type[BaseModel]


def sections(
    model: type[BaseModel], *, listed: Collection[type[BaseModel]] = (), name: str = ""
) -> Iterator[Section]:
    """Yield `model` and every section below it, each before its own.

    Args:
        model: What a file is read as.
        listed: Kinds that are described elsewhere: they are left out, and what is below them.
        name: Dotted key of `model`.
    """
    yield Section(name, model)
    key = name.partition(":")[0]
    for field, info in model.model_fields.items():
        below = f"{key}.{field}".lstrip(".") + _of_each(info.annotation)
        found = [one for one in models(info.annotation) if one not in listed]
        for one in found:
            kind = word(one)
            yield from sections(one, listed=listed, name=f"{below}: {kind}" if kind else below)


def models(hint: Any) -> list[type[BaseModel]]:
    """Return the models in a type, in their order."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return [hint]
    inner = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
    return [one for part in inner for one in models(part)]


def word(model: type[BaseModel]) -> str:
    """Return the word that selects a model among others, "" where it has none."""
    for name in ("kind", "format"):
        if name in model.model_fields:
            return str(model.model_fields[name].default)
    return ""


def _of_each(hint: Any) -> str:
    """Return what stands in a key for the name of an entry, "" where a type is no map."""
    inner = [hint, *get_args(hint)]
    return ".<name>" if any(get_origin(one) is dict for one in inner) else ""
