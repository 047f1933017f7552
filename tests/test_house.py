"""The rooms of the house and the one way through them: who may know whom, read from the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import aqn_tune

ROOT = Path(aqn_tune.__file__).parent
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "ray",
    "optuna",
    "scipy",
    "pandas",
    "numpy",
}

# room: the libraries and rooms that it must never import, not even inside a function
FORBIDDEN = {
    "training": {
        "ray",
        "optuna",
        "aqn_tune.search",
        "aqn_tune.confirm",
        "aqn_tune.report",
        "aqn_tune.cli",
    },
    "injection": {"ray", "optuna", "aqn_tune.search", "aqn_tune.training", "aqn_tune.report"},
    "search": {
        "torch",
        "transformers",
        "peft",
        "aqn_tune.training",
        "aqn_tune.injection",
        "aqn_tune.cli",
    },
    "confirm": {
        "torch",
        "transformers",
        "peft",
        "aqn_tune.training",
        "aqn_tune.injection",
        "aqn_tune.cli",
        "aqn_tune.report",
    },
    "cluster": {
        "torch",
        "transformers",
        "peft",
        "aqn_tune.training",
        "aqn_tune.injection",
        "aqn_tune.cli",
    },
    "evidence": {
        "torch",
        "transformers",
        "peft",
        "ray",
        "optuna",
        "aqn_tune.training",
        "aqn_tune.search",
    },
    "report": {
        "torch",
        "transformers",
        "peft",
        "ray",
        "optuna",
        "aqn_tune.training",
        "aqn_tune.search",
    },
    "ledger": {"torch", "ray", "aqn_tune.training", "aqn_tune.search", "aqn_tune.report"},
    "faults": {"ray", "transformers", "aqn_tune.training", "aqn_tune.search", "aqn_tune.injection"},
    "quantization": {"ray", "transformers", "aqn_tune.training", "aqn_tune.injection"},
    "noise": {"ray", "transformers", "aqn_tune.training", "aqn_tune.search", "aqn_tune.injection"},
}

# file: what it may import all the same; `test_report_page` holds that no import of a report loads it
ALLOWED = {"report/search_importance.py": {"optuna"}}


def imports_of(source: str) -> set[str]:
    """Return every module that a source text imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def trespasses(room: str, source: str, file: str = "") -> set[str]:
    return {
        name
        for name in imports_of(source)
        for forbidden in FORBIDDEN[room] - ALLOWED.get(file, set())
        if name == forbidden or name.startswith(f"{forbidden}.")
    }


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_a_room_knows_only_what_it_may(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    names = {file.relative_to(ROOT).as_posix(): file for file in files}
    found = {name: trespasses(room, file.read_text(), name) for name, file in names.items()}
    assert {name: bad for name, bad in found.items() if bad} == {}


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("training", "def f():\n    import ray.tune"),
        ("search", "from torch import nn"),
        ("report", "from aqn_tune import training"),
        ("confirm", "from aqn_tune.report.loading import load_results"),
        ("report", "def f():\n    import optuna"),
    ],
)
def test_a_trespass_would_be_seen(room: str, source: str) -> None:
    assert trespasses(room, source)


def test_no_global_random_state_in_the_library() -> None:
    """Global generators tie a number to the order of everything drawn before it."""
    suspects = (
        "torch.manual_seed(",
        "np.random.",
        "numpy.random.seed",
        "random.seed(",
        "torch.rand(",
    )
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in ROOT.rglob("*.py")
        for line in path.read_text().splitlines()
        if any(suspect in line for suspect in suspects) and "default_rng" not in line
    ]
    assert found == []


def test_the_readme_has_a_line_for_every_file() -> None:
    readme = (ROOT.parent / "README.md").read_text()
    files = [p for p in ROOT.rglob("*.py") if p.name not in ("__init__.py", "__main__.py")]
    files += [*(ROOT.parent / "experiments").glob("*"), *(ROOT.parent / "search_spaces").glob("*")]
    missing = [p.name for p in files if f"{p.name} " not in readme]
    assert missing == []
