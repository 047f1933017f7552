"""`--no-reuse` and `--pack`: every cell trains its own run, and every run alone; no number changes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic import LAYERS, Behaviour, engine, inline, inline_packs, make_setting, make_study

from aqn_tune.cli.run import write_study
from aqn_tune.cli.status import study_status
from aqn_tune.confirm.runner import run_confirm
from aqn_tune.errors import UserError
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import TrainingRow
from aqn_tune.report.loading import load_results
from aqn_tune.report.record_tables import cost_table
from aqn_tune.report.write import write_report
from aqn_tune.search.record import Recorder
from aqn_tune.search.runner import run_search, search_left
from aqn_tune.study.cells import resolve_run, stage_cells
from aqn_tune.study.folder import StudyFolder, study_folder, study_hash
from aqn_tune.study.packing import jobs_of, make_packs
from aqn_tune.study.runs import Pack
from aqn_tune.study.schema import Study
from aqn_tune.study.sweep import resolve_scenarios

SWEEP = {"during": ["both", "eval"], "faults.0.threshold": [0.1, 0.2]}
"""Four scenarios that share the clean arm, two of which share every arm."""
CELLS = 6 * 4 * 2
"""Controls x scenarios x search seeds."""
SHARED = (1 + 5 * 2 + 4) * 2
"""What they come to: clean, five arms under each threshold, and four that meet it at deployment."""


def study_of(root: Path, *, reuse: bool, **changes: Any) -> Study:
    compute = {"reuse": reuse, "pack_replicas": 4, **changes.pop("compute", {})}
    return make_study(
        root, **{"search": {"configs": 2}, "sweep": SWEEP, "compute": compute, **changes}
    )


def run(
    study: Study,
    stages: str = "search",
    *,
    how: Callable[..., None] = inline,
    behaviour: Behaviour | None = None,
) -> tuple[Ledger, list[Pack]]:
    """Run stages of a study without Ray; return the ledger and the packs that were handed out."""
    folder, setting = study_folder(study), make_setting(study)
    write_study(study, folder)
    packs: list[Pack] = []
    made = engine(behaviour or Behaviour())

    def open_pack(pack: Pack, *rest: Any) -> Any:
        packs.append(pack)
        return made.open_pack(pack, *rest)

    watched = made._replace(open_pack=open_pack)
    with pytest.MonkeyPatch.context() as patch:
        for stage, function in (("search", run_search), ("confirm", run_confirm)):
            if stage in stages:
                patch.setattr(f"aqn_tune.{stage}.runner.execute", how)
                function(
                    study, setting, resolve_scenarios(study), folder, layer_count=LAYERS,
                    engine=watched,
                )  # type: ignore[operator]  # fmt: skip
    return Ledger(folder.ledger), packs


def trained(packs: list[Pack]) -> int:
    """Return how many runs packs have trained."""
    return sum(len(pack.runs) for pack in packs if pack.rungs != (0,))


def numbers(ledger: Ledger) -> dict[str, Any]:
    """Return all that must not depend on who trained what in which pack."""
    aside = {"pack", "pack_size", "lockstep", "seconds", "adapter"}
    return {
        "evaluations": {key: row.model_dump() for key, row in ledger.evaluations.items()},
        "trainings": {key: row.model_dump(exclude=aside) for key, row in ledger.rungs.items()},
        "search": [row.model_dump() for row in ledger.search],
        "cells": {key: row.model_dump() for key, row in ledger.cells.items()},
    }


# -- jobs and packs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sweep", "cells", "shared"),
    [
        ({}, 12, 12),
        ({"faults.0.threshold": [0.1, 0.2, 0.5]}, 36, (1 + 15) * 2),
        ({"during": ["eval"], "faults.0.threshold": [0.1, 0.2, 0.5]}, 36, 5 * 2),
        (SWEEP, CELLS, SHARED),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 8])
def test_without_reuse_every_cell_has_a_run_of_its_own(
    tmp_path: Path, sweep: dict[str, Any], cells: int, shared: int, size: int
) -> None:
    study = study_of(tmp_path, reuse=True, sweep=sweep)
    found = stage_cells(
        study, make_setting(study), resolve_scenarios(study), stage="search", layer_count=LAYERS
    ).cells
    together, alone = (jobs_of(found, reuse=reuse) for reuse in (True, False))
    assert (len(together), len(alone)) == (shared, cells)
    assert {job.cell for job in together} == {""}
    assert [job.cell for job in alone] == [cell.name for cell in found]
    assert all(len(job.run.conditions) == 2 for job in alone), "clean, and its own scenario"
    assert {job.training_key for job in alone} == {job.training_key for job in together}
    for jobs in (together, alone):
        packs = make_packs(
            jobs, stage="search", prefix="p", size=size, rungs=(20,), split="validation"
        )
        assert sum(len(pack.runs) for pack in packs) == len(jobs)
        assert max(len(pack.runs) for pack in packs) <= size
        for pack in packs:
            keys = [run.training_key(make_setting(study)) for run in pack.runs]
            assert len(set(keys)) == len(keys), "rows name a run by its key alone"
            assert list(pack.own) == (keys if jobs is alone else [])
    assert sorted(cell for pack in packs for cell in pack.own.values()) == sorted(
        cell.name for cell in found
    )


# -- the search ------------------------------------------------------------------------------------


def test_the_search_comes_to_the_same_numbers_and_trains_every_cell(tmp_path: Path) -> None:
    with_reuse, packs = run(study_of(tmp_path / "a", reuse=True))
    without, more = run(study_of(tmp_path / "b", reuse=False))
    assert numbers(without) == numbers(with_reuse)
    configs = len({c.training_key for c in with_reuse.cells.values() if c.config})
    assert trained([p for p in packs if p.name.startswith("control")]) == SHARED
    assert trained([p for p in more if p.name.startswith("own-control")]) == CELLS
    assert configs
    named = Counter(row.cell for row in without.own_trainings.values())
    assert set(named) == {
        f"{c.stage}/{c.scenario}/{c.arm}/{c.replicate}" for c in without.cells.values()
    }
    assert not with_reuse.own_trainings
    again = without.repeated()
    assert again.trainings >= CELLS - SHARED
    assert again.steps >= (CELLS - SHARED) * 20
    assert again.seconds >= (CELLS - SHARED) * 3 * 0.01


def test_configs_that_are_known_trainings_are_trained_all_the_same(tmp_path: Path) -> None:
    space = {"dimensions": {"targeting": {"kind": "choice", "values": ["none", "global"]}}}
    changes: dict[str, Any] = {"search": {"space": space, "configs": 3}, "sweep": {}}
    shared, packs = run(study_of(tmp_path / "a", reuse=True, **changes))
    without, more = run(study_of(tmp_path / "b", reuse=False, **changes))
    assert not [pack for pack in packs if pack.name.startswith("both-c")]
    assert len([pack for pack in more if pack.name.startswith("both-c")]) == 3
    assert numbers(without) == numbers(shared)


@pytest.mark.parametrize("packs_before", [1, 2, 5, 12, 16, 18])
def test_an_interrupted_one_goes_on_with_the_cells_that_are_left(
    tmp_path: Path, packs_before: int
) -> None:
    study = study_of(tmp_path, reuse=False)
    _, first = run(study, how=inline_packs(packs_before))
    _, second = run(study)
    ledger, third = run(study)
    assert trained(first) + trained(second) == CELLS + sum(
        len(p.runs) for p in (*first, *second) if "-c0" in p.name
    )
    done = [cell for pack in (*first, *second) for cell in pack.own.values()]
    assert len(done) == len(set(done)), "no cell trains twice"
    assert third == []
    whole, _ = run(study_of(tmp_path / "whole", reuse=False))
    assert numbers(ledger) == numbers(whole)


def test_a_run_that_broke_off_is_tried_again_and_spoils_nothing(tmp_path: Path) -> None:
    study = study_of(tmp_path, reuse=False)
    folder = study_folder(study)
    ledger, _ = run(study, how=inline_packs(breaks="own-control005"))
    lost = CELLS - sum(cell.startswith("search/") and "/c0" not in cell and not row.error
                       for (_, cell), row in ledger.own_trainings.items())  # fmt: skip
    assert 0 < lost <= 4
    left = search_left(
        study, make_setting(study), resolve_scenarios(study), folder, layer_count=LAYERS
    )
    assert any("own-control005" in one for one in left)
    ledger, packs = run(study)
    assert trained(packs) == lost
    whole, _ = run(study_of(tmp_path / "whole", reuse=True))
    assert numbers(ledger)["evaluations"] == numbers(whole)["evaluations"]


@pytest.mark.parametrize("packs_before", [3, 1000])
def test_a_study_that_shared_before_is_trained_again_and_compared(
    tmp_path: Path, packs_before: int
) -> None:
    """It is the same folder: the two differ in no number."""
    shared, own = (study_of(tmp_path, reuse=reuse) for reuse in (True, False))
    assert study_hash(shared) == study_hash(own)
    run(shared, how=inline_packs(packs_before))
    ledger, packs = run(own)
    assert trained([p for p in packs if p.name.startswith("own-control")]) == CELLS
    whole, _ = run(study_of(tmp_path / "whole", reuse=True))
    assert numbers(ledger) == numbers(whole)
    _, packs = run(shared)
    assert packs == [], "and back again nothing is left"


# -- numbers that differ ---------------------------------------------------------------------------


def edit(folder: StudyFolder, wanted: dict[str, Any], change: dict[str, Any]) -> None:
    lines = []
    for line in folder.ledger.read_text().splitlines():
        row = json.loads(line)
        if all(row.get(key) == value for key, value in wanted.items()):
            row.update(change)
        lines.append(json.dumps(row))
    folder.ledger.write_text("\n".join(lines) + "\n")


FINAL = {"kind": "evaluation", "step": 20, "condition": "faulty"}
LAST = {"kind": "training", "step_reached": 20}


@pytest.mark.parametrize(
    ("wanted", "change", "said"),
    [
        (FINAL, {"loss": math.nextafter(1.5, 2.0)}, "loss: 1.5"),
        (FINAL, {"exact_match": 0.125}, "exact_match: 0.125 / "),
        (FINAL, {"faults": []}, "faults: "),
        ({**FINAL, "step": 5}, {"loss": None}, "loss: None / "),
        (LAST, {"train_losses": [1.0] * 10}, "train_losses: "),
        (LAST, {"status": "failed", "error": "loss is not finite"}, "status: failed / "),
        ({**LAST, "step_reached": 10}, {"seed": 3}, "seed: 3 / "),
    ],
)
def test_other_numbers_than_the_recorded_ones_name_the_cell(
    tmp_path: Path, wanted: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    shared, own = (study_of(tmp_path, reuse=reuse) for reuse in (True, False))
    ledger, _ = run(shared, how=inline_packs(1000))
    key = ledger.cells["search", 0, "both-threshold0.2", "global", 1].training_key
    folder = study_folder(shared)
    edit(folder, {**wanted, "training_key": key}, change)
    before = folder.ledger.read_text()
    with pytest.raises(
        UserError, match=r"^search/both-threshold0\.2/global/1: trained for itself"
    ) as caught:
        run(own)
    assert said in str(caught.value)
    assert key in str(caught.value)
    assert folder.ledger.read_text().startswith(before)
    now = Ledger(folder.ledger)
    own_row = now.own_trainings.get((key, "search/both-threshold0.2/global/1"))
    assert own_row is None or own_row.status == "unfinished"


def test_a_shared_study_does_not_look(tmp_path: Path) -> None:
    """What is recorded holds: nothing is trained that could differ from it."""
    shared = study_of(tmp_path, reuse=True)
    ledger, _ = run(shared)
    key = ledger.cells["search", 0, "both-threshold0.2", "global", 1].training_key
    edit(study_folder(shared), {**FINAL, "training_key": key}, {"exact_match": 0.125})
    _, packs = run(shared)
    assert packs == []


def _pack(study: Study, *, own: bool, name: str = "p") -> Pack:
    scenario = resolve_scenarios(study)[0]
    run = resolve_run(study, scenario, study.controls.arm("global"), seed=2, layer_count=LAYERS)
    key = run.training_key(make_setting(study))
    cells = {key: "search/both/global/0"} if own else {}
    return Pack(
        name=name, stage="search", runs=(run,), rungs=(5, 10, 20), split="validation", own=cells
    )


def _row(pack: Pack, study: Study, reached: int, status: str, losses: int) -> TrainingRow:
    return TrainingRow(
        training_key=pack.runs[0].training_key(make_setting(study)), stage="search",
        seed=2, steps=20, step_reached=reached, status=status,
        error="loss is not finite" if status == "failed" else "", seconds=1.0, pack=pack.name,
        pack_size=1, train_losses=(1.0,) * losses,
    )  # type: ignore[arg-type]  # fmt: skip


FIVE, SEVEN = (5, "unfinished", 5), (7, "failed", 2)
ALIVE, ENDED = (10, "unfinished", 5), (20, "finished", 10)


@pytest.mark.parametrize(
    ("recorded", "again", "differs"),
    [
        ([FIVE, SEVEN], [FIVE, SEVEN], False),
        # the first to arrive is behind, or ahead
        ([FIVE], [FIVE, SEVEN], False),
        ([FIVE, ALIVE, ENDED], [FIVE, ALIVE], False),
        # a run that failed says so at every later rung, without a step since
        ([FIVE, SEVEN, (7, "failed", 0)], [FIVE, SEVEN, (7, "failed", 0)], False),
        # it failed in the step after a rung, which the other has only just reached
        ([FIVE, (5, "failed", 0)], [FIVE, (5, "failed", 0)], False),
        # one failed where the other did not
        ([FIVE, SEVEN], [FIVE, ALIVE], True),
        ([FIVE, ALIVE], [FIVE, SEVEN], True),
        ([FIVE, ALIVE, ENDED], [FIVE, ALIVE, (20, "failed", 10)], True),
        ([FIVE, ALIVE, (20, "failed", 10)], [FIVE, ALIVE, ENDED], True),
        ([FIVE, SEVEN], [FIVE, (7, "failed", 1)], True),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_what_became_of_two_runs_of_one_training(
    tmp_path: Path,
    recorded: list[tuple[int, str, int]],
    again: list[tuple[int, str, int]],
    differs: bool,
    own: bool,
) -> None:
    """Two packs that share a training may differ; a cell's own run may not."""
    study = study_of(tmp_path, reuse=not own)
    recorder = Recorder(Ledger(tmp_path / "ledger.jsonl"), tmp_path)
    first, second = _pack(study, own=False, name="first"), _pack(study, own=own, name="second")
    for row in recorded:
        recorder.report(first, [_row(first, study, *row)])
    last = recorder.ledger.trainings[_row(first, study, *FIVE).training_key]

    def report() -> None:
        for row in again:
            recorder.report(second, [_row(second, study, *row)])

    if own and differs:
        with pytest.raises(UserError, match="search/both/global/0: trained for itself"):
            report()
        return
    report()
    assert bool(recorder.ledger.own_trainings) is own
    if not differs and len(again) <= len(recorded):
        assert recorder.ledger.trainings[last.training_key] == last


def test_a_run_that_failed_between_two_rungs_is_no_contradiction_at_the_next(
    tmp_path: Path,
) -> None:
    """The original bug: it is reported again at every rung, with no losses since, and was refused."""
    study = study_of(tmp_path, reuse=True)
    recorder = Recorder(Ledger(tmp_path / "ledger.jsonl"), tmp_path)
    pack = _pack(study, own=False)
    for row in (FIVE, SEVEN, (7, "failed", 0)):
        recorder.report(pack, [_row(pack, study, *row)])
    (held,) = recorder.ledger.trainings.values()
    assert (held.status, len(held.train_losses)) == ("failed", 2)
    with pytest.raises(UserError, match="other numbers than those recorded"):
        recorder.report(pack, [_row(pack, study, 7, "failed", 1)])


def test_rows_of_a_worker_that_died_are_not_said_twice(tmp_path: Path) -> None:
    study = study_of(tmp_path, reuse=False)
    recorder = Recorder(Ledger(tmp_path / "ledger.jsonl"), tmp_path)
    pack = _pack(study, own=True)
    for row in (FIVE, ALIVE, ALIVE, ENDED, ENDED):
        recorder.report(pack, [_row(pack, study, *row)])
    rows = [row.kind for row in recorder.ledger.recorded()]
    assert rows == ["training", "own_training"] * 3


# -- the confirmation ------------------------------------------------------------------------------


BOTH_TIMES: dict[str, Any] = {"sweep": {"during": ["both", "eval"]}}
"""Two scenarios that share their clean arm: a run of one serves the other."""


def broken_off(root: Path, which: int) -> tuple[Study, Ledger, str]:
    """Run a study whose confirm pack number `which` breaks off; return it, its ledger and the pack."""
    quiet = study_of(root / "quiet", reuse=False, **BOTH_TIMES)
    _, packs = run(quiet, "search confirm")
    trained = [pack.name for pack in packs if pack.stage == "confirm" and pack.rungs != (0,)]
    study = study_of(root / "broken", reuse=False, **BOTH_TIMES)
    ledger, _ = run(study, "search confirm", how=inline_packs(breaks=trained[which]))
    return study, ledger, trained[which]


@pytest.mark.parametrize("which", [0, -1], ids=["before", "after"])
def test_a_confirm_run_of_its_own_that_broke_off_is_a_gap_until_it_was_tried_again(
    tmp_path: Path, which: int
) -> None:
    """Before or after another cell has trained the same: verdicts were written over the gap.

    After it there was no row to tell; before it the row was replaced by that of the other cell.
    """
    study, ledger, name = broken_off(tmp_path, which)
    broken = [row for row in ledger.own_trainings.values() if row.error]
    assert {row.pack for row in broken} == {name}
    assert any(ledger.trainings[row.training_key].status == "finished" for row in broken)
    gaps = load_results(study_folder(study)).gaps
    assert any("train for themselves (--no-reuse) broke off" in gap for gap in gaps)
    ledger, packs = run(study, "confirm")
    assert [pack.name for pack in packs] == [name]
    assert not any(row.error for row in ledger.own_trainings.values())
    assert not load_results(study_folder(study)).gaps


def test_a_run_of_its_own_that_broke_off_is_no_gap_where_runs_are_shared_again(
    tmp_path: Path,
) -> None:
    """The original bug: nothing was queued for it any more, and every run ended without verdicts."""
    study, _, _ = broken_off(tmp_path, -1)
    assert load_results(study_folder(study)).gaps
    compute = study.compute.model_copy(update={"reuse": True})
    shared = study.model_copy(update={"compute": compute})
    run(shared, "confirm")
    assert not load_results(study_folder(shared)).gaps


def test_the_confirmation_trains_every_cell_and_comes_to_the_same(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"sweep": {"during": ["both", "eval"]}, "confirm": {"export": "all"}}
    ledgers, counts = [], []
    for reuse in (True, False):
        study = study_of(tmp_path / str(reuse), reuse=reuse, **changes)
        ledger, packs = run(study, "search confirm")
        write_report(study_folder(study))
        ledgers.append(ledger)
        counts.append(trained([pack for pack in packs if pack.stage == "confirm"]))
    shared, own = ledgers
    assert numbers(own) == numbers(shared)
    cells = [cell for cell in own.cells.values() if cell.stage == "confirm"]
    assert counts[1] == len(cells)
    assert counts[0] == len({cell.training_key for cell in cells}) < counts[1]
    folders = [
        study_folder(study_of(tmp_path / str(reuse), reuse=reuse, **changes))
        for reuse in (True, False)
    ]
    verdicts = [json.loads(folder.verdict.read_text()) for folder in folders]
    for verdict in verdicts:
        verdict.pop("times")
    assert verdicts[0] == verdicts[1]
    # Every cell has its adapter, and the one that a row names is there.
    root = folders[1].root
    assert len(list(root.glob("adapters/*/*/*"))) == len(cells)
    for cell in cells:
        assert (root / own.trainings[cell.training_key].adapter).is_dir()
    notes = cost_table(load_results(folders[1])).notes
    assert any("only repeated what was recorded already" in note for note in notes)


def test_a_generation_that_has_its_verdicts_is_left_alone(tmp_path: Path) -> None:
    shared, own = (study_of(tmp_path, reuse=reuse, sweep={}) for reuse in (True, False))
    run(shared, "search confirm")
    folder = study_folder(shared)
    write_report(folder)
    before = folder.ledger.read_bytes()
    _, packs = run(own, "confirm")
    assert packs == []
    assert folder.ledger.read_bytes() == before


def test_a_generation_without_verdicts_is_trained_for_every_cell(tmp_path: Path) -> None:
    shared, own = (study_of(tmp_path, reuse=reuse, sweep={}) for reuse in (True, False))
    run(shared, "search confirm", how=inline_packs(20))
    ledger, packs = run(own, "confirm")
    cells = [cell for cell in ledger.cells.values() if cell.stage == "confirm"]
    assert trained(packs) == len(cells)


def test_status_counts_what_was_repeated(tmp_path: Path) -> None:
    study = study_of(tmp_path, reuse=False)
    ledger, _ = run(study)
    state = study_status(study, study_folder(study))
    assert state["repeated"] == ledger.repeated()._asdict()
    assert state["repeated"]["trainings"] >= CELLS - SHARED
    assert state["reused"] == {}
    assert sum(state["trainings"]["search"].values()) == len(ledger.trainings)


# -- packs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_the_size_of_packs_changes_no_number_and_no_folder(tmp_path: Path, replicas: int) -> None:
    changes: dict[str, Any] = {"search": {"configs": 3, "replicates": 3}}
    usual = study_of(tmp_path / "a", reuse=True, **changes)
    packed = study_of(tmp_path / "b", reuse=True, compute={"pack_replicas": replicas}, **changes)
    assert study_hash(usual) == study_hash(packed)
    first, _ = run(usual)
    second, packs = run(packed)
    assert numbers(first) == numbers(second)
    configs = [pack for pack in packs if "-c0" in pack.name]
    assert configs
    for pack in packs:
        assert len(pack.runs) <= (3 if pack in configs else replicas)
        assert min(pack.lockstep or len(pack.runs), len(pack.runs)) <= replicas
    assert {row.lockstep for row in second.trainings.values()} <= set(range(1, replicas + 1))


def test_another_size_in_the_middle_of_a_search(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"search": {"configs": 3, "replicates": 3}}
    run(study_of(tmp_path, reuse=True, **changes), how=inline_packs(6))
    ledger, _ = run(study_of(tmp_path, reuse=True, compute={"pack_replicas": 1}, **changes))
    whole, _ = run(study_of(tmp_path / "whole", reuse=True, **changes))
    assert numbers(ledger) == numbers(whole)
