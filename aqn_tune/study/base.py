"""The one base class of everything a user may write in a study file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """A frozen, validated piece of configuration; unknown keys are refused.

    Every field of a subclass carries a sentence (`Field(description=...)`): the schema, the error
    messages, `aqn-tune list` and the docs all read it from there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=False)
