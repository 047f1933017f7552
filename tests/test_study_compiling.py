"""Whether compiled layers pay is told from measured trainings: of one machine, compiling counted apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from synthetic import make_setting, make_study

from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import CellRow, EvaluationRow, TrainingRow
from aqn_tune.study import calibration as calibrating
from aqn_tune.study.calibration import (
    Calibration,
    Rate,
    calibration_file,
    find_costs,
    update_calibration,
    workload_of,
)
from aqn_tune.study.compiling import Compiled, compare_compiled
from aqn_tune.study.effort import Load, Work
from aqn_tune.study.folder import study_folder
from aqn_tune.study.plan import make_plan
from aqn_tune.study.schema import Study
from aqn_tune.study.sweep import resolve_scenarios


def compiled(study: Study, is_compiled: bool = True) -> Study:
    training = study.training.model_copy(update={"compile": is_compiled})
    return study.model_copy(update={"training": training})


class Pace(NamedTuple):
    is_compiled: bool
    step: float
    row: float
    compiling: float = 0.0
    size: int = 8


PLAIN, FASTER = Pace(False, 0.1, 0.01), Pace(True, 0.08, 0.5, 30.0)


def calibration_of(study: Study, paces: Sequence[Pace]) -> str:
    rates = tuple(
        Rate(
            workload=workload_of(make_setting(study), compiled(study, pace.is_compiled).training),
            pack_size=pace.size, trainings=1, seconds_per_step=pace.step, seconds_per_row=pace.row,
            compile_seconds=pace.compiling,
        )
        for pace in paces
    )  # fmt: skip
    return Calibration(machine="a machine", rates=rates).model_dump_json()


def compare(
    study: Study, monkeypatch: pytest.MonkeyPatch, here: Sequence[Pace], shipped: Sequence[Pace] = (),
    *, steps: int = 10_000,
) -> Compiled | None:  # fmt: skip
    file, reference = calibration_file(study.output), Path(study.output).parent / "reference.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(calibration_of(study, here))
    reference.write_text(calibration_of(study, shipped))
    monkeypatch.setattr(calibrating, "REFERENCE", reference)
    work = Work(trainings=1, steps=steps, evaluations=1, rows=1000)
    scenarios = resolve_scenarios(study)
    return compare_compiled(study, make_setting(study), scenarios, [Load(work)], workers=2)


@pytest.mark.parametrize(
    ("steps", "plain", "with_compiled", "pays"),
    [
        # two shapes of 30 s each: packs of two (a config's seeds) and of eight
        (10_000, 525.0, 485.0, True),
        (6_000, 325.0, 325.0, False),
        (1_000, 75.0, 125.0, False),
    ],
)
def test_it_pays_where_it_saves_more_than_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    steps: int, plain: float, with_compiled: float, pays: bool,
) -> None:  # fmt: skip
    """(10,000 x 0.1 + 1,000 x 0.01) / 2 workers + 20 to start; rows cost the same both ways."""
    found = compare(make_study(tmp_path), monkeypatch, [PLAIN, FASTER], steps=steps)
    assert found is not None
    assert found.plain_seconds == pytest.approx(plain)
    assert found.compiled_seconds == pytest.approx(with_compiled)
    assert found.compile_seconds == 60.0
    assert found.pays is pays


@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_answer_is_the_same_from_either_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_compiled: bool
) -> None:
    study = make_study(tmp_path)
    found = compare(compiled(study, is_compiled), monkeypatch, [PLAIN, FASTER])
    assert found is not None
    assert found.plain_seconds == pytest.approx(525.0)


@pytest.mark.parametrize(
    ("here", "shipped", "source"),
    [
        ([PLAIN, FASTER], [], "measured here"),
        ([], [PLAIN, FASTER], "measured on another machine"),
        # each measured on one machine only: their ratio would be that of the machines
        ([PLAIN], [FASTER], None),
        ([FASTER], [PLAIN], None),
        ([PLAIN], [PLAIN, FASTER], "measured on another machine"),
        ([PLAIN], [], None),
        ([], [], None),
        # in packs of other sizes: their ratio would hold what lockstep gains
        ([PLAIN._replace(size=1), FASTER], [], None),
        (
            [PLAIN._replace(size=1), PLAIN._replace(size=4), FASTER._replace(size=4)],
            [],
            "measured here",
        ),
        # recorded before compiling was counted apart: it took no seconds, said the plan
        ([PLAIN, FASTER._replace(compiling=0.0)], [], None),
    ],
)
def test_only_rates_that_were_measured_side_by_side_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    here: Sequence[Pace], shipped: Sequence[Pace], source: str | None,
) -> None:  # fmt: skip
    found = compare(make_study(tmp_path), monkeypatch, here, shipped)
    assert (found and found.source.partition(" (")[0]) == source
    if found is not None:
        assert found.plain_seconds == pytest.approx(525.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"steps": 20, "gradient_checkpointing": True}},
        {"scenario": {"quantization": ["mxfp4"]}},
        {"training": {"steps": 20, "method": {"kind": "full"}}},
    ],
    ids=["checkpointing", "quantizers inside", "full"],
)
def test_nothing_is_said_where_compiling_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    study = make_study(tmp_path, **changes)
    assert compare(study, monkeypatch, [PLAIN, FASTER]) is None


def rows_of(compiling: float) -> list[Any]:
    """Return a pack of four of which each has trained for a second, and the pack compiled so long."""
    rows: list[Any] = []
    for replicate in range(4):
        key = f"k{replicate}"
        cell = {"arm": "clean", "replicate": replicate, "seed": replicate, "training_key": key}
        rows.append(CellRow(stage="search", scenario="both", **cell))
        rows.append(
            EvaluationRow(
                training_key=key, step=20, final=True, condition="clean", split="validation",
                rows=100, loss=1.0, exact_match=0.5,
            )
        )  # fmt: skip
        rows.append(
            TrainingRow(
                training_key=key, stage="search", seed=replicate, steps=20, step_reached=20,
                status="finished", seconds=3.0 + compiling / 4, eval_seconds=1.0,
                compile_seconds=compiling / 4, pack="p", pack_size=4, lockstep=4,
            )
        )  # fmt: skip
    return rows


def test_what_compiling_took_is_measured_apart_and_the_longest_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a warm cache it took a second, and the next machine has none."""
    monkeypatch.setattr(calibrating, "REFERENCE", tmp_path / "none.json")
    study = compiled(make_study(tmp_path))
    setting, folder = make_setting(study), study_folder(study)
    for waited in (32.0, 1.0):
        folder.ledger.unlink(missing_ok=True)
        Ledger(folder.ledger).append(rows_of(waited))
        update_calibration(study, setting, folder)
        costs = find_costs(study.output, workload_of(setting, study.training), 4)
        assert costs is not None
        assert costs.seconds_per_step == pytest.approx(2.0 / 20)
        assert costs.seconds_per_row == pytest.approx(1.0 / 100)
        assert costs.compile_seconds == pytest.approx(32.0)


def test_a_shape_is_expected_to_take_as_long_as_the_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first that a worker meets takes most: later ones find a part of the work done."""
    study = compiled(make_study(tmp_path))
    monkeypatch.setattr(calibrating, "REFERENCE", tmp_path / "reference.json")
    rates = [
        Rate(
            workload=workload_of(make_setting(study), study.training), pack_size=size, trainings=1,
            seconds_per_step=0.1, seconds_per_row=0.01, compile_seconds=waited,
        )
        for size, waited in ((6, 20.0), (8, 3.0))
    ]  # fmt: skip
    calibration = Calibration(machine="a machine", rates=tuple(rates))
    calibrating.REFERENCE.write_text(calibration.model_dump_json())
    costs = find_costs(study.output, rates[0].workload, 8)
    assert costs is not None
    assert costs.compile_seconds == 20.0


def test_the_plan_of_a_compiled_study_waits_for_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aqn_tune.study.plan.make_setting", make_setting)
    study = make_study(tmp_path)
    seconds = {}
    for waiting in (1.0, 31.0):
        compare(study, monkeypatch, [PLAIN, FASTER._replace(compiling=waiting)])
        seconds[waiting] = make_plan(compiled(study)).estimate.seconds
    assert seconds[1.0] is not None
    assert seconds[31.0] is not None
    assert seconds[31.0] - seconds[1.0] == pytest.approx(60.0)
    plan = make_plan(study).estimate
    assert plan.compiled is not None
    assert plan.compiled.plain_seconds == plan.seconds, "one study, one time"


def test_a_calibration_without_compiled_layers_is_written_as_before(tmp_path: Path) -> None:
    said = json.loads(calibration_of(make_study(tmp_path), [PLAIN, FASTER]))
    assert ["compile_seconds" in rate for rate in said["rates"]] == [False, True]
