"""A driver that is killed at fixed places; `python tests/chaos.py` does it at random ones."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chaos
import pytest
from synthetic import search_inline

from aqn_tune.ledger import Ledger
from aqn_tune.study.folder import StudyFolder, study_folder

Row = dict[str, Any]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> chaos.Ended:
    """A study with one worker that nobody disturbs."""
    return chaos.finish(tmp_path_factory.mktemp("quiet"), 1)


def stage_half(quiet: chaos.Ended, stage: chaos.Stage) -> chaos.Moment:
    """Return the moment at which half of what a stage writes is in the ledger."""
    if stage == "search":
        return chaos.search_half(quiet)
    rows = list(Ledger(quiet.folder.ledger).recorded())
    asked = next(number for number, row in enumerate(rows) if row.kind == "search")
    trained = [
        number
        for number, row in enumerate(rows, 1)
        if row.kind == "training"
        and (number <= asked if stage == "controls" else row.stage == "confirm")
    ]
    return chaos.Moment(rows=trained[len(trained) // 2])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["controls", "search", "confirm"])
def test_a_killed_study_comes_to_the_same_end(
    quiet: chaos.Ended, tmp_path: Path, stage: chaos.Stage
) -> None:
    """Search rows, rung tables, Optuna's trials, every number and verdict.json are identical."""
    done = chaos.killed(tmp_path, quiet, stage_half(quiet, stage))
    assert (done.code, done.stage) == (chaos.KILLED, stage)
    assert done.rungs > 0
    assert done.defects == ()


@pytest.mark.slow
def test_a_killed_study_of_two_workers_loses_nothing(tmp_path: Path) -> None:
    quiet = chaos.finish(tmp_path / "quiet", 2)
    done = chaos.killed(tmp_path / "killed", quiet, chaos.search_half(quiet))
    assert (done.code, done.stage) == (chaos.KILLED, "search")
    assert done.defects == ()


@pytest.mark.slow
def test_a_scheduler_that_forgets_is_found_out(quiet: chaos.Ended, tmp_path: Path) -> None:
    done = chaos.killed(tmp_path, quiet, chaos.search_half(quiet), forget=True)
    assert (done.code, done.stage) == (chaos.KILLED, "search")
    assert done.defects


# -- drivers that end otherwise --------------------------------------------------------------------


HANGING = "import time\nwhile True: time.sleep(1)"


def process(code: str) -> subprocess.Popen[str]:
    """Start something that is no driver in the place of one."""
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_driver_that_hangs_is_ended() -> None:
    driver = process(HANGING)
    with pytest.raises(subprocess.TimeoutExpired):
        chaos.output(driver, limit=0.1)
    assert driver.returncode == chaos.KILLED


@pytest.mark.parametrize(
    ("code", "defects"),
    [
        ("raise SystemExit(0)", ()),
        ("raise SystemExit(3)", ("the driver ended with 3 by itself: nothing",)),
        ("raise ValueError('no')", ("the driver ended with 1 by itself: ValueError: no",)),
        ("import os; os.kill(os.getpid(), 15)", ("the driver ended with -15 by itself: nothing",)),
    ],
)
def test_a_driver_that_was_not_killed_is_not_taken_for_one(
    whole: chaos.Ended,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    defects: tuple[str, ...],
) -> None:
    """Planted: a first driver that ends by itself, before the study has a ledger."""

    monkeypatch.setattr(chaos, "start", lambda *_: process(code))
    monkeypatch.setattr(chaos, "finish", lambda *_, **__: whole)
    monkeypatch.setattr(chaos, "_differences", lambda *_: [])  # it has no verdict
    done = chaos.killed(tmp_path, whole, chaos.Moment())
    assert done.code != chaos.KILLED
    assert (done.stage, done.defects) == ("start", defects)


def test_a_driver_that_hangs_before_its_moment_is_a_defect(
    whole: chaos.Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill it is all the same, but not the one that was to be."""
    monkeypatch.setattr(chaos, "start", lambda *_: process(HANGING))
    monkeypatch.setattr(chaos, "finish", lambda *_, **__: whole)
    monkeypatch.setattr(chaos, "_differences", lambda *_: [])
    monkeypatch.setattr(chaos, "LIMIT", 0.1)
    done = chaos.killed(tmp_path, whole, chaos.Moment(seconds=0.1))
    assert (done.code, done.defects) == (chaos.KILLED, ("the driver hung",))


KILL = chaos.Round(chaos.KILLED, "search", 40, 5.0, ())
FOUND = KILL._replace(defects=("rung tables differ",))
BY_ITSELF = KILL._replace(code=0, stage="report", seconds=1.0)
CRASH = KILL._replace(code=1, defects=("the driver ended with 1 by itself: ValueError",))


@pytest.mark.parametrize(
    ("rounds", "control", "code", "said"),
    [
        ([KILL, KILL._replace(stage="confirm")], FOUND, 0,
         ["2 drivers killed in 2 rounds (1 in search, 1 in confirm), 2 of 2 as undisturbed",
          "killed in search: found out: rung tables differ"]),
        ([KILL, BY_ITSELF, KILL], FOUND, 0,
         ["2 drivers killed in 3 rounds (2 in search), 2 of 2 as undisturbed"]),
        # twice as many rounds as there were to be kills, and too few
        ([KILL, *[BY_ITSELF] * 3], FOUND, 1, ["1 drivers killed in 4 rounds"]),
        ([BY_ITSELF] * 4, FOUND, 1, ["0 drivers killed in 4 rounds"]),
        ([KILL, CRASH, KILL], FOUND, 1, ["2 drivers killed in 3 rounds", "ended with 1"]),
        ([KILL, FOUND], FOUND, 1, ["2 drivers killed in 2 rounds (2 in search), 1 of 2 as undisturbed"]),
        ([KILL, KILL], KILL, 1, ["NOT FOUND OUT"]),
        ([KILL, KILL], CRASH, 1, ["scheduler forgotten, ended with 1"]),
    ],
)  # fmt: skip
def test_what_the_rounds_come_to(
    rounds: list[chaos.Round],
    control: chaos.Round,
    code: int,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    left = [*rounds, control]
    shortest = 10.0

    def kill(root: Path, quiet: chaos.Ended, moment: chaos.Moment, **_: bool) -> chaos.Round:
        nonlocal shortest
        assert moment.seconds <= shortest or moment.rows == 1, "it has ended by then"
        done = left.pop(0)
        shortest = shortest if done.code == chaos.KILLED else done.seconds
        return done

    quiet = chaos.Ended(chaos.study_in("runs", 1), StudyFolder(Path("none")), Path("log"), 10.0)
    monkeypatch.setattr(chaos, "finish", lambda *_: quiet)
    monkeypatch.setattr(chaos, "search_half", lambda _: chaos.Moment(rows=1))
    monkeypatch.setattr(chaos, "killed", kill)
    assert chaos.main(["--kills", "2", "--workers", "1"]) == code
    assert not left
    out = capsys.readouterr().out
    for fragment in said:
        assert fragment in out


# -- comparisons, each with what it has to find ----------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> chaos.Ended:
    """A study whose search has ended, without Ray."""
    root = tmp_path_factory.mktemp("whole")
    study = chaos.study_in(root, 1)
    search_inline(study, study_folder(study))
    return chaos.Ended(study, study_folder(study), root / "log", 0.0)


def planted(whole: chaos.Ended, root: Path, change: Callable[[Row], Row | None]) -> chaos.Ended:
    """Return a copy of a study whose ledger rows were changed, or dropped where nothing is returned."""
    study = whole.study.model_copy(update={"output": str(root)})
    folder = study_folder(study)
    shutil.copytree(whole.folder.root, folder.root)
    rows = [json.loads(line) for line in whole.folder.ledger.read_text().splitlines()]
    kept = [json.dumps(new) for row in rows if (new := change(dict(row))) is not None]
    folder.ledger.write_text("\n".join(kept) + "\n")
    return chaos.Ended(study, folder, root / "log", 0.0)


def keys_of(whole: chaos.Ended, config: str) -> set[str]:
    """Return the trainings of a config in all scenarios; of the controls for ""."""
    cells = Ledger(whole.folder.ledger).cells.values()
    return {cell.training_key for cell in cells if cell.config == config}


def first(
    wanted: Callable[[Row], bool], new: Callable[[Row], Row | None]
) -> Callable[[Row], Row | None]:
    """Return a change of the first row that is wanted."""
    met = []

    def change(row: Row) -> Row | None:
        if met or not wanted(row):
            return row
        met.append(row)
        return new(row)

    return change


def drop(row: Row) -> None:
    """Change a row into none."""


def test_the_stage_of_a_ledger(whole: chaos.Ended, tmp_path: Path) -> None:
    lines = whole.folder.ledger.read_text().splitlines(keepends=True)
    kinds = [json.loads(line)["kind"] for line in lines]
    cuts = {
        "start": kinds.index("training"),
        "controls": kinds.index("search"),
        "search": len(lines),
    }
    for stage, rows in cuts.items():
        path = tmp_path / f"{stage}.jsonl"
        path.write_text("".join(lines[:rows]))
        assert chaos.stage_of(Ledger(path)) == stage
    cell = next(json.loads(line) for line in lines if '"kind": "cell"' in line)
    with path.open("a") as file:
        file.write(json.dumps({**cell, "stage": "confirm", "training_key": "k"}) + "\n")
    assert chaos.stage_of(Ledger(path)) == "confirm"
    trained = next(json.loads(line) for line in lines if '"kind": "training"' in line)
    for status, stage in (("unfinished", "confirm"), ("finished", "report")):
        with path.open("a") as file:
            row = {**trained, "stage": "confirm", "training_key": "k", "status": status}
            file.write(json.dumps(row) + "\n")
        assert chaos.stage_of(Ledger(path)) == stage


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda: lambda row: row, False),
        (lambda: first(lambda row: row["kind"] == "evaluation", drop), True),
        (
            lambda: first(lambda row: row["kind"] == "search", lambda row: {**row, "value": 9.0}),
            True,
        ),
    ],
)
@pytest.mark.parametrize("torn", ["", '{"kind": "trai'])
def test_a_row_that_was_on_disk_and_is_not_any_more(
    whole: chaos.Ended,
    tmp_path: Path,
    change: Callable[[], Callable[[Row], Row | None]],
    lost: bool,
    torn: str,
) -> None:
    """Half of a row was never promised."""
    before = planted(whole, tmp_path / "before", lambda row: row).folder.ledger.read_bytes()
    ended = planted(whole, tmp_path / "after", change())
    assert bool(chaos._lost(before + torn.encode(), ended)) is lost


@pytest.mark.parametrize(
    ("lines", "again"),
    [
        ([], []),
        (["p 10 77", "q 5 77"], []),
        (["p 10 77", "p 5 77"], ["p was trained to step 5 again"]),
        (["p 5 77", "p 5 78"], ["p was trained to step 5 again"]),
        (
            ["q 20 77", "p 5 77"],
            ["p was trained to step 5 again", "q was trained to step 20 again"],
        ),
    ],
)
def test_what_the_ledger_held_and_was_trained_again(lines: list[str], again: list[str]) -> None:
    assert chaos._again({("p", 5), ("q", 20)}, lines) == again


def louder(row: Row) -> Row:
    return {**row, "loss": row["loss"] + 1e-12}


def elsewhere(row: Row) -> Row:
    """Change what another worker may change."""
    if row["kind"] != "training":
        return row
    return {**row, "pack": "other", "pack_size": 1, "lockstep": 1, "seconds": 9.0}


Change = Callable[[set[str]], Callable[[Row], Row | None]]


def of(kind: str, keys: set[str]) -> Callable[[Row], bool]:
    return lambda row: row["kind"] == kind and row["training_key"] in keys


@pytest.mark.parametrize(
    ("config", "change", "defects"),
    [
        ("", lambda keys: lambda row: row, []),
        ("", lambda keys: elsewhere, []),
        # another number
        ("", lambda keys: first(of("evaluation", keys), louder), ["1 of N evaluations have other numbers"]),
        ("c001", lambda keys: first(of("evaluation", keys), louder),
         ["1 of N evaluations have other numbers"]),
        ("c001", lambda keys: first(of("training", keys), lambda row: {**row, "train_losses": [0.5]}),
         ["1 of N rungs have other numbers"]),
        # a control that is not there
        ("", lambda keys: first(of("evaluation", keys), drop),
         ["1 evaluations of controls are in one of the studies alone"]),
        ("", lambda keys: first(of("training", keys), drop),
         ["1 rungs of controls are in one of the studies alone"]),
        ("", lambda keys: first(of("cell", keys), lambda row: {**row, "training_key": "other"}),
         ["the controls are not the same trainings"]),
        # a config that was not proposed, or went less far
        ("c001", lambda keys: lambda row: None if row.get("training_key") in keys else row, []),
        ("c001", lambda keys: first(of("training", keys), drop), []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("swapped", [False, True])
def test_what_two_workers_may_not_change(
    whole: chaos.Ended,
    tmp_path: Path,
    config: str,
    change: Change,
    defects: list[str],
    swapped: bool,
) -> None:
    """Whichever of the two studies it is in."""
    keys = keys_of(whole, config)
    assert keys
    ended = planted(whole, tmp_path, change(keys))
    found = chaos._other_numbers(*((ended, whole) if swapped else (whole, ended)))
    assert [re.sub(r"of \d+", "of N", one) for one in found] == defects


def test_all_configs_may_be_others(whole: chaos.Ended, tmp_path: Path) -> None:
    """Nothing is asked of them but that what both have proposed has the same numbers."""
    configs = {f"c{number:03d}" for number in range(6)}
    keys = set.union(*(keys_of(whole, config) for config in configs))
    ended = planted(whole, tmp_path, lambda row: None if row.get("training_key") in keys else row)
    assert chaos._other_numbers(whole, ended) == []
    assert not keys & Ledger(ended.folder.ledger).trainings.keys()
