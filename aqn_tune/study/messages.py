"""From a validation error to one message that says where, what was got and what is allowed."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Union

from pydantic import BaseModel, ValidationError

from aqn_tune.errors import UserError, nearest
from aqn_tune.study.source import KeyPath, Source, dotted

_PREFIX = "Input should be "
TAGS = ("kind", "format")
"""Keys that say which of several models a mapping is; a model with both is told by the first."""


def as_user_error(error: ValidationError, model: type[BaseModel], source: Source) -> UserError:
    """Return all problems of a validation as one error, a line each, with file and line.

    Args:
        error: What pydantic raised for `source.data`.
        model: The model that was validated.
        source: The document.
    """
    problems: dict[KeyPath, list[str]] = {}
    items = error.errors(include_url=False)
    for item in items:
        if item["type"] == "too_short" and len(items) > 1 and item["input"]:
            continue  # a list whose bad items were left out; they are reported themselves
        path = _real_path(item["loc"], item["type"], source.data)
        text = _text(dict(item), path, _types_at(model, item["loc"]))
        found = problems.setdefault(path, [])
        if text not in found:
            found.append(text)
    return UserError("\n".join(_joined(source, path, texts) for path, texts in problems.items()))


def located(source: Source, message: str) -> UserError:
    """Return `message` with the place of the dotted key it begins with, if it does."""
    key, sign, _ = message.partition(": ")
    path = find(source, key) if sign else None
    return UserError(message if path is None else f"{source.place(path)}: {message}")


def find(source: Source, key: str) -> KeyPath | None:
    """Return the path of the dotted `key`, or of its longest leading part that the document has."""
    by_name = {dotted(path): path for path in source.places if path}
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        path = by_name.get(".".join(parts[:end]))
        if path is not None:
            return path
    return None


def _joined(source: Source, path: KeyPath, texts: list[str]) -> str:
    got = [text for text in texts if text.startswith("got ")]
    if len(got) > 1:  # one complaint per member of a union: what was got, then all that is allowed
        head = got[0].partition("; allowed: ")[0]
        allowed: dict[str, None] = {}
        hints: dict[str, None] = {}
        for text in got:
            one, sign, hint = text.partition("; allowed: ")[2].partition("; did you mean")
            allowed[one] = None
            hints[sign + hint] = None
        merged = f"{head}; allowed: {', or '.join(a for a in allowed if a)}{''.join(hints)}"
        texts = [merged, *(text for text in texts if text not in got)]
    body = "; ".join(texts)
    first, sign, _ = body.partition(": ")
    own = find(source, first) if sign and not path else None
    if own is not None:
        return f"{source.place(own)}: {body}"
    name = dotted(path)
    return f"{source.place(path)}: {name}: {body}" if name else f"{source.place(path)}: {body}"


def _text(item: dict[str, Any], path: KeyPath, candidates: list[Any]) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        names = list(dict.fromkeys(_field_names(candidates)))
        return f"unknown key; allowed are {', '.join(names)}{nearest(str(path[-1]), names)}"
    if kind == "missing":
        return f"the key is missing{_described(candidates, str(path[-1]))}"
    if kind == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        return (
            f"unknown {_told_apart(context)} '{context['tag']}'; allowed are {', '.join(tags)}"
            f"{nearest(context['tag'], tags)}"
        )
    if kind == "union_tag_not_found":
        name = _told_apart(context)
        return f"the key `{name}` is missing; allowed {name}s are {', '.join(_tags(candidates))}"
    if kind == "value_error":
        return str(context.get("error", item["msg"]))
    got = _shown(item["input"])
    if kind == "too_short":
        return f"got {got}; allowed: at least {context['min_length']} entries"
    if kind in ("model_type", "model_attributes_type"):
        kinds = list(_tags(candidates))
        name = next((_tag_field(hint) for hint in _members(candidates) if _tag_field(hint)), "")
        return f"got {got}; allowed: a mapping" + (
            f" with `{name}`: {', '.join(kinds)}" * bool(kinds)
        )
    if kind == "literal_error" and isinstance(item["input"], str):
        options = [part.strip(" '") for part in context["expected"].replace(" or ", ",").split(",")]
        return f"got {got}; allowed: {context['expected']}{nearest(item['input'], options)}"
    allowed = _plain(item["msg"])
    if item["input"] is None and "when" in path:
        return """got null; allowed: a verdict in quotes (an unquoted ~ is YAML's null)"""
    return f"got {got}; allowed: {allowed}"


def _plain(message: str) -> str:
    message = message.removeprefix(_PREFIX)
    for formal, plain in (
        ("a valid tuple", "a list"),
        ("a valid dictionary", "a mapping"),
        ("a valid integer", "a whole number"),
        ("a valid number", "a number"),
        ("a valid string", "text"),
        (", unable to parse string as an integer", ""),
        (", unable to parse string as a number", ""),
    ):
        message = message.replace(formal, plain)
    return message


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _real_path(loc: Sequence[str | int], kind: str, data: Any) -> KeyPath:
    """Return `loc` without the parts that name members of a union rather than keys."""
    path: list[str | int] = []
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(data, dict) and part in data:
            data = data[part]
            path.append(part)
        elif isinstance(data, dict) and str(part).isdigit() and int(part) in data:
            data = data[int(part)]
            path.append(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
            path.append(part)
        elif last and kind == "missing":
            path.append(part)
    return tuple(path)


def _types_at(model: type[BaseModel], loc: Sequence[str | int]) -> list[Any]:
    """Return the types that may stand where the last part of `loc` lies."""
    candidates: list[Any] = [model]
    for part in loc[:-1]:
        candidates = list(_descend(candidates, part)) or candidates
    models = [t for t in _members(candidates) if isinstance(t, type) and issubclass(t, BaseModel)]
    inner = list(_descend(candidates, loc[-1])) if loc else []
    return [*models, *(t for t in _members(inner) if t not in models)]


def _members(hints: Sequence[Any]) -> Iterator[Any]:
    """Yield the plain types behind annotations and unions."""
    for hint in hints:
        origin = typing.get_origin(hint)
        if origin is Annotated:
            yield from _members([typing.get_args(hint)[0]])
        elif origin in (Union, types.UnionType):
            yield from _members(typing.get_args(hint))
        else:
            yield hint


def _descend(hints: Sequence[Any], part: str | int) -> Iterator[Any]:
    for hint in _members(hints):
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            if part in hint.model_fields:
                yield hint.model_fields[str(part)].annotation
            elif _tag(hint) == part:
                yield hint
        elif typing.get_origin(hint) is tuple and isinstance(part, int):
            yield typing.get_args(hint)[0]
        elif typing.get_origin(hint) is dict:
            yield typing.get_args(hint)[1]


def _field_names(candidates: Sequence[Any]) -> Iterator[str]:
    for hint in candidates:
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            yield from hint.model_fields


def _told_apart(context: dict[str, Any]) -> str:
    """Return the key by which pydantic tells the members of a union apart: kind, or format."""
    return str(context["discriminator"]).strip("'")


def _tag_field(hint: Any) -> str:
    """Return the key that says which of several models one is, "" where a model stands alone."""
    if not (isinstance(hint, type) and issubclass(hint, BaseModel)):
        return ""
    return next((name for name in TAGS if name in hint.model_fields), "")


def _tag(hint: Any) -> str | None:
    name = _tag_field(hint)
    return str(hint.model_fields[name].default) if name else None


def _tags(candidates: Sequence[Any]) -> Iterator[str]:
    for hint in candidates:
        tag = _tag(hint)
        if tag is not None:
            yield tag


def _described(candidates: Sequence[Any], name: str) -> str:
    for hint in candidates:
        if isinstance(hint, type) and issubclass(hint, BaseModel) and name in hint.model_fields:
            description = hint.model_fields[name].description
            return f": {description}" if description else ""
    return ""
