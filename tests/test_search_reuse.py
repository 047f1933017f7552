"""Search runs that another study has trained are taken from its ledger, and only then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic import LAYERS, Behaviour, engine, inline, make_setting, make_study

from aqn_tune.cli.run import write_study
from aqn_tune.cli.status import study_status
from aqn_tune.confirm.runner import run_confirm
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.broken import BROKE_OFF
from aqn_tune.ledger.rows import TrainingRow
from aqn_tune.report.loading import load_results
from aqn_tune.report.manifest import write_manifest
from aqn_tune.report.record_tables import cost_table
from aqn_tune.report.summary import summary_text
from aqn_tune.report.verdict_file import verdict_content
from aqn_tune.search.donors import find_donors
from aqn_tune.search.shelf import Shelf, _alike_in_every_pack
from aqn_tune.study.cells import stage_cells
from aqn_tune.study.code import hardware
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.schema import Study
from aqn_tune.study.sweep import resolve_scenarios

CONTROLS = 12
"""Six controls, two search seeds."""


def study_of(root: Path, name: str = "mine", **changes: Any) -> Study:
    """Return a small study; those of one seed have their controls in common."""
    return make_study(root, study=name, **{"search": {"configs": 2}, **changes})


def search(study: Study, *, log: Path | None = None) -> tuple[Ledger, list[str]]:
    """Run the search as `aqn-tune run` does, without Ray; return the ledger and what was announced."""
    from aqn_tune.search.runner import run_search

    folder, setting = study_folder(study), make_setting(study)
    write_study(study, folder)
    write_manifest(folder, study, setting)
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aqn_tune.search.runner.execute", inline)
        run_search(
            study, setting, resolve_scenarios(study), folder, layer_count=LAYERS,
            engine=engine(Behaviour(log=str(log or ""))), announce=said.append,
        )  # fmt: skip
    return Ledger(folder.ledger), said


def confirm(study: Study) -> Ledger:
    folder = study_folder(study)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aqn_tune.confirm.runner.execute", inline)
        run_confirm(
            study, make_setting(study), resolve_scenarios(study), folder, layer_count=LAYERS,
            engine=engine(),
        )  # fmt: skip
    return Ledger(folder.ledger)


def sources(ledger: Ledger, stage: str = "search") -> list[str]:
    """Return where each training of the controls came from, "" for trained here."""
    keys = {c.training_key for c in ledger.cells.values() if c.stage == stage and not c.config}
    return [ledger.trainings[key].source for key in sorted(keys)]


def bare(ledger: Ledger) -> dict[Any, dict[str, Any]]:
    """Return every number of a ledger, without who trained it and where."""
    aside = {"source", "pack", "pack_size", "lockstep", "seconds"}
    rows: dict[Any, Any] = {**ledger.evaluations, **ledger.rungs, **ledger.mechanism}
    return {key: row.model_dump(exclude=aside) for key, row in rows.items()}


@pytest.fixture
def donor(tmp_path: Path) -> tuple[Study, StudyFolder]:
    study = study_of(tmp_path / "runs", "donor")
    search(study)
    return study, study_folder(study)


Donated = tuple[Study, StudyFolder]


# -- what is taken ---------------------------------------------------------------------------------


def test_controls_of_another_study_are_taken_and_say_where_from(
    donor: Donated, tmp_path: Path
) -> None:
    timed = {"seconds": 9.0, "eval_seconds": 3.0, "generate_seconds": 2.0, "compile_seconds": 1.0}
    edit_rows(lambda row: row["kind"] == "training", timed)(donor[1])
    mine = study_of(tmp_path / "runs", confirm={"alpha": 0.01})
    log = tmp_path / "log"
    ledger, said = search(mine, log=log)
    assert not [line for line in log.read_text().splitlines() if line.startswith("control")]
    assert log.read_text().startswith("base 0 "), "the untrained base is evaluated in every study"
    name = donor[1].root.name
    assert set(sources(ledger)) == {f"{name}/control000", f"{name}/control001"}
    taken = [row for row in ledger.trainings.values() if row.source]
    assert len(taken) >= CONTROLS
    spent = {tuple(getattr(row, name) for name in timed) for row in taken}
    assert spent == {(0.0, 0.0, 0.0, 0.0)}, "it was not spent here"
    assert said[0] == f"{CONTROLS} trainings reused from {name}"
    assert all(
        row.source for row in ledger.evaluations.values() if row.training_key == taken[0].training_key
        and row.step
    )  # fmt: skip


def test_what_is_taken_is_what_training_gives(donor: Donated, tmp_path: Path) -> None:
    """The same study trained where there is nothing to take has the same numbers, row by row."""
    changes: dict[str, Any] = {"confirm": {"alpha": 0.01}}
    taken, _ = search(study_of(tmp_path / "runs", **changes))
    trained, _ = search(study_of(tmp_path / "elsewhere", **changes))
    assert any(sources(taken))
    assert not any(sources(trained))
    assert bare(taken) == bare(trained)
    assert taken.search == trained.search
    assert taken.cells == trained.cells


def test_configs_of_another_study_are_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    """The same space and seed ask the same configs. Those that ASHA stopped there are trained here."""
    spec: dict[str, Any] = {"search": {"configs": 6}}
    theirs, _ = search(study_of(tmp_path / "runs", "donor", **spec))
    ended = {row.config: row.event for row in theirs.search if row.event in ("finished", "stopped")}
    assert set(ended.values()) == {"finished", "stopped"}
    ledger, _ = search(study_of(tmp_path / "runs", confirm={"alpha": 0.01}, **spec))
    for config, event in ended.items():
        keys = {c.training_key for c in ledger.cells.values() if c.config == config}
        found = {bool(ledger.trainings[key].source) for key in keys}
        assert found == {event == "finished"}, (config, event)


def test_a_config_with_a_seed_that_the_other_study_lacks_is_trained(
    donor: Donated, tmp_path: Path
) -> None:
    mine = study_of(tmp_path / "runs", search={"configs": 2, "replicates": 3})
    ledger, said = search(mine)
    assert said[0].startswith(f"{CONTROLS} trainings reused"), "of 18: two seeds of three"
    configs = {c.training_key for c in ledger.cells.values() if c.config}
    assert not any(ledger.trainings[key].source for key in configs)


@pytest.mark.parametrize(
    ("rungs", "taken"),
    [
        ((0.25, 0.5, 1.0), True),
        # rungs that the other study has passed on its way
        ((0.25, 1.0), True),
        ((1.0,), True),
        # one at which it was not evaluated
        ((0.25, 0.75, 1.0), False),
    ],
)
def test_every_rung_has_to_be_there(
    donor: Donated, tmp_path: Path, rungs: tuple[float, ...], taken: bool
) -> None:
    spec = {"configs": 1, "rungs": rungs}
    ledger, _ = search(study_of(tmp_path / "runs", search=spec))
    assert all(map(bool, sources(ledger))) is taken
    assert any(sources(ledger)) is taken
    alone, _ = search(study_of(tmp_path / "elsewhere", search=spec))
    assert bare(ledger) == bare(alone), "losses are those since the rung before, here"


def test_a_scenario_may_have_another_name(donor: Donated, tmp_path: Path) -> None:
    """What an evaluation depends on is its device; rows are renamed when they are taken."""
    mine = study_of(tmp_path / "runs", sweep={"faults.0.threshold": [0.1]})
    (scenario,) = resolve_scenarios(mine)
    assert scenario.name != "both"
    ledger, _ = search(mine)
    assert all(sources(ledger))
    theirs = Ledger(donor[1].ledger)
    key = ledger.cells["search", 0, scenario.name, "targeted", 0].training_key
    here = ledger.evaluation(key, 20, "faulty", scenario.name, "validation")
    there = theirs.evaluation(key, 20, "faulty", "both", "validation")
    assert here is not None
    assert there is not None
    assert (here.loss, here.faults) == (there.loss, there.faults)


def test_a_second_taker_names_the_study_that_trained(donor: Donated, tmp_path: Path) -> None:
    search(study_of(tmp_path / "runs", "between"))
    shutil.rmtree(donor[1].root)
    ledger, _ = search(study_of(tmp_path / "runs"))
    assert {source.partition("/")[0] for source in sources(ledger)} == {donor[1].root.name}


def test_confirm_runs_are_never_taken(donor: Donated, tmp_path: Path) -> None:
    """Two studies of one seed have their confirm seeds in common, and each trains its own."""
    confirm(donor[0])
    mine = study_of(tmp_path / "runs")
    search(mine)
    ledger = confirm(mine)
    theirs = Ledger(donor[1].ledger)
    confirmed = {c.training_key for c in ledger.cells.values() if c.stage == "confirm"}
    assert confirmed & theirs.trainings.keys()
    assert not any(ledger.trainings[key].source for key in confirmed)


def test_a_study_that_continues_takes_nothing_again(donor: Donated, tmp_path: Path) -> None:
    mine = study_of(tmp_path / "runs")
    search(mine)
    before = study_folder(mine).ledger.read_bytes()
    _, said = search(mine)
    assert study_folder(mine).ledger.read_bytes() == before
    assert said == []


def test_what_was_taken_is_counted(donor: Donated, tmp_path: Path) -> None:
    mine = study_of(tmp_path / "runs", sweep={"faults.0.threshold": [0.1, 0.2]})
    ledger, _ = search(mine)
    name = donor[1].root.name
    number = len([row for row in ledger.trainings.values() if row.source])
    assert number == CONTROLS - 2, "the clean arm was not evaluated under the second threshold"
    folder = study_folder(mine)
    assert study_status(mine, folder)["reused"] == {name: number}
    results = load_results(folder)
    assert f"{number} trainings reused from {name}" in summary_text(folder)
    assert verdict_content(results)["reused"] == {name: number}
    table = cost_table(results)
    assert any(f"{number} trainings of the search came from {name}" in n for n in table.notes)
    trained = [row for row in ledger.trainings.values() if not row.source]
    assert table.rows[0][2] == f"{len(trained)}", "what was taken cost nothing"


# -- what is not taken -----------------------------------------------------------------------------


def edit_manifest(**changes: Any) -> Callable[[StudyFolder], None]:
    def edit(folder: StudyFolder) -> None:
        content = json.loads(folder.manifest.read_text())
        content["starts"][0].update(changes)
        folder.manifest.write_text(json.dumps(content))

    return edit


def edit_rows(
    wanted: Callable[[dict[str, Any]], bool], change: dict[str, Any] | None
) -> Callable[[StudyFolder], None]:
    """Return an edit that changes the ledger rows that are wanted, or drops them."""

    def edit(folder: StudyFolder) -> None:
        lines = []
        for line in folder.ledger.read_text().splitlines():
            row = json.loads(line)
            if wanted(row):
                if change is None:
                    continue
                row.update(change)
            lines.append(json.dumps(row))
        folder.ledger.write_text("\n".join(lines) + "\n")

    return edit


def is_last(row: dict[str, Any]) -> bool:
    return row["kind"] == "training" and row["step_reached"] == 20


def is_evaluation(step: int, condition: str) -> Callable[[dict[str, Any]], bool]:
    def wanted(row: dict[str, Any]) -> bool:
        return row["kind"] == "evaluation" and (row["step"], row["condition"]) == (step, condition)

    return wanted


def move(name: str) -> Callable[[StudyFolder], None]:
    return lambda folder: (folder.root.rename(folder.root.with_name(name)), None)[1]


def write(name: str, text: str, *, more: bool = False) -> Callable[[StudyFolder], None]:
    def edit(folder: StudyFolder) -> None:
        path = folder.root / name
        path.write_text(path.read_text() + text if more else text)

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        # another code, another machine, or not known which
        (edit_manifest(code_hash="0" * 16), ""),
        (edit_manifest(hardware="0" * 16), ""),
        (edit_manifest(hardware=""), ""),
        (lambda folder: folder.manifest.unlink(), ""),
        (write("manifest.json", '{"study": "donor", "study_hash": "", "starts": []}'), ""),
        # not the folder of a study any more
        (move("donor-12345678.old-1"), ""),
        (move("copy"), ""),
        # trainings that are no number
        (edit_rows(is_last, None), ""),
        (edit_rows(is_last, {"status": "unfinished"}), ""),
        (edit_rows(is_last, {"status": "failed", "error": "loss is not finite"}), ""),
        (edit_rows(is_last, {"status": "failed", "error": BROKE_OFF + "killed"}), ""),
        (edit_rows(is_last, {"stage": "confirm"}), ""),
        (edit_rows(is_last, {"step_reached": 19}), ""),
        (edit_rows(is_last, {"train_losses": [1.0]}), ""),
        (edit_rows(lambda row: row["kind"] == "training" and row["step_reached"] == 5, None), ""),
        # evaluations that are missing or of something else
        (edit_rows(is_evaluation(20, "faulty"), None), ""),
        (edit_rows(is_evaluation(5, "clean"), None), ""),
        (edit_rows(is_evaluation(10, "faulty"), {"split": "test"}), ""),
        (edit_rows(is_evaluation(20, "faulty"), {"rows": 255}), ""),
        (edit_rows(is_evaluation(20, "faulty"), {"draws": 2}), ""),
        (edit_rows(is_evaluation(20, "clean"), {"final": False}), ""),
        (edit_rows(is_evaluation(20, "faulty"), {"scenario": "other"}), ""),
        # files that cannot be read: said, and no reason to stop
        (write("ledger.jsonl", "{broken\n", more=True), "ledger.jsonl, line "),
        (write("ledger.jsonl", '{"kind": "invented"}\n', more=True), "not a ledger row"),
        (write("manifest.json", "{"), "cannot be read"),
        (write("manifest.json", "[]"), "cannot be read"),
        (write("manifest.json", '{"study": 3}'), "cannot be read"),
        (edit_manifest(hardware=["x86"]), "cannot be read"),
        (write("study.yaml", "a: [1"), "cannot be read"),
        (write("study.yaml", "\nunknown_key: 1\n", more=True), "cannot be read"),
        (write("study.yaml", "\nseed: 8\n", more=True), "study.yaml is not the study of"),
        (lambda folder: folder.study.unlink(), "cannot be read"),
    ],
)  # fmt: skip
def test_a_folder_that_nothing_is_taken_from(
    donor: Donated, tmp_path: Path, edit: Callable[[StudyFolder], None], said: str
) -> None:
    edit(donor[1])
    ledger, announced = search(study_of(tmp_path / "runs"))
    assert not any(sources(ledger))
    assert not [row for row in ledger.trainings.values() if row.source]
    assert {row.status for row in ledger.trainings.values()} <= {"finished", "unfinished"}
    if said:
        (line,) = announced
        assert said in line
        assert line.endswith("none of its trainings is reused")
        assert line.startswith(f"{donor[1].root.name}: ")
    else:
        assert announced == []


def test_a_line_that_is_being_written_is_no_corrupt_ledger(donor: Donated, tmp_path: Path) -> None:
    """A study that runs at the same time is read as far as it has come."""
    with donor[1].ledger.open("a") as file:
        file.write('{"kind": "train')
    ledger, _ = search(study_of(tmp_path / "runs"))
    assert all(sources(ledger))


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        # what does not enter the numbers of the search
        ({"description": "other words"}, True),
        ({"confirm": {"replicates": 7, "alpha": 0.1}}, True),
        ({"arms": {"wide": {"rank": 16}}}, True),
        ({"compute": {"pack_replicas": 3}}, True),
        # what does
        ({"seed": 8}, False),
        ({"eval_batch_size": 32}, False),
        ({"task": {"kind": "word_problems", "train_rows": 100}}, False),
        ({"task": {"kind": "word_problems", "validation_rows": 128}}, False),
        ({"training": {"learning_rate": 1e-4}}, False),
        ({"training": {"steps": 24}}, False),
        ({"scenario": {"faults": [{"kind": "dead_zone", "threshold": 0.2, "layers": [10]}],
                       "during": "eval"}}, False),
        ({"scenario": {"deploy": "merged"}}, False),
        # where the last bit is not the same everywhere
        ({"compute": {"gpus_per_worker": 0.5}}, False),
        ({"compute": {"address": "auto"}}, False),
        # and where it is not wanted
        ({"compute": {"reuse": False}}, False),
    ],
)  # fmt: skip
def test_what_a_study_may_differ_in(
    donor: Donated, tmp_path: Path, changes: dict[str, Any], taken: bool
) -> None:
    ledger, _ = search(study_of(tmp_path / "runs", **changes))
    found = [
        ledger.trainings[cell.training_key].source
        for cell in ledger.cells.values()
        if not cell.config and cell.arm != "wide"
    ]
    assert all(map(bool, found)) is taken
    assert any(found) is taken


def test_observed_steps_have_to_be_there(tmp_path: Path) -> None:
    """Planted: a study that looks at steps which the other one has not looked at."""
    from aqn_tune.ledger.rows import MechanismRow

    plain, looking = study_of(tmp_path / "a", "donor"), {"mechanism": {"steps": [0, 7]}}
    search(plain)
    assert not any(sources(search(study_of(tmp_path / "a", **looking))[0]))
    folder = study_folder(study_of(tmp_path / "a", "mine", **looking))
    shutil.rmtree(folder.root)
    donor = study_of(tmp_path / "a", "donor2", **looking)
    ledger, _ = search(donor)
    shutil.rmtree(study_folder(plain).root)
    seen = [
        MechanismRow(training_key=key, step=step, layers=(), sites=())
        for key in ledger.trainings
        for step in (0, 7)
    ]
    ledger.append(seen)
    taken, _ = search(study_of(tmp_path / "a", "mine", **looking))
    assert all(sources(taken))
    assert all(row.source for row in taken.mechanism.values())
    keys = {c.training_key for c in taken.cells.values() if not c.config}
    assert {key for key in taken.mechanism if key[0] in keys} == {
        (key, step) for key in keys for step in (0, 7)
    }
    assert all(sources(search(study_of(tmp_path / "a", "third"))[0])), "none asked, none needed"


def test_a_control_that_was_begun_here_is_finished_here(donor: Donated, tmp_path: Path) -> None:
    mine = study_of(tmp_path / "runs")
    folder, setting = study_folder(mine), make_setting(mine)
    cells = stage_cells(mine, setting, resolve_scenarios(mine), stage="search", layer_count=LAYERS)
    begun = cells.cells[3]
    Ledger(folder.ledger).append(
        [
            TrainingRow(
                training_key=begun.training_key, stage="search", seed=begun.run.seed, steps=20,
                step_reached=0, status="failed", error=BROKE_OFF + "killed", seconds=0.0, pack="p",
                pack_size=1,
            )
        ]
    )  # fmt: skip
    ledger, _ = search(mine)
    assert ledger.trainings[begun.training_key].source == ""
    assert ledger.trainings[begun.training_key].status == "finished"
    assert sum(map(bool, sources(ledger))) == CONTROLS - 1


def test_what_is_to_be_exported_is_trained(donor: Donated, tmp_path: Path) -> None:
    from aqn_tune.search.record import Recorder
    from aqn_tune.search.runner import control_packs, take_over
    from aqn_tune.search.shelf import open_shelf

    mine = study_of(tmp_path / "runs")
    folder, setting = study_folder(mine), make_setting(mine)
    recorder = Recorder(Ledger(folder.ledger), folder.root)
    packs = control_packs(mine, setting, resolve_scenarios(mine), recorder, layer_count=LAYERS)
    key = packs[1].runs[0].training_key(setting)
    exporting = packs[1].model_copy(update={"export": {key: str(tmp_path / "adapter")}})
    shelf = open_shelf(mine, folder, layer_count=LAYERS, rounds_alike=lambda: True, announce=None)
    take_over((packs[0], exporting, *packs[2:]), shelf, setting, recorder)
    assert key not in recorder.ledger.trainings
    assert len(recorder.ledger.trainings) == CONTROLS - 1


@pytest.mark.parametrize(
    ("training", "eval_batch", "rows", "alike"),
    [
        ({}, 64, 256, True),
        ({}, 64, 250, True),
        ({}, 64, 255, False),
        ({}, 33, 256, False),
        ({"batch_size": 15}, 64, 256, False),
        ({"batch_size": 6, "gradient_accumulation_steps": 2}, 64, 256, False),
        ({"batch_size": 8, "gradient_accumulation_steps": 2}, 64, 256, True),
        ({"max_length": 60}, 64, 256, False),
        ({"compile": True}, 64, 256, False),
    ],
)
def test_packs_round_alike_in_even_shapes_only(
    tmp_path: Path, training: dict[str, Any], eval_batch: int, rows: int, alike: bool
) -> None:
    mine = study_of(tmp_path, training=training)
    setting = make_setting(mine)
    cells = stage_cells(mine, setting, resolve_scenarios(mine), stage="search", layer_count=LAYERS)
    assert _alike_in_every_pack(cells.cells[0].run, eval_batch, rows) is alike


def test_studies_whose_packs_round_differently_take_nothing(tmp_path: Path) -> None:
    odd: dict[str, Any] = {"eval_batch_size": 33}
    search(study_of(tmp_path, "donor", **odd))
    assert not any(sources(search(study_of(tmp_path, **odd))[0]))


def test_nothing_is_taken_where_a_training_depends_on_its_pack(
    donor: Donated, tmp_path: Path
) -> None:
    from aqn_tune.search.runner import run_search

    made = engine()._replace(rounds_alike=lambda setting, training, most: False)
    mine = study_of(tmp_path / "runs")
    folder, setting = study_folder(mine), make_setting(mine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aqn_tune.search.runner.execute", inline)
        run_search(mine, setting, resolve_scenarios(mine), folder, layer_count=LAYERS, engine=made)
    assert not any(sources(Ledger(folder.ledger)))


def test_an_empty_shelf_survives_pickling(donor: Donated, tmp_path: Path) -> None:
    import pickle

    mine = study_of(tmp_path / "runs")
    shelf = Shelf(lambda: find_donors(mine, study_folder(mine), layer_count=28, announce=print))
    copy = pickle.loads(pickle.dumps(shelf))
    setting = make_setting(mine)
    cells = stage_cells(mine, setting, resolve_scenarios(mine), stage="search", layer_count=LAYERS)
    assert copy.find(cells.cells[0].training_key, cells.cells[0].run, (20,)) is None


def test_the_hardware_is_known_on_this_machine_alone(tmp_path: Path) -> None:
    compute = study_of(tmp_path).compute
    assert len(hardware(compute)) == 16
    assert hardware(compute.model_copy(update={"address": "auto"})) == ""
    assert hardware(compute.model_copy(update={"gpus_per_worker": 1.0})) == ""


def test_the_study_file_of_a_folder_reads_back(donor: Donated) -> None:
    assert Study.model_validate(yaml.safe_load(donor[1].study.read_text())) == donor[0]
