"""What a person sees in a terminal while a study runs, and of one that has ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_ledger import make_study, write_fake

from aqn_tune.cli.output import ProgressLine
from aqn_tune.cli.status import study_status
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import SearchRow
from aqn_tune.search.progress import Progress
from aqn_tune.search.work import Best
from aqn_tune.study.folder import StudyFolder

TWO = {"sweep": {"faults.0.threshold": [0.1, 0.2]}}
MILD, HARSH = "both-threshold0.1", "both-threshold0.2"


def moment(*best: Best) -> Progress:
    return Progress("search", 40, 7, 2, 3, 1, best, None)


def test_the_best_config_is_the_best_of_its_scenario(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planted: the least loss over all scenarios, which is the mildest fault's for ever."""
    monkeypatch.setattr("aqn_tune.cli.output.PLAIN_SECONDS", 0.0)
    mild = Best(MILD, "c000", 0.25)
    with ProgressLine(quiet=False) as progress:
        progress.stage(moment())
        progress.stage(moment(mild))
        progress.stage(moment(mild, Best(HARSH, "c001", 0.9)))
        progress.stage(moment(mild, Best(HARSH, "c001", 0.9))._replace(finished=8))
        progress.stage(moment(mild, Best(HARSH, "c004", 0.8)))
        progress.stage(moment(mild._replace(config="c002", value=0.2), Best(HARSH, "c004", 0.8)))
    shown = [line.partition("failed")[2] for line in capsys.readouterr().err.splitlines()]
    assert shown == [
        "",
        f"; best in {MILD}: c000 0.2500",
        f"; best in {HARSH}: c001 0.9000",
        f"; best in {HARSH}: c001 0.9000",
        f"; best in {HARSH}: c004 0.8000",
        f"; best in {MILD}: c002 0.2000",
    ]


def test_a_stopped_config_is_not_an_unfinished_one(tmp_path: Path) -> None:
    """Planted: a finished study that says it still has unfinished trainings."""
    fake = write_fake(tmp_path, **TWO)
    trainings = study_status(fake.study, fake.folder)["trainings"]
    assert trainings["search"]["stopped"] == 2
    assert trainings["search"]["failed"] == 2
    assert "unfinished" not in trainings["search"]
    assert set(trainings["confirm"]) == {"finished"}


def test_a_config_that_waits_for_its_rung_is_unfinished(tmp_path: Path) -> None:
    fake = write_fake(tmp_path / "fake", **TWO)
    folder = StudyFolder(tmp_path / "running")
    stopped = [
        row
        for row in fake.rows
        if not (isinstance(row, SearchRow) and (row.scenario, row.event) == (MILD, "stopped"))
    ]
    Ledger(folder.ledger).append(stopped)
    trainings = study_status(make_study(tmp_path, **TWO), folder)["trainings"]
    assert trainings["search"]["unfinished"] == 2
    assert "stopped" not in trainings["search"]
