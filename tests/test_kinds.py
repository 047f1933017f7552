"""Registers of kinds are read off the unions that a study is validated with."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from aqn_tune.kinds import by_kind


class One(BaseModel):
    kind: Literal["one"] = "one"


class Two(BaseModel):
    kind: Literal["two"] = "two"


class Again(BaseModel):
    kind: Literal["one"] = "one"


class Four(BaseModel):
    format: Literal["four"] = "four"


@pytest.mark.parametrize(
    ("union", "key", "wanted"),
    [
        (Annotated[Two | One, Field(discriminator="kind")], "kind", [("two", Two), ("one", One)]),
        (Annotated[One, Field()], "kind", [("one", One)]),
        (Annotated[Four, Field()], "format", [("four", Four)]),
    ],
)
def test_members_by_their_word_in_the_order_of_the_union(
    union: object, key: str, wanted: list[tuple[str, type[BaseModel]]]
) -> None:
    assert list(by_kind(union, key=key).items()) == wanted


def test_a_word_stands_for_one_kind() -> None:
    with pytest.raises(ValueError, match="Again and One are both 'one'"):
        by_kind(Annotated[One | Two | Again, Field()])
