"""Which trainings are one: equal ones are trained once, unequal ones never share a key."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from aqn_tune.errors import UserError
from aqn_tune.models.spec import ModelSpec
from aqn_tune.study.cells import conditions_of, named_arms, resolve_run, stage_cells, unique_runs
from aqn_tune.study.device import HEALTHY
from aqn_tune.study.folder import study_hash
from aqn_tune.study.runs import Run, Setting
from aqn_tune.study.schema import Study
from aqn_tune.study.sweep import resolve_scenarios
from aqn_tune.tasks import WordProblems

SETTING = Setting(model=ModelSpec(), task=WordProblems(), model_fingerprint="f")
DEAD_ZONE: dict[str, Any] = {"kind": "dead_zone", "layers": [3], "threshold": 0.2}
IN_LINEARS = {**DEAD_ZONE, "modules": ["linear"]}
SPARSE = {**DEAD_ZONE, "density": 0.5}
NOISY = {"kind": "relative_gaussian", "layers": [3], "scale": 0.1}
FLIPS: dict[str, Any] = {"kind": "bit_flip", "layers": [3], "bits": "mantissa", "rate": 1e-4}


def study(**changes: Any) -> Study:
    data: dict[str, Any] = {
        "study": "s",
        "scenario": {"faults": [DEAD_ZONE]},
        "search": {
            "space": {"dimensions": {"sigma_start": {"kind": "fixed", "value": 0.1}}},
            "replicates": 2,
        },
        "confirm": {"replicates": 6},
    }
    return Study.model_validate({**data, **changes})


def keys_of(made: Study, arm: str) -> list[str]:
    """Return the training key of an arm in each scenario, replicate 0."""
    cells = stage_cells(made, SETTING, resolve_scenarios(made), stage="search", layer_count=8).cells
    return [cell.training_key for cell in cells if (cell.arm, cell.replicate) == (arm, 0)]


@pytest.mark.parametrize(
    ("scenario", "sweep", "distinct"),
    [
        # what only an evaluation sees
        ({}, {"deploy": ["unmerged", "merged"]}, 1),
        ({"faults": [NOISY]}, {"eval_draws": [1, 4]}, 1),
        ({"faults": [SPARSE]}, {"eval_devices": ["same", "unseen"]}, 1),
        # a device seed is one training per device only where something of the device is drawn
        ({}, {"device_seed": [0, 1, 2]}, 1),
        ({"faults": [SPARSE]}, {"device_seed": [0, 1, 2]}, 3),
        ({"faults": [{**SPARSE, "persistence": "transient"}]}, {"device_seed": [0, 1, 2]}, 1),
        ({"faults": [{**SPARSE, "persistence": "intermittent", "activation_rate": 0.5}]},
         {"device_seed": [0, 1, 2]}, 3),
        ({"faults": [NOISY]}, {"device_seed": [0, 1, 2]}, 1),
        ({"faults": [FLIPS]}, {"device_seed": [0, 1, 2]}, 1),
        ({"faults": [{**FLIPS, "persistence": "permanent"}]}, {"device_seed": [0, 1, 2]}, 3),
        ({"faults": [DEAD_ZONE, SPARSE]}, {"device_seed": [0, 1, 2]}, 3),
        ({"faults": [DEAD_ZONE, {**SPARSE, "when": "eval"}]}, {"device_seed": [0, 1, 2]}, 1),
        ({"quantization": "mxfp4"}, {"device_seed": [0, 1]}, 1),
        # the path of the adapters is only met where values pass one
        ({}, {"adapter_path": ["exact", "faulty"]}, 1),
        ({"faults": [IN_LINEARS]}, {"adapter_path": ["exact", "faulty"]}, 2),
        ({"faults": [{**IN_LINEARS, "site": "input"}]}, {"adapter_path": ["exact", "faulty"]}, 2),
        ({"faults": [{**IN_LINEARS, "site": "grad_input"}]},
         {"adapter_path": ["exact", "faulty"]}, 2),
        ({"faults": [{**IN_LINEARS, "site": "weight"}]}, {"adapter_path": ["exact", "faulty"]}, 1),
        ({"quantization": "mxfp4"}, {"adapter_path": ["exact", "faulty"]}, 2),
        ({"quantization": {"format": "mxfp4", "operands": "weight"}},
         {"adapter_path": ["exact", "faulty"]}, 1),
        # when a part acts is told from whether it does
        ({}, {"during": ["both", "train"]}, 1),
        ({}, {"during": ["both", "eval"]}, 2),
        ({}, {"faults.0.when": ["both", "train"]}, 1),
        ({}, {"faults.0.when": ["both", "eval"]}, 2),
        ({"quantization": "mxfp4"}, {"quantization.0.when": ["both", "train", "eval"]}, 2),
        # layers are the same however they are written
        ({}, {"faults.0.layers": [[7], [-1]]}, 1),
        ({"quantization": "mxfp4"}, {"quantization.0.layers": ["all", ["0-7"]]}, 1),
        # and what training does see
        ({}, {"faults.0.density": [0.5, 1.0]}, 2),
        ({"quantization": "mxfp4"}, {"quantization.0.format": ["mxfp4", "nvfp4", "int8"]}, 3),
        ({"quantization": "mxfp4"}, {"quantization.0.scale_mode": ["floor", "even"]}, 2),
    ],
)  # fmt: skip
def test_trainings_of_a_sweep(
    scenario: dict[str, Any], sweep: dict[str, list[Any]], distinct: int
) -> None:
    made = study(scenario={"faults": [DEAD_ZONE], **scenario}, sweep=sweep)
    (key,) = sweep
    count = len(sweep[key])
    faulty = keys_of(made, "fault_only")
    assert len(faulty) == count
    assert len(set(faulty)) == distinct
    assert len(set(keys_of(made, "clean"))) == 1, "a healthy device is the same in every scenario"


def test_the_clean_arm_is_one_training_evaluated_on_every_device() -> None:
    sweep = {
        "adapter_path": ["exact", "faulty"], "deploy": ["unmerged", "merged"],
        "eval_draws": [1, 3], "device_seed": [0, 5], "during": ["both", "eval"],
    }  # fmt: skip
    made = study(scenario={"faults": [{**IN_LINEARS, "density": 0.5}, NOISY]}, sweep=sweep)
    scenarios = resolve_scenarios(made)
    assert len(scenarios) == 32
    cells = stage_cells(made, SETTING, scenarios, stage="search", layer_count=8).cells
    runs = unique_runs(cells)
    clean = {cell.training_key for cell in cells if cell.arm == "clean"}
    assert len(clean) == 2, "two seeds"
    for key in clean:
        run = runs[key]
        assert run.device == HEALTHY
        assert [c.name for c in run.conditions] == ["clean"] + ["faulty"] * 32
        devices = {(c.scenario, c.device.adapter_path, c.device.deploy, c.device.seed, c.draws)
                   for c in run.conditions[1:]}  # fmt: skip
        assert len({device[1:] for device in devices}) == 16
        assert all(c.device.faults for c in run.conditions[1:])
    trained = {cell.training_key for cell in cells if cell.arm == "fault_only"} - clean
    assert len(trained) == 2 * 4, "two seeds, two adapter paths, two devices; the rest is not seen"


def run_of(made: Study, arm: str, *, layer_count: int = 8) -> Run:
    (scenario,) = resolve_scenarios(made)
    return resolve_run(made, scenario, named_arms(made)[arm], seed=1, layer_count=layer_count)


@pytest.mark.parametrize(
    ("during", "trained", "deployed"),
    [
        ("both", ["output", "grad_input", "grad_input"], ["output"]),
        ("train", ["output", "grad_input", "grad_input"], []),
        ("eval", [], ["output"]),
    ],
)
def test_no_fault_of_a_gradient_is_deployed(
    during: str, trained: list[str], deployed: list[str]
) -> None:
    """Neither one that is declared nor a companion: in an evaluation no gradient would ever meet it."""
    faults = [{**NOISY, "backward_scale": 0.05}, {**DEAD_ZONE, "site": "grad_input"}]
    made = study(scenario={"faults": faults, "during": during})
    (scenario,) = resolve_scenarios(made)
    clean, faulty = conditions_of(scenario, 8)
    assert clean.device == HEALTHY
    assert [fault.site for fault in faulty.device.faults] == deployed
    run = run_of(made, "fault_only")
    assert [fault.site for fault in run.device.faults] == trained
    assert run.conditions == (clean, faulty)


def test_full_fine_tuning_knows_no_adapter_path() -> None:
    full = {"method": {"kind": "full"}}
    scenario = {"faults": [IN_LINEARS]}
    one, other = (
        run_of(study(training=full, scenario={**scenario, "adapter_path": path}), "fault_only")
        for path in ("exact", "faulty")
    )
    assert one.device == other.device
    assert one.training_key(SETTING) == other.training_key(SETTING)


@pytest.mark.parametrize(
    ("accumulation", "redraws", "met"),
    [
        (1, ("step", "microbatch", "forward"), ("step", "step", "step")),
        (4, ("step", "microbatch", "forward"), ("step", "microbatch", "microbatch")),
    ],
)
def test_draws_that_are_the_same_are_one_training(
    accumulation: int, redraws: tuple[str, ...], met: tuple[str, ...]
) -> None:
    arms = {redraw: {"noise": {"redraw": redraw}} for redraw in redraws}
    training = {"gradient_accumulation_steps": accumulation}
    runs = [run_of(study(training=training, arms=arms), redraw) for redraw in redraws]
    assert tuple(run.noise.redraw for run in runs if run.noise) == met
    assert len({run.training_key(SETTING) for run in runs}) == len(set(met))


@pytest.mark.parametrize("redraw", ["step", "microbatch", "forward"])
def test_controls_draw_their_noise_as_declared(redraw: str) -> None:
    made = study(controls={"redraw": redraw})
    policies = [arm.noise for arm in named_arms(made).values() if arm.noise is not None]
    assert len(policies) == 4
    assert {policy.redraw for policy in policies} == {redraw}


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ({"device": "faulty"}, {}, True),
        ({"device": "healthy"}, {}, False),
        ({"skip": "faulty"}, {"skip": [3]}, True),
        ({"skip": [3]}, {"skip": [-5]}, True),
        ({"skip": [3]}, {}, False),
        ({"train_layers": "faulty"}, {"train_layers": ["3-3"]}, True),
        ({"train_layers": "faulty"}, {}, False),
        ({"train_layers": "healthy"}, {"train_layers": "faulty"}, False),
        ({"weight_decay": 0.0}, {}, True),
        ({"weight_decay": 0.1}, {}, False),
        ({"learning_rate": 0.002}, {}, True),
        ({"rank": 8}, {}, True),
        ({"rank": 4}, {}, False),
        ({"noise": {"targeting": "none"}}, {}, True),
        ({"noise": {"targeting": "targeted"}}, {"noise": {"targeting": "global"}}, False),
        ({"noise": {"schedule": {"kind": "constant", "sigma": 0.1}}},
         {"noise": {"schedule": {"kind": "linear", "sigma_start": 0.1, "sigma_end": 0.1}}}, True),
        ({"noise": {"schedule": {"kind": "constant", "sigma": 0.1, "stop_fraction": 0.5}}},
         {"noise": {"schedule": {"kind": "constant", "sigma": 0.1}}}, False),
        ({"noise": {"carrier": "linear_weight"}},
         {"noise": {"carrier": {"kind": "linear_weight", "relative": True}}}, False),
    ],
)  # fmt: skip
def test_arms_are_told_apart_by_what_they_train(
    one: dict[str, Any], other: dict[str, Any], equal: bool
) -> None:
    made = study(arms={"one": one, "other": other})
    first, second = (run_of(made, name).training_key(SETTING) for name in ("one", "other"))
    assert (first == second) is equal


def test_an_arm_on_the_faulty_device_trains_through_it_where_the_others_do_not() -> None:
    made = study(
        scenario={"faults": [DEAD_ZONE, {**NOISY, "when": "eval"}], "during": "eval"},
        arms={"aware": {"device": "faulty"}},
    )
    assert run_of(made, "fault_only").device == HEALTHY
    device = run_of(made, "aware").device
    assert [fault.kind for fault in device.faults] == ["dead_zone"]


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"skip": [8]}, "skip: there is no layer 8 of 8; allowed are 0 to 7"),
        ({"skip": ["0-7"]}, "skip: every layer would be left out"),
        ({"train_layers": [9]}, "train_layers: there is no layer 9 of 8"),
        ({"train_layers": [3, 4], "skip": [4]}, "train_layers: layers 4 are left out by `skip`"),
        ({"train_layers": "faulty", "skip": "faulty"}, "train_layers: 'faulty' leaves no layer"),
        ({"skip": [3], "noise": {}}, "noise: layers 3 are left out by `skip`"),
        ({"skip": "faulty", "noise": {"targeting": "targeted"}}, "noise: layers 3 are left out"),
    ],
)
def test_arms_that_cannot_be(arm: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        run_of(study(arms={"mine": arm}), "mine")


@pytest.mark.parametrize(
    "arm",
    [
        {"skip": "faulty", "noise": {"targeting": "healthy"}},
        {"skip": [0], "noise": {"targeting": "targeted"}},
        {"skip": [0], "train_layers": "healthy"},
    ],
)
def test_arms_that_leave_layers_out_and_can_be(arm: dict[str, Any]) -> None:
    run = run_of(study(arms={"mine": arm}), "mine")
    assert run.skip
    assert not set(run.skip) & set(run.train_layers or ())
    assert run.noise is None or not set(run.skip) & set(run.noise.noised_layers())


def test_the_faulty_device_is_refused_where_no_part_acts_in_training() -> None:
    made = study(
        scenario={"faults": [{**DEAD_ZONE, "when": "eval"}]}, arms={"aware": {"device": "faulty"}}
    )
    with pytest.raises(UserError, match=r"^device: got 'faulty', but every part .* `when: eval`"):
        run_of(made, "aware")


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        # defaults written out are no other study
        ({"controls": {"redraw": "step"}}, True),
        ({"scenario": {"faults": [DEAD_ZONE], "deploy": "unmerged", "device_seed": 0}}, True),
        ({"scenario": {"faults": [{**DEAD_ZONE, "density": 1.0, "when": "both"}]}}, True),
        ({"training": {"gradient_accumulation_steps": 1}}, True),
        ({"controls": {"redraw": "forward"}}, False),
        ({"scenario": {"faults": [DEAD_ZONE], "quantization": "mxfp4"}}, False),
        ({"scenario": {"faults": [DEAD_ZONE], "deploy": "merged"}}, False),
        ({"scenario": {"faults": [SPARSE], "eval_devices": "unseen"}}, False),
        ({"scenario": {"faults": [DEAD_ZONE], "device_seed": 1}}, False),
        ({"arms": {"mine": {"skip": "faulty"}}}, False),
    ],
)
def test_the_study_is_told_by_what_it_declares(changes: dict[str, Any], same: bool) -> None:
    assert (study_hash(study(**changes)) == study_hash(study())) is same


def test_a_resolved_study_reads_back_as_the_same_study() -> None:
    made = study(
        scenario={
            "faults": [IN_LINEARS, {**FLIPS, "when": "train"}],
            "quantization": [{"format": "mxfp4", "layers": [1]}, {"format": "int8", "layers": [2]}],
            "adapter_path": "faulty", "deploy": "merged", "device_seed": 3,
        },
        sweep={"quantization.0.scale_mode": ["floor", "even"], "faults.0.layers": [[3], "all"]},
        controls={"redraw": "microbatch", "schedule": "linear", "carrier": "linear_weight"},
        arms={
            "mine": {"skip": ["1-2", -1], "train_layers": "healthy", "weight_decay": 0.1},
            "aware": {"device": "faulty", "noise": {"targeting": {"kind": "zone", "edge": [0]}}},
        },
    )  # fmt: skip
    text = yaml.safe_dump(made.model_dump(mode="json"))
    again = Study.model_validate(yaml.safe_load(text))
    assert again == made
    assert study_hash(again) == study_hash(made)
