"""What a plan says, against counts done by hand and against scipy."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic import make_setting, make_study

from aqn_tune.cli.app import main
from aqn_tune.errors import UserError
from aqn_tune.evidence.declared import declare
from aqn_tune.evidence.power import mde_sd_units
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import CellRow, EvaluationRow, TrainingRow
from aqn_tune.study import calibration as calibrating
from aqn_tune.study.calibration import (
    Calibration,
    Costs,
    Sample,
    calibration_file,
    find_costs,
    read_calibration,
    split_cost,
    update_calibration,
    workload_of,
)
from aqn_tune.study.detectable import detectable_effect, t_quantile
from aqn_tune.study.effort import Load, Part, Work, most_seconds_of, seconds_of
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.plan import MOST_STAGES, make_plan, ranges
from aqn_tune.study.schema import Study
from aqn_tune.study.sweep import resolve_scenarios


@pytest.mark.parametrize("n", [6, 8, 12, 40, 200])
@pytest.mark.parametrize("level", [0.05, 0.05 / 16, 0.05 / 60])
@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
def test_detectable_effect_is_that_of_the_evidence(n: int, level: float, power: float) -> None:
    assert detectable_effect(n, level, power) == pytest.approx(
        mde_sd_units(n, level, power), rel=1e-6
    )


def test_t_quantile_known_values() -> None:
    assert t_quantile(0.975, 7) == pytest.approx(2.364624, abs=1e-6)
    assert t_quantile(0.995, 5) == pytest.approx(4.032143, abs=1e-6)


def test_a_normal_approximation_would_not_do() -> None:
    normal = (1.959964 + 0.841621) / 6**0.5
    assert detectable_effect(6, 0.05, 0.8) > 1.2 * normal


def plan_of(tmp_path: Path, *, searched: bool = True, **changes: Any) -> Any:
    study = make_study(tmp_path, **changes)
    return make_plan(study if searched else study.model_copy(update={"search": None}))


def test_the_work_of_a_small_study_by_hand(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert plan.rungs == (5, 10, 20)
    assert plan.search is not None
    # search: 6 controls x 2 seeds, each evaluated clean and faulty at 3 rungs; the base once each
    assert (plan.search.cells, plan.search.unique) == (12, 12)
    # 8 configs x 2 seeds: 16 to step 5, 8 to step 10, 4 to step 20
    assert plan.search.expected.trainings == 12 + 16
    assert plan.search.expected.steps == 12 * 20 + 16 * 5 + 8 * 5 + 4 * 10
    assert plan.search.expected.evaluations == 12 * 3 * 2 + 2 + (16 + 8 + 4) * 2
    assert plan.search.most.steps == (12 + 16) * 20
    assert plan.search.expected.rows == plan.search.expected.evaluations * 256
    # confirm: 6 controls, the finalist and its global twin (its none twin is fault_only), 6 seeds
    assert plan.confirm.unique == 36
    assert plan.confirm.most.trainings == 36 + 12
    assert plan.confirm.most.steps == 48 * 20
    assert plan.confirm.most.evaluations == 48 * 2 + 2
    assert plan.confirm.split_rows == 600
    # a pack takes eight: two even ones of the twelve, which are evaluated twice at each rung, beside 8 of
    # two; five of the 36, and two of what is not known yet
    assert plan.search.parts[1] == Part(2 + 8, Work(6, 120, 6 * 2 * 3, 6 * 2 * 3 * 256))
    assert plan.confirm.parts[1] == Part(5 + 2, Work(8, 160, 8 * 2, 8 * 2 * 600))


@pytest.mark.parametrize(
    ("workers", "about", "most"),
    [
        (1, (560, 960), (560, 960)),
        # at most: an even share of all but the largest pack, with that one at the end
        (2, (560 / 2, 960 / 2), (120 + 440 / 2, 160 + 800 / 2)),
        # or as many rounds of the largest pack as there are
        (4, (560 / 4, 960 / 4), (120 + 440 / 4, 2 * 160)),
        (5, (120, 960 / 5), (120 + 440 / 5, 2 * 160)),
        (10, (120, 160), (120, 160)),
        (64, (120, 160), (120, 160)),
    ],
)
def test_no_more_workers_are_busy_than_there_are_packs(
    workers: int, about: tuple[float, ...], most: tuple[float, ...], tmp_path: Path
) -> None:
    """The original bug: ten and seven packs were divided among 64 workers, 24 s in place of 280 s."""
    plan = plan_of(tmp_path)
    loads = [Load(stage.most, stage.parts) for stage in (plan.search, plan.confirm)]
    costs = Costs(1.0, 0.0, None, None, "by hand", 8)
    for load, one, bound in zip(loads, about, most, strict=True):
        assert seconds_of([load], costs, workers) == pytest.approx(one + 20)
        assert most_seconds_of([load], costs, workers) == pytest.approx(bound + 20)
    assert most_seconds_of(loads, costs, workers) == pytest.approx(sum(most) + 20)


def test_the_time_of_a_study_is_that_of_its_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = Costs(1.0, 0.0, None, None, "by hand", 8)
    monkeypatch.setattr("aqn_tune.study.plan.find_costs", lambda *_: costs)
    estimate = plan_of(tmp_path, compute={"workers": 64}).estimate
    assert estimate.most_seconds == pytest.approx(120 + 160 + 20)
    assert estimate.seconds == pytest.approx(120 + 160 + 20), "one config goes to the end"


def test_a_searched_learning_rate_makes_the_none_twin_a_training_of_its_own(tmp_path: Path) -> None:
    dimensions = {"learning_rate": {"kind": "float", "low": 1e-4, "high": 1e-3}}
    plan = plan_of(tmp_path, search={"space": {"dimensions": dimensions}})
    assert plan.confirm.most.trainings == 36 + 18


def test_finalists_whose_rank_is_searched_may_need_packs_of_their_own(tmp_path: Path) -> None:
    """36 runs go into five packs of eight; those of six arms, each of a rank of its own, into six."""
    confirm = {"finalists": 2, "replicates": 6}
    for name, packs in (("learning_rate", 5), ("rank", 6)):
        dimensions = {name: {"kind": "choice", "values": [8, 12] if name == "rank" else [1e-3]}}
        changes = {"search": {"space": {"dimensions": dimensions}}, "confirm": confirm}
        plan = plan_of(tmp_path, **changes)
        assert plan.confirm.most.trainings == 36 + 36
        assert plan.confirm.parts[1].packs == 5 + packs


def test_clean_is_trained_once_for_all_thresholds(tmp_path: Path) -> None:
    sweep = {"faults.0.threshold": [0.1, 0.2, 0.5]}
    plan = plan_of(tmp_path, sweep=sweep, searched=False)
    assert plan.search is None
    assert plan.configs == 0
    assert (plan.confirm.cells, plan.confirm.unique) == (6 * 3 * 6, (1 + 5 * 3) * 6)
    # the clean arm is evaluated once clean and once under each threshold
    assert plan.confirm.most.evaluations == (4 + 15 * 2) * 6 + 4


def test_search_without_configs_is_no_search(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, search={"configs": 0})
    assert plan.search is None
    assert plan.confirm.most.trainings == 36


def test_missing_arms_are_listed_and_leave_the_family(tmp_path: Path) -> None:
    fault = {"kind": "dead_zone", "layers": "all", "threshold": 0.1}
    contrasts = [["global", "fault_only"], ["healthy", "global"]]
    plan = plan_of(
        tmp_path,
        searched=False,
        scenario={"faults": [fault]},
        confirm={"contrasts": contrasts},
    )
    (scenario,) = plan.scenarios
    reasons = {arm.arm: arm.reason for arm in scenario.arms if arm.reason}
    assert list(reasons) == ["healthy", "random"]
    assert "every layer is faulty" in reasons["healthy"]
    assert plan.detectable.family == 1


def test_the_family_is_the_one_that_is_declared(tmp_path: Path) -> None:
    study = make_study(tmp_path, sweep={"faults.0.threshold": [0.1, 0.2]})
    declared = declare(study, resolve_scenarios(study), (), margin=None)
    found = make_plan(study).detectable
    assert found.family == len(declared.family) == 10
    assert found.level == pytest.approx(0.05 / 10)
    assert found.floor == 2**-5
    assert found.effect_sd == pytest.approx(mde_sd_units(6, 0.05 / 10, 0.8), rel=1e-6)


def test_with_looks_the_effect_is_that_of_the_last_one_at_its_share_of_alpha(
    tmp_path: Path,
) -> None:
    study = make_study(tmp_path, confirm={"replicates": 12, "looks": [6, 9, 12]})
    plan = make_plan(study)
    found = plan.detectable
    assert (found.looks, found.replicates, found.alpha) == ((6, 9, 12), 12, 0.05)
    assert found.look_alpha == pytest.approx(0.05 / 3)
    assert found.level == pytest.approx(0.05 / 3 / found.family)
    assert found.effect_sd == pytest.approx(
        mde_sd_units(12, 0.05 / 3 / found.family, 0.8), rel=1e-6
    )
    fixed = make_plan(make_study(tmp_path, confirm={"replicates": 12}))
    assert plan.confirm.most == fixed.confirm.most, "its work is counted to the last look"
    # 6, 3 and 3 seeds of six controls, and of a finalist and a twin that join them, eight in a pack
    (base, *looks), (_, whole) = plan.confirm.parts, fixed.confirm.parts
    assert (base.packs, base.largest) == (1, Work(0, 0, 2, 2 * 600))
    assert [part.packs for part in looks] == [5 + 2, 3 + 1, 3 + 1]
    assert whole.packs == 9 + 3
    assert {part.largest for part in (*looks, whole)} == {Work(8, 160, 16, 16 * 600)}
    assert (fixed.detectable.looks, fixed.detectable.look_alpha) == ((), 0.05)


def test_arms_and_schedule_are_spelled_out(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, training={"steps": 30, "warmup_steps": 2})
    arms = {arm.arm: (arm.layers, arm.dose) for arm in plan.scenarios[0].arms}
    assert arms["clean"] == ("", 0.0)
    assert arms["global"] == ("0-27", 28.0)
    assert arms["targeted"] == ("10", 1.0)
    assert arms["healthy"] == ("0-9,11-27", 27.0)
    stages = [(s.first_step, s.last_step, round(s.sigma, 4)) for s in plan.schedule]
    assert stages[:3] == [(0, 2, 0.0), (3, 5, 0.05), (6, 8, 0.0281)]
    assert stages[-1] == (27, 29, 0.0005)


@pytest.mark.parametrize(
    ("schedule", "steps", "stages"),
    [
        # few stretches are spelled out, whatever the kind
        ({"kind": "constant", "sigma": 0.1}, 100, [(0, 99, 0.1, 0.1)]),
        ({"kind": "constant", "sigma": 0.1, "warmup_fraction": 0.2, "stop_fraction": 0.3}, 10,
         [(0, 1, 0, 0), (2, 6, 0.1, 0.1), (7, 9, 0, 0)]),
        ({"kind": "linear", "sigma_start": 0.4, "sigma_end": 0.0}, 4,
         [(0, 0, 0.4, 0.4), (1, 1, 0.3, 0.3), (2, 2, 0.2, 0.2), (3, 3, 0.1, 0.1)]),
        # many are summed up where sigma falls
        ({"kind": "linear", "sigma_start": 0.1, "sigma_end": 0.0}, 1000, [(0, 999, 0.1, 0.0001)]),
        ({"kind": "linear", "sigma_start": 0.1, "sigma_end": 0.0, "warmup_fraction": 0.1,
          "stop_fraction": 0.1}, 100,
         [(0, 9, 0, 0), (10, 89, 0.1, 0.1 * 11 / 90), (90, 99, 0, 0)]),
        ({"kind": "geometric", "sigma_start": 0.1, "sigma_end": 0.001, "stages": 24}, 100,
         [(0, 3, 0, 0), (4, 99, 0.1, 0.001)]),
        ({"kind": "epoch_aware", "sigma_start": 0.1, "sigma_end": 0.001, "epochs": 2,
          "stages_per_epoch": 9}, 100,
         [(0, 4, 0, 0), (5, 49, 0.1, 0.01), (50, 54, 0, 0), (55, 99, 0.01, 0.001)]),
    ],
)  # fmt: skip
def test_a_schedule_stays_readable(
    schedule: dict[str, Any], steps: int, stages: list[tuple[float, ...]], tmp_path: Path
) -> None:
    training = {"steps": steps, "warmup_steps": 1}
    plan = plan_of(tmp_path, searched=False, training=training, controls={"schedule": schedule})
    found = [(s.first_step, s.last_step, s.sigma, s.last_sigma) for s in plan.schedule]
    assert [stage[:2] for stage in found] == [stage[:2] for stage in stages]
    assert [stage[2:] for stage in found] == [pytest.approx(stage[2:]) for stage in stages]
    assert found[0][0] == 0
    assert found[-1][1] == steps - 1


def show(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0


def test_a_schedule_of_many_epochs_is_cut_on_the_screen_and_whole_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = {"kind": "epoch_aware", "epochs": 20, "stages_per_epoch": 3}
    study = make_study(
        tmp_path, training={"steps": 200, "warmup_steps": 1}, controls={"schedule": schedule}
    )
    file = tmp_path / "demo.yaml"
    file.write_text(yaml.safe_dump(study.model_dump(mode="json", exclude_unset=True)))
    show(["plan", str(file), "--json"])
    rows = json.loads(capsys.readouterr().out)["schedule"]
    assert len(rows) == 2 * 20
    show(["plan", str(file)])
    text = capsys.readouterr().out.partition("Noise of the controls")[2].partition("Work")[0]
    lines = [line for line in text.splitlines() if line.strip()][2:]
    assert len(lines) == MOST_STAGES
    assert [line.split()[0] for line in (*lines[5:8], lines[-1])] == [
        "23-29", "...", "173-179", "193-199"
    ]  # fmt: skip


NOISY = {"kind": "relative_gaussian", "layers": [10], "scale": 0.1}
SPARSE = {"kind": "dead_zone", "layers": [10], "threshold": 0.1, "density": 0.5}


@pytest.mark.parametrize(
    ("scenario", "sweep", "search", "confirm"),
    [
        # search: 12 controls at 3 rungs, the base, 28 evaluations of configs; confirm: 36 + 12, the base
        ({"faults": [NOISY], "eval_draws": 4}, {},
         12 * 3 * 5 + 5 + 28 * 5, 48 * 5 + 5),
        # clean is one training per seed for both scenarios, evaluated once clean and 4 times in each
        ({"faults": [NOISY], "eval_draws": 4}, {"faults.0.scale": [0.1, 0.2]},
         (2 * 9 + 20 * 5) * 3 + 9 + 28 * 10, 6 * 9 + 60 * 5 + 24 * 5 + 9),
        # the draws of an evaluation are not seen in training: all arms are shared
        ({"faults": [NOISY]}, {"eval_draws": [1, 3]},
         12 * 5 * 3 + 5 + 28 * (2 + 4), 36 * 5 + 12 * (2 + 4) + 5),
        ({"faults": [SPARSE], "eval_devices": "unseen", "eval_draws": 3}, {},
         12 * 3 * 4 + 4 + 28 * 4, 48 * 4 + 4),
        # no fault is left to draw: one pass, whatever is declared for the others
        ({"faults": [{**NOISY, "when": "train"}, SPARSE], "eval_devices": "unseen"}, {},
         12 * 3 * 2 + 2 + 28 * 2, 48 * 2 + 2),
    ],
)  # fmt: skip
def test_every_draw_of_an_evaluation_is_counted(
    scenario: dict[str, Any], sweep: dict[str, Any], search: int, confirm: int, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path, scenario=scenario, sweep=sweep)
    assert plan.search is not None
    assert plan.search.expected.evaluations == search
    assert plan.search.expected.rows == search * 256
    assert plan.confirm.expected.evaluations == confirm
    assert plan.confirm.expected.rows == confirm * 600


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((), ""), ((3,), "3"), ((0, 1, 2), "0-2"), ((0, 2, 3, 7), "0,2-3,7")],
)
def test_ranges(numbers: tuple[int, ...], text: str) -> None:
    assert ranges(numbers) == text


def test_seeds_of_the_stages_are_disjoint(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert plan.search is not None
    assert not set(plan.search.seeds) & set(plan.confirm.seeds)


def test_planning_writes_nothing(tmp_path: Path) -> None:
    plan_of(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("samples", "per_step", "per_row"),
    [
        # two mixes of steps and rows: both costs are identified
        ([Sample(100, 600, 22.0), Sample(100, 2000, 50.0)], 0.1, 0.02),
        ([Sample(10, 0, 1.0), Sample(0, 50, 1.0)], 0.1, 0.02),
        # Measured apart, whatever a fit would make of the totals.
        ([Sample(100, 600, 22.0, 6.0), Sample(100, 600, 26.0, 6.0)], 0.18, 0.01),
        # One that did not measure it: the fit again.
        ([Sample(100, 600, 22.0, 1.0), Sample(100, 2000, 50.0)], 0.1, 0.02),
        # one mix: a row costs a third of a training row; 100 steps + 1600 rows / (16 * 3)
        ([Sample(100, 1600, 40.0)] * 3, 0.3, 0.3 / 48),
        # a fit that would be negative falls back on the same rule
        ([Sample(100, 0, 10.0), Sample(100, 4800, 9.0)], 19 / 300, 19 / 300 / 48),
    ],
)
def test_costs_are_split(samples: list[Sample], per_step: float, per_row: float) -> None:
    assert split_cost(samples, 16) == pytest.approx((per_step, per_row))


@pytest.mark.parametrize("writing", [0.0, 10.0])
def test_a_finished_study_calibrates_the_next_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writing: float
) -> None:
    """How long its answers took to write does not enter: that depends on what is written."""
    monkeypatch.setattr(calibrating, "REFERENCE", tmp_path / "none.json")
    study = make_study(tmp_path)
    setting = make_setting(study)
    monkeypatch.setattr("aqn_tune.study.plan.make_setting", make_setting)
    assert make_plan(study).estimate.source == "not measured"
    folder = study_folder(study)
    rows: list[Any] = []
    for replicate, status in ((0, "finished"), (1, "finished"), (2, "failed")):
        key = f"k{replicate}"
        rows.append(
            CellRow(
                stage="search", scenario="both", arm="clean", replicate=replicate, seed=replicate,
                training_key=key,
            )
        )  # fmt: skip
        rows.append(
            EvaluationRow(
                training_key=key, step=20, final=True, condition="clean", split="validation",
                rows=480, loss=1.0, exact_match=0.5,
            )
        )  # fmt: skip
        rows.append(
            TrainingRow(
                training_key=key, stage="search", seed=replicate, steps=20, step_reached=20,
                status=status, seconds=writing + (60.0 if status == "failed" else 30.0),
                generate_seconds=writing, pack="p", pack_size=8, lockstep=4,
            )
        )  # fmt: skip
    Ledger(folder.ledger).append(rows)
    update_calibration(study, setting, folder)
    # 20 steps + 480 rows / 48 = 30 step-equivalents in 30 s; the failed training is no measurement
    costs = find_costs(study.output, workload_of(setting, study.training), 8)
    assert costs is not None
    assert costs.seconds_per_step == pytest.approx(1.0)
    assert costs.seconds_per_row == pytest.approx(1 / 48)
    assert "measured here" in costs.source
    assert "at 4 replicates per trial in place of 8" in (costs.source)
    plan = make_plan(study)
    assert plan.search is not None
    assert plan.estimate.seconds is not None
    work = (plan.search.expected, plan.confirm.expected)
    busy = sum(w.steps + w.rows / 48 for w in work)
    assert plan.estimate.seconds == pytest.approx(busy + 20)
    assert plan.estimate.most_seconds is not None
    assert plan.estimate.most_seconds > plan.estimate.seconds
    known = read_calibration(calibration_file(study.output))
    assert known is not None
    assert known.rates[0].trainings == 2


def trained(study: Study) -> StudyFolder:
    """Record one training of a study, and return its folder."""
    folder = study_folder(study)
    Ledger(folder.ledger).append(
        [
            CellRow(
                stage="search", scenario="both", arm="clean", replicate=0, seed=0, training_key="k",
            ),
            EvaluationRow(
                training_key="k", step=20, final=True, condition="faulty", scenario="both",
                split="validation", rows=120, draws=4, loss=1.0, exact_match=0.5,
            ),
            TrainingRow(
                training_key="k", stage="search", seed=0, steps=20, step_reached=20,
                status="finished", seconds=30.0, pack="p", pack_size=8, lockstep=8,
            ),
        ]
    )  # fmt: skip
    return folder


def test_the_rows_of_every_draw_are_part_of_what_a_training_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrating, "REFERENCE", tmp_path / "none.json")
    study = make_study(tmp_path)
    setting = make_setting(study)
    update_calibration(study, setting, trained(study))
    costs = find_costs(study.output, workload_of(setting, study.training), 8)
    assert costs is not None
    # 20 steps + 4 * 120 rows / 48 = 30 step-equivalents in 30 s
    assert costs.seconds_per_step == pytest.approx(1.0)


def test_two_studies_that_end_together_are_both_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original bug: the second read before the first had written, and both had one name for the draft."""
    sizes = (8, 16)
    studies = [make_study(tmp_path, training={"batch_size": size}) for size in sizes]
    folders = [trained(study) for study in studies]
    draft = tmp_path / "calibration.tmp"
    draft.write_text("of another process")
    read = calibrating.read_calibration

    def update(number: int) -> None:
        update_calibration(studies[number], make_setting(studies[number]), folders[number])

    second = threading.Thread(target=update, args=(1,))

    def read_and_wait(file: Path) -> Calibration | None:
        known = read(file)
        if second.ident is None:
            second.start()
            second.join(timeout=0.5)
        return known

    monkeypatch.setattr(calibrating, "read_calibration", read_and_wait)
    update(0)
    second.join()
    known = read(calibration_file(studies[0].output))
    assert known is not None
    assert sorted(rate.workload.batch_size for rate in known.rates) == list(sizes)
    assert draft.read_text() == "of another process"


@pytest.mark.parametrize(
    "change", [{"gradient_checkpointing": True}, {"gradient_accumulation_steps": 4}]
)
def test_a_training_of_another_pace_has_no_known_cost(
    change: dict[str, Any], tmp_path: Path
) -> None:
    from aqn_tune.study.loading import make_setting as real_setting

    study = make_study(tmp_path, training={"steps": 100, **change})
    assert find_costs(study.output, workload_of(real_setting(study), study.training), 8) is None


def test_another_workload_is_not_taken_for_this_one(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    workload = workload_of(make_setting(study), study.training)
    assert find_costs(study.output, workload, 8) is None, "no model called 'synthetic' is shipped"


def test_a_gpu_has_another_pace_than_a_cpu(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    on_gpu = make_setting(study).model_copy(update={"device": "cuda"})
    workloads = [workload_of(setting, study.training) for setting in (make_setting(study), on_gpu)]
    assert workloads[0] != workloads[1]


def test_a_broken_calibration_is_named(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text('{"machine": 3}')
    with pytest.raises(UserError, match=r"calibration\.json: not a calibration"):
        read_calibration(file)


def test_the_embedded_model_ships_with_a_calibration(tmp_path: Path) -> None:
    """Its fingerprint must be the shipped model's, or the file is of no use to anyone."""
    from aqn_tune.study.loading import make_setting as real_setting

    study = make_study(tmp_path, training={"steps": 100})
    costs = find_costs(study.output, workload_of(real_setting(study), study.training), 8)
    assert costs is not None
    assert costs.source.startswith("measured on another machine (")
    assert make_plan(study).estimate.seconds is not None
