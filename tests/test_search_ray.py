"""The search under Ray Tune: workers, deaths, signals, silence. One Ray for all but the killed drivers."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from synthetic import (
    LAYERS,
    USUAL,
    Behaviour,
    make_scenarios,
    make_setting,
    make_study,
    ray_two,
    search_inline,
)
from synthetic import engine as synthetic_engine
from test_search_resume import picture, work_of

from aqn_tune.errors import Interrupted, UserError
from aqn_tune.ledger import Ledger
from aqn_tune.search.progress import Progress
from aqn_tune.search.record import broke_off
from aqn_tune.search.runner import run_search
from aqn_tune.study.engine import Engine
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.schema import Study

__all__ = ["ray_two"]

SMALL: dict[str, Any] = {"configs": 4, "rungs": (0.25, 1.0)}


def search(
    study: Study,
    behaviour: Behaviour = USUAL,
    *,
    engine: Engine | None = None,
    **more: Any,
) -> tuple[StudyFolder, Ledger]:
    """Run a search under Ray, with the synthetic engine or another one."""
    folder = study_folder(study)
    run_search(
        study,
        make_setting(study),
        make_scenarios(study),
        folder,
        layer_count=LAYERS,
        engine=engine or synthetic_engine(behaviour),
        **more,
    )
    return folder, Ledger(folder.ledger)


@pytest.fixture(scope="module")
def serial(
    ray_two: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Study, StudyFolder, list[Progress], list[str], list[int]]:
    """A search with one worker, what it showed, its log and how many rows each listener got."""
    root = tmp_path_factory.mktemp("serial")
    study = make_study(root / "out")
    moments: list[Progress] = []
    rows: list[int] = []
    folder, _ = search(
        study,
        Behaviour(log=str(root / "log"), late=2.0),
        progress=moments.append,
        listeners=(lambda new: rows.append(len(new)),),
    )
    return study, folder, moments, (root / "log").read_text().splitlines(), rows


Serial = tuple[Study, StudyFolder, list[Progress], list[str], list[int]]


def test_one_worker_makes_the_same_ledger_as_no_ray(serial: Serial, tmp_path: Path) -> None:
    """Reused actors leave nothing behind: each pack gives what it gives in a fresh process object."""
    study, folder, _, log, _ = serial
    inline = study.model_copy(update={"output": str(tmp_path)})
    search_inline(inline, study_folder(inline), behaviour=Behaviour(late=2.0))
    assert picture(study, folder) == picture(inline, study_folder(inline))
    assert len({line.split()[2] for line in log}) == 1  # one process did it all


def test_stopped_is_pruned_and_the_best_has_reached_the_last_rung(serial: Serial) -> None:
    """On a loss that rises with the steps, the lowest values belong to stopped configs."""
    study, folder, *_ = serial
    last = len(work_of(study, folder).rungs) - 1
    for scenario in make_scenarios(study):
        stored = optuna.load_study(study_name=scenario.name, storage=f"sqlite:///{folder.optuna}")
        states = [t.state.name for t in stored.trials]
        assert len(states) == study.search.configs  # type: ignore[union-attr]
        assert set(states) == {"COMPLETE", "PRUNED"}
        for trial in stored.trials:
            reached = max(trial.intermediate_values)
            assert (trial.state.name == "COMPLETE") == (reached == last)
        assert stored.best_trial.last_step == last
        lowest = min(v for t in stored.trials for v in t.intermediate_values.values())
        assert lowest < stored.best_value


def test_no_state_is_left_behind(serial: Serial) -> None:
    _, folder, *_ = serial
    assert not (folder.root / "ray").exists()
    assert not list(folder.state.iterdir())


def test_progress_and_listeners_see_everything(serial: Serial) -> None:
    study, folder, moments, _, rows = serial
    end = moments[-1]
    assert end.finished + end.stopped + end.failed == end.total
    assert (end.running, end.failed, end.seconds_left) == (0, 0, 0.0)
    assert {best.scenario for best in end.best} == {s.name for s in make_scenarios(study)}
    assert max(m.running for m in moments) == 1
    assert sum(rows) == len(folder.ledger.read_text().splitlines())


def test_two_workers_change_no_number(serial: Serial, tmp_path: Path) -> None:
    """Other configs may be proposed; what both searches trained is equal to the last bit."""
    study, folder, *_ = serial
    parallel = study.model_copy(
        update={"output": str(tmp_path), "compute": study.compute.model_copy(update={"workers": 2})}
    )
    other, ledger = search(parallel, Behaviour(late=2.0, sleep=0.02))
    one = Ledger(folder.ledger).evaluations
    shared = one.keys() & ledger.evaluations.keys()
    assert len(shared) > 50
    assert all(one[key] == ledger.evaluations[key] for key in shared)
    for scenario in make_scenarios(study):
        ended = [r for r in ledger.search if r.scenario == scenario.name and r.event != "rung"]
        assert sum(r.event == "asked" for r in ended) * 2 == len(ended)
    assert work_of(parallel, other).tally().left == 0


def test_what_diverges_stops_at_the_first_rung_and_is_failed(ray_two: None, tmp_path: Path) -> None:
    study = make_study(tmp_path)
    folder, ledger = search(study, Behaviour(nan_above=0.06))
    failed = {(r.scenario, r.config) for r in ledger.search if r.event == "failed"}
    assert failed
    for scenario, config in failed:
        rungs = [
            (r.rung, r.value)
            for r in ledger.search
            if (r.scenario, r.config, r.event) == (scenario, config, "rung")
        ]
        assert rungs == [(0, None)]
        keys = [
            c.training_key
            for c in ledger.cells.values()
            if (c.scenario, c.config) == (scenario, config)
        ]
        assert {ledger.trainings[key].status for key in keys} == {"failed"}
        assert not [key for key in ledger.evaluations if key[0] in keys]
    for scenario in make_scenarios(study):
        stored = optuna.load_study(study_name=scenario.name, storage=f"sqlite:///{folder.optuna}")
        assert "RUNNING" not in {t.state.name for t in stored.trials}
        assert stored.best_trial.params["sigma_start"] <= 0.06
    assert work_of(study, folder).tally().left == 0


def test_a_worker_that_dies_once_costs_no_number(serial: Serial, tmp_path: Path) -> None:
    study, folder, *_ = serial
    again = study.model_copy(update={"output": str(tmp_path / "out")})
    log, flag = tmp_path / "log", tmp_path / "died"
    search(
        again,
        Behaviour(late=2.0, die_at=10, die_in="both-", flag=str(flag), log=str(log)),
    )
    assert flag.exists()
    assert picture(again, study_folder(again)) == picture(study, folder)
    lines = [line.rsplit(" ", 1)[0] for line in log.read_text().splitlines()]
    assert len(lines) == len(set(lines))  # it went on from its state: no rung was trained twice
    assert len({line.split()[2] for line in log.read_text().splitlines()}) == 2


@pytest.mark.slow
def test_ten_workers_that_die_cost_no_number(serial: Serial, tmp_path: Path) -> None:
    """Every pack that comes to its second rung loses its worker there, and goes on from its first."""
    study, folder, *_ = serial
    again = study.model_copy(update={"output": str(tmp_path / "out")})
    log, flags = tmp_path / "log", tmp_path / "flags"
    flags.mkdir()
    search(again, Behaviour(late=2.0, die_at=10, flag=str(flags), log=str(log)))
    died = {flag.name for flag in flags.iterdir()}
    assert len(died) >= 10
    assert picture(again, study_folder(again)) == picture(study, folder)
    lines = [line.split() for line in log.read_text().splitlines()]
    assert len({(pack, step) for pack, step, _ in lines}) == len(lines)
    workers = {pack: {pid for name, _, pid in lines if name == pack} for pack, *_ in lines}
    assert {pack for pack, pids in workers.items() if len(pids) == 2} == died


def test_a_worker_that_keeps_dying_fails_its_config_only(ray_two: None, tmp_path: Path) -> None:
    study = make_study(tmp_path, search=SMALL, compute={"workers": 1, "max_failures": 1})
    name = f"{make_scenarios(study)[0].name}-c001"
    folder, ledger = search(study, Behaviour(die_at=5, die_in=name))
    failed = [r for r in ledger.search if r.event == "failed"]
    assert [f"{r.scenario}-{r.config}" for r in failed] == [name]
    assert "worker died 2 times" in failed[0].error
    broken = [row for row in ledger.trainings.values() if row.status == "failed"]
    assert {row.pack for row in broken} == {name}
    assert all(broke_off(row) for row in broken)
    assert work_of(study, folder).tally().left == 0


def test_an_exception_is_no_number_and_controls_are_tried_again(
    ray_two: None, tmp_path: Path
) -> None:
    study = make_study(tmp_path, search=SMALL)
    _, ledger = search(study, Behaviour(raise_in="control"))
    controls = [c.training_key for c in ledger.cells.values() if not c.config]
    assert {ledger.trainings[key].error for key in controls} == {
        "broke off: RuntimeError: no such kernel"
    }
    assert not [e for e in ledger.evaluations.values() if e.training_key in controls and e.step]
    before = list(ledger.search)
    _, ledger = search(study)
    assert {ledger.trainings[key].status for key in controls} == {"finished"}
    assert ledger.search == before


@pytest.mark.parametrize("vandal", ["base", "tokens"])
def test_weights_and_tokens_are_shared_and_read_only(
    ray_two: None, tmp_path: Path, vandal: str
) -> None:
    study = make_study(tmp_path, search=SMALL)
    _, ledger = search(study, Behaviour(vandal=vandal))
    assert {"assignment destination is read-only"} == {
        row.error.rsplit(": ", 1)[1] for row in ledger.trainings.values()
    }


def test_a_user_error_of_a_worker_ends_the_search(ray_two: None, tmp_path: Path) -> None:
    study = make_study(tmp_path, search=SMALL)
    with pytest.raises(UserError, match=r"^no such file: train\.jsonl$"):
        search(study, Behaviour(user_error="no such file: train.jsonl"))
    assert not Ledger(study_folder(study).ledger).trainings


def test_rows_that_cannot_be_loaded_end_the_search_before_its_first_trial(
    ray_two: None, tmp_path: Path
) -> None:
    def refuse(*_: Any) -> Any:
        raise UserError("row 3 needs 70 tokens")

    study = make_study(tmp_path, search=SMALL)
    folder, opened = study_folder(study), tmp_path / "log"
    made = synthetic_engine(Behaviour(log=str(opened)))._replace(load_splits=refuse)
    with pytest.raises(UserError, match=r"^row 3 needs 70 tokens$"):
        search(study, engine=made)
    ledger = Ledger(folder.ledger)
    assert not ledger.trainings
    assert not ledger.search
    assert not opened.exists()


def test_an_engine_that_no_worker_can_load_ends_the_search(ray_two: None, tmp_path: Path) -> None:
    study = make_study(tmp_path, search=SMALL, compute={"workers": 1, "max_failures": 0})
    made = synthetic_engine()._replace(open_pack=_Unloadable())
    with pytest.raises(RuntimeError, match="a worker cannot start"):
        search(study, engine=made)


class _Unloadable:
    def __call__(self, *_: Any) -> Any:
        raise AssertionError

    def __reduce__(self) -> Any:
        return (os.stat, ("/no/such/file",))


def test_a_relative_output_folder_works_and_nothing_is_printed(
    ray_two: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    study = make_study("runs", search=SMALL)
    folder, ledger = search(study, Behaviour(raise_in="both-threshold0.1-c001"))
    assert folder.root.is_relative_to(tmp_path)
    assert ledger.trainings
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


def test_ray_can_pickle_the_searcher(tmp_path: Path) -> None:
    from aqn_tune.search.driver import Driver, LedgerScheduler, StudySearcher
    from aqn_tune.search.progress import ProgressMeter

    study = make_study(tmp_path)
    work = work_of(study, study_folder(study))
    driver = Driver(work, ProgressMeter("search", work, lambda moment: None))
    pickle.loads(pickle.dumps(LedgerScheduler(driver)))
    copy = pickle.loads(pickle.dumps(StudySearcher(driver)))
    assert copy.suggest("1")["name"] == driver.work.next_pack().name == "base"  # type: ignore[union-attr]


# -- drivers that are killed -----------------------------------------------------------------------

DRIVER = """
import sys
sys.path.insert(0, {tests!r})
from synthetic import *
from aqn_tune.errors import Interrupted
from aqn_tune.study.folder import study_folder
study = make_study({out!r}, search={{"configs": 5}})
try:
    run_search(study, make_setting(study), make_scenarios(study), study_folder(study),
               layer_count=LAYERS, engine=engine(Behaviour(sleep={sleep}, log={log!r})))
except Interrupted as error:
    print("interrupted:", error)
    sys.exit(130)
"""


def start_driver(out: Path, *, sleep: float) -> subprocess.Popen[str]:
    """Start a search in a process of its own."""
    code = DRIVER.format(
        tests=str(Path(__file__).parent),
        out=str(out),
        sleep=sleep,
        log=str(out.with_suffix(".log")),
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(folder: StudyFolder, pattern: str, count: int, driver: subprocess.Popen[str]) -> None:
    """Return as soon as the ledger holds `count` rows that match."""
    while driver.poll() is None:
        if folder.ledger.exists():
            found = re.findall(pattern, folder.ledger.read_text())
            if len(found) >= count:
                return
        time.sleep(0.02)
    raise AssertionError(driver.communicate())


@pytest.mark.slow
def test_a_driver_killed_in_the_middle_continues_to_the_same_end(
    ray_two: None, tmp_path: Path
) -> None:
    """kill -9, twice, then a run in peace: ledger, Optuna study and rung tables as without."""
    study = make_study(tmp_path / "out", search={"configs": 5})
    folder = study_folder(study)
    for rungs in (3, 9):
        driver = start_driver(tmp_path / "out", sleep=0.15)
        wait_for(folder, '"event": "rung"', rungs, driver)
        driver.kill()
        driver.communicate()
    search(study)
    whole = study.model_copy(update={"output": str(tmp_path / "whole")})
    search_inline(whole, study_folder(whole))
    assert picture(study, folder) == picture(whole, study_folder(whole))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_search_in_order(ray_two: None, tmp_path: Path, number: int) -> None:
    study = make_study(tmp_path / "out", search={"configs": 5})
    folder = study_folder(study)
    driver = start_driver(tmp_path / "out", sleep=0.15)
    wait_for(folder, '"event": "rung"', 2, driver)
    if number == signal.SIGINT:
        os.killpg(driver.pid, number)  # a terminal sends it to the workers, too
    else:
        driver.send_signal(number)
    out, err = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert out.startswith("interrupted: the search was interrupted")
    assert "Traceback" not in err
    assert work_of(study, folder).tally().left > 0
    assert not (folder.root / "ray").exists()
    search(study)
    assert work_of(study, folder).tally().left == 0


def test_interrupted_is_no_user_error() -> None:
    assert not issubclass(Interrupted, UserError)
