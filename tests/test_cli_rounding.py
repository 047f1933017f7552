"""`--no-reuse` is refused where runs of other packs differ in the last bit, with a way out that is one."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from synthetic import engine as synthetic_engine
from synthetic import inline_packs, make_setting, make_study

from aqn_tune.cli import run
from aqn_tune.cli.output import ProgressLine
from aqn_tune.errors import UserError
from aqn_tune.study.engine import Engine
from aqn_tune.study.folder import study_folder
from aqn_tune.study.schema import Study

ALONE = r"^compute\.reuse: got false \(--no-reuse\).*: add --pack 1$"
LEAVE_OUT = r"^compute\.reuse: got false \(--no-reuse\).*: leave it out$"


class Begun(Exception):
    """The run has come to its first trial."""


def alike_up_to(most: int) -> Engine:
    """Return an engine of which runs are alike to the last bit in packs of up to so many."""
    return synthetic_engine()._replace(rounds_alike=lambda setting, training, size: size <= most)


def study_of(root: Path, *, reuse: bool, pack: int | str) -> Study:
    return make_study(root, search={"configs": 2}, compute={"reuse": reuse, "pack_replicas": pack})


@pytest.fixture(autouse=True)
def without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: Any) -> None:
        raise Begun

    monkeypatch.setattr(run, "make_setting", make_setting)
    monkeypatch.setattr("aqn_tune.search.cluster.ray_session", begun)


def contents(root: Path) -> dict[Path, bytes]:
    """Return every file below a folder but for the lock that whoever works there holds."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.read_bytes() for path in files}


TABLE = [
    # reuse, most runs of a pack, most runs of a pack in which all are alike; what is said
    (False, 1, 1, ""),
    (False, 4, 4, ""),
    (False, "auto", 8, ""),
    (False, 4, 3, ALONE),
    (False, 4, 1, ALONE),
    (False, "auto", 7, ALONE),
    (False, 4, 0, LEAVE_OUT),
    (False, 1, 0, LEAVE_OUT),
    (True, 1, 0, ""),
    (True, 4, 1, ""),
    (True, "auto", 0, ""),
]


@pytest.mark.parametrize(("reuse", "pack", "alike", "said"), TABLE)
def test_what_would_be_held_to_a_bit_that_depends_on_its_pack_is_refused(
    tmp_path: Path, reuse: bool, pack: int | str, alike: int, said: str
) -> None:
    study = study_of(tmp_path, reuse=reuse, pack=pack)
    with pytest.raises(UserError if said else Begun, match=said or None):
        run.run_study(study, engine=alike_up_to(alike), progress=ProgressLine(quiet=True))
    assert contents(tmp_path) == {}


def test_a_study_that_was_begun_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def brought(reuse: bool, packs: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("aqn_tune.search.cluster.ray_session", lambda _: nullcontext())
            patch.setattr("aqn_tune.search.runner.execute", inline_packs(packs))
            run.run_study(
                study_of(tmp_path, reuse=reuse, pack=4),
                engine=alike_up_to(1),
                progress=ProgressLine(quiet=True),
            )

    with pytest.raises(UserError, match="the search is not complete"):
        brought(True, 2)
    before = contents(tmp_path)
    assert study_folder(study_of(tmp_path, reuse=False, pack=4)).ledger in before
    with pytest.raises(UserError, match=ALONE):
        brought(False, 2)
    assert contents(tmp_path) == before
    with pytest.raises(UserError, match="the search is not complete"):
        brought(True, 3)
    assert contents(tmp_path) != before
