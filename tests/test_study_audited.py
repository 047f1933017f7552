"""At which steps the noise of a training is measured."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch

from aqn_tune.ledger.rows import NoiseMeasure
from aqn_tune.noise import EffectiveNoise, NoisePolicy
from aqn_tune.study.runs import Condition, Run
from aqn_tune.study.training import TrainingSpec
from aqn_tune.training import audit
from aqn_tune.training.audit import MOST_SHORT, is_audited


def run_with(noise: EffectiveNoise | None) -> Run:
    return Run(training=TrainingSpec(), noise=noise, seed=1, conditions=(Condition(name="clean"),))


def audited(noise: EffectiveNoise) -> list[int]:
    run = run_with(noise)
    return [step for step in range(len(noise.sigma)) if is_audited(run, step)]


def noise_of(sigma: list[float], later: dict[int, float] | None = None) -> EffectiveNoise:
    phases = [{"step": step, "multipliers": [m, 1.0]} for step, m in (later or {}).items()]
    return EffectiveNoise.model_validate(
        {
            "carrier": {"kind": "hidden"},
            "sigma": sigma,
            "multipliers": [1.0, 1.0],
            "later": phases,
        }
    )


@pytest.mark.parametrize(
    ("sigma", "later", "steps"),
    [
        # the first and the last step of every sigma, none without noise
        ([0.1] * 6, {}, [0, 5]),
        ([0.0] * 3 + [0.1] * 4 + [0.01] * 3, {}, [3, 6, 7, 9]),
        ([0.0, 0.1, 0.1, 0.1, 0.0, 0.1, 0.1, 0.1], {}, [1, 3, 5, 7]),
        ([0.1, 0.1, 0.01, 0.001, 0.001], {}, [0, 1, 2, 3, 4]),
        # of every phase of the multipliers too
        ([0.1] * 9, {4: 0.5}, [0, 3, 4, 8]),
        ([0.1] * 9, {4: 0.5, 5: 0.7}, [0, 3, 4, 5, 8]),
        ([0.1, 0.1, 0.0, 0.0, 0.1, 0.1, 0.1, 0.0], {4: 0.5}, [0, 1, 4, 6]),
        # steps with a sigma of their own, while they are few
        ([0.5, 0.4, 0.3, 0.2, 0.1], {}, [0, 1, 2, 3, 4]),
        ([0.0, 0.4, 0.0], {}, [1]),
    ],
)
def test_audited_steps(sigma: list[float], later: dict[int, float], steps: list[int]) -> None:
    assert audited(noise_of(sigma, later)) == steps


def linear(steps: int, **targeting: Any) -> EffectiveNoise:
    policy = NoisePolicy.model_validate(
        {
            "schedule": {"kind": "linear", "warmup_fraction": 0.1, "stop_fraction": 0.1},
            "targeting": targeting or {"kind": "global"},
        }
    )
    noise = policy.resolve(steps=steps, layer_count=4, fault_layers=(1,))
    assert noise is not None
    return noise


@pytest.mark.parametrize("steps", [30, 100, 1000, 5000])
def test_a_schedule_that_changes_at_every_step_is_looked_at_now_and_then(steps: int) -> None:
    found = audited(linear(steps))
    assert len(found) == MOST_SHORT
    assert found[0] == steps // 10
    assert found[-1] == steps - steps // 10 - 1
    gaps = {b - a for a, b in itertools.pairwise(found)}
    assert max(gaps) - min(gaps) <= 1, "evenly spaced"


def test_the_bounds_of_a_phase_are_looked_at_whatever_the_schedule() -> None:
    zone = {
        "kind": "zone", "middle": [1, 2], "boundary": 0.305, "middle_multiplier_after": 0.5,
    }  # fmt: skip
    found = audited(linear(1000, **zone))
    assert {100, 304, 305, 899} <= set(found)
    assert len(found) <= MOST_SHORT + 4


def test_short_stages_among_long_ones_do_not_take_their_bounds() -> None:
    falling = [0.5 - 0.001 * step for step in range(100)]
    found = audited(noise_of([*falling, *[0.1] * 50, *[0.05] * 50]))
    assert {0, 99, 100, 149, 150, 199} <= set(found)
    assert len(found) == MOST_SHORT + 4


def test_nothing_is_audited_without_noise() -> None:
    assert not any(is_audited(run_with(None), step) for step in range(5))


def test_the_steps_follow_from_the_run_alone() -> None:
    one, other = run_with(linear(200)), run_with(linear(300))
    first = [is_audited(one, step) for step in range(200)]
    for step in reversed(range(200)):
        is_audited(other, step)
        assert is_audited(one, step) is first[step]


def measured(run: Run, rng: random.Random, *, draws: int, factor: float = 1.0) -> NoiseMeasure:
    """Return what an audit of one layer measures when its noise is `factor` times the declared."""
    assert run.noise is not None
    looked_at = [s for s in range(len(run.noise.sigma)) if is_audited(run, s)]
    squares, scheduled = 0.0, 0.0
    for step in looked_at:
        sigma = run.noise.sigma[step]
        # The sum of n squared normal draws is a gamma variable of shape n / 2 and scale 2.
        squares += (factor * sigma) ** 2 * rng.gammavariate(draws / 2, 2)
        scheduled += draws * sigma**2
    count = draws * len(looked_at)
    return NoiseMeasure(
        layer=0,
        looks=len(looked_at),
        scheduled=math.sqrt(scheduled / count),
        realised=math.sqrt(squares / count),
        draws=count,
    )


def test_few_draws_under_a_falling_sigma_raise_no_false_alarm() -> None:
    """The first stages outweigh the last ones a thousandfold: pooled over all steps, a norm of 64
    weights has the certainty of a few hundred draws, not of the thousands that were made."""
    policy = NoisePolicy.model_validate(
        {
            "carrier": "rmsnorm_weight",
            "schedule": {"kind": "geometric", "sigma_start": 0.01, "sigma_end": 0.0001},
            "targeting": {"kind": "targeted", "layers": [0]},
        }
    )
    run = run_with(policy.resolve(steps=60, layer_count=1, fault_layers=(0,)))
    rng = random.Random(0)
    alarms = [
        list(audit._noise_mismatches(run, 60, [measured(run, rng, draws=128)], torch.float32))
        for _ in range(20_000)
    ]
    assert not any(alarms)
    # 128 draws in each of two steps of a sigma: half too much or too little cannot be chance.
    for factor in (0.5, 1.5):
        wrong = measured(run, rng, draws=128, factor=factor)
        assert list(audit._noise_mismatches(run, 60, [wrong], torch.float32))
