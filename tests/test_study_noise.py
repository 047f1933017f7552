"""Known answers of schedules and targetings, and what a policy comes to."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from aqn_tune.errors import UserError
from aqn_tune.noise.policy import NoisePolicy
from aqn_tune.noise.schedules.constant import Constant
from aqn_tune.noise.schedules.geometric import Geometric
from aqn_tune.noise.targeting import TargetingSpec
from aqn_tune.noise.targeting.multipliers import Multipliers
from aqn_tune.noise.targeting.subset import Healthy, Random, Targeted, Window
from aqn_tune.noise.targeting.uniform import Global, NoTargeting

# QeRL (arXiv 2510.11696), K = 10 intervals, 0.05 -> 0.0005: sigma_i = 0.05 * 0.01 ** (i / 8).
QERL = [0.05, 0.028117066, 0.015811388, 0.0088913971, 0.005, 0.0028117066, 0.0015811388,
        0.00088913971, 0.0005]  # fmt: skip


def test_qerl_schedule_over_29_steps() -> None:
    schedule = Geometric(sigma_start=0.05, sigma_end=0.0005, stages=9)
    found = [schedule.sigma_at(step, 29) for step in range(30)]
    expected = [0.0] * 3 + [sigma for sigma in QERL for _ in range(3)]
    assert found == pytest.approx(expected, rel=1e-7)


def test_qerl_schedule_over_30_steps_has_ten_equal_intervals() -> None:
    table = Geometric(sigma_start=0.05, sigma_end=0.0005, stages=9).table(30)
    assert table == pytest.approx([0.0] * 3 + [s for s in QERL for _ in range(3)], rel=1e-7)


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        (Geometric(sigma_start=0.1, sigma_end=0.001, stages=3, warmup_fraction=0), 6,
         [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]),
        (Geometric(sigma_start=0.1, sigma_end=0.001, stages=1), 4, [0, 0, 0.1, 0.1]),
        (Geometric(sigma_start=0.1, sigma_end=0.1, stages=4, warmup_fraction=0.5), 4,
         [0, 0, 0.1, 0.1]),
        (Geometric(sigma_start=0.1, sigma_end=0.01, stages=2, warmup_fraction=0.1), 10,
         [0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01]),
        (Constant(sigma=0.2), 3, [0.2, 0.2, 0.2]),
        (Constant(sigma=0.2, warmup_fraction=0.5), 4, [0, 0, 0.2, 0.2]),
    ],
)  # fmt: skip
def test_schedules_by_hand(
    schedule: Geometric | Constant, steps: int, expected: list[float]
) -> None:
    assert schedule.table(steps) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("steps", [7, 10, 30, 70, 100, 1000])
def test_stages_are_equally_long_up_to_one_step(steps: int) -> None:
    table = Geometric(stages=6).table(steps)
    lengths = [table.count(sigma) for sigma in sorted(set(table))]
    assert len(lengths) == 7, "warm-up and six stages"
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    "values",
    [
        {"sigma_start": -0.1},
        {"sigma_start": math.nan},
        {"sigma_end": 0.0},
        {"sigma_start": 0.01, "sigma_end": 0.1},
        {"stages": 0},
        {"warmup_fraction": 1.0},
        {"sigma": 0.1},
    ],
)
def test_schedules_that_make_no_sense_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Geometric.model_validate(values)


def ones(layers: set[int], count: int = 8) -> tuple[float, ...]:
    return tuple(1.0 if layer in layers else 0.0 for layer in range(count))


@pytest.mark.parametrize(
    ("targeting", "expected"),
    [
        (NoTargeting(), ones(set())),
        (Global(), ones(set(range(8)))),
        (Targeted(), ones({2, 3})),
        (Targeted(layers=("5-6", -1)), ones({5, 6, 7})),
        (Healthy(), ones({0, 1, 4, 5, 6, 7})),
        (Healthy(layers=(0,)), ones(set(range(1, 8)))),
        (Window(centre=4, width=3), ones({3, 4, 5})),
        (Window(centre=4, width=2), ones({3, 4})),
        (Window(centre=0, width=3), ones({0, 1})),
        (Window(centre=7, width=5), ones({5, 6, 7})),
        (Multipliers(values=(0, 1, 2, 0, 0, 0, 0, 0.5)), (0, 1, 2, 0, 0, 0, 0, 0.5)),
        (Multipliers(values={1: 2.0}, default=0.5), (0.5, 2.0, *(0.5,) * 6)),
    ],
)
def test_multipliers_of_each_targeting(
    targeting: TargetingSpec, expected: tuple[float, ...]
) -> None:
    assert targeting.multipliers(8, (2, 3)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_random_takes_as_many_healthy_layers_as_are_faulty(seed: int) -> None:
    multipliers = Random(seed=seed).multipliers(8, (2, 3))
    assert sum(multipliers) == 2
    assert multipliers[2] == multipliers[3] == 0
    assert multipliers == Random(seed=seed).multipliers(8, (2, 3))


def test_random_is_refused_where_too_few_layers_are_healthy() -> None:
    """Drawn from all layers instead, it could be `targeted` under another name."""
    assert sum(Random().multipliers(8, (0, 1, 2, 3))) == 4
    with pytest.raises(UserError, match="cannot choose 6 of 2 healthy layers"):
        Random().multipliers(8, (0, 1, 2, 3, 4, 5))


@pytest.mark.parametrize(
    ("targeting", "faulty", "message"),
    [
        (Healthy(), tuple(range(8)), "every layer is faulty"),
        (Targeted(), (), "no fault layer"),
        (Window(centre=8, width=1), (2,), "no layer 8 of 8"),
        (Random(count=9), (2,), "cannot choose 9 of 8"),
        (Multipliers(values=(1.0, 2.0)), (2,), "got 2 numbers for 8 layers"),
        (Multipliers(values={8: 1.0}), (2,), "no layer 8 of 8"),
    ],
)
def test_targetings_that_cannot_exist(
    targeting: TargetingSpec, faulty: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        targeting.multipliers(8, faulty)


def policy(**values: object) -> NoisePolicy:
    return NoisePolicy.model_validate(values)


@pytest.mark.parametrize("kind", ["global", "targeted", "healthy", "random"])
def test_energy_gives_every_targeting_the_dose_of_global(kind: str) -> None:
    noise = policy(targeting=kind, normalise="energy").resolve(
        steps=30, layer_count=8, fault_layers=(2, 3)
    )
    assert noise is not None
    assert noise.energy() == pytest.approx(8.0)


def test_without_normalisation_targeted_differs_in_dose() -> None:
    noise = policy(targeting="targeted").resolve(steps=30, layer_count=8, fault_layers=(2, 3))
    assert noise is not None
    assert noise.energy() == 2.0


def test_no_targeting_is_no_noise() -> None:
    assert policy(targeting="none").resolve(steps=30, layer_count=8, fault_layers=(2,)) is None


@pytest.mark.parametrize(
    "values",
    [
        {"schedule": {"kind": "constant", "sigma": 0.0}},
        {"schedule": {"kind": "geometric", "sigma_start": 0.0}},
        {"targeting": {"kind": "multipliers", "values": {}}},
    ],
)
def test_a_policy_that_would_inject_nothing_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(UserError, match="injects nothing in 30 steps"):
        policy(**values).resolve(steps=30, layer_count=8, fault_layers=(2,))


def test_a_warm_up_as_long_as_the_training_is_refused() -> None:
    short = policy(schedule={"kind": "constant", "sigma": 0.1, "warmup_fraction": 0.9})
    with pytest.raises(UserError, match="injects nothing in 1 steps"):
        short.resolve(steps=1, layer_count=8, fault_layers=(2,))


def test_policies_that_come_to_the_same_noise_are_equal() -> None:
    def resolved(**values: object) -> object:
        return policy(**values).resolve(steps=30, layer_count=8, fault_layers=(2, 3))

    assert resolved(targeting="targeted") == resolved(
        targeting={"kind": "window", "centre": 3, "width": 2}
    )
    assert resolved(targeting="targeted") != resolved(targeting="global")


def test_a_parameter_that_a_targeting_does_not_have_is_refused() -> None:
    with pytest.raises(ValidationError, match="layers"):
        policy(targeting={"kind": "global", "layers": [3]})
