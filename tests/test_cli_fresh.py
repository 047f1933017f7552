"""`--fresh`, and notes about other studies: nothing is moved, and nothing stopped, without need."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from synthetic import engine, inline_packs, make_setting, make_study

from aqn_tune.cli import resume, run
from aqn_tune.cli.output import ProgressLine
from aqn_tune.errors import UserError
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.schema import Study

QUIET = ProgressLine(quiet=True)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study that was cut off after a few packs."""
    study = make_study(tmp_path / "runs", search={"configs": 3})
    monkeypatch.setattr("aqn_tune.search.runner.execute", inline_packs(3))
    monkeypatch.setattr(run, "make_setting", make_setting)
    monkeypatch.setattr("aqn_tune.search.cluster.ray_session", lambda _: nullcontext())
    with pytest.raises(UserError, match="the search is not complete"):
        run.run_study(study, engine=engine(), progress=QUIET)
    return study


@contextmanager
def no_cluster(_: Any) -> Any:
    raise UserError("compute.address: cannot join the Ray cluster")
    yield


@pytest.mark.parametrize("why", ["cluster", "rounding"])
def test_a_fresh_start_that_is_refused_leaves_the_study_where_it_was(
    begun: Study, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """The original bug: it was renamed first, and the next plain run began anew in silence."""
    folder = study_folder(begun)
    before = {path.name: path.read_bytes() for path in folder.root.iterdir() if path.is_file()}
    study, made = begun, engine()
    if why == "cluster":
        monkeypatch.setattr("aqn_tune.search.cluster.ray_session", no_cluster)
    else:
        compute = begun.compute.model_copy(update={"reuse": False})
        study = begun.model_copy(update={"compute": compute})
        made = made._replace(rounds_alike=lambda setting, training, most: False)
    with pytest.raises(UserError, match="cannot join" if why == "cluster" else "leave it out"):
        run.run_study(study, engine=made, progress=QUIET, fresh=True)
    after = {path.name: path.read_bytes() for path in folder.root.iterdir() if path.is_file()}
    assert after == before
    assert [path.name for path in folder.root.parent.iterdir()] == [folder.root.name]


def test_a_fresh_start_leaves_the_place_to_a_run_that_has_taken_it(
    begun: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The original bug: a folder without study.yaml was removed, with the run that had just begun in it."""
    root = study_folder(begun).root
    before = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
    lock = FileLock(root / ".lock")
    check = run._check_folder
    held: list[int] = []

    def another_begins(folder: StudyFolder, study: Study) -> None:
        check(folder, study)
        folder.root.mkdir()
        lock.acquire(timeout=0)
        held.append((root / ".lock").stat().st_ino)

    monkeypatch.setattr(run, "_check_folder", another_begins)
    with pytest.raises(UserError, match="another run works in this folder"):
        run.run_study(begun, engine=engine(), progress=QUIET, fresh=True)
    lock.release()
    assert [(path.name, path.stat().st_ino) for path in root.iterdir()] == [(".lock", *held)]
    aside = root.with_name(f"{root.name}.old-1")
    after = {path.name: path.read_bytes() for path in aside.iterdir() if path.is_file()}
    assert after == before
    said = capsys.readouterr().err
    assert f"the folder that --fresh has renamed stays where it is: {aside}" in said


def test_a_fresh_start_that_has_begun_keeps_both(begun: Study) -> None:
    folder = study_folder(begun)
    with pytest.raises(UserError, match="the search is not complete"):
        run.run_study(begun, engine=engine(), progress=QUIET, fresh=True)
    names = {path.name for path in folder.root.parent.iterdir()}
    assert names == {folder.root.name, f"{folder.root.name}.old-1"}


@pytest.mark.parametrize("content", [b"study: synthetic\n", b"\xff\xfe\x00", b"[1, 2"])
def test_a_neighbour_that_cannot_be_read_stops_nothing(begun: Study, content: bytes) -> None:
    other = begun.model_copy(update={"seed": 99})
    neighbour = study_folder(begun).root.with_name("synthetic-garbage")
    neighbour.mkdir()
    (neighbour / "study.yaml").write_bytes(content)
    said = run.like_another(other, study_folder(other))
    assert "seed: 7 -> 99" in said
    assert "garbage" not in said


def test_a_neighbour_that_is_not_ours_stops_nothing(
    begun: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted, as root may read everything."""

    def refuse(_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("aqn_tune.report.results.load_study_file", refuse)
    other = begun.model_copy(update={"seed": 99})
    assert run.like_another(other, study_folder(other)) == ""


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_study_on_a_gpu_goes_on_with_another_share(begun: Study, share: float) -> None:
    compute = begun.compute.model_copy(update={"gpus_per_worker": 0.5})
    recorded = begun.model_copy(update={"compute": compute})
    folder = study_folder(recorded)
    folder.root.mkdir()
    run.write_study(recorded, folder)
    again = resume.study_of(folder.root, [f"compute.gpus_per_worker={share}"])
    assert again.compute.gpus_per_worker == share
    with pytest.raises(UserError, match=r"gpus_per_worker: 0\.5 -> 0\.0"):
        resume.study_of(folder.root, ["compute.gpus_per_worker=0"])


def test_a_study_is_not_continued_somewhere_else(begun: Study) -> None:
    """The original bug: the option was passed over in silence."""
    with pytest.raises(UserError, match=r"--set output=/big: .* is continued where it is"):
        resume.study_of(study_folder(begun).root, ["output=/big"])
