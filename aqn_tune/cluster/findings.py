"""What a check comes to: rules, what they object to, and a line for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

Subject = TypeVar("Subject")
Status = Literal["ok", "wrong", "note"]


class Note(str):
    """A remark of a rule that is no mistake: something to do before launch, or that was not looked at."""


class Finding(NamedTuple):
    """One line of a check."""

    rule: str
    """Name of the rule, or "node" for a node that was looked at."""
    status: Status
    """wrong is what the check fails for."""
    place: str
    """File and line, or the node; "" for the whole."""
    text: str
    """What holds; or the dotted key, what was got and what to do."""


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """Something that has to be true of a cluster file."""

    name: str
    holds: str
    """What is true of a file that keeps it."""
    look: Callable[[Subject], Iterator[str]]
    """Yield a message for everything that breaks it, beginning with the dotted key; or a Note."""


def judge(
    rules: Sequence[Rule[Subject]], subject: Subject, place: Callable[[str], str]
) -> Iterator[Finding]:
    """Yield the findings of all rules, in their order: what is wrong, or `ok`; then the notes.

    Args:
        rules: The rules to apply.
        subject: What each of them looks at.
        place: Where a message belongs, from the dotted key that it begins with.
    """
    for rule in rules:
        said = list(dict.fromkeys(rule.look(subject)))
        notes = [text for text in said if isinstance(text, Note)]
        wrong = [text for text in said if not isinstance(text, Note)]
        for text in wrong:
            yield Finding(rule.name, "wrong", place(text), text)
        if not wrong:
            yield Finding(rule.name, "ok", "", rule.holds)
        for text in notes:
            yield Finding(rule.name, "note", place(text), str(text))


def mapping(value: Any) -> dict[str, Any]:
    """Return `value` if it is a mapping, else an empty one: what it should be is Ray's schema to say."""
    return value if isinstance(value, dict) else {}


def listing(value: Any) -> list[Any]:
    """Return `value` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def number(value: Any, default: float) -> float:
    """Return `value` if it is a number, else `default`."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default


def shown(value: Any) -> str:
    """Return a value as messages quote it; `nothing` for one that is not there."""
    return "nothing" if value is None else repr(value)
