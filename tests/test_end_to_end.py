"""A whole study with the real engine on a tiny model: worker counts, reruns, adapters, TensorBoard files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from exactness import exact
from tiny import save_tiny_model

from aqn_tune.cli.app import main
from aqn_tune.ledger import Ledger
from aqn_tune.models.load import build_model, load_tokenizer
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.loading import load_study
from aqn_tune.training.data import load_tokens

pytestmark = pytest.mark.slow
torch.set_num_threads(1)


def write_study(tmp_path: Path, workers: int, packed: int) -> Path:
    model = save_tiny_model(tmp_path.parent / "tiny-model")
    content = {
        "study": "tiny",
        "model": {"path": str(model)},
        "task": {"kind": "word_problems", "train_rows": 60, "validation_rows": 16, "test_rows": 32},
        "training": {
            "steps": 6,
            "batch_size": 4,
            "warmup_steps": 1,
            "method": {"kind": "lora", "rank": 2},
        },
        "eval_batch_size": 16,
        "scenario": {"faults": [{"kind": "dead_zone", "layers": [1], "threshold": 0.2}]},
        "sweep": {"during": ["both", "eval"]},
        "search": {
            "space": {
                "dimensions": {
                    "sigma_start": {"kind": "float", "low": 0.01, "high": 0.1, "log": True},
                    "targeting": {"kind": "choice", "values": ["global", "targeted"]},
                }
            },
            "configs": 2,
            "replicates": 2,
            "rungs": [0.5, 1.0],
        },
        "confirm": {"finalists": 1, "replicates": 6, "generate": True},
        "compute": {"workers": workers, "pack_replicas": packed},
        "output": str(tmp_path / "runs"),
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyFolder]:
    study = write_study(tmp_path_factory.mktemp("one"), workers=1, packed=8)
    assert call("run", str(study), "-q") == 0
    return study, study_folder(load_study(study))


@exact
def test_workers_and_packs_change_no_number(
    done: tuple[Path, StudyFolder], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Controls and fresh arms: the configs themselves may differ, they depend on who finished first."""
    other = write_study(tmp_path_factory.mktemp("two"), workers=2, packed=3)
    assert call("run", str(other), "-q") == 0
    first, second = Ledger(done[1].ledger), Ledger(study_folder(load_study(other)).ledger)
    shared = first.evaluations.keys() & second.evaluations.keys()
    assert len(shared) > 100
    assert all(first.evaluations[key] == second.evaluations[key] for key in shared)


@exact
def test_runs_that_share_nothing_come_to_the_same_numbers(
    done: tuple[Path, StudyFolder], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every cell trains its own run, and every run is alone in its forward passes."""
    other = write_study(tmp_path_factory.mktemp("alone"), workers=1, packed=8)
    assert call("run", str(other), "-q", "--no-reuse", "--pack", "1") == 0
    folder = study_folder(load_study(other))
    assert folder.root.name == done[1].root.name
    first, second = Ledger(done[1].ledger), Ledger(folder.ledger)
    assert first.evaluations == second.evaluations
    assert first.search == second.search
    assert {row.lockstep for row in second.trainings.values()} == {1}
    assert max(row.lockstep for row in first.trainings.values()) == 8
    assert len(second.own_trainings) == len(second.cells)
    assert second.repeated().trainings == len(second.cells) - len(second.trainings) > 0


@exact
def test_another_study_takes_what_this_one_has_searched(
    done: tuple[Path, StudyFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(done[0].read_text())
    content["confirm"]["alpha"] = 0.1
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({**content, "study": "second"}))
    assert call("run", str(study)) == 0
    shown = capsys.readouterr()
    name = done[1].root.name
    folder = study_folder(load_study(study))
    first, second = Ledger(done[1].ledger), Ledger(folder.ledger)
    taken = [row for row in second.trainings.values() if row.source]
    assert f"{len(taken)} trainings reused from {name}" in shown.out
    controls = {
        c.training_key for c in second.cells.values() if c.stage == "search" and not c.config
    }
    assert controls <= {row.training_key for row in taken}
    assert {row.stage for row in taken} == {"search"}
    assert first.evaluations.keys() == second.evaluations.keys()
    for key, row in second.evaluations.items():
        assert row.model_copy(update={"source": ""}) == first.evaluations[key]
    assert call("rerun", str(folder.root), "search/both/targeted/1", "-q") == 0
    assert call("rerun", str(folder.root), "confirm/eval/finalist1/0", "-q") == 0


@exact
@pytest.mark.parametrize(
    "cell", ["confirm/both/global/3", "confirm/eval/finalist1/0", "search/both/c000/1"]
)
def test_a_cell_run_again_is_bit_identical(done: tuple[Path, StudyFolder], cell: str) -> None:
    assert call("rerun", str(done[1].root), cell, "-q") == 0


def test_a_rerun_sees_a_number_that_was_changed(
    done: tuple[Path, StudyFolder], tmp_path: Path
) -> None:
    """Plants one altered digit in a copy of the ledger."""
    folder = StudyFolder(tmp_path / done[1].root.name)
    folder.root.mkdir()
    folder.study.write_text(done[1].study.read_text())
    ledger = Ledger(done[1].ledger)
    key = ledger.cells["confirm", 0, "both", "global", 3].training_key
    rows = []
    for row in ledger.rows():
        if row.kind == "evaluation" and row.training_key == key and row.condition == "faulty":
            row = row.model_copy(update={"loss": row.loss + 1e-12})
        rows.append(row)
    Ledger(folder.ledger).append(rows)
    assert call("rerun", str(folder.root), "confirm/both/global/3", "-q") == 1


def test_the_exported_adapter_reproduces_the_recorded_clean_loss(
    done: tuple[Path, StudyFolder],
) -> None:
    from peft import PeftModel

    study, folder = load_study(done[0]), done[1]
    ledger = Ledger(folder.ledger)
    cell = ledger.cells["confirm", 0, "both", "finalist1", 2]
    row = ledger.trainings[cell.training_key]
    recorded = ledger.evaluation(cell.training_key, 6, "clean", "", "test")
    adapter = folder.root / row.adapter
    model = PeftModel.from_pretrained(build_model(study.model), adapter).eval()
    data = load_tokens(load_tokenizer(study.model), study.task.splits().test, 64)
    with torch.no_grad():
        logits = model(input_ids=data.tokens).logits[:, :-1]
    labels = torch.where(data.answer, data.tokens, torch.tensor(-100))[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert recorded is not None
    assert float(loss) == pytest.approx(recorded.loss, abs=1e-5)


def test_confirmed_models_write_their_answers_and_those_of_the_search_do_not(
    done: tuple[Path, StudyFolder],
) -> None:
    """`confirm.generate` is on in this study; the untrained base, at step 0, is never asked."""
    ledger = Ledger(done[1].ledger)
    rows = [row for row in ledger.evaluations.values() if row.step > 0 and row.loss is not None]
    confirmed = [row for row in rows if ledger.trainings[row.training_key].stage == "confirm"]
    searched = [row for row in rows if ledger.trainings[row.training_key].stage == "search"]
    assert confirmed
    assert searched
    assert [row for row in confirmed if row.generated_exact_match is None] == []
    assert [row for row in searched if row.generated_exact_match is not None] == []


def test_everything_is_written(done: tuple[Path, StudyFolder]) -> None:
    folder = done[1]
    verdict = json.loads(folder.verdict.read_text())
    assert set(verdict["scenarios"]) == {"both", "eval"}
    ledger = Ledger(folder.ledger)
    finished = [row for row in ledger.trainings.values() if row.status == "finished"]
    assert finished
    assert all(row.audit is not None and row.audit.weights_unchanged for row in finished)
    # A deployed fault costs the eval scenario's fault_only what it costs the clean arm: one training.
    keys = {
        ledger.cells["confirm", 0, scenario, arm, 0].training_key
        for scenario, arm in [("both", "clean"), ("eval", "clean"), ("eval", "fault_only")]
    }
    assert len(keys) == 1
    assert not list(folder.state.glob("*"))
