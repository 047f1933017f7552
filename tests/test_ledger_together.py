"""Rows of one event: known at once, on disk together, and told to listeners after that."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from synthetic import make_study, search_inline

from aqn_tune.errors import UserError
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import RecordedRow, SearchRow
from aqn_tune.search.record import Recorder
from aqn_tune.study.folder import study_folder


def row(number: int) -> SearchRow:
    return SearchRow(
        scenario="s", event="asked", config=f"c{number:03d}", number=number, params={"a": 1.0}
    )


def on_disk(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_rows_are_known_at_once_and_written_at_the_end(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with ledger.together():
        ledger.append([row(0)])
        with ledger.together():
            ledger.append([row(1), row(2)])
        assert (len(ledger.search), on_disk(ledger.path)) == (3, 0)
    assert on_disk(ledger.path) == 3
    ledger.append([row(3)])
    assert on_disk(ledger.path) == 4
    assert Ledger(ledger.path).search == ledger.search


def test_what_was_appended_before_an_exception_is_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(KeyError), ledger.together():
        ledger.append([row(0)])
        raise KeyError
    assert on_disk(ledger.path) == 1


def test_a_storage_that_does_not_take_them_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.path = tmp_path / "file" / "ledger.jsonl"
    with pytest.raises((UserError, OSError)), ledger.together():
        ledger.append([row(0)])


def test_listeners_are_told_what_is_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    told: list[tuple[int, int]] = []

    def listen(rows: Sequence[RecordedRow]) -> None:
        told.append((len(rows), on_disk(path)))

    recorder = Recorder(Ledger(path), tmp_path, [listen])
    with recorder.together():
        recorder.write([row(0)])
        with recorder.together():
            recorder.write([row(1)])
        assert told == []
    recorder.write([row(2)])
    with recorder.together():
        pass
    assert told == [(2, 2), (1, 3)]


def test_a_decision_of_the_search_waits_for_the_disk_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand configs spent more time waiting than in all else: two or three waits for each event."""
    waits: list[int] = []
    fsync = os.fsync

    def counted(number: int) -> Any:
        waits.append(number)
        return fsync(number)

    monkeypatch.setattr("aqn_tune.ledger.ledger.os.fsync", counted)
    study = make_study(tmp_path, search={"configs": 4})
    ledger = search_inline(study, study_folder(study))
    asked = sum(row.event == "asked" for row in ledger.search)
    rungs = sum(row.event == "rung" for row in ledger.search)
    controls = len(
        {row.pack for row in ledger.trainings.values() if row.pack.startswith("control")}
    )
    others = 3  # the cells of the controls, the untrained base, and the Optuna studies at the end
    assert len(waits) == asked + rungs + controls * 3 + others
