"""Search spaces, and the cells and packs that a study comes to."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from pydantic import ValidationError

from aqn_tune.errors import UserError
from aqn_tune.models.spec import ModelSpec
from aqn_tune.study.cells import (
    Finalist,
    config_cells,
    finalist_arms,
    stage_cells,
    unique_runs,
)
from aqn_tune.study.packing import Job, base_pack, jobs_of, make_packs, pack_size
from aqn_tune.study.runs import Run, Setting
from aqn_tune.study.schema import Study
from aqn_tune.study.space import Params, SpaceSpec, arm_of
from aqn_tune.study.space_checks import corners
from aqn_tune.study.sweep import resolve_scenarios
from aqn_tune.tasks import WordProblems

SETTING = Setting(model=ModelSpec(), task=WordProblems(), model_fingerprint="f")
DEAD_ZONE = {"kind": "dead_zone", "layers": [3], "threshold": 0.2}


def study(**changes: Any) -> Study:
    data: dict[str, Any] = {
        "study": "s",
        "scenario": {"faults": [DEAD_ZONE]},
        "search": {
            "space": {"dimensions": {"sigma_start": {"kind": "float", "low": 0.01, "high": 0.1}}},
            "configs": 2,
            "replicates": 2,
        },
        "confirm": {"replicates": 6},
    }
    return Study.model_validate({**data, **changes})


def search_runs(made: Study) -> dict[str, Any]:
    cells = stage_cells(made, SETTING, resolve_scenarios(made), stage="search", layer_count=8)
    return unique_runs(cells.cells)


def test_the_clean_arm_of_every_threshold_is_one_training_per_seed() -> None:
    made = study(sweep={"faults.0.threshold": [0.1, 0.2, 0.5]})
    scenarios = resolve_scenarios(made)
    cells = stage_cells(made, SETTING, scenarios, stage="search", layer_count=8).cells
    clean = {(c.scenario, c.replicate): c.training_key for c in cells if c.arm == "clean"}
    assert len(clean) == 6
    assert len(set(clean.values())) == 2
    run = unique_runs(cells)[clean["both-threshold0.1", 0]]
    conditions = [(c.name, c.scenario) for c in run.conditions]
    assert conditions == [
        ("clean", ""),
        ("faulty", "both-threshold0.1"),
        ("faulty", "both-threshold0.2"),
        ("faulty", "both-threshold0.5"),
    ]


@pytest.mark.parametrize(
    ("during", "expected"),
    [
        # clean is its own; the five other arms see each threshold
        (["both"], 1 + 5 * 2),
        # on a healthy machine clean and fault_only are the same, and no threshold is seen
        (["eval"], 1 + 4),
        # the arms of the eval scenarios join the clean arm of the others
        (["both", "eval"], 1 + 5 * 2 + 4),
    ],
)
def test_trainings_are_shared_between_scenarios(during: list[str], expected: int) -> None:
    made = study(sweep={"during": during, "faults.0.threshold": [0.1, 0.2]})
    assert len(search_runs(made)) == expected * 2, "two seeds"


def test_sharing_never_joins_runs_that_train_differently() -> None:
    made = study(sweep={"during": ["both", "eval"], "faults.0.threshold": [0.1, 0.2]})
    cells = stage_cells(made, SETTING, resolve_scenarios(made), stage="search", layer_count=8).cells
    for cell in cells:
        kept = unique_runs(cells)[cell.training_key]
        same = {"training", "device", "noise", "skip", "train_layers", "train_rest", "seed"}
        assert same <= set(Run.model_fields)
        assert kept.model_dump(include=same) == cell.run.model_dump(include=same)
        assert set(cell.run.conditions) <= set(kept.conditions)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"study": "other"}, False),
        ({"seed": 1}, True),
        ({"training": {"learning_rate": 0.001}}, True),
        ({"eval_batch_size": 32}, False),
        ({"confirm": {"replicates": 8}}, False),
        ({"compute": {"workers": 1}}, False),
    ],
)
def test_the_training_key_holds_what_training_sees_and_no_more(
    change: dict[str, Any], differs: bool
) -> None:
    assert (set(search_runs(study()) ^ search_runs(study(**change)).keys()) != set()) is differs


def test_replicates_come_in_blocks_so_that_an_interrupted_stage_is_balanced() -> None:
    made = study()
    cells = stage_cells(made, SETTING, resolve_scenarios(made), stage="confirm", layer_count=8)
    order = [cell.replicate for cell in cells.cells]
    assert order == sorted(order)
    assert len(order) == 6 * 6


def test_healthy_is_missing_where_every_layer_is_faulty() -> None:
    made = study(scenario={"faults": [{**DEAD_ZONE, "layers": "all"}]})
    cells = stage_cells(made, SETTING, resolve_scenarios(made), stage="search", layer_count=8)
    reasons = {missing.arm: missing.reason for missing in cells.missing}
    assert set(reasons) == {"healthy", "random"}
    assert "every layer is faulty" in reasons["healthy"]
    assert "cannot choose 8 of 0 healthy layers" in reasons["random"]
    assert not {"healthy", "random"} & {cell.arm for cell in cells.cells}


def test_an_own_arm_that_cannot_exist_is_an_error_and_not_left_out() -> None:
    window = {"kind": "window", "centre": 9, "width": 1}
    made = study(arms={"mine": {"noise": {"targeting": window}}})
    with pytest.raises(UserError, match=r"arms\.mine: .*no layer 9 of 8"):
        stage_cells(made, SETTING, resolve_scenarios(made), stage="search", layer_count=8)


@pytest.mark.parametrize("stage", ["search", "confirm"])
def test_a_seed_index_is_the_same_seed_in_every_arm_and_scenario(stage: Any) -> None:
    made = study(sweep={"faults.0.threshold": [0.1, 0.2]})
    cells = stage_cells(made, SETTING, resolve_scenarios(made), stage=stage, layer_count=8).cells
    by_replicate: dict[int, set[int]] = {}
    for cell in cells:
        by_replicate.setdefault(cell.replicate, set()).add(cell.run.seed)
    assert all(len(seeds) == 1 for seeds in by_replicate.values())
    assert len(set.union(*by_replicate.values())) == len(by_replicate)


FULL: Params = {
    "targeting": "window",
    "window_centre": 3,
    "window_width": 2,
    "sigma_start": 0.1,
    "sigma_ratio": 0.1,
    "stages": 4,
    "warmup_fraction": 0.2,
    "learning_rate": 0.001,
    "rank": 4,
    "normalise": "energy",
    "carrier": "rmsnorm_weight",
}


def test_twins_differ_from_their_finalist_in_targeting_alone() -> None:
    arms = finalist_arms([Finalist("s", 1, "c000", FULL)])
    best, none, everywhere = (arms[name] for name in arms)
    assert list(arms) == ["finalist1", "finalist1_none", "finalist1_global"]
    assert best is not None
    assert best.noise is not None
    assert none == best.model_copy(update={"noise": None})
    assert everywhere is not None
    assert everywhere.noise is not None
    assert everywhere.noise.targeting.kind == "global"
    left = everywhere.noise.model_copy(update={"targeting": best.noise.targeting})
    assert everywhere.model_copy(update={"noise": left}) == best


def test_a_finalist_without_noise_has_no_global_twin() -> None:
    arms = finalist_arms([Finalist("s", 1, "c000", {"targeting": "none", "rank": 4})])
    assert arms["finalist1_global"] is None
    assert arms["finalist1_none"] == arms["finalist1"]


def test_the_point_of_a_space_becomes_the_arm_it_says() -> None:
    arm = arm_of(FULL)
    assert arm.noise is not None
    assert (arm.learning_rate, arm.rank) == (0.001, 4)
    dumped = arm.noise.model_dump()
    assert dumped["carrier"]["kind"] == "rmsnorm_weight"
    assert dumped["schedule"] == {
        "kind": "geometric", "sigma_start": 0.1, "sigma_end": pytest.approx(0.01), "stages": 4,
        "warmup_fraction": 0.2,
    }  # fmt: skip
    assert dumped["targeting"] == {"kind": "window", "centre": 3, "width": 2}
    assert dumped["normalise"] == "energy"


@pytest.mark.parametrize(
    "params",
    [
        {"targeting": "global", "window_centre": 3},
        {"targeting": "none", "sigma_start": 0.1},
        {"targeting": "global", "multiplier_3": 1.0},
        {"schedule": "constant", "sigma_ratio": 0.1},
        {"schedule": "constant", "stages": 3},
        {"targeting": "window", "window_centre": 3, "window_width": 1, "random_count": 2},
    ],
)
def test_a_parameter_that_nobody_reads_is_refused(params: Params) -> None:
    with pytest.raises(UserError, match="has no effect"):
        arm_of(params)


@pytest.mark.parametrize("layer", range(3))
def test_every_layer_multiplier_changes_the_noise(layer: int) -> None:
    """Five runs that differed in multipliers nobody read were once one run with five names."""
    base: Params = {"targeting": "multipliers", "multiplier_default": 0.5}
    named: Params = {**base, f"multiplier_{layer}": 1.5}
    arm = arm_of(named)
    assert arm.noise is not None
    noise = arm.noise.resolve(steps=10, layer_count=3, fault_layers=(0,))
    assert noise is not None
    assert noise.multipliers == tuple(1.5 if k == layer else 0.5 for k in range(3))


@pytest.mark.parametrize(
    ("dimensions", "message"),
    [
        ({}, "at least 1"),
        ({"sigma": {"kind": "fixed", "value": 1}}, "unknown dimension 'sigma'"),
        ({"stages": {"kind": "int", "low": 5, "high": 2}}, "low 5 is above high 2"),
        ({"sigma_start": {"kind": "float", "low": 0, "high": 1, "log": True}}, "low > 0"),
        (
            {
                "window_centre": {"kind": "fixed", "value": 1, "when": {"targeting": ["window"]}},
                "targeting": {"kind": "choice", "values": ["window"]},
            },
            "not a dimension before it",
        ),
    ],
)
def test_spaces_that_make_no_sense_are_refused(dimensions: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SpaceSpec.model_validate({"dimensions": dimensions})


def test_corners_reach_every_choice_and_both_ends_of_every_range() -> None:
    space = SpaceSpec.model_validate(
        {
            "dimensions": {
                "carrier": {"kind": "choice", "values": ["hidden", "rmsnorm_weight"]},
                "targeting": {"kind": "choice", "values": ["global", "window", "healthy"]},
                "window_centre": {
                    "kind": "int", "low": 0, "high": 7, "when": {"targeting": ["window"]}
                },
                "sigma_start": {"kind": "float", "low": 0.1, "high": 0.2},
            }
        }
    )  # fmt: skip
    points = list(corners(space))
    for name, value in [
        ("carrier", "hidden"), ("carrier", "rmsnorm_weight"), ("targeting", "global"),
        ("targeting", "healthy"), ("window_centre", 0), ("window_centre", 7),
        ("sigma_start", 0.1), ("sigma_start", 0.2),
    ]:  # fmt: skip
        assert any(point.get(name) == value for point in points), (name, value)
    assert all(("window_centre" in p) == (p["targeting"] == "window") for p in points)


def test_packs_hold_runs_of_equal_shape_up_to_their_size_and_lose_none() -> None:
    """Ranks 8 and 16 may share one; alpha / rank of rank 12 is 4 / 3 and is kept apart."""
    made = study(arms={"wide": {"rank": 16}, "odd": {"rank": 12}})
    runs = search_runs(made)
    cells = stage_cells(made, SETTING, resolve_scenarios(made), stage="search", layer_count=8).cells
    packs = make_packs(
        jobs_of(cells, reuse=True),
        stage="search",
        prefix="p",
        size=4,
        rungs=(25, 100),
        split="validation",
    )
    assert sum(len(pack.runs) for pack in packs) == len(runs)
    assert max(len(pack.runs) for pack in packs) == 4
    ranks = [{run.training.method.rank for run in pack.runs} for pack in packs]
    assert set(map(frozenset, ranks)) <= {frozenset({8}), frozenset({8, 16}), frozenset({12})}
    assert {8, 16} in ranks
    assert len({pack.name for pack in packs}) == len(packs)


@pytest.mark.parametrize(
    ("runs", "size", "sizes"),
    [
        (12, 8, [6, 6]),
        (6, 4, [3, 3]),
        (9, 4, [3, 3, 3]),
        (3, 8, [3]),
        (9, 3, [3, 3, 3]),
        (3, 1, [1] * 3),
    ],
)
def test_packs_are_as_even_as_they_come(runs: int, size: int, sizes: list[int]) -> None:
    """A last pack of two would keep one worker waiting for the others."""
    made = study()
    jobs = [
        Job(str(number), run.model_copy(update={"seed": number}))
        for number, run in zip(
            range(runs), itertools.cycle(search_runs(made).values()), strict=False
        )
    ]
    packs = make_packs(
        jobs, stage="search", prefix="p", size=size, rungs=(100,), split="validation"
    )
    assert [len(pack.runs) for pack in packs] == sizes


def test_configs_share_the_search_seeds_of_the_controls() -> None:
    made = study()
    (scenario,) = resolve_scenarios(made)
    cells = config_cells(
        made, SETTING, scenario, config="c000", params={"sigma_start": 0.1}, layer_count=8
    )
    controls = stage_cells(made, SETTING, [scenario], stage="search", layer_count=8).cells
    assert {c.run.seed for c in cells} == {c.run.seed for c in controls}


def test_the_base_is_evaluated_under_every_condition_of_the_study() -> None:
    made = study(sweep={"faults.0.threshold": [0.1, 0.2]})
    scenarios = resolve_scenarios(made)
    run = stage_cells(made, SETTING, scenarios, stage="search", layer_count=8).cells[0].run
    pack = base_pack(run, scenarios, layer_count=8, stage="search", split="validation")
    assert pack.rungs == (0,)
    assert [(c.name, c.scenario) for c in pack.runs[0].conditions] == [
        ("clean", ""), ("faulty", "both-threshold0.1"), ("faulty", "both-threshold0.2"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("compute", "training", "runs"),
    [
        ({}, {}, 8),
        ({"pack_replicas": "auto"}, {"batch_size": 4, "max_length": 16}, 8),
        ({"pack_replicas": 3}, {}, 3),
        ({"pack_replicas": 3, "gpus_per_worker": 1}, {}, 3),
        ({"gpus_per_worker": 0.5}, {"batch_size": 8, "max_length": 64}, 32),
        ({"gpus_per_worker": 1}, {"batch_size": 8, "max_length": 512}, 4),
        (
            {"gpus_per_worker": 1},
            {"batch_size": 8, "gradient_accumulation_steps": 4, "max_length": 512},
            16,
        ),
        ({"gpus_per_worker": 1}, {"batch_size": 64, "max_length": 512}, 1),
    ],
)
def test_how_many_runs_a_pack_takes(
    compute: dict[str, Any], training: dict[str, Any], runs: int
) -> None:
    assert pack_size(study(compute=compute, training=training)) == runs
