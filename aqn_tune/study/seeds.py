"""Seeds: every random draw of a study is keyed, none comes from global state.

A draw is identified by a path of words and numbers under an integer seed, for example
`stream_seed(replicate_seed, "noise", step, layer)`. The same path gives the same draw in every
arm, process, worker and order of execution, which is what pairs arms and makes resume exact.
"""

from __future__ import annotations

import zlib
from typing import Literal

Stage = Literal["search", "confirm"]
"""The search stage explores and makes no claims; the confirm stage makes all of them."""

_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """One round of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64-bit integers."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def stream_seed(seed: int, *path: str | int) -> int:
    """Return the 64-bit seed of the stream `path` under `seed`.

    Costs about a microsecond, so hot loops may call it per step and layer. Words enter by CRC-32,
    numbers by value (never by `hash()`, which differs between processes).
    """
    state = _mix(seed & _MASK)
    for part in path:
        word = zlib.crc32(part.encode()) | 1 << 40 if isinstance(part, str) else part
        state = _mix(state ^ _mix(word & _MASK))
    return state


def replicate_seed(study_seed: int, stage: Stage, index: int, *, generation: int = 0) -> int:
    """Return the seed of replicate `index` of a stage, an even 63-bit number for search and odd for confirm.

    The parity makes the two pools disjoint by construction: no study seed, index or generation can
    ever make a confirm replicate repeat a search replicate.
    """
    pool = {"search": 0, "confirm": 1}[stage]
    return (stream_seed(study_seed, stage, generation, index) >> 1) & ~1 | pool
