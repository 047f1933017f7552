"""A YAML document that remembers in which file and line each of its keys stands."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from aqn_tune.errors import UserError, nearest

KeyPath = tuple[str | int, ...]
"""Where a value lies in a document: keys and list positions from the root."""

AS_MAPPING = {"confirm.margin": "{kind: gap, share: 0.1}"}
"""A mapping that may be written in place of a number, by the key that may be either."""

FREE_KEYS = ("sweep",)
"""Mappings whose own keys are dotted, so that a dotted key ends there."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `1e-3` is a number and `no` a word; in YAML 1.1 it is the other way."""


_Loader.yaml_implicit_resolvers = {}
_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("merge", r"^<<$", "<"),
)
for _kind, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}",
        re.compile(_pattern),
        ["" if c == "\0" else c for c in _first],
    )


_READ: dict[str, tuple[str, Callable[[str], Any]]] = {
    "int": ("a whole number", lambda text: int(text, 10)),
    "float": ("a number", lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan"))),
    "bool": ("true or false", {"true": True, "false": False}.__getitem__),
}
"""What a scalar of each kind is called, and how it is read from its text in small letters."""


class Place(NamedTuple):
    """Where a key was written."""

    file: str
    """File, or the `--set` that gave it."""
    line: int | None
    """Line, from 1; None for an override."""

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


class Source(NamedTuple):
    """A document and the place of every key in it."""

    data: dict[str, Any]
    places: dict[KeyPath, Place]

    def place(self, path: Sequence[str | int]) -> Place:
        """Return where `path` was written, or the nearest enclosing key that was."""
        known = tuple(path)
        while known not in self.places:
            known = known[:-1]
        return self.places[known]


def dotted(path: Sequence[str | int]) -> str:
    """Return a path as users write it: `scenario.faults.0.threshold`."""
    return ".".join(str(part) for part in path)


def read_source(path: Path) -> Source:
    """Return the document of a YAML file.

    Raises UserError for a file that cannot be read, is no YAML, is not a mapping, or names a key
    twice (YAML would keep the last one in silence).
    """
    return parse_source(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Return the text of a file. Raises UserError where there is none, or nothing to be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file{_neighbour(path)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error.reason})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def parse_source(text: str, file: str) -> Source:
    """Return the document of a YAML text; `file` is what messages call it. See `read_source`."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        context = f" {error.context}" if error.context else ""
        raise UserError(f"{file}{line}: not valid YAML: {error.problem}{context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(node, yaml.MappingNode):
        got = (
            "an empty file"
            if node is None
            else f"a {type(node).__name__.removesuffix('Node').lower()}"
        )
        raise UserError(f"{file}: got {got}; a mapping of keys to values is expected")
    reader = _Reader(file)
    data = reader.value(node, ())
    return Source(data, reader.places)


class _Reader:
    """Turn nodes into values and note where each was."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.places: dict[KeyPath, Place] = {}
        self._open: set[int] = set()

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.places.setdefault(path, Place(self.file, node.start_mark.line + 1))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if id(node) in self._open:
            raise UserError(f"{self._at(node)}: {dotted(path)}: an alias that contains itself")
        self._open.add(id(node))
        result = (
            self._mapping(node, path)
            if isinstance(node, yaml.MappingNode)
            else [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        )
        self._open.discard(id(node))
        return result

    def _at(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}"

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str | int, Any]:
        values: dict[str | int, Any] = {}
        merged: dict[str | int, Any] = {}
        lines: dict[str | int, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                found = self.value(value_node, (*path, "<<"))
                for part in found if isinstance(found, list) else [found]:
                    if not isinstance(part, dict):
                        raise UserError(f"{self._at(key_node)}: `<<` needs a mapping to merge")
                    merged = {**part, **merged}
                continue
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise UserError(f"{self._at(key_node)}: a key must be a word or a whole number")
            line = key_node.start_mark.line + 1
            if key in values:
                raise UserError(
                    f"{self.file}:{line}: {dotted((*path, key))}: the key is there twice, "
                    f"first in line {lines[key]}; keep one"
                )
            lines[key] = line
            self.places[(*path, key)] = Place(self.file, line)
            values[key] = self.value(value_node, (*path, key))
        return {**merged, **values}

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
        if kind == "null":
            return None
        if kind in ("str", "merge"):
            return text
        if kind not in _READ:
            raise UserError(f"{self._at(node)}: the YAML tag {node.tag!r} is not allowed here")
        name, read = _READ[kind]
        try:
            return read(text.lower())
        except (KeyError, ValueError):  # a tag that a user wrote, or thousands of digits
            raise UserError(
                f"{self._at(node)}: got {text[:40]!r}, which cannot be read as {name} (!!{kind}); "
                "write one, or put it in quotes without the tag if text is meant"
            ) from None


def parse_value(text: str, file: str) -> Any:
    """Return the value of a piece of YAML: `0.2`, `[1, 2]`, `{kind: hidden}`."""
    return parse_source(f"value: {text}", file).data["value"]


def apply_override(source: Source, override: str) -> Source:
    """Return `source` with one `key.of.study=value`, the value read as YAML.

    Lists are addressed by position. Whether the key exists is for the schema to say; a key inside
    something that is no mapping, and a position that a list does not have, raise UserError.
    """
    name = f"--set {override}"
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise UserError(f"{name}: write it as key.of.study=value, for example training.steps=50")
    value = parse_value(text, name)
    places = dict(source.places)
    parts = key.strip().split(".")
    data = _replaced(source.data, parts, value, name, ())
    path = _path_of(data, parts)
    for known in list(places):
        if known[: len(path)] == path:
            del places[known]
    for end in range(1, len(path) + 1):
        places.setdefault(path[:end], Place(name, None))
    return Source(data, places)


def _replaced(node: Any, parts: list[str], value: Any, name: str, path: KeyPath) -> Any:
    if not parts:
        return value
    if isinstance(node, list):
        if not parts[0].isdigit() or int(parts[0]) >= len(node):
            raise UserError(
                f"{name}: {dotted(path)} is a list of {len(node)}; got position {parts[0]!r}"
                + (f", allowed are 0 to {len(node) - 1}" if node else "")
            )
        index = int(parts[0])
        changed = _replaced(node[index], parts[1:], value, name, (*path, index))
        return [*node[:index], changed, *node[index + 1 :]]
    if node is None:
        node = {}
    if not isinstance(node, dict):
        key = dotted(path)
        # A word stands for the kind of a mapping, a number for none.
        example = f"{{kind: {node}}}" if isinstance(node, str) else AS_MAPPING.get(key, "")
        raise UserError(
            f"{name}: {key} is {node!r}, which has no {parts[0]!r}; set {key} as a whole"
            + (f", for example {key}='{example}'" if example else "")
        )
    head, rest = (dotted(parts), []) if path and path[-1] in FREE_KEYS else (parts[0], parts[1:])
    return {**node, head: _replaced(node.get(head), rest, value, name, (*path, head))}


def _path_of(data: Any, parts: list[str]) -> KeyPath:
    """Return the path that dotted `parts` name in `data`, which holds it."""
    path: list[str | int] = []
    rest = list(parts)
    while rest:
        if path and path[-1] in FREE_KEYS:
            return (*path, dotted(rest))
        part: str | int = int(rest[0]) if isinstance(data, list) else rest[0]
        path.append(part)
        data, rest = data[part], rest[1:]
    return tuple(path)


def _neighbour(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; the folder {folder} does not exist"
    return nearest(path.name, (p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")))
