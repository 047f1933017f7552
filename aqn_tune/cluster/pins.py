"""The releases that this package asks for."""

from __future__ import annotations

import re
import tomllib
from functools import lru_cache
from importlib.metadata import requires
from pathlib import Path


@lru_cache(maxsize=1)
def required() -> dict[str, str]:
    """Return the exact versions that aqn_tune requires, by package.

    They are read from the pyproject.toml beside the package, which is what a cluster installs; where
    there is none, from the metadata of the installed package.
    """
    file = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if file.exists():
        declared = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        declared = requires("aqn_tune") or []
    found = (re.fullmatch(r"([\w.-]+)(?:\[[^\]]*\])?\s*==\s*([\w.]+)", one) for one in declared)
    return {one.group(1).lower(): one.group(2) for one in found if one}
