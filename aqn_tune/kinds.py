"""The classes that a study chooses from, by the word that selects each."""

from __future__ import annotations

from typing import Any, get_args


def by_kind(union: object, *, key: str = "kind") -> dict[str, Any]:
    """Return the members of a union of models by their word, in the order of the union.

    Args:
        union: `Annotated[One | Other, Field(discriminator=key)]`, or `Annotated[One, ...]`.
        key: The field that holds a member's word, as its default.

    Raises ValueError where two members have the same word.
    """
    members = get_args(union)[0]
    found: dict[str, Any] = {}
    for member in get_args(members) or (members,):
        word = member.model_fields[key].default
        if word in found:
            raise ValueError(f"{member.__name__} and {found[word].__name__} are both {word!r}")
        found[word] = member
    return found
