"""`aqn-tune resume`, and what is said where a study is not the one that was begun."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import chaos
import pytest
from synthetic import engine, inline_packs, make_setting, make_study

from aqn_tune.cli import resume, run
from aqn_tune.cli.app import main
from aqn_tune.cli.output import ProgressLine
from aqn_tune.errors import Interrupted, UserError
from aqn_tune.ledger import Ledger
from aqn_tune.search.work import Work
from aqn_tune.study.difference import differences, differences_text
from aqn_tune.study.engine import Engine
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.runs import Setting
from aqn_tune.study.schema import Study


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, ""),
        ({"description": "other words", "compute": {"workers": 1, "pack_replicas": 2}}, ""),
        ({"seed": 5}, "seed: 7 -> 5"),
        ({"compute": {"gpus_per_worker": 1}}, "compute.gpus_per_worker: 0.0 -> 1.0"),
        (
            {"sweep": {"faults.0.threshold": [0.1, 0.4]}},
            "sweep.faults.0.threshold.1: 0.2 -> 0.4",
        ),
        ({"sweep": {"faults.0.threshold": [0.1]}}, "sweep.faults.0.threshold.1: 0.2 -> absent"),
        (
            {"search": {"configs": 4}, "seed": 5},
            "seed: 7 -> 5, search.configs: 8 -> 4",
        ),
    ],
)
def test_in_what_studies_differ(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    base: dict[str, Any] = {
        "seed": 7,
        "sweep": {"faults.0.threshold": [0.1, 0.2]},
        "search": {"configs": 8},
    }
    one, other = make_study(tmp_path, **base), make_study(tmp_path, **{**base, **changes})
    assert differences_text(differences(one, other)) == found


def test_many_differences_are_counted(tmp_path: Path) -> None:
    one = make_study(tmp_path, sweep={"faults.0.threshold": [n / 20 for n in range(1, 10)]})
    other = make_study(tmp_path, sweep={"faults.0.threshold": [n / 30 for n in range(1, 10)]})
    assert differences_text(differences(one, other)).endswith(" and 3 more")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands run studies on the synthetic objective, without Ray and to their end."""
    monkeypatch.setattr(run, "make_setting", make_setting)
    monkeypatch.setattr("aqn_tune.training.engine.ENGINE", engine())
    monkeypatch.setattr("aqn_tune.search.cluster.ray_session", lambda _: nullcontext())
    for stage in ("search", "confirm"):
        monkeypatch.setattr(f"aqn_tune.{stage}.runner.execute", inline_packs())


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: None) -> Study:
    """A study that was cut off after a few packs."""
    study = make_study(tmp_path / "runs", search={"configs": 3})
    with monkeypatch.context() as patch:
        patch.setattr("aqn_tune.search.runner.execute", inline_packs(3))
        with pytest.raises(UserError, match="the search is not complete"):
            run.run_study(study, engine=engine(), progress=ProgressLine(quiet=True))
    return study


def contents(root: Path) -> dict[Path, bytes | None]:
    """Return everything below a folder; None for the content of a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def test_what_is_continued_is_the_study_of_the_folder_wherever_it_lies_now(
    begun: Study, tmp_path: Path
) -> None:
    folder = study_folder(begun)
    again = resume.study_of(folder.root, [])
    assert not differences(begun, again)
    assert study_folder(again).root == folder.root
    moved = tmp_path / "elsewhere" / folder.root.name
    moved.parent.mkdir()
    folder.root.rename(moved)
    assert study_folder(resume.study_of(moved, ["compute.workers=1"])).root == moved


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["seed=9"], r"cannot become another one \(seed: \d+ -> 9\)"),
        (["search.configs=2", "training.steps=21"], "search.configs: 3 -> 2"),
        (["compute.gpus_per_worker=1"], "compute.gpus_per_worker"),
        (["sead=9"], "did you mean 'seed'"),
    ],
)
def test_a_changed_study_is_refused_with_what_was_changed(
    begun: Study,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    said: str,
) -> None:
    before = contents(tmp_path)
    options = [option for one in overrides for option in ("--set", one)]
    with pytest.raises(SystemExit) as ended:
        main(["resume", str(study_folder(begun).root), *options])
    assert ended.value.code == 2
    assert re.search(said, capsys.readouterr().err)
    assert contents(tmp_path) == before


def test_another_generation_is_no_other_study(begun: Study) -> None:
    again = resume.study_of(
        study_folder(begun).root, ["confirm.generation=1", "confirm.replicates=9"]
    )
    assert (again.confirm.generation, again.confirm.replicates) == (1, 9)
    looks = ["confirm.generation=1", "confirm.replicates=9", "confirm.looks=[6, 9]"]
    assert resume.study_of(study_folder(begun).root, looks).confirm.looks == (6, 9)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("study.yaml", "takes the folder of a study"),
        ("empty", "no study.yaml here"),
        ("renamed", "is called"),
    ],
)
def test_what_is_no_study_to_continue(
    begun: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, said: str
) -> None:
    (tmp_path / "study.yaml").write_text("study: s\n")
    (tmp_path / "empty").mkdir()
    study_folder(begun).root.rename(tmp_path / "renamed")
    with pytest.raises(SystemExit) as ended:
        main(["resume", str(tmp_path / place)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_run_and_resume_begin_with_the_same(begun: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Study] = []

    def noted(study: Study, **_: Any) -> None:
        seen.append(study)

    monkeypatch.setattr(resume, "run_and_report", noted)
    monkeypatch.setattr(run, "run_and_report", noted)
    folder: StudyFolder = study_folder(begun)
    with pytest.raises(SystemExit):
        main(["resume", str(folder.root), "--pack", "2"])
    with pytest.raises(SystemExit):
        main(["run", str(folder.study), "--set", f"output={folder.root.parent}", "--pack", "2"])
    assert seen[0] == seen[1]
    assert seen[0].compute.pack_replicas == 2


def in_a_config(work: Work, *, setting: Setting, engine: Engine, **rest: Any) -> None:
    """Stand in for `execute`: interrupted when a config has come to its first rung, and would go on."""
    shared = engine.load(setting, rest["split"], rest["max_length"])
    while (pack := work.next_pack()) is not None:
        training = engine.open_pack(pack, setting, shared)
        while work.arrived(pack, training.advance()):
            if pack.name.startswith("both-c"):
                raise Interrupted("enough")


def test_what_is_resumed_comes_to_the_end_of_a_study_that_nobody_disturbed(
    begun: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is cut off in its controls, then in a config."""
    folder = study_folder(begun)
    with monkeypatch.context() as patch:
        patch.setattr("aqn_tune.search.runner.execute", in_a_config)
        with pytest.raises(SystemExit) as ended:
            main(["resume", str(folder.root)])
    assert ended.value.code == 130
    assert [row.event for row in Ledger(folder.ledger).search] == ["asked", "rung"]
    assert not folder.verdict.exists()
    held = folder.ledger.read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["resume", str(folder.root), "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out) == json.loads(folder.verdict.read_text())
    assert folder.ledger.read_bytes().startswith(held)
    quiet = begun.model_copy(update={"output": str(tmp_path / "quiet")})
    run.run_study(quiet, engine=engine(), progress=ProgressLine(quiet=True))
    ends = (chaos.Ended(one, study_folder(one), tmp_path / "log", 0.0) for one in (quiet, begun))
    expected, found = (chaos.picture(one) for one in ends)
    assert expected["verdict"]
    assert {name for name in expected if expected[name] != found[name]} == set()


def test_who_starts_another_study_by_mistake_is_told(begun: Study, tmp_path: Path) -> None:
    folder = study_folder(begun)
    other = begun.model_copy(update={"seed": begun.seed + 1})
    said = run.like_another(other, study_folder(other))
    assert f"{folder.root.name} differs in seed: {begun.seed} -> {begun.seed + 1}" in said
    assert f"aqn-tune resume {folder.root}" in said
    assert run.like_another(begun, folder) == ""
    (folder.root.parent / f"{begun.study}-00000000").mkdir()
    assert run.like_another(other, study_folder(other)) == said
    assert Ledger(folder.ledger).trainings
