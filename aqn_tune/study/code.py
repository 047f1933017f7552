"""The identity of the code that makes the numbers."""

from __future__ import annotations

import hashlib
import platform
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "numpy")
"""Libraries of which another release may give other numbers."""


@lru_cache(maxsize=1)
def code_hash() -> str:
    """Return a 16-digit hash of all that turns a run into numbers.

    It covers every Python file of the installed package with its place in it, the releases of Python
    and of the `LIBRARIES`, and the type of processor.
    """
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    releases = [f"{name} {version(name)}" for name in LIBRARIES]
    surroundings = [*releases, platform.python_version(), platform.machine()]
    digest.update("\0".join(surroundings).encode())
    return digest.hexdigest()[:16]
