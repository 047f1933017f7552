"""The commands on a recorded study, with a synthetic engine in place of training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from synthetic import Behaviour, inline, make_study
from synthetic import engine as synthetic_engine

from aqn_tune.cli import rerun, run
from aqn_tune.cli.app import main
from aqn_tune.cli.output import ProgressLine
from aqn_tune.errors import Interrupted, UserError
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import CellRow, SearchRow
from aqn_tune.search.progress import Progress
from aqn_tune.search.work import Best
from aqn_tune.study.cells import config_cells, stage_cells
from aqn_tune.study.engine import Engine
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.loading import layer_count, load_study, make_setting, resolve_scenarios
from aqn_tune.study.packing import jobs_of, make_packs
from aqn_tune.study.runs import Pack
from aqn_tune.study.schema import Study
from aqn_tune.study.space import Params

SILENT = ProgressLine(quiet=True)
CELL = "search/both/targeted/1"
PARAMS: Params = {"targeting": "window", "window_centre": 3, "window_width": 2, "sigma_start": 0.1}


def call(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    code = stopped.value.code
    return code if isinstance(code, int) else 0


def record(study: Study, engine: Engine) -> StudyFolder:
    """Record the controls and one config of a search, without Ray."""
    folder = study_folder(study)
    run.write_study(study, folder)
    setting, scenarios = make_setting(study), resolve_scenarios(study)
    layers = layer_count(study.model)
    controls = stage_cells(study, setting, scenarios, stage="search", layer_count=layers).cells
    config = config_cells(
        study, setting, scenarios[0], config="c000", params=PARAMS, layer_count=layers
    )
    ledger = Ledger(folder.ledger)
    ledger.append(
        [
            SearchRow(
                scenario=scenarios[0].name, event="asked", config="c000", number=0, params=PARAMS
            )
        ]
    )
    ledger.append(
        CellRow(
            stage=cell.stage, scenario=cell.scenario, arm=cell.arm, config=cell.config,
            replicate=cell.replicate, seed=cell.run.seed, training_key=cell.training_key,
        )
        for cell in (*controls, *config)
    )  # fmt: skip
    for pack in make_packs(
        jobs_of([*controls, *config], reuse=True),
        stage="search", prefix="p", size=5, rungs=(5, 10, 20), split="validation",
    ):  # fmt: skip
        shared = engine.load(setting, pack.split, study.training.max_length)
        training = engine.open_pack(pack, setting, shared)
        for _ in pack.rungs:
            report = training.advance()
            ledger.append([*report.evaluations, *report.trainings])
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path / "runs")


@pytest.mark.parametrize("cell", [CELL, "search/both/c000/0"])
@pytest.mark.parametrize("whole_pack", [False, True])
def test_rerun_finds_every_loss_again(study: Study, cell: str, whole_pack: bool) -> None:
    engine = synthetic_engine()
    folder = record(study, engine)
    compared = rerun.rerun(
        study, Ledger(folder.ledger), cell, engine=engine, progress=SILENT, whole_pack=whole_pack
    )
    losses = [
        (c.what, c.step) for c in compared if c.what.endswith(" loss") and "train" not in c.what
    ]
    assert losses == [
        (name, step) for step in (5, 10, 20) for name in ("clean loss", "faulty both loss")
    ]
    assert all(item.same for item in compared)
    assert sum(item.what == "train loss" for item in compared) == 10, "those of the last row"


def test_a_pack_of_which_the_ledger_holds_a_part_is_not_trained_as_a_whole(study: Study) -> None:
    engine = synthetic_engine()
    folder = record(study, engine)
    ledger = Ledger(folder.ledger)
    key = ledger.cells["search", 0, "both", "targeted", 1].training_key
    known = ledger.trainings[key]
    ledger.append([known.model_copy(update={"pack_size": known.pack_size + 1})])
    with pytest.raises(
        UserError, match=f"--whole-pack: pack {known.pack} had {known.pack_size + 1}"
    ):
        rerun.rerun(study, ledger, CELL, engine=engine, progress=SILENT, whole_pack=True)
    assert rerun.rerun(study, ledger, CELL, engine=engine, progress=SILENT)


@pytest.mark.parametrize("lockstep", [1, 2])
def test_a_whole_pack_goes_through_in_the_parts_it_had(study: Study, lockstep: int) -> None:
    engine = synthetic_engine()
    ledger = Ledger(record(study, engine).ledger)
    key = ledger.cells["search", 0, "both", "targeted", 1].training_key
    ledger.append([ledger.trainings[key].model_copy(update={"lockstep": lockstep})])
    packs: list[Pack] = []

    def open_pack(pack: Pack, *rest: Any) -> Any:
        packs.append(pack)
        return engine.open_pack(pack, *rest)

    watched = engine._replace(open_pack=open_pack)
    rerun.rerun(study, ledger, CELL, engine=watched, progress=SILENT, whole_pack=True)
    assert [pack.lockstep for pack in packs] == [lockstep]


def test_rerun_by_training_key(study: Study) -> None:
    engine = synthetic_engine()
    ledger = Ledger(record(study, engine).ledger)
    key = next(row.training_key for row in ledger.cells.values() if row.arm == "healthy")
    compared = rerun.rerun(study, ledger, key, engine=engine, progress=SILENT)
    assert compared
    assert all(item.same for item in compared)


def test_rerun_sees_a_change_of_the_last_bit(study: Study) -> None:
    engine = synthetic_engine()
    folder = record(study, engine)
    ledger = Ledger(folder.ledger)
    key = next(
        row.training_key
        for row in ledger.cells.values()
        if (row.arm, row.replicate) == ("targeted", 1)
    )
    old = ledger.evaluation(key, 20, "faulty", "both", "validation")
    assert old is not None
    assert old.loss is not None
    import math

    ledger.append([old.model_copy(update={"loss": math.nextafter(old.loss, 2.0)})])
    compared = rerun.rerun(
        study, Ledger(folder.ledger), CELL, engine=synthetic_engine(), progress=SILENT
    )
    wrong = [item for item in compared if not item.same]
    assert [(item.what, item.step) for item in wrong] == [("faulty both loss", 20)]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("search/both/targetd/1", "did you mean 'search/both/targeted/1'"),
        ("search/both/targeted/7", "stage/scenario/arm/replicate, for example search/both/clean/0"),
    ],
)
def test_rerun_of_a_cell_that_is_not_there(study: Study, cell: str, message: str) -> None:
    engine = synthetic_engine()
    folder = record(study, engine)
    with pytest.raises(UserError, match=message):
        rerun.rerun(study, Ledger(folder.ledger), cell, engine=engine, progress=SILENT)


def test_rerun_refuses_a_study_that_comes_to_another_training(study: Study) -> None:
    engine = synthetic_engine()
    ledger = Ledger(record(study, engine).ledger)
    other = study.model_copy(update={"seed": 8})
    with pytest.raises(UserError, match="does not come to training"):
        rerun.rerun(other, ledger, CELL, engine=engine, progress=SILENT)


@pytest.fixture
def real_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine], None]:
    """Put another engine in the place of the one that trains with torch."""
    import types

    def put(engine: Engine) -> None:
        module = types.ModuleType("aqn_tune.training.engine")
        module.ENGINE = engine  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "aqn_tune.training.engine", module)

    return put


def test_rerun_command(
    study: Study, real_engine: Callable[[Engine], None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = record(study, synthetic_engine())
    real_engine(synthetic_engine())
    before = folder.ledger.read_bytes()
    assert call(["rerun", str(folder.root), CELL]) == 0
    assert "all identical" in capsys.readouterr().out
    real_engine(synthetic_engine(Behaviour(effect=0.31)))
    assert call(["rerun", str(folder.root), CELL]) == 1
    assert "DIFFERS" in capsys.readouterr().out
    assert call(["rerun", str(folder.root), CELL, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["identical"] is False
    assert len(found["losses"]) == 22
    assert folder.ledger.read_bytes() == before


def test_status_command(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    folder = record(study, synthetic_engine(Behaviour(nan_above=0.09)))
    assert call(["status", str(folder.root), "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert state["trainings"]["search"] == {"finished": 12, "failed": 2}
    assert state["configs"] == {"both": {"asked": 1}}
    assert [failure["cell"] for failure in state["failures"]] == [
        "search/both/c000/0", "search/both/c000/1",
    ]  # fmt: skip
    assert call(["status", str(folder.root)]) == 0
    text = capsys.readouterr().out
    assert "loss is not finite" in text
    assert "nothing yet" in text


def test_status_says_which_trainings_were_not_in_lockstep(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = record(study, synthetic_engine())
    reason = "the memory did not hold 5 at a time"

    def shown() -> tuple[dict[str, int], list[str]]:
        """Return what of it is in the JSON, and what is printed."""
        assert call(["status", str(folder.root), "--json"]) == 0
        state = json.loads(capsys.readouterr().out)
        assert call(["status", str(folder.root)]) == 0
        lines = capsys.readouterr().out.splitlines()
        return state["apart"], [line for line in lines if line.startswith("apart")]

    assert shown() == ({}, [])
    ledger = Ledger(folder.ledger)
    limited = {"lockstep": 3, "lockstep_limit": reason}
    rows = list(ledger.trainings.values())[:2]
    ledger.append([row.model_copy(update=limited) for row in rows])
    assert shown() == (
        {reason: 2},
        [f"apart   2 trainings not in lockstep with their whole pack: {reason}"],
    )


def test_only_failures_of_arms_count_against_a_run(study: Study) -> None:
    folder = record(study, synthetic_engine(Behaviour(nan_above=0.09)))
    outcome = run.count_failures(folder, Ledger(folder.ledger))
    assert (outcome.failed, outcome.failed_configs) == (0, 2)
    other = make_study(folder.root.parent / "other")
    folder = record(other, synthetic_engine(Behaviour(nan_above=0.04)))
    outcome = run.count_failures(folder, Ledger(folder.ledger))
    assert (outcome.failed, outcome.failed_configs) == (8, 2)


def test_train_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    real_engine: Callable[[Engine], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    real_engine(synthetic_engine())
    monkeypatch.chdir(tmp_path)
    fault = "{kind: dead_zone, layers: [10], threshold: 0.2}"
    Path("demo.yaml").write_text(
        f"study: demo\nscenario: {{faults: [{fault}]}}\nsweep: {{faults.0.threshold: [0.1, 0.2]}}\n"
    )
    arguments = ["train", "demo.yaml", "--arm", "targeted", "--scenario", "both-threshold0.2"]
    assert call([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "finished"
    assert found["seed"] % 2 == 0, "a search seed"
    assert [e["condition"] for e in found["evaluations"]] == ["clean", "faulty"]
    assert {e["split"] for e in found["evaluations"]} == {"validation"}
    adapter = Path(found["adapter"])
    assert adapter.is_dir()
    assert adapter.is_relative_to(tmp_path / "runs" / "trained")
    (adapter / "adapter_model.safetensors").touch()
    assert call(arguments) == 2
    assert "holds something already" in capsys.readouterr().err
    real_engine(synthetic_engine(Behaviour(nan_above=0.01)))
    assert call([*arguments, "--out", "elsewhere"]) == 1
    assert "the training failed: loss is not finite" in capsys.readouterr().err


def test_fresh_renames_and_never_deletes(tmp_path: Path) -> None:
    folder = tmp_path / "study-1234"
    assert run.set_aside(folder) is None
    for number in (1, 2):
        folder.mkdir()
        (folder / "ledger.jsonl").write_text(str(number))
        assert run.set_aside(folder) == tmp_path / f"study-1234.old-{number}"
        assert not folder.exists()
    assert (tmp_path / "study-1234.old-1" / "ledger.jsonl").read_text() == "1"
    assert (tmp_path / "study-1234.old-2" / "ledger.jsonl").read_text() == "2"


def test_two_runs_never_share_a_folder(study: Study) -> None:
    folder = study_folder(study)
    with (
        run._locked(folder),
        pytest.raises(UserError, match="another run works in this folder"),
        run._locked(folder),
    ):
        raise AssertionError("two runs in one folder")
    with run._locked(folder):
        pass


def test_a_folder_of_something_else_is_refused(study: Study) -> None:
    folder = study_folder(study)
    folder.root.mkdir(parents=True)
    run._check_folder(folder, study)
    (folder.root / "notes.txt").touch()
    with pytest.raises(UserError, match="not a study's folder"):
        run._check_folder(folder, study)
    run.write_study(study.model_copy(update={"seed": 99}), folder)
    with pytest.raises(UserError, match="holds another study"):
        run._check_folder(folder, study)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("a.yaml:3: x: got 1\nb.yaml:4: y: got 2"), 2, "error: a.yaml:3: x: got 1\n"),
        (Interrupted("stopped; run it again to continue"), 130, "run it again"),
    ],
)
def test_errors_become_exit_codes(
    error: Exception,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    study: Study,
    real_engine: Callable[[Engine], None],
    tmp_path: Path,
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    real_engine(synthetic_engine())
    monkeypatch.setattr(run, "run_study", fails)
    monkeypatch.setattr(run, "load_study", lambda *args: study)
    assert call(["run", "any.yaml"]) == code
    assert said in capsys.readouterr().err


def test_a_defect_of_the_program_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, study: Study, real_engine: Callable[[Engine], None]
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    real_engine(synthetic_engine())
    monkeypatch.setattr(run, "run_study", fails)
    monkeypatch.setattr(run, "load_study", lambda *args: study)
    with pytest.raises(ZeroDivisionError):
        main(["run", "any.yaml"])


MOMENT = Progress(
    stage="search",
    total=40,
    finished=7,
    running=2,
    stopped=3,
    failed=1,
    best=(Best("a", "c003", 0.5), Best("b", "c001", 0.25)),
    seconds_left=600.0,
)


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("aqn_tune.cli.output.time.monotonic", lambda: now[0])
    with ProgressLine(quiet=False) as progress:
        progress.stage(MOMENT)
        now[0] += 14.0
        progress.stage(MOMENT._replace(finished=8))
        now[0] += 2.0
        progress.stage(MOMENT._replace(finished=9))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "search 11/40; 2 running, 3 stopped, 1 failed; best in b: c001 0.2500; 10 min left",
        "search 13/40; 2 running, 3 stopped, 1 failed; best in b: c001 0.2500; 10 min left",
    ]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine(quiet=True) as progress:
        progress.stage(MOMENT)
        progress.note("x")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_plan_as_json_and_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # in a narrow table sentences are broken up
    fault = "{kind: dead_zone, layers: all, threshold: 0.2}"
    Path("demo.yaml").write_text(f"study: demo\nscenario: {{faults: [{fault}]}}\n")
    assert call(["plan", "demo.yaml", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["detectable"]["replicates"] == 8
    assert plan["search"] is None
    assert call(["plan", "demo.yaml"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for fragment in ("healthy", "n/a", "every layer is faulty", "28 layers", "sd of the paired"):
        assert fragment in text
    assert list(tmp_path.iterdir()) == [tmp_path / "demo.yaml"]


def test_plan_says_the_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fault = "{kind: dead_zone, layers: [10], threshold: 0.2}"
    Path("demo.yaml").write_text(
        f"study: demo\nscenario: {{faults: [{fault}]}}\nconfirm: {{replicates: 12}}\n"
    )
    assert call(["plan", "demo.yaml"]) == 0
    assert "looks  " not in capsys.readouterr().out
    assert call(["plan", "demo.yaml", "--set", "confirm.looks=[6, 9, 12]"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for fragment in (
        "at 6, 9 and 12 seeds, each judged at alpha 0.0167; the confirmation ends at the first that leaves",
        "all 12 seeds, which are counted above and below, are the most that it takes",
        "at n = 12, the last look,",
    ):
        assert fragment in text


DEMO = """\
study: demo
scenario: {faults: [{kind: dead_zone, layers: [10], threshold: 0.2}]}
sweep: {during: [both, eval]}
search: {space: {dimensions: {sigma_start: {kind: fixed, value: 0.1}}}, configs: 2, replicates: 2}
compute: {pack_replicas: 4}
"""


def planned(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert call(["plan", "demo.yaml", "--json", *options]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_plan_counts_what_is_not_shared_and_the_size_of_packs_changes_the_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text(DEMO)
    usual = planned(capsys)
    alone = planned(capsys, "--no-reuse")
    small = planned(capsys, "--pack", "1")
    assert (usual["reuse"], usual["pack_replicas"]) == (True, 4)
    assert (alone["reuse"], small["pack_replicas"]) == (False, 1)
    assert usual["hash"] == alone["hash"] == small["hash"]
    assert usual["folder"] == alone["folder"] == small["folder"]
    # six arms, two scenarios; at deployment alone clean and fault_only are the clean arm of `both`
    assert (usual["search"]["cells"], usual["search"]["unique"]) == (24, (1 + 5 + 4) * 2)
    assert (alone["search"]["cells"], alone["search"]["unique"]) == (24, 24)
    # beside them two scenarios of two configs and two seeds
    assert alone["search"]["most"]["trainings"] == 24 + 8
    # 8 seeds: 12 cells, and two finalists of two scenarios with both twins
    assert alone["confirm"]["most"]["trainings"] == 8 * (12 + 2 * 2 * 3)
    assert usual["confirm"]["most"]["trainings"] == 8 * (10 + 2 * 2 * 2)
    for stage in ("search", "confirm"):
        parts = [found[stage].pop("parts")[1] for found in (small, usual)]
        assert small[stage] == usual[stage]
        # alone there are more packs, of fewer runs; a pack of the search takes all seeds of a config
        assert parts[0]["packs"] > parts[1]["packs"]
        assert parts[0]["largest"]["trainings"] == {"search": 2, "confirm": 1}[stage]
        assert parts[1]["largest"]["trainings"] == 4
    # by the calibration that is shipped, which has the cost of runs alone and of packs of eight
    for seconds in ("seconds", "most_seconds"):
        assert small["estimate"][seconds] != usual["estimate"][seconds]
    assert call(["plan", "demo.yaml", "--no-reuse", "--pack", "3"]) == 0
    text = capsys.readouterr().out
    assert "24 control cells do not share (--no-reuse) and take 24 trainings" in text
    assert "up to 3 runs of one shape share a forward pass" in text


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("value", "said"), [("0", "greater than or equal to 1"), ("x", "should be a valid integer")]
)
def test_a_pack_size_that_is_none(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    value: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text(DEMO)
    assert call([command, "demo.yaml", "--pack", value]) == 2
    shown = capsys.readouterr().err
    assert "--pack" in shown
    assert said in shown
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == [tmp_path / "demo.yaml"]


def test_the_options_of_a_run_reach_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_engine: Callable[[Engine], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text(DEMO)
    real_engine(synthetic_engine())
    seen: list[Study] = []

    def note(study: Study, **rest: Any) -> None:
        seen.append(study)
        raise Interrupted("enough")

    monkeypatch.setattr(run, "run_study", note)
    for options in (
        (),
        ("--pack", "2"),
        ("--no-reuse",),
        ("--set", "compute.pack_replicas=9", "--pack", "1"),
    ):
        assert call(["run", "demo.yaml", *options]) == 130
    assert [(s.compute.pack_replicas, s.compute.reuse) for s in seen] == [
        (4, True), (2, True), (4, False), (1, True),
    ]  # fmt: skip
    assert len({study_folder(study) for study in seen}) == 1


NOTHING_LEFT = "nothing is left to train, so --no-reuse trains nothing"


def write_inline_demo(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Stand in `folder`, with a study `demo.yaml` whose packs run in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("aqn_tune.search.cluster.ray_session", nullcontext)
    monkeypatch.setattr("aqn_tune.confirm.runner.execute", inline)
    Path("demo.yaml").write_text(
        "study: demo\nscenario: {faults: [{kind: dead_zone, layers: [10], threshold: 0.2}]}\n"
    )


def test_no_reuse_says_that_a_study_with_nothing_left_trains_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    real_engine: Callable[[Engine], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_inline_demo(monkeypatch, tmp_path)
    real_engine(synthetic_engine())
    ledger = study_folder(load_study("demo.yaml")).ledger
    assert not ledger.exists()
    said: list[bool] = []
    recorded: list[bytes] = []
    for options in (("--no-reuse",), (), ("--no-reuse",)):
        assert call(["run", "demo.yaml", *options]) == 0
        said.append(NOTHING_LEFT in " ".join(capsys.readouterr().err.split()))
        recorded.append(ledger.read_bytes())
    assert said == [False, False, True]
    assert len(set(recorded)) == 1


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe\x00", b'{"machine": "m", "of_a_later_version": 1}']
)
def test_a_broken_calibration_costs_a_finished_study_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    real_engine: Callable[[Engine], None],
    capsys: pytest.CaptureFixture[str],
    content: bytes,
) -> None:
    """The original bug: it ended the study behind its last training, before the report."""
    write_inline_demo(monkeypatch, tmp_path)
    real_engine(synthetic_engine())
    calibration = tmp_path / "runs" / "calibration.json"
    calibration.parent.mkdir()
    calibration.write_bytes(content)
    assert call(["run", "demo.yaml"]) == 0
    said = capsys.readouterr().err
    assert f"was not recorded for the next plan: {calibration}: not a calibration" in said
    folder = study_folder(load_study("demo.yaml"))
    assert folder.report.is_file()
    assert folder.verdict.is_file()
    assert json.loads(folder.manifest.read_text())["finished"]
    assert calibration.read_bytes() == content
