"""The one base class of everything a user may write in a study file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """A frozen, validated piece of configuration; unknown keys are refused.

    Every field of a subclass carries a sentence (`Field(description=...)`): the schema, the error
    messages, `aqn-tune list` and the docs all read it from there. Numbers are finite: no others have
    a place in JSON, and so neither in a hash nor in a file that reads back.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=False
    )


class Measured(Spec):
    """A piece of what was measured: on its way it may hold a number that is not finite, on disk never."""

    model_config = ConfigDict(allow_inf_nan=True)
