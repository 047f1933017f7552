"""The lock of a confirmation: written first, held to, never extended."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from synthetic import (
    LAYERS,
    engine,
    inline,
    make_scenarios,
    make_setting,
    make_study,
    search_inline,
)

from aqn_tune.confirm.lock import check_code, hold_lock, read_locks
from aqn_tune.confirm.measured import detectable_lines, search_gain
from aqn_tune.confirm.runner import run_confirm
from aqn_tune.errors import UserError
from aqn_tune.evidence.power import mde_sd_units
from aqn_tune.ledger import Ledger
from aqn_tune.search.ranking import finalists
from aqn_tune.study.cells import Finalist
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.margin import AbsoluteMargin, GainMargin
from aqn_tune.study.schema import Study

Made = tuple[Study, StudyFolder]


def confirm(study: Study, chosen: list[Finalist] | None = None) -> Ledger:
    """Run the confirmation of a searched study without Ray."""
    folder, scenarios = study_folder(study), make_scenarios(study)
    ledger = Ledger(folder.ledger)
    best = [f for s in scenarios for f in finalists(ledger, s, study)] if chosen is None else chosen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aqn_tune.confirm.runner.execute", inline)
        run_confirm(
            study,
            make_setting(study),
            scenarios,
            folder,
            best,
            layer_count=LAYERS,
            engine=engine(),
        )
    return Ledger(folder.ledger)


def changed(study: Study, **confirm_changes: Any) -> Study:
    """Return `study` with another `confirm` section."""
    return study.model_copy(update={"confirm": study.confirm.model_copy(update=confirm_changes)})


@pytest.fixture
def done(tmp_path: Path) -> Made:
    """A study that has been searched and confirmed."""
    study = make_study(tmp_path, search={"configs": 3})
    folder = study_folder(study)
    search_inline(study, folder)
    confirm(study)
    return study, folder


def test_the_lock_says_everything_before_the_first_run(tmp_path: Path) -> None:
    study = make_study(tmp_path, search={"configs": 3})
    folder = study_folder(study)
    search_inline(study, folder)

    def nothing_yet(work: Any, **_: Any) -> None:
        (lock,) = read_locks(folder.lock).generations
        ledger = Ledger(folder.ledger)
        confirm_cells = [row for row in ledger.cells.values() if row.stage == "confirm"]
        assert not [row for row in ledger.trainings.values() if row.stage == "confirm"]
        assert {row.training_key for row in confirm_cells} == {
            key for arm in lock.arms for key in arm.training_keys
        }
        assert len(lock.seeds) == lock.replicates == 6
        assert {(f.scenario, f.rank) for f in lock.finalists} == {
            (scenario.name, 1) for scenario in make_scenarios(study)
        }
        arms = {arm.arm for arm in lock.arms}
        assert arms >= {"clean", "fault_only", "finalist1", "finalist1_none", "finalist1_global"}
        assert lock.gain is not None
        assert lock.gain == pytest.approx(2.0 * (1 - 2.718281828**-3), abs=0.1)
        assert lock.margin == 0.05 * lock.gain

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aqn_tune.confirm.runner.execute", nothing_yet)
        scenarios = make_scenarios(study)
        chosen = [f for s in scenarios for f in finalists(Ledger(folder.ledger), s, study)]
        run_confirm(
            study,
            make_setting(study),
            scenarios,
            folder,
            chosen,
            layer_count=LAYERS,
            engine=engine(),
        )
    assert folder.lock.exists()


def test_every_cell_is_run_once_on_the_test_split(done: Made) -> None:
    study, folder = done
    ledger = Ledger(folder.ledger)
    cells = [row for row in ledger.cells.values() if row.stage == "confirm"]
    for cell in cells:
        assert ledger.trainings[cell.training_key].status == "finished"
        found = ledger.evaluation(cell.training_key, 20, "faulty", cell.scenario, "test")
        assert found is not None
        assert found.final
    search_seeds = {row.seed for row in ledger.cells.values() if row.stage == "search"}
    assert not search_seeds & {row.seed for row in cells}
    base = ledger.evaluation(cells[0].training_key, 0, "clean", "", "test")
    assert base is not None
    size = folder.ledger.stat().st_size
    confirm(study)
    assert folder.ledger.stat().st_size == size


def test_replicates_are_run_in_blocks(done: Made) -> None:
    """All arms of seed i come before seed i + 1, so that an interrupted stage is balanced."""
    _, folder = done
    ledger = Ledger(folder.ledger)
    order = {
        row.training_key: row.replicate for row in ledger.cells.values() if row.stage == "confirm"
    }
    trained = [
        order[row.training_key] for row in ledger.trainings.values() if row.training_key in order
    ]
    assert trained == sorted(trained)


def test_adapters_of_finalists_are_exported_under_relative_names(done: Made) -> None:
    study, folder = done
    ledger = Ledger(folder.ledger)
    exported = {row.adapter for row in ledger.trainings.values() if row.adapter}
    names = [scenario.name for scenario in make_scenarios(study)]
    assert exported == {f"adapters/{name}/finalist1/g0-s{i}" for name in names for i in range(6)}
    assert all((folder.root / place).is_dir() for place in exported)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"replicates": 7}, "replicates: locked 6, now 7"),
        ({"alpha": 0.01}, "alpha: locked 0.05, now 0.01"),
        ({"margin": GainMargin(share=0.2)}, "margin_fraction: locked 0.05, now 0.2"),
        (
            {"margin": AbsoluteMargin(nats=0.01)},
            'margin_rule: locked null, now {"kind": "absolute", "nats": 0.01}',
        ),
        ({"contrasts": (("targeted", "global"),)}, "contrasts: locked"),
    ],
)
def test_a_locked_generation_is_not_changed_or_extended(
    done: Made, change: dict[str, Any], field: str
) -> None:
    study, folder = done
    before = folder.lock.read_bytes(), folder.ledger.read_bytes()
    other = changed(study, **change)
    with pytest.raises(UserError, match=r"raise confirm\.generation to 1") as caught, \
            pytest.MonkeyPatch.context() as patch:  # fmt: skip
        patch.setattr("test_confirm_lock.study_folder", lambda _: folder)
        confirm(other)
    assert field in str(caught.value)
    assert (folder.lock.read_bytes(), folder.ledger.read_bytes()) == before


def test_other_finalists_are_refused(done: Made) -> None:
    study, folder = done
    chosen = [
        Finalist(scenario.name, 1, "c009", {"targeting": "targeted", "sigma_start": 0.01})
        for scenario in make_scenarios(study)
    ]
    with pytest.raises(UserError, match="finalists: locked"):
        confirm(study, chosen)
    assert folder.lock.exists()


def test_a_new_generation_has_fresh_seeds_and_keeps_the_old_lock(done: Made) -> None:
    study, folder = done
    first = read_locks(folder.lock).generations
    second = changed(study, generation=1, replicates=8)
    assert study_folder(second) == folder  # the search is not paid for again
    ledger = confirm(second)
    locks = read_locks(folder.lock).generations
    assert locks[:1] == first
    assert len(locks) == 2
    assert not set(locks[0].seeds) & set(locks[1].seeds)
    cells = [row for row in ledger.cells.values() if row.stage == "confirm"]
    assert {row.generation for row in cells} == {0, 1}
    assert all(ledger.trainings[row.training_key].status == "finished" for row in cells)
    confirm(study)  # the first one is spent, and reports as it was
    assert read_locks(folder.lock).generations == locks


def test_code_that_changed_does_not_continue(done: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    study, folder = done
    (held,) = read_locks(folder.lock).generations
    check_code(folder.lock, held)
    monkeypatch.setattr("aqn_tune.confirm.lock.code_hash", lambda: "another")
    with pytest.raises(UserError, match="cannot mix two versions"):
        check_code(folder.lock, held)
    confirm(study)  # nothing is left to run: any code may report it
    # a run that is missing may not be made up for with other code
    lines = folder.ledger.read_text().splitlines(keepends=True)
    folder.ledger.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="cannot mix two versions"):
        confirm(study)


def test_a_lock_that_was_edited_is_refused(done: Made) -> None:
    study, folder = done
    (held,) = read_locks(folder.lock).generations
    folder.lock.write_text(folder.lock.read_text().replace('"replicates"', '"replicas"'))
    with pytest.raises(UserError, match="not a lock file"):
        confirm(study)
    with pytest.raises(UserError, match="not a lock file"):
        hold_lock(folder.lock, held)


@pytest.mark.parametrize("key", ["alpha", "margin", "power", "replicates"])
def test_an_edited_value_of_a_lock_is_seen(done: Made, key: str) -> None:
    """Planted: a value loosened in the file, which reads perfectly well."""
    study, folder = done
    content = json.loads(folder.lock.read_text())
    content["generations"][0][key] *= 2
    folder.lock.write_text(json.dumps(content))
    with pytest.raises(UserError, match="a locked value was edited"):
        read_locks(folder.lock)
    with pytest.raises(UserError, match="a locked value was edited"):
        confirm(study)


def test_a_lock_without_its_hashes_is_refused(done: Made) -> None:
    """They are made up for a new lock, never for one that is read."""
    _, folder = done
    content = json.loads(folder.lock.read_text())
    del content["identities"]
    folder.lock.write_text(json.dumps(content))
    with pytest.raises(UserError, match="identities: missing"):
        read_locks(folder.lock)


def test_the_detectable_effect_is_in_nats_and_from_the_pairs_of_the_search(done: Made) -> None:
    study, folder = done
    ledger = Ledger(folder.ledger)
    (held,) = read_locks(folder.lock).generations

    def losses(scenario: str, arm: str) -> list[float]:
        keys = [ledger.cells["search", 0, scenario, arm, i].training_key for i in range(2)]
        rows = [ledger.evaluation(key, 20, "faulty", scenario, "validation") for key in keys]
        return [row.loss for row in rows if row and row.loss is not None]

    names = [scenario.name for scenario in make_scenarios(study)]
    assert [one.scenario for one in held.detectable] == names
    family = len(names) * len(study.primary_contrasts())
    for one in held.detectable:
        # The twins of the finalist did not run in the search.
        pairs = [p for p in study.primary_contrasts() if not p[0].startswith("finalist")]
        spreads = [
            stdev(
                theirs - ours
                for ours, theirs in zip(
                    losses(one.scenario, arm), losses(one.scenario, reference), strict=True
                )
            )
            for arm, reference in pairs
        ]
        assert one.contrasts == len(pairs) == 3
        assert one.sd == pytest.approx(math.sqrt(fmean(sd * sd for sd in spreads)))
        assert one.effect == pytest.approx(one.sd * mde_sd_units(6, 0.05 / family, 0.8))
    lines = detectable_lines(held)
    assert "6 seeds" in lines[0]
    assert f"{held.detectable[1].effect:.3g} nats per token" in lines[2]


def test_two_locks_of_the_same_content_have_the_same_identity(done: Made) -> None:
    (held,) = read_locks(done[1].lock).generations
    later = held.model_copy(update={"created": "2031-01-01T00:00:00+00:00"})
    assert later.identity() == held.identity()
    assert held.model_copy(update={"alpha": 0.1}).identity() != held.identity()


def test_without_a_search_there_is_no_gain_and_no_finalist(tmp_path: Path) -> None:
    study = make_study(tmp_path, search=None)
    folder = study_folder(study)
    ledger = confirm(study)
    (held,) = read_locks(folder.lock).generations
    assert held.gain is held.margin is None
    assert held.finalists == ()
    assert {(one.contrasts, one.sd, one.effect) for one in held.detectable} == {(0, None, None)}
    assert "not known in nats" in detectable_lines(held)[1]
    assert search_gain(ledger, study, make_scenarios(study)) is None
