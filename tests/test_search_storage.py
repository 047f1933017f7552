"""Storage that fails: a clear error, nothing that is recorded lost, and the same end after it is mended."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from synthetic import make_study, search_inline

from aqn_tune.cli.app import main
from aqn_tune.errors import UserError, storage_error
from aqn_tune.ledger import Ledger
from aqn_tune.search.driver import Driver
from aqn_tune.search.state import SavedState, write_state
from aqn_tune.search.trainable import PackTrainable
from aqn_tune.search.work import Work
from aqn_tune.study.engine import Engine
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.runs import Pack, Setting
from aqn_tune.study.schema import Study


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/ledger.jsonl")


def full(*_: Any) -> None:
    raise full_disk()


def over(before: Exception, error: Exception, how: str = "") -> Exception:
    """Return `error` as it is when raised where `before` is handled, from it, from None or from nothing."""
    with pytest.raises(type(error)) as raised:
        try:
            raise before
        except type(before):
            if how == "from it":
                raise error from before
            if how == "from None":
                raise error from None
            raise error  # noqa: B904 - that it names no cause is the point
    assert raised.value is error
    return error


IS_FULL = "/data/ledger.jsonl: no space is left"
QUOTING = f"Traceback (most recent call last):\n  ...\nOSError: {full_disk()}\n"
"""What Ray gives as the text of an error of its own, over whatever happened on the driver."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "", "/a"), "/a: no space is left"),
        (OSError(errno.ENOSPC, ""), "there: no space is left"),
        (OSError(errno.EROFS, "", "/a"), "/a: the file system is read-only"),
        (PermissionError(errno.EACCES, "", "/a"), "/a: permission is denied"),
        (sqlite3.OperationalError("database or disk is full"), "there: no space is left"),
        (sqlite3.OperationalError("no such table"), ""),
        (FileNotFoundError(errno.ENOENT, "", "/a"), ""),
        (RuntimeError("no space left"), ""),
        (None, ""),
        # one that names it as its cause
        (over(full_disk(), RuntimeError("Ray came to an end"), "from it"), IS_FULL),
        (over(over(full_disk(), ValueError(), "from it"), KeyError("a"), "from it"), IS_FULL),
        # one that quotes it, and one that came of clearing up
        (over(full_disk(), RuntimeError(QUOTING)), IS_FULL),
        (over(full_disk(), FileNotFoundError(errno.ENOENT, "", "/a")), IS_FULL),
        # either of them with a word that it has nothing to do with it
        (over(full_disk(), RuntimeError(QUOTING), "from None"), ""),
        (over(full_disk(), FileNotFoundError(errno.ENOENT, "", "/a"), "from None"), ""),
        # a defect of the code that handles it
        (over(full_disk(), KeyError("trial")), ""),
        (over(PermissionError(errno.EACCES, "", "/a"), AttributeError("no such name")), ""),
        (over(over(full_disk(), ValueError(), "from it"), KeyError("a")), ""),
        (over(over(full_disk(), KeyError("a")), RuntimeError("'a'"), "from it"), ""),
    ],
)
def test_what_the_user_can_mend(error: BaseException | None, said: str) -> None:
    found = storage_error(error, "there")
    assert (found is None) is (not said)
    assert str(found or "").startswith(said)


def searched(study: Study) -> StudyFolder:
    folder = study_folder(study)
    search_inline(study, folder)
    return folder


def test_a_ledger_that_cannot_grow_ends_the_search_and_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a line is left behind, as a full disk leaves it."""
    whole = make_study(tmp_path / "whole", search={"configs": 4})
    searched(whole)
    size = study_folder(whole).ledger.stat().st_size
    study = make_study(tmp_path / "torn", search={"configs": 4})
    ledger = study_folder(study).ledger
    fsync = os.fsync
    for allowed in (size // 4, size // 2, size - 40):

        def scarce(number: int, allowed: int = allowed) -> None:
            if ledger.exists() and ledger.stat().st_size > allowed:
                with ledger.open("rb+") as file:
                    file.truncate(allowed)
                full()
            fsync(number)

        with monkeypatch.context() as patch:
            patch.setattr("aqn_tune.ledger.ledger.os.fsync", scarce)
            with pytest.raises(
                UserError, match=r"ledger\.jsonl: no space is left.*run the study again"
            ):
                searched(study)
        assert ledger.stat().st_size == allowed
    searched(study)
    assert _numbers(study_folder(study)) == _numbers(study_folder(whole))


class Worker(PackTrainable):  # type: ignore[misc]
    """A worker in this process, without Ray."""

    def __init__(self, config: dict[str, Any], **shared: Any) -> None:
        self.setup(config, **shared)


def by_workers(
    work: Work, *, setting: Setting, engine: Engine, folder: StudyFolder, **rest: Any
) -> None:
    """Stand in for `aqn_tune.search.execute.execute`: driver and trainable as they are, one worker."""
    shared = engine.load(setting, rest["split"], rest["max_length"])
    setting = setting.model_copy(update={"memory_share": 1.0})  # else Ray is asked
    driver = Driver(work)
    while (pack := driver.next_pack()) is not None:
        worker = Worker(
            {"name": pack.name, "pack": pack.model_dump_json()},
            shared=shared, engine=engine, setting=setting, state_folder=str(folder.state),
        )  # fmt: skip
        while driver.result(worker.step()):
            pass
        worker.cleanup()
    if driver.fatal is not None:
        raise driver.fatal


def defect(*_: Any) -> None:
    raise ValueError("a defect")


CANNOT_WRITE = "both-threshold0.3-c001"


@pytest.mark.parametrize("failure", [full, defect])
def test_a_worker_that_cannot_write_ends_the_search_and_fails_no_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Callable[..., None]
) -> None:
    """A defect in the same place fails the config, and the search goes on without it."""
    study = make_study(tmp_path / "broken", search={"configs": 4})
    folder = study_folder(study)

    def write(path: Path, pack: Pack, saved: SavedState) -> None:
        if pack.name == CANNOT_WRITE:
            failure()
        write_state(path, pack, saved)

    monkeypatch.setattr("synthetic.inline", by_workers)
    with monkeypatch.context() as patch:
        patch.setattr("aqn_tune.search.trainable.write_state", write)
        with pytest.raises(UserError, match=IS_FULL) if failure is full else nullcontext():
            searched(study)
    ledger = Ledger(folder.ledger)
    failed = {f"{row.scenario}-{row.config}" for row in ledger.search if row.event == "failed"}
    broken = {row.pack for row in ledger.trainings.values() if row.status == "failed"}
    assert failed == broken == (set() if failure is full else {CANNOT_WRITE})
    searched(study)
    whole = searched(make_study(tmp_path / "whole", search={"configs": 4}))
    assert (_numbers(folder) == _numbers(whole)) is (failure is full)


def test_the_command_line_says_it_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("aqn_tune.cli.app.app", lambda **_: full())
    with pytest.raises(SystemExit) as ended:
        main(["run", "study.yaml"])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: /data/ledger.jsonl: no space is left")
    assert "Traceback" not in shown
    monkeypatch.setattr("aqn_tune.cli.app.app", lambda **_: Path("/no/such/file").stat())
    with pytest.raises(FileNotFoundError):
        main(["run", "study.yaml"])


# -- a disk that is really full --------------------------------------------------------------------

DRIVER = """
import resource
import sys
sys.path.insert(0, {tests!r})
from synthetic import *
from aqn_tune.errors import UserError
from aqn_tune.search.cluster import ray_session
from aqn_tune.study.folder import study_folder
study = make_study({out!r}, search={{"configs": 4}})
try:
    with ray_session(study.compute):
        if {limit}:  # of this process alone: Ray and its workers are there already
            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        run_search(study, make_setting(study), make_scenarios(study), study_folder(study),
                   layer_count=LAYERS, engine=engine())
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MB; left out where the system forbids it, and nowhere else."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    # In any other language its refusal would not be known for one.
    english = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=english)
    if done.returncode and re.search("permission denied|not permitted", done.stderr):
        pytest.skip(f"this container may not mount a file system: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def spoiled(out: Path, said: str, *, limit: int = 0) -> Study:
    """Run the driver until storage fails and return its study."""
    code = DRIVER.format(tests=str(Path(__file__).parent), out=str(out), limit=limit)
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stderr) == (2, ""), ended
    assert said in ended.stdout
    return make_study(out, search={"configs": 4})


def check_nothing_is_lost(study: Study, tmp_path: Path, mend: Callable[[], object]) -> None:
    """Mend the storage, go on, and compare the end with that of a study that nothing happened to."""
    recorded = Ledger(study_folder(study).ledger).trainings
    assert recorded
    mend()
    searched(study)
    after = Ledger(study_folder(study).ledger)
    assert recorded.keys() <= after.trainings.keys()
    assert all(
        after.trainings[key].step_reached >= row.step_reached for key, row in recorded.items()
    )
    whole = make_study(tmp_path / "whole", search={"configs": 4})
    searched(whole)
    assert _numbers(study_folder(study)) == _numbers(study_folder(whole))


@pytest.mark.slow
def test_a_file_that_may_not_grow_ends_the_search_and_what_is_there_is_kept(tmp_path: Path) -> None:
    """Needs no rights: a limit that the process sets itself."""
    study = spoiled(tmp_path / "runs", "larger than is allowed", limit=120 << 10)
    check_nothing_is_lost(study, tmp_path, lambda: None)


@pytest.mark.slow
def test_a_full_disk_ends_the_search_and_what_is_there_is_kept(
    small_disk: Path, tmp_path: Path
) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * (720 << 10))
    study = spoiled(small_disk / "runs", "no space is left on the device")
    check_nothing_is_lost(study, tmp_path, filler.unlink)


def _numbers(folder: StudyFolder) -> list[Any]:
    ledger = Ledger(folder.ledger)
    # Of a report that was cut off in the middle, the runs that are left go on as a smaller pack.
    apart = {"seconds", "eval_seconds", "pack_size", "lockstep"}
    rows = [row.model_dump(exclude=apart) for row in ledger.recorded()]
    assert len(set(map(str, rows))) == len(rows), "nothing is written twice"
    return rows
