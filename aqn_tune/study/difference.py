"""In what two studies differ, key by key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from aqn_tune.study.folder import NOT_IDENTITY
from aqn_tune.study.schema import Study

SHOWN = 6
"""Differences that a message spells out."""
SHOWN_PARTS = 3
"""Keys of a part that one side lacks, in words."""
_ABSENT = object()


class Difference(NamedTuple):
    """A key that has another value in another study."""

    key: str
    """Dotted, `scenario.faults.0.threshold`."""
    old: str
    """As JSON; "absent" where the study has no such key."""
    new: str


def differences(old: Study, new: Study) -> tuple[Difference, ...]:
    """Return every key in which two studies differ, of those that can change a number, in order."""
    # Of a GPU it matters whether there is one, as in the study's hash.
    gpu = bool(old.compute.gpus_per_worker) != bool(new.compute.gpus_per_worker)
    return differing(_content(old, gpu=gpu), _content(new, gpu=gpu))


def differing(old: Any, new: Any) -> tuple[Difference, ...]:
    """Return every key in which two mappings of plain data differ, in order; lists are keyed by position."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = dict.fromkeys([*before, *after])
    pairs = ((key, before.get(key, _ABSENT), after.get(key, _ABSENT)) for key in keys)
    return tuple(Difference(key, _text(a), _text(b)) for key, a, b in pairs if a != b)


def together(found: Sequence[Difference]) -> tuple[Difference, ...]:
    """Return differences with what only goes along with another one left out.

    Noise beside none is one key, and not every key of the noise; another kind (of targeting, of method) is
    one key, and not those that this kind has and the other has not.
    """
    kinds = {one.key.removesuffix("kind") for one in found if one.key.endswith(".kind")}
    wholes = {f"{one.key}." for one in found if {one.old, one.new} == {"null", "absent"}}

    def goes_along(one: Difference) -> bool:
        lacks = "absent" in (one.old, one.new)
        inside = any(one.key.startswith(whole) for whole in wholes)
        of_kind = any(one.key.startswith(kind) for kind in kinds if one.key != f"{kind}kind")
        return inside or (lacks and of_kind)

    kept = []
    for one in found:
        if goes_along(one):
            continue
        if f"{one.key}." in wholes:
            parts = [d for d in found if d.key.startswith(f"{one.key}.")]
            said = ", ".join(
                f"{d.key.removeprefix(f'{one.key}.')}: {d.new if d.old == 'absent' else d.old}"
                for d in parts[:SHOWN_PARTS]
            )
            whole = f"{{{said}{', ...' if len(parts) > SHOWN_PARTS else ''}}}"
            old, new = (whole if text == "absent" else text for text in (one.old, one.new))
            one = Difference(one.key, old, new)
        kept.append(one)
    return tuple(kept)


def differences_text(found: Sequence[Difference]) -> str:
    """Return differences on one line: `training.steps: 60 -> 80, seed: 0 -> 1 and 3 more`."""
    shown = ", ".join(f"{one.key}: {one.old} -> {one.new}" for one in found[:SHOWN])
    more = len(found) - SHOWN
    return shown + (f" and {more} more" if more > 0 else "")


def _content(study: Study, *, gpu: bool) -> dict[str, Any]:
    content = study.model_dump(mode="json", exclude=NOT_IDENTITY)
    if gpu:
        content["compute"] = {"gpus_per_worker": study.compute.gpus_per_worker}
    return content


def _leaves(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value below a mapping or a list that is neither, or is empty, with its dotted key."""
    children: list[tuple[Any, Any]] = []
    if isinstance(content, dict):
        children = list(content.items())
    elif isinstance(content, list):
        children = list(enumerate(content))
    if not children:
        yield key, content
    for name, child in children:
        yield from _leaves(child, f"{key}.{name}" if key else str(name))


def _text(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
