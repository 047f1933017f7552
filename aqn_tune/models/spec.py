"""Which base model a study fine-tunes."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["EMBEDDED", "ModelSpec"]

EMBEDDED: Final = "embedded"
"""The ``path`` that names the model shipped inside the package."""


class ModelSpec(BaseModel):
    """A causal language model: the one shipped with the package, or any Hugging Face one.

    Only safetensors are read and code from a model folder is never run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: str = Field(
        default=EMBEDDED,
        min_length=1,
        description="'embedded', a Hugging Face model folder, or a name on the hub.",
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of a hub name; not for folders."
    )
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        default="float32", description="Number format the weights are loaded and computed in."
    )
