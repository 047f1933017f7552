"""The identity of the code that makes the numbers."""

from __future__ import annotations

import hashlib
import platform
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from aqn_tune.study.schema import ComputeSpec

LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "numpy")
"""Libraries of which another release may give other numbers."""


@lru_cache(maxsize=1)
def code_hash() -> str:
    """Return a 16-digit hash of all that turns a run into numbers.

    It covers every Python file of the installed package with its place in it, the releases of Python
    and of the `LIBRARIES`, and the type of processor.
    """
    digest = _sources()
    releases = [f"{name} {version(name)}" for name in LIBRARIES]
    surroundings = [*releases, platform.python_version(), platform.machine()]
    digest.update("\0".join(surroundings).encode())
    return digest.hexdigest()[:16]


def source_hash() -> str:
    """Return a 16-digit hash of every Python file of the installed package, with its place in it."""
    return _sources().hexdigest()[:16]


def _sources() -> hashlib._Hash:
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest


@lru_cache(maxsize=1)
def processor_hash() -> str:
    """Return a 16-digit hash of this machine's processor: its model and its instruction sets.

    Two processors of one type differ in the last bits of a number where their instruction sets do.
    """
    parts = {platform.machine(), platform.processor()}
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in _TELLING:
                parts.add(" ".join(sorted(value.split())))
    return hashlib.sha256("\0".join(sorted(parts)).encode()).hexdigest()[:16]


_CPU_INFO = Path("/proc/cpuinfo")
_TELLING = ("model name", "flags", "Features", "CPU implementer", "CPU part")


def hardware(compute: ComputeSpec) -> str:
    """Return what a study's trainings run on, as far as it decides about the last bits of a number.

    That is `processor_hash`, and empty where it is not known: on a cluster, whose machines may
    differ, and on GPUs.
    """
    if compute.address is not None or compute.gpus_per_worker:
        return ""
    return processor_hash()
