"""`aqn-tune run` from a study file to its verdicts, on a synthetic objective, with the real Ray."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from synthetic import Behaviour
from synthetic import engine as synthetic_engine

from aqn_tune.cli.app import main
from aqn_tune.study.folder import study_folder
from aqn_tune.study.loading import load_study

STUDY = """\
study: planted
seed: 3
description: Noise on the faulty layers is known to help, noise elsewhere is known not to.
training: {steps: 20, warmup_steps: 2}
scenario:
  faults: [{kind: dead_zone, layers: [10], threshold: 0.2}]
search:
  space:
    dimensions:
      sigma_start: {kind: float, low: 0.01, high: 0.1, log: true}
      targeting: {kind: choice, values: [global, targeted]}
  configs: 3
  replicates: 2
confirm: {finalists: 1, replicates: 6}
compute: {workers: 1, pack_replicas: 12}
"""


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    code = stopped.value.code
    return code if isinstance(code, int) else 0


def without_times(verdict: Path) -> dict[str, Any]:
    content = json.loads(verdict.read_text())
    content.pop("times")
    return dict(content)


@pytest.mark.slow
def test_a_study_runs_continues_and_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.ModuleType("aqn_tune.training.engine")
    module.ENGINE = synthetic_engine(Behaviour(effect=0.3))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aqn_tune.training.engine", module)
    monkeypatch.chdir(tmp_path)
    Path("planted.yaml").write_text(STUDY)
    folder = study_folder(load_study("planted.yaml"))

    assert call("run", "planted.yaml") == 0
    shown = capsys.readouterr()
    assert "tensorboard" in shown.out
    assert str(folder.report) in shown.out
    for path in (folder.study, folder.manifest, folder.lock, folder.report, folder.verdict):
        assert path.is_file(), path
    first = without_times(folder.verdict)
    contrasts = first["scenarios"]["both"]["contrasts"]
    assert contrasts["targeted-vs-fault_only"]["verdict"] == ">"
    assert contrasts["targeted-vs-global"]["verdict"] == ">"
    assert "measured here" in plan_source(capsys)

    # Running it again finds everything done, starts no Ray and trains nothing.
    ledger = folder.ledger.read_bytes()
    monkeypatch.setattr("ray.init", refuse)
    assert call("run", "planted.yaml", "-q") == 0
    assert capsys.readouterr().out == ""
    assert folder.ledger.read_bytes() == ledger
    assert without_times(folder.verdict) == first
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "aqn_tune.training.engine", module)

    # A fresh run comes to the same verdicts; the old folder is kept.
    assert call("run", "planted.yaml", "--fresh", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    printed.pop("times")
    assert printed == first == without_times(folder.verdict)
    assert (folder.root.with_name(f"{folder.root.name}.old-1") / "ledger.jsonl").read_bytes() == (
        ledger
    )

    # Any cell of it can be trained again: a control, a config of the search, a confirmed twin.
    for cell in ("search/both/global/1", "search/both/c000/0", "confirm/both/finalist1_global/5"):
        assert call("rerun", str(folder.root), cell) == 0, cell
    assert call("status", "planted.yaml", "--json") == 0


def refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("Ray was started with nothing to run")


def plan_source(capsys: pytest.CaptureFixture[str]) -> str:
    assert call("plan", "planted.yaml", "--json") == 0
    return str(json.loads(capsys.readouterr().out)["estimate"]["source"])
