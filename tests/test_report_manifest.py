"""The manifest: versions, hashes and times."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

from fake_ledger import make_setting, make_study

from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import TrainingRow
from aqn_tune.report.manifest import (
    finish_manifest,
    read_manifest,
    version_of,
    write_manifest,
)
from aqn_tune.study.code import code_hash
from aqn_tune.study.folder import study_folder, study_hash


def test_a_manifest_names_what_a_study_was_run_with(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    folder = study_folder(study)
    write_manifest(folder, study, make_setting(study))
    content = json.loads(folder.manifest.read_text())
    assert content["study_hash"] == study_hash(study)
    assert content["model_fingerprint"] == "f" * 16
    assert content["finished"] is None
    (start,) = content["starts"]
    assert start["packages"]["pydantic"] == metadata.version("pydantic")
    assert start["code_hash"] == code_hash()
    finish_manifest(folder)
    assert read_manifest(folder)["finished"] >= content["started"]


def training(key: str, *, lockstep: int, limit: str = "") -> TrainingRow:
    return TrainingRow(
        training_key=key, stage="search", seed=2, steps=20, step_reached=20, status="finished",
        seconds=1.0, pack="p", pack_size=5, lockstep=lockstep, lockstep_limit=limit,
    )  # fmt: skip


def test_a_manifest_says_how_many_runs_shared_their_passes_and_why_not_more(
    tmp_path: Path,
) -> None:
    study = make_study(tmp_path)
    folder = study_folder(study)
    write_manifest(folder, study, make_setting(study))
    finish_manifest(folder)
    assert read_manifest(folder)["lockstep"] == {"largest": 0, "limits": {}}
    limit = "at most 2 were asked for"
    Ledger(folder.ledger).append(
        [
            training("a", lockstep=3),
            training("b", lockstep=2, limit=limit),
            training("c", lockstep=1, limit=limit),
        ]
    )
    finish_manifest(folder)
    assert read_manifest(folder)["lockstep"] == {"largest": 3, "limits": {limit: 2}}


def test_continuing_keeps_the_first_start_and_lists_both(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    folder = study_folder(study)
    write_manifest(folder, study, make_setting(study))
    first = read_manifest(folder)
    write_manifest(folder, study, make_setting(study))
    second = read_manifest(folder)
    assert second["started"] == first["started"]
    assert second["starts"][0] == first["starts"][0]
    assert len(second["starts"]) == 2


def test_a_folder_without_a_manifest_stays_without_one(tmp_path: Path) -> None:
    folder = study_folder(make_study(tmp_path))
    finish_manifest(folder)
    assert read_manifest(folder) == {}
    assert not folder.manifest.exists()


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert version_of("a-package-that-does-not-exist") is None
