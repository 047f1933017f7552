"""Every schedule step by step against tables and formulas written down a second time."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
from pydantic import ValidationError

from aqn_tune.errors import UserError
from aqn_tune.noise import sigma_schedule
from aqn_tune.noise.schedules import SCHEDULES, ScheduleSpec
from aqn_tune.noise.schedules.constant import Constant
from aqn_tune.noise.schedules.epoch_aware import EpochAware
from aqn_tune.noise.schedules.geometric import Geometric
from aqn_tune.noise.schedules.linear import Linear


def qerl_sigma(step: int, steps: int, k: int, start: float, end: float) -> float:
    """QeRL (arXiv 2510.11696): K intervals, the first without noise, K - 1 values."""
    interval = min(step * k // steps, k - 1)
    return 0.0 if interval == 0 else start * (end / start) ** ((interval - 1) / (k - 2))


def epoch_sigma(step: int, steps: int, epochs: int, m: int, start: float, end: float) -> float:
    """The epoch-aware schedule by its own words: boundaries, a pause, a staircase between two of them."""
    position = Fraction(step * epochs, steps)
    epoch = min(math.floor(position), epochs - 1)
    inside = position - epoch  # share of the epoch that has passed
    if inside < Fraction(1, m + 1):
        return 0.0
    stage = min(math.floor((inside - Fraction(1, m + 1)) / Fraction(1, m + 1)), m - 1)
    first, last = (start * (end / start) ** ((epoch + i) / epochs) for i in (0, 1))
    return first * (last / first) ** (stage / (m - 1)) if m > 1 else first


def test_qerl_over_29_steps_step_for_step() -> None:
    table = sigma_schedule(Geometric(sigma_start=0.05, sigma_end=0.0005, stages=9), 29)
    assert len(table) == 30
    assert table[0:3] == (0.0, 0.0, 0.0)
    assert table[3:6] == (0.05, 0.05, 0.05)
    assert table[6:9] == pytest.approx([0.02811706626] * 3, rel=1e-9)
    assert table[27:30] == (0.0005, 0.0005, 0.0005)
    expected = [qerl_sigma(step, 29, 10, 0.05, 0.0005) for step in range(30)]
    assert table == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", [3, 4, 5, 7, 10, 11, 13, 32])
@pytest.mark.parametrize("steps", [1, 2, 5, 9, 10, 11, 29, 30, 70, 116, 300, 999, 1000])
def test_qerl_at_any_number_of_steps_and_stages(steps: int, k: int) -> None:
    table = sigma_schedule({"kind": "geometric", "stages": k - 1}, steps)
    expected = [qerl_sigma(step, steps, k, 0.05, 0.0005) for step in range(steps + 1)]
    assert table == pytest.approx(expected, rel=1e-12)


def test_two_qerl_stages_are_a_pause_and_one_value() -> None:
    """Where the formula divides by K - 2 = 0."""
    assert sigma_schedule({"kind": "geometric", "stages": 1}, 4) == (0, 0, 0.05, 0.05, 0.05)


def test_epoch_aware_of_two_epochs_and_five_stages() -> None:
    """0.05 -> 0.005 -> 0.0005, each epoch a pause and five values, of which epochs share one."""
    table = sigma_schedule(EpochAware(epochs=2, stages_per_epoch=5), 24)
    expected = [
        0, 0, 0.05, 0.05, 0.0281170663, 0.0281170663,
        0.0158113883, 0.0158113883, 0.00889139705, 0.00889139705, 0.005, 0.005,
        0, 0, 0.005, 0.005, 0.00281170663, 0.00281170663,
        0.00158113883, 0.00158113883, 0.000889139705, 0.000889139705, 0.0005, 0.0005,
        0.0005,
    ]  # fmt: skip
    assert table == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("epochs", "m"), [(1, 1), (1, 4), (2, 1), (2, 5), (3, 2), (5, 7)])
@pytest.mark.parametrize("steps", [1, 3, 10, 24, 29, 100, 301])
def test_epoch_aware_at_any_number_of_steps_and_epochs(steps: int, epochs: int, m: int) -> None:
    table = sigma_schedule(EpochAware(epochs=epochs, stages_per_epoch=m), steps)
    expected = [epoch_sigma(step, steps, epochs, m, 0.05, 0.0005) for step in range(steps + 1)]
    assert table == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("steps", [7, 29, 30, 100])
def test_one_epoch_is_the_geometric_schedule(steps: int) -> None:
    one = EpochAware(epochs=1, stages_per_epoch=6)
    assert one.table(steps) == Geometric(stages=6).table(steps)


def test_linear_by_hand() -> None:
    line = Linear(sigma_start=0.1, sigma_end=0.0)
    assert sigma_schedule(line, 4) == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0])
    warm = Linear(sigma_start=0.1, sigma_end=0.02, warmup_fraction=0.2)
    assert sigma_schedule(warm, 5) == pytest.approx([0, 0.1, 0.08, 0.06, 0.04, 0.02])
    late = Linear(sigma_start=0.1, sigma_end=0.02, warmup_fraction=0.9)
    assert sigma_schedule(late, 3) == pytest.approx([0, 0, 0, 0.02])


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.25, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 29, 300])
def test_linear_meets_both_ends_and_falls_evenly(steps: int, warmup: float) -> None:
    table = sigma_schedule(Linear(sigma_start=0.1, sigma_end=0.01, warmup_fraction=warmup), steps)
    noisy = table[math.ceil(warmup * steps - 1e-6) :]
    assert table[: steps + 1 - len(noisy)] == (0.0,) * (steps + 1 - len(noisy))
    assert table[-1] == 0.01
    if len(noisy) > 1:
        assert noisy[0] == 0.1
        falls = [a - b for a, b in itertools.pairwise(noisy)]
        assert falls == pytest.approx([0.09 / len(falls)] * len(falls))


def test_linear_without_a_fall_is_constant() -> None:
    assert Linear(sigma_start=0.03, sigma_end=0.03).table(7) == Constant(sigma=0.03).table(7)


SHAPES: tuple[dict[str, Any], ...] = (
    {"kind": "geometric"},
    {"kind": "linear", "warmup_fraction": 0.1},
    {"kind": "constant", "warmup_fraction": 0.25},
    {"kind": "epoch_aware", "epochs": 3, "stages_per_epoch": 2},
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("steps", "fraction", "quiet"),
    [(10, 0.2, 2), (10, 0.3, 3), (29, 0.1, 2), (29, 0.5, 14), (30, 1 / 3, 10), (300, 0.7, 210),
     (3, 0.2, 0), (1, 0.9, 0)],
)  # fmt: skip
def test_stop_fraction_silences_the_end_and_moves_nothing(
    shape: dict[str, Any], steps: int, fraction: float, quiet: int
) -> None:
    whole = sigma_schedule(shape, steps)
    stopped = sigma_schedule({**shape, "stop_fraction": fraction}, steps)
    assert stopped == whole[: steps - quiet] + (0.0,) * (quiet + 1)


def test_stop_fraction_is_no_part_of_the_identity_of_a_schedule_that_has_none() -> None:
    assert "stop_fraction" not in Geometric().model_dump(mode="json")
    assert Geometric(stop_fraction=0.5).model_dump(mode="json")["stop_fraction"] == 0.5
    stopped = Geometric(stop_fraction=0.5)
    assert Geometric.model_validate(stopped.model_dump()) == stopped


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 2, 7, 300])
def test_every_sigma_is_finite_and_within_the_peak(shape: dict[str, Any], steps: int) -> None:
    spec = SCHEDULES[shape["kind"]].model_validate(shape)
    table = sigma_schedule(spec, steps)
    assert all(math.isfinite(sigma) and 0 <= sigma <= spec.peak() for sigma in table)


FALLING = ("geometric", "linear", "epoch_aware")
WARMED = ("geometric", "linear", "constant")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        *((kind, {"sigma_start": 0.01, "sigma_end": 0.1}, "sigma_end 0.1 is above sigma_start 0.01")
          for kind in FALLING),
        *((kind, {field: value}, "finite number")
          for kind in FALLING for field in ("sigma_start", "sigma_end")
          for value in (math.nan, math.inf)),
        *((kind, {"sigma_start": -0.1}, "greater than or equal to 0") for kind in FALLING),
        ("geometric", {"sigma_end": 0.0}, "greater than 0"),
        ("epoch_aware", {"sigma_end": 0.0}, "greater than 0"),
        ("linear", {"sigma_start": 0.0}, "sigma_end 0.0005 is above sigma_start 0"),
        ("constant", {"sigma": -1.0}, "greater than or equal to 0"),
        ("geometric", {"stages": 0}, "greater than or equal to 1"),
        ("epoch_aware", {"epochs": 0}, "greater than or equal to 1"),
        ("epoch_aware", {"stages_per_epoch": 0}, "greater than or equal to 1"),
        ("epoch_aware", {"stages_per_epoch": 2.5}, "valid integer"),
        ("epoch_aware", {"warmup_fraction": 0.1}, "Extra inputs"),
        ("linear", {"stages": 3}, "Extra inputs"),
        *((kind, {"warmup_fraction": 1.0}, "less than 1") for kind in WARMED),
        *((kind, {"warmup_fraction": math.nan}, "finite number") for kind in WARMED),
        *((kind, {"stop_fraction": value}, message) for kind in SCHEDULES
          for value, message in ((1.0, "less than 1"), (-0.1, "greater than or equal"),
                                 (math.nan, "finite number"))),
    ],
)  # fmt: skip
def test_schedules_that_make_no_sense_are_refused(
    kind: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        SCHEDULES[kind].model_validate(values)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_kind_stands_for_its_defaults(kind: str) -> None:
    named = sigma_schedule(kind, 40)
    assert named == sigma_schedule({"kind": kind}, 40) == sigma_schedule(SCHEDULES[kind](), 40)
    assert max(named) == 0.05


@pytest.mark.parametrize(
    ("schedule", "steps", "message"),
    [
        ("geometrc", 10, r"unknown kind 'geometrc'.*did you mean 'geometric'\?"),
        ({"kind": "epoch-aware"}, 10, r"unknown kind.*did you mean 'epoch_aware'\?"),
        ({"kind": 3}, 10, "unknown kind 3; allowed are geometric, linear"),
        ({"stages": 3}, 10, "`kind` is missing; allowed kinds are geometric, linear"),
        ({"kind": "geometric", "stagess": 3}, 10, r"stagess.*unknown key.*did you mean 'stages'\?"),
        ({"kind": "geometric", "stages": "many"}, 10, "stages: got 'many'; allowed: a whole number"),
        ({"kind": "linear", "sigma_start": -1}, 10, "sigma_start: got -1.*greater than or equal to 0"),
        ({"kind": "linear", "sigma_end": 1}, 10, "sigma_end 1.0 is above sigma_start 0.05"),
        ({"kind": "constant", 7: 1}, 10, "schedule"),
        (None, 10, "schedule: got None"),
        ([0.1], 10, r"schedule: got \[0.1\]"),
        ("constant", 0, "total_steps: got 0; allowed are whole numbers from 1"),
        ("constant", -3, "total_steps: got -3"),
        ("constant", 2.5, "total_steps: got 2.5"),
        ("constant", True, "total_steps: got True"),
    ],
)  # fmt: skip
def test_sigma_schedule_says_what_is_wrong(schedule: Any, steps: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sigma_schedule(schedule, steps)


def test_every_schedule_is_registered_under_its_kind() -> None:
    assert {name: kind().model_dump()["kind"] for name, kind in SCHEDULES.items()} == {
        name: name for name in SCHEDULES
    }
    assert all(issubclass(kind, ScheduleSpec) for kind in SCHEDULES.values())
