"""A state file whose end was lost: the pack is trained again and comes to the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from synthetic import LAYERS, Behaviour, engine, make_scenarios, make_setting, make_study

from aqn_tune.ledger import Ledger
from aqn_tune.search.record import Recorder
from aqn_tune.search.runner import control_packs
from aqn_tune.search.state import read_state, state_path
from aqn_tune.search.trainable import PackTrainable, report_of
from aqn_tune.study.engine import RungReport
from aqn_tune.study.runs import Pack
from aqn_tune.study.schema import Study

PLACES = ["empty", "header", "no state", "half", "a byte"]


def damage(path: Path, place: str) -> None:
    whole = path.read_bytes()
    end = whole.index(b"\n") + 1
    middle = (end + len(whole)) // 2
    path.write_bytes(
        {
            "empty": b"",
            "header": whole[: end // 2],
            "no state": whole[:end],
            "half": whole[:middle],
            "a byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        }[place]
    )


def pack_of(study: Study, root: Path) -> Pack:
    recorder = Recorder(Ledger(root / "ledger.jsonl"), root)
    packs = control_packs(
        study, make_setting(study), make_scenarios(study), recorder, layer_count=LAYERS
    )
    return packs[1]


def worker(study: Study, pack: Pack, root: Path) -> PackTrainable:
    """Return a worker as Ray starts one, without Ray."""
    setting = make_setting(study).model_copy(update={"memory_share": 1.0})
    made = engine(Behaviour(log=str(root / "log")))
    one: Any = PackTrainable.__new__(PackTrainable)
    one.setup(
        {"pack": pack.model_dump_json()},
        shared=made.load(setting, pack.split, study.training.max_length),
        engine=made,
        setting=setting,
        state_folder=str(root / "state"),
    )
    return one  # type: ignore[no-any-return]


def numbers(report: RungReport) -> Any:
    rows = [row.model_dump(exclude={"seconds"}) for row in report.trainings]
    return report.step, report.evaluations, rows


def trained(root: Path) -> list[int]:
    return [int(line.split()[1]) for line in (root / "log").read_text().splitlines()]


@pytest.mark.parametrize("place", PLACES)
def test_a_damaged_state_costs_time_and_no_number(tmp_path: Path, place: str) -> None:
    """The original bug: the worker could not read it, and the pack was recorded as broken off."""
    study = make_study(tmp_path)
    pack = pack_of(study, tmp_path)
    aside = tmp_path / "quiet"
    aside.mkdir()
    quiet = worker(study, pack, aside)
    expected = [numbers(report_of(quiet.step())) for _ in pack.rungs]
    first = worker(study, pack, tmp_path)
    first.step()
    first.step()
    path = state_path(tmp_path / "state", pack)
    assert read_state(path, pack) is not None
    damage(path, place)
    assert read_state(path, pack) is None
    again = worker(study, pack, tmp_path)
    assert [numbers(report_of(again.step())) for _ in pack.rungs] == expected
    assert trained(tmp_path) == [*pack.rungs[:2], *pack.rungs]


def test_a_whole_state_is_gone_on_from(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    pack = pack_of(study, tmp_path)
    first = worker(study, pack, tmp_path)
    reports = [numbers(report_of(first.step())) for _ in pack.rungs[:2]]
    again = worker(study, pack, tmp_path)
    assert numbers(report_of(again.step())) == reports[-1], (
        "reported again, in case it was not heard"
    )
    again.step()
    assert trained(tmp_path) == list(pack.rungs)
