"""What each command and module may load: held by looking at sys.modules, not at a clock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("PIL", "resvg_py", "torch", "ray", "transformers", "peft", "scipy", "pandas", "optuna",
         "numpy", "pyarrow", "tensorboard", "huggingface_hub", "tokenizers")  # fmt: skip
STUDY = """\
study: demo
scenario:
  faults: [{kind: dead_zone, layers: [10], threshold: 0.2}]
search: {space: SPACE, configs: 4}
decisions:
  contrasts: [[global, fault_only]]
  rows: [{when: [any], say: done}]
"""


def run(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["plan", "demo.yaml"],
        ["plan", "demo.yaml", "--json"],
        ["list", "faults"],
        ["list", "tasks", "--json"],
        ["list", "quantization"],
        ["list", "noise"],
        ["list", "targeting"],
        ["list", "schedules"],
        ["list", "margins"],
        ["inspect", "--help"],
        ["cluster", "check", "--help"],
    ],
)
def test_light_commands_load_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    space = ROOT / "search_spaces" / "aqn_full.yaml"
    (tmp_path / "demo.yaml").write_text(STUDY.replace("SPACE", str(space)))
    code = f"""
import sys
from aqn_tune.cli.app import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not done.stderr


def test_a_wrong_arm_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    space = ROOT / "search_spaces" / "aqn_full.yaml"
    (tmp_path / "demo.yaml").write_text(STUDY.replace("SPACE", str(space)))
    code = """
import sys
from aqn_tune.cli.app import main
try:
    main(["inspect", "demo.yaml", "--arm", "targetd"])
except SystemExit as stop:
    assert stop.code == 2, stop.code
assert "torch" not in sys.modules
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'targeted'?" in done.stderr


def test_the_import_check_would_see_a_heavy_import(tmp_path: Path) -> None:
    done = run("import sys, numpy; assert 'numpy' not in sys.modules", tmp_path)
    assert done.returncode != 0


def test_every_kind_of_thing_imports_with_torch_refused(tmp_path: Path) -> None:
    code = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "peft"):
            raise ImportError("refused: " + name)

sys.meta_path.insert(0, Refuse())
import aqn_tune.cli, aqn_tune.evidence, aqn_tune.faults, aqn_tune.ledger, aqn_tune.noise
import aqn_tune.study, aqn_tune.tasks
seen = 0
for room in (aqn_tune.cli, aqn_tune.evidence, aqn_tune.faults, aqn_tune.ledger, aqn_tune.noise,
             aqn_tune.study, aqn_tune.tasks):
    for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
        importlib.import_module(module.name)
        seen += 1
try:
    import torch
except ImportError:
    print(seen)
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


def test_python_m_is_the_same_command(tmp_path: Path) -> None:
    code = "import runpy, sys; sys.argv = ['x', '--version']; runpy.run_module('aqn_tune')"
    code = code.replace("run_module('aqn_tune')", "run_module('aqn_tune', run_name='__main__')")
    done = run(code, tmp_path)
    assert done.stdout.startswith("aqn-tune 0.")
