"""What a locked generation is never exposed to: a moving search, lost runs, other code, other folders."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from synthetic import LAYERS, SPACE, make_setting, make_study
from synthetic import engine as synthetic_engine

from aqn_tune.cli.app import main
from aqn_tune.cli.run import write_study
from aqn_tune.confirm.lock import read_locks
from aqn_tune.confirm.measured import search_gain
from aqn_tune.confirm.runner import run_confirm
from aqn_tune.errors import UserError
from aqn_tune.ledger import Ledger
from aqn_tune.report.loading import load_results
from aqn_tune.report.write import write_report
from aqn_tune.search.execute import check_done, execute
from aqn_tune.search.runner import run_search, search_left
from aqn_tune.search.work import Work
from aqn_tune.study.engine import Engine, RungReport
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.loading import load_study
from aqn_tune.study.runs import Pack, Setting
from aqn_tune.study.schema import Study
from aqn_tune.study.sweep import resolve_scenarios

Execute = Callable[..., None]


def inline(*, breaks: tuple[str, ...] = (), stage: str = "", runs: int = 1000) -> Execute:
    """Return a stand-in for `execute` in which packs named so break off, in one stage.

    Only `runs` packs are run; the rest is left, as by an interruption that nobody noticed.
    """

    def run(work: Work, *, setting: Setting, engine: Engine, stage: str = "", **rest: Any) -> None:
        shared = engine.load(setting, rest["split"], rest["max_length"])
        for _ in range(runs):
            pack = work.next_pack()
            if pack is None:
                return
            if stage == where and pack.name.startswith(breaks):
                work.broke(pack, "its worker died 3 times")
                continue
            training = engine.open_pack(pack, setting, shared)
            while work.arrived(pack, training.advance()):
                pass

    where = stage
    return run


def search(study: Study, how: Execute | None = None) -> StudyFolder:
    """Run the search of a study without Ray."""
    folder = study_folder(study)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aqn_tune.search.runner.execute", how or inline())
        run_search(
            study, make_setting(study), resolve_scenarios(study), folder,
            layer_count=LAYERS, engine=synthetic_engine(),
        )  # fmt: skip
    return folder


def confirm(study: Study, how: Execute | None = None, **more: Any) -> Ledger:
    """Run the confirmation of a study without Ray."""
    folder = study_folder(study)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aqn_tune.confirm.runner.execute", how or inline())
        run_confirm(
            study, make_setting(study), resolve_scenarios(study), folder,
            layer_count=LAYERS, engine=synthetic_engine(), **more,
        )  # fmt: skip
    return Ledger(folder.ledger)


def left(study: Study) -> tuple[str, ...]:
    """Return what the search has left."""
    folder, scenarios = study_folder(study), resolve_scenarios(study)
    return search_left(study, make_setting(study), scenarios, folder, layer_count=LAYERS)


def raised(study: Study, generation: int) -> Study:
    """Return `study` with another generation of confirm seeds."""
    confirmation = study.confirm.model_copy(update={"generation": generation})
    return study.model_copy(update={"confirm": confirmation})


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = make_study(tmp_path, search={"configs": 3}, compute={"pack_replicas": 4})
    write_study(study, study_folder(study))
    return study


# -- the lock and the search -----------------------------------------------------------------------


def test_a_control_tried_again_does_not_move_what_is_locked(study: Study) -> None:
    """The original bug: a search control that is run again changes G, and the study locks itself out."""
    folder = search(study)
    confirm(study, inline(runs=2))
    (held,) = read_locks(folder.lock).generations
    ledger = Ledger(folder.ledger)
    clean = ledger.cells["search", 0, "both", "clean", 0].training_key
    old = ledger.evaluation(clean, 20, "clean", "", "validation")
    assert old is not None
    assert old.loss is not None
    ledger.append([old.model_copy(update={"loss": old.loss + 0.5})])
    now = search_gain(Ledger(folder.ledger), study, resolve_scenarios(study))
    assert held.gain is not None
    assert now == pytest.approx(held.gain - 0.25), "what an unchanged study would be refused for"
    confirm(study)
    assert read_locks(folder.lock).generations == (held,)
    assert load_results(folder).makes_claims


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (inline(breaks=("control001",), stage="search"), "control pack control001 broke off: its"),
        (inline(breaks=("base",), stage="search"), "the untrained base has not been evaluated"),
        (inline(runs=6), "of 3 configs of both"),
        (inline(runs=2), "control pack control002 is not finished"),
    ],
)
def test_nothing_is_locked_before_the_search_is_complete(
    study: Study, how: Execute, said: str
) -> None:
    folder = search(study, how)
    before = folder.ledger.read_bytes()
    assert any(said in one for one in left(study))
    with pytest.raises(UserError, match=r"search is not complete.*run the study again") as caught:
        confirm(study)
    assert said in str(caught.value)
    assert not folder.lock.exists()
    assert folder.ledger.read_bytes() == before
    search(study)
    assert left(study) == ()
    confirm(study)
    assert load_results(folder).makes_claims


def test_a_config_that_broke_off_has_failed_and_leaves_the_search_complete(study: Study) -> None:
    search(study, inline(breaks=("both-c001",), stage="search"))
    assert left(study) == ()


def _without(folder: StudyFolder, drop: Callable[[dict[str, Any]], bool]) -> None:
    lines = folder.ledger.read_text().splitlines(keepends=True)
    folder.ledger.write_text("".join(line for line in lines if not drop(json.loads(line))))


def test_the_gain_is_never_a_mean_over_the_seeds_that_survived(study: Study) -> None:
    folder = search(study)
    scenarios = resolve_scenarios(study)
    whole = folder.ledger.read_text()
    ledger = Ledger(folder.ledger)
    assert search_gain(ledger, study, scenarios) is not None
    lost = ledger.cells["search", 0, "both", "clean", 1].training_key
    _without(folder, lambda row: row["kind"] == "evaluation" and row["training_key"] == lost)
    with pytest.raises(UserError, match="seed 1 of the clean arm has no loss"):
        search_gain(Ledger(folder.ledger), study, scenarios)
    folder.ledger.write_text(whole)
    failed = ledger.trainings[lost].model_copy(update={"status": "failed", "error": "not finite"})
    Ledger(folder.ledger).append([failed])
    with pytest.raises(UserError, match=r"seed 1 of the clean arm has no loss \(not finite\)"):
        confirm(study)
    assert not folder.lock.exists()
    folder.ledger.write_text(whole)
    _without(folder, lambda row: row["kind"] == "evaluation" and row["step"] == 0)
    with pytest.raises(UserError, match="untrained base has no finite clean loss"):
        search_gain(Ledger(folder.ledger), study, scenarios)


def test_a_stage_that_ends_with_work_left_is_an_error(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a Ray that comes back without having run anything."""
    from ray import tune

    class Tuner:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def fit(self) -> None: ...

    monkeypatch.setattr("aqn_tune.search.execute.ray_session", lambda _: nullcontext())
    monkeypatch.setattr(tune, "Tuner", Tuner)
    monkeypatch.setattr(tune, "with_parameters", lambda trainable, **_: trainable)
    monkeypatch.setattr(tune, "with_resources", lambda trainable, _: trainable)
    with pytest.raises(
        RuntimeError, match=r"the search came to an end with \d+ of \d+ trials left"
    ):
        search(study, execute)


def test_work_that_failed_is_not_left(study: Study) -> None:
    works: list[Work] = []

    def keep(work: Work, **rest: Any) -> None:
        works.append(work)
        inline(breaks=("control",), stage="search")(work, **rest)

    search(study, keep)
    check_done(works[0], "search")


# -- runs that broke off ---------------------------------------------------------------------------


def test_a_run_that_broke_off_is_a_gap_until_it_has_ended(study: Study) -> None:
    folder = search(study)
    confirm(study, inline(breaks=("g0-001",), stage="confirm"))
    results = load_results(folder)
    assert not results.makes_claims
    assert any("broke off and will be tried again" in gap for gap in results.gaps)
    assert write_report(folder).verdict is None
    assert not folder.verdict.exists()
    confirm(study)
    assert load_results(folder).makes_claims
    assert write_report(folder).verdict == folder.verdict


def test_a_run_that_failed_on_its_own_account_is_no_gap(study: Study) -> None:
    folder = search(study)
    ledger = confirm(study)
    key = ledger.cells["confirm", 0, "both", "random", 3].training_key
    row = ledger.trainings[key]
    ledger.append([row.model_copy(update={"status": "failed", "error": "loss is not finite"})])
    assert load_results(folder).makes_claims
    size = folder.ledger.stat().st_size
    confirm(study)
    assert folder.ledger.stat().st_size == size, "and it is not tried again"


@pytest.mark.parametrize("kept", [0, 1])
def test_a_base_that_was_not_evaluated_everywhere_is_a_gap(study: Study, kept: int) -> None:
    folder = search(study)
    confirm(study)

    def drop(row: dict[str, Any]) -> bool:
        base = row["kind"] == "evaluation" and row["step"] == 0 and row["split"] == "test"
        return base and (not kept or row["condition"] == "faulty")

    _without(folder, drop)
    assert load_results(folder).gaps == (
        "The untrained base has not been evaluated on the test split.",
    )
    confirm(study)
    assert load_results(folder).makes_claims


def test_nothing_of_a_generation_is_run_once_its_verdicts_are_written(study: Study) -> None:
    folder = search(study)
    ledger = confirm(study)
    write_report(folder)
    key = ledger.cells["confirm", 0, "both", "targeted", 2].training_key
    _without(folder, lambda row: row.get("training_key") == key and row["kind"] == "training")
    before = folder.ledger.read_bytes()
    with pytest.raises(UserError, match="A generation is not run again once its verdicts"):
        confirm(study)
    assert folder.ledger.read_bytes() == before
    confirm(raised(study, 1))  # fresh seeds are not concerned


def test_the_verdicts_of_another_generation_excuse_no_other_code(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original bug: with any verdict.json, a generation half done was silently left at that."""
    folder = search(study)
    confirm(study)
    write_report(folder)
    second = raised(study, 1)
    confirm(second, inline(runs=2))
    monkeypatch.setattr("aqn_tune.confirm.lock.code_hash", lambda: "another")
    with pytest.raises(UserError, match="cannot mix two versions"):
        confirm(second)
    confirm(study)  # the first one has ended: any code may report it


# -- folders that do not belong together -----------------------------------------------------------


def test_a_lock_of_another_study_is_not_reported(study: Study, tmp_path: Path) -> None:
    folder = search(study)
    confirm(study)
    other = make_study(tmp_path / "other", search={"configs": 3}, confirm={"alpha": 0.2})
    write_study(other, folder)
    with pytest.raises(
        UserError, match=r"another study than study\.yaml.*alpha: locked 0\.05, now 0\.2"
    ):
        load_results(folder)


@pytest.mark.parametrize(
    "change", [{"training_key": "0" * 16}, {"arm": "invented"}, {"replicate": 6}]
)
def test_cells_that_were_not_locked_are_not_reported(study: Study, change: dict[str, Any]) -> None:
    folder = search(study)
    ledger = confirm(study)
    row = ledger.cells["confirm", 0, "both", "targeted", 5]
    ledger.append([row.model_copy(update=change)])
    with pytest.raises(UserError, match="the ledger and the lock do not belong together"):
        load_results(folder)


# -- the command -----------------------------------------------------------------------------------

RUN = ("run", "planted.yaml")


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    code = stopped.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture
def planted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[StudyFolder, Callable[[Execute], None]]:
    """A study file, its folder, and a way to say how its stages are run."""
    import yaml

    module = types.ModuleType("aqn_tune.training.engine")
    module.ENGINE = synthetic_engine()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aqn_tune.training.engine", module)
    monkeypatch.setattr("aqn_tune.search.cluster.ray_session", lambda _: nullcontext())
    monkeypatch.chdir(tmp_path)
    content = {
        "study": "planted",
        "training": {"steps": 20, "warmup_steps": 2},
        "scenario": {"faults": [{"kind": "dead_zone", "layers": [10], "threshold": 0.2}]},
        "search": {"space": SPACE, "configs": 2, "replicates": 2},
        "confirm": {"finalists": 1, "replicates": 6},
    }
    Path("planted.yaml").write_text(yaml.safe_dump(content))

    def stages(how: Execute) -> None:
        monkeypatch.setattr("aqn_tune.search.runner.execute", how)
        monkeypatch.setattr("aqn_tune.confirm.runner.execute", how)

    stages(inline())
    return study_folder(load_study(Path("planted.yaml"))), stages


Planted = tuple[StudyFolder, Callable[[Execute], None]]


def picture(folder: StudyFolder) -> dict[str, bytes]:
    """Return every file of a folder."""
    files = (path for path in sorted(folder.root.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder.root)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("breaks", "reason"),
    [
        ("base", "The untrained base has not been evaluated on the test split."),
        ("g0-000", "broke off and will be tried again"),
    ],
)
def test_a_run_without_verdicts_says_so_and_exits_with_1(
    planted: Planted, capsys: pytest.CaptureFixture[str], breaks: str, reason: str
) -> None:
    folder, stages = planted
    stages(inline(breaks=(breaks,), stage="confirm"))
    assert call(*RUN) == 1
    said = capsys.readouterr().err
    assert f"confirm pack {breaks} broke off: its worker died 3 times" in said
    assert "the study ended without verdicts: " in said
    assert reason in said
    assert folder.report.exists()
    assert not folder.verdict.exists()
    stages(inline())
    assert call(*RUN, "-q") == 0
    assert folder.verdict.exists()


WHY = "evaluation audit: condition 'faulty' both declares 1 faults, 0 changed a value in 2 batches"


def without_a_base(split: str) -> Engine:
    """Return an engine to which no evaluation of the untrained base on a split is a number."""
    made = synthetic_engine()

    def open_pack(pack: Pack, *rest: Any) -> Any:
        training: Any = made.open_pack(pack, *rest)
        if pack.rungs == (0,) and pack.split == split:
            (row,) = training.advance().trainings
            failed = row.model_copy(update={"status": "failed", "error": WHY})
            training.advance = lambda: RungReport(0, (), (failed,))
        return training

    return made._replace(open_pack=open_pack)


def test_a_base_that_fails_ends_the_search_with_its_reason(
    planted: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    """The original bug: the whole search was run, and then it was said to run the study again."""
    folder, _ = planted
    sys.modules["aqn_tune.training.engine"].ENGINE = without_a_base("validation")  # type: ignore[attr-defined]
    for _ in range(2):
        assert call(*RUN, "-q") == 2
        said = capsys.readouterr().err
        assert f"error: the untrained base cannot be evaluated: {WHY}. It would fail again" in said
        assert not Ledger(folder.ledger).trainings, "nothing is trained for it"


def test_a_base_that_fails_in_the_confirmation_is_announced_with_its_reason(
    planted: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = planted
    sys.modules["aqn_tune.training.engine"].ENGINE = without_a_base("test")  # type: ignore[attr-defined]
    assert call(*RUN) == 1
    said = capsys.readouterr().err
    assert f"confirm pack base broke off: {WHY}" in said
    assert "The untrained base has not been evaluated on the test split." in said
    assert folder.report.exists()


def test_what_can_be_detected_is_printed_before_the_first_run(
    planted: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, stages = planted
    at_first_run: list[str] = []

    def look(work: Work, *, stage: str, **rest: Any) -> None:
        if stage == "confirm":
            at_first_run.append(capsys.readouterr().err)
        inline()(work, stage=stage, **rest)

    stages(look)
    assert call(*RUN) == 0
    (held,) = read_locks(folder.lock).generations
    assert f"both: {held.detectable[0].effect:.3g} nats per token" in at_first_run[0]
    assert call(*RUN, "-q", "--fresh") == 0
    assert at_first_run[1] == ""


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (inline(breaks=("control000",), stage="search"), "was last run with"),
        (inline(breaks=("g0-000",), stage="confirm"), "was locked with"),
    ],
)
def test_other_code_does_not_continue_and_leaves_the_folder_as_it_was(
    planted: Planted,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    how: Execute,
    message: str,
) -> None:
    folder, stages = planted
    stages(how)
    assert call(*RUN, "-q") in (1, 2)
    stages(inline())
    before = picture(folder)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("aqn_tune.study.code.code_hash", lambda: "another")
        patch.setattr("aqn_tune.confirm.lock.code_hash", lambda: "another")
        assert call(*RUN, "-q") == 2
        said = capsys.readouterr().err
        started = json.loads(folder.manifest.read_text())["starts"][-1]["code_hash"]
        assert all(part in said for part in (message, started, "another", "--fresh"))
        assert picture(folder) == before
    assert call(*RUN, "-q") == 0


def test_a_finished_study_is_reported_by_any_code_which_does_not_become_its_own(
    planted: Planted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planted: a report by other code, and then a generation that would mix the two."""
    folder, _ = planted
    assert call(*RUN, "-q") == 0
    manifest, ledger = folder.manifest.read_bytes(), folder.ledger.read_bytes()
    monkeypatch.setattr("aqn_tune.study.code.code_hash", lambda: "another")
    monkeypatch.setattr("aqn_tune.confirm.lock.code_hash", lambda: "another")
    monkeypatch.setattr("aqn_tune.report.manifest.code_hash", lambda: "another")
    assert call(*RUN, "-q") == 0
    assert (folder.manifest.read_bytes(), folder.ledger.read_bytes()) == (manifest, ledger)
    assert call(*RUN, "-q", "--set", "confirm.generation=1") == 2
    assert "was last run with" in capsys.readouterr().err
    folder.manifest.unlink()
    assert call(*RUN, "-q", "--set", "confirm.generation=1") == 2
    assert "it is not known which code" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("confirm.replicates=7", "replicates: locked 6, now 7"),
        ("lock", "a locked value was edited"),
        ("model", "is recorded with training"),
    ],
)
def test_a_refused_run_leaves_the_folder_byte_for_byte(
    planted: Planted,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
    message: str,
) -> None:
    """The original bug: study.yaml, the manifest and TensorBoard were written before the lock was read."""
    folder, stages = planted
    if change == "model":
        stages(inline(breaks=("control000",), stage="search"))
    assert call(*RUN, "-q") == (2 if change == "model" else 0)
    stages(inline())
    more: tuple[str, ...] = ()
    if change == "lock":
        folder.lock.write_text(folder.lock.read_text().replace('"alpha": 0.05', '"alpha": 0.1'))
    elif change == "model":
        monkeypatch.setattr("aqn_tune.models.locate.fingerprint", lambda _: "other files")
    else:
        more = ("--set", change)
    before = picture(folder)
    assert len(before) > 5
    capsys.readouterr()
    assert call(*RUN, "-q", *more) == 2
    assert message in capsys.readouterr().err
    assert picture(folder) == before
