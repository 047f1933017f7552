"""A search that was cut off anywhere goes on as if it had not been (without Ray)."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from synthetic import (
    LAYERS,
    Behaviour,
    engine,
    make_scenarios,
    make_setting,
    make_study,
    search_inline,
)

from aqn_tune.errors import UserError
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import EvaluationRow, TrainingRow
from aqn_tune.search.asha import ScenarioASHA
from aqn_tune.search.record import BROKE_OFF, Recorder
from aqn_tune.search.runner import control_packs
from aqn_tune.search.search_work import SearchWork
from aqn_tune.search.state import (
    SavedState,
    drop_other_states,
    read_state,
    state_path,
    write_state,
)
from aqn_tune.search.suggest import build_study
from aqn_tune.search.work import FixedPacks
from aqn_tune.study.cells import resolve_run
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.runs import Pack
from aqn_tune.study.schema import Study


def work_of(study: Study, folder: StudyFolder) -> SearchWork:
    """Return the work that a session starts with."""
    recorder = Recorder(Ledger(folder.ledger), folder.root)
    scenarios, setting = make_scenarios(study), make_setting(study)
    packs = control_packs(study, setting, scenarios, recorder, layer_count=LAYERS)
    return SearchWork(
        study,
        setting,
        scenarios,
        layer_count=LAYERS,
        controls=FixedPacks(packs, setting=setting, recorder=recorder, state=folder.state),
        recorder=recorder,
        state=folder.state,
    )


def picture(study: Study, folder: StudyFolder) -> dict[str, Any]:
    """Return all that must not depend on interruptions."""
    work = work_of(study, folder)
    ledger = Ledger(folder.ledger)
    space = study.search.space  # type: ignore[union-attr]
    return {
        "search": [row.model_dump() for row in ledger.search],
        "evaluations": {key: row.model_dump() for key, row in ledger.evaluations.items()},
        "cells": {key: row.model_dump() for key, row in ledger.cells.items()},
        "trainings": {
            key: row.model_dump(exclude={"seconds"}) for key, row in ledger.trainings.items()
        },
        "rung tables": work.asha.tables(),
        "optuna": {
            scenario.name: [
                (t.number, t.state.name, t.params, t.values, t.intermediate_values)
                for t in build_study(
                    space, work.history.records(scenario.name), scenario=scenario.name
                ).trials
            ]
            for scenario in make_scenarios(study)
        },
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, StudyFolder]:
    """A search that ran without interruption."""
    study = make_study(tmp_path_factory.mktemp("whole"), search={"configs": 6})
    folder = study_folder(study)
    search_inline(study, folder)
    return study, folder


def cut_at(folder: StudyFolder, root: Path, line: int, *, torn: bool) -> StudyFolder:
    """Return a copy of a folder whose ledger ends after `line` rows, and maybe in half a row."""
    lines = folder.ledger.read_text().splitlines(keepends=True)
    copy = StudyFolder(root)
    copy.root.mkdir()
    rest = lines[line][: len(lines[line]) // 2] if torn else ""
    copy.ledger.write_text("".join(lines[:line]) + rest)
    return copy


def test_cut_off_after_any_decision_it_continues_to_the_same_end(
    whole: tuple[Study, StudyFolder], tmp_path: Path
) -> None:
    study, folder = whole
    expected = picture(study, folder)
    kinds = [json.loads(line)["kind"] for line in folder.ledger.read_text().splitlines()]
    decisions = [n for n, kind in enumerate(kinds) if kind == "search"]
    # Right before and after search rows, and in the middle of one; the early ones cost the most.
    cuts = [decisions[0], *decisions[3::7], len(kinds) - 1]
    for number, line in enumerate(cuts):
        copy = cut_at(folder, tmp_path / str(line), line, torn=number % 2 == 1)
        search_inline(study, copy)
        assert picture(study, copy) == expected, f"cut after row {line}"


def test_without_the_rung_tables_it_would_not(
    whole: tuple[Study, StudyFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original bug: a restored search begins with empty rungs, and keeps what it should stop."""
    study, folder = whole
    lines = [json.loads(line) for line in folder.ledger.read_text().splitlines()]
    stopped = [n for n, line in enumerate(lines) if line.get("event") == "stopped"]
    copy = cut_at(folder, tmp_path / "copy", stopped[len(stopped) // 2], torn=False)
    replay = SearchWork._replay

    def forgetful(self: SearchWork) -> None:
        replay(self)
        self.asha = ScenarioASHA(self._scenarios, rung_count=3, reduction_factor=2.0)

    with monkeypatch.context() as patch:
        patch.setattr(SearchWork, "_replay", forgetful)
        search_inline(study, copy)
    events = [(r.scenario, r.config, r.event) for r in Ledger(copy.ledger).search]
    assert events != [(r.scenario, r.config, r.event) for r in Ledger(folder.ledger).search]


def test_a_finished_search_has_nothing_left(
    whole: tuple[Study, StudyFolder], tmp_path: Path
) -> None:
    study, folder = whole
    assert work_of(study, folder).tally().left == 0
    before = folder.ledger.read_bytes()
    search_inline(study, folder, behaviour=Behaviour(raise_in=""))
    assert folder.ledger.read_bytes() == before


def test_no_value_of_a_rung_mixes_fidelities(whole: tuple[Study, StudyFolder]) -> None:
    """Every rung value is the mean over all replicates at that rung's step, and the seeds never change."""
    study, folder = whole
    ledger, rungs = Ledger(folder.ledger), work_of(study, folder).rungs
    seeds = set()
    for row in ledger.search:
        if row.event != "rung":
            continue
        cells = [
            c for c in ledger.cells.values() if (c.scenario, c.config) == (row.scenario, row.config)
        ]
        losses = []
        for cell in cells:
            found = ledger.evaluation(
                cell.training_key, rungs[row.rung], "faulty", row.scenario, "validation"
            )
            assert found is not None
            losses.append(found.loss or math.nan)
        seeds.add(tuple(c.seed for c in cells))
        assert len(losses) == 2
        assert row.value == math.fsum(losses) / 2
    assert len(seeds) == 1


def test_every_control_is_the_declared_one_and_comes_first(
    whole: tuple[Study, StudyFolder],
) -> None:
    study, folder = whole
    ledger, setting = Ledger(folder.ledger), make_setting(study)
    for scenario in make_scenarios(study):
        for name in study.controls.include:
            for replicate in range(2):
                cell = ledger.cells["search", 0, scenario.name, name, replicate]
                run = resolve_run(
                    study,
                    scenario,
                    study.controls.arm(name),
                    seed=cell.seed,
                    layer_count=LAYERS,
                )
                assert run.training_key(setting) == cell.training_key
                training = ledger.trainings[cell.training_key]
                assert (training.status, training.step_reached) == ("finished", 20)
    lines = [json.loads(line) for line in folder.ledger.read_text().splitlines()]
    trained = [line["pack"] for line in lines if line["kind"] == "training"]
    first_config = next(n for n, name in enumerate(trained) if not name.startswith("control"))
    assert not any(name.startswith("control") for name in trained[first_config:])


def test_nothing_is_trained_twice(tmp_path: Path) -> None:
    """A config that comes to a known training is answered from the ledger, at every rung."""
    space = {"dimensions": {"targeting": {"kind": "choice", "values": ["none", "global"]}}}
    study = make_study(tmp_path / "out", search={"space": space, "configs": 5})
    log = tmp_path / "log"
    folder = study_folder(study)
    ledger = search_inline(study, folder, behaviour=Behaviour(log=str(log)))
    assert not [line for line in log.read_text().splitlines() if "-c0" in line.split()[0]]
    rungs = [row for row in ledger.search if row.event == "rung"]
    assert len(rungs) > 10
    assert {row.event for row in ledger.search if row.event != "rung"} >= {"asked", "finished"}
    fault_only = [
        ledger.evaluation(
            ledger.cells["search", 0, "both-threshold0.1", "fault_only", i].training_key,
            20,
            "faulty",
            "both-threshold0.1",
            "validation",
        )
        for i in range(2)
    ]
    assert any(r.value == math.fsum(e.loss or 0 for e in fault_only if e) / 2 for r in rungs)


def test_a_config_that_cannot_exist_in_a_scenario_fails_alone(tmp_path: Path) -> None:
    space = {"dimensions": {"targeting": {"kind": "choice", "values": ["healthy", "global"]}}}
    everywhere = {"faults": [{"kind": "dead_zone", "threshold": 0.1, "layers": "all"}]}
    study = make_study(tmp_path, search={"space": space, "configs": 8}, scenario=everywhere)
    ledger = search_inline(study, study_folder(study))
    failed = [row for row in ledger.search if row.event == "failed"]
    assert failed
    assert all("every layer is faulty" in row.error for row in failed)
    healthy = {r.config for r in ledger.search if r.params.get("targeting") == "healthy"}
    assert {row.config for row in failed} <= healthy
    assert not [c for c in ledger.cells.values() if c.config in healthy and c.config not in
                {r.config for r in ledger.search if r.params.get("targeting") == "global"}]  # fmt: skip


def test_a_space_with_an_unread_parameter_ends_the_search_at_once(tmp_path: Path) -> None:
    space = {
        "dimensions": {
            "targeting": {"kind": "fixed", "value": "global"},
            "window_width": {"kind": "int", "low": 1, "high": 3},
        }
    }
    study = make_study(tmp_path, search={"space": space})
    with pytest.raises(UserError, match="window_width has no effect"):
        search_inline(study, study_folder(study))


# -- the recorder ----------------------------------------------------------------------------------


def _pack(study: Study, name: str = "control000", size: int = 2) -> Pack:
    scenario = make_scenarios(study)[0]
    runs = tuple(
        resolve_run(study, scenario, study.controls.arm("global"), seed=s, layer_count=LAYERS)
        for s in range(size)
    )
    return Pack(name=name, stage="search", runs=runs, rungs=(5, 20), split="validation")


@pytest.fixture
def reported(tmp_path: Path) -> tuple[Study, Recorder, Pack, list[EvaluationRow | TrainingRow]]:
    study = make_study(tmp_path)
    pack = _pack(study)
    setting = make_setting(study)
    made = engine()
    report = made.open_pack(pack, setting, made.load(setting, pack.split, 64)).advance()
    recorder = Recorder(Ledger(tmp_path / "ledger.jsonl"), tmp_path)
    rows = [*report.evaluations, *report.trainings]
    recorder.report(pack, rows)
    return study, recorder, pack, rows


Reported = tuple[Study, Recorder, Pack, list[EvaluationRow | TrainingRow]]


def test_rows_that_arrive_again_are_not_written_again(reported: Reported) -> None:
    _, recorder, pack, rows = reported
    size = recorder.ledger.path.stat().st_size
    again = [
        r.model_copy(update={"seconds": 99.0}) if isinstance(r, TrainingRow) else r for r in rows
    ]
    recorder.report(pack, again)
    assert recorder.ledger.path.stat().st_size == size


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("evaluation", {"loss": 1.25}),
        ("evaluation", {"exact_match": 0.125}),
        ("training", {"train_losses": (9.0,)}),
    ],
)
def test_rows_that_arrive_again_with_other_numbers_are_refused(
    reported: Reported, kind: str, change: dict[str, Any]
) -> None:
    _, recorder, pack, rows = reported
    changed = [r.model_copy(update=change) if r.kind == kind else r for r in rows]
    with pytest.raises(UserError, match="other numbers than those recorded"):
        recorder.report(pack, changed)


def test_another_pack_may_round_differently_and_the_first_holds(reported: Reported) -> None:
    study, recorder, _, rows = reported
    first = next(r for r in rows if isinstance(r, EvaluationRow))
    other = _pack(study, "both-threshold0.1-c003", size=1)
    recorder.report(other, [first.model_copy(update={"loss": (first.loss or 0) + 1e-7})])
    held = recorder.ledger.evaluation(
        first.training_key, 5, first.condition, first.scenario, "validation"
    )
    assert held == first


def test_a_pack_in_other_parts_may_round_differently_and_the_first_holds(
    reported: Reported,
) -> None:
    """The memory that is free decides how many of its runs share a pass."""
    _, recorder, pack, rows = reported
    size = recorder.ledger.path.stat().st_size
    changed = [
        r.model_copy(update={"loss": (r.loss or 0) + 1e-7})
        if isinstance(r, EvaluationRow)
        else r.model_copy(update={"lockstep": r.lockstep + 1})
        for r in rows
    ]
    recorder.report(pack, changed)
    assert recorder.ledger.path.stat().st_size == size


def test_the_untrained_base_is_no_state_of_the_clean_training(reported: Reported) -> None:
    """Its last rung is its first: it may call the training finished, which is not trained at all."""
    study, recorder, pack, rows = reported
    base = pack.model_copy(
        update={"name": "base", "rungs": (0,), "runs": _pack(study, size=3).runs[2:]}
    )
    training = next(r for r in rows if isinstance(r, TrainingRow))
    key = base.runs[0].training_key(make_setting(study))
    recorder.report(
        base,
        [
            training.model_copy(
                update={"training_key": key, "status": "finished", "step_reached": 0}
            )
        ],
    )
    assert key not in recorder.ledger.trainings


def test_a_training_only_moves_forward(reported: Reported) -> None:
    _, recorder, pack, rows = reported
    first = next(r for r in rows if isinstance(r, TrainingRow))
    finished = first.model_copy(update={"step_reached": 20, "status": "finished"})
    recorder.report(pack, [finished])
    recorder.report(pack, [first])
    assert recorder.ledger.trainings[first.training_key] == finished


def test_what_broke_off_is_failed_and_may_be_tried_again(reported: Reported) -> None:
    study, recorder, pack, rows = reported
    keys = [run.training_key(make_setting(study)) for run in pack.runs]
    recorder.broke(pack, keys, "its worker died")
    for key in keys:
        row = recorder.ledger.trainings[key]
        assert (row.status, row.error) == ("failed", BROKE_OFF + "its worker died")
    recorder.report(pack, rows)
    assert recorder.ledger.trainings[keys[0]].status == "unfinished"


# -- state files -----------------------------------------------------------------------------------


def test_state_files(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    pack, other = _pack(study), _pack(study, size=3)
    setting, made = make_setting(study), engine()
    training = made.open_pack(pack, setting, made.load(setting, pack.split, 64))
    report = training.advance()
    path = state_path(tmp_path / "state", pack)
    assert read_state(path, pack) is None
    write_state(path, pack, SavedState(report, training.state()))
    saved = read_state(path, pack)
    assert saved is not None
    assert saved.report == report
    fresh = made.open_pack(pack, setting, made.load(setting, pack.split, 64))
    fresh.restore(saved.state)
    assert fresh.advance().evaluations == training.advance().evaluations
    assert read_state(path, other) is None
    for alike in ({"export": {"k": "elsewhere"}}, {"own": {"k": "cell"}}, {"lockstep": 1}):
        assert read_state(path, pack.model_copy(update=alike)) is not None
    half = path.with_name(path.name + ".123.tmp")
    half.write_bytes(b"{")
    drop_other_states(path.parent, "search", [pack])
    assert path.exists()
    assert not half.exists()
    drop_other_states(path.parent, "search", [])
    assert not path.exists()


def test_state_of_other_code_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path)
    pack, setting, made = _pack(study), make_setting(study), engine()
    training = made.open_pack(pack, setting, made.load(setting, pack.split, 64))
    path = state_path(tmp_path, pack)
    write_state(path, pack, SavedState(training.advance(), training.state()))
    monkeypatch.setattr("aqn_tune.search.state.code_hash", lambda: "another")
    assert read_state(path, pack) is None


def test_a_ledger_of_another_study_is_refused(
    whole: tuple[Study, StudyFolder], tmp_path: Path
) -> None:
    _, folder = whole
    other = make_study(tmp_path / "out", seed=8)
    root = StudyFolder(tmp_path / "copy")
    shutil.copytree(folder.root, root.root)
    with pytest.raises(UserError, match="belongs to another version of the study"):
        work_of(other, root)
