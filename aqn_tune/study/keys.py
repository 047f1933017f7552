"""Content hashes: the identity of a study, a training and a condition."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel


def canonical(value: Any) -> Any:
    """Reduce `value` to plain JSON types; equal content gives an equal result whatever its order."""
    if isinstance(value, BaseModel):
        return canonical(value.model_dump(mode="json"))
    if isinstance(value, dict):
        return {str(key): canonical(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot hash a {type(value).__name__}: {value!r}")


def content_hash(value: Any, length: int = 16) -> str:
    """Return the first `length` hex digits of the SHA-256 of the canonical JSON of `value`.

    Floats enter by their shortest exact decimal form, so 0.1 and 0.10 are equal and 0.1 + 0.2 and
    0.3 are not. NaN and infinity have no JSON form and raise ValueError.
    """
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
