"""Packs drawn at random: a run is the same whatever shares its pack, and wherever it was interrupted."""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from exactness import BIT_FOR_BIT
from tiny import (
    CLEAN,
    LAYERS,
    one_pack,
    save_tiny_model,
    tiny_data,
    tiny_pack,
    tiny_run,
    tiny_setting,
    tiny_training,
)

from aqn_tune.faults import DeadZone, RelativeGaussian
from aqn_tune.ledger.rows import EvaluationRow, TrainingRow
from aqn_tune.study.device import Device
from aqn_tune.study.engine import Shared
from aqn_tune.study.runs import Condition, Run, pack_key
from aqn_tune.training.engine import ENGINE
from aqn_tune.training.evaluate import Evaluated, evaluate
from aqn_tune.training.groups import Group, Groups
from aqn_tune.training.memory import Fit
from aqn_tune.training.state import ReplicaState

torch.set_num_threads(1)

STEPS = 6
NUMBERS = range(12)
CUTS = range(1, STEPS)
TOLERANCE = 1e-5
"""Of packs whose products are not the run's own to the last bit."""
SHAPES = ((4, 1), (4, 2), (8, 4), (2, 1))
ODD_SHAPES = ((3, 1), (6, 2))
"""Rows of a step, and the microbatches that they are split into."""
TARGETINGS = ("global", "targeted", "healthy", {"kind": "window", "centre": 2, "width": 2})
CARRIERS = ("hidden", "rmsnorm_weight", "linear_weight")
PACK = {"seconds", "eval_seconds", "generate_seconds", "pack_size", "lockstep", "lockstep_limit"}
"""What a row says of the pack, not of the run."""


# -- what is drawn ---------------------------------------------------------------------------------


class Drawn(NamedTuple):
    dtype: str
    runs: tuple[Run, ...]
    wild: int | None
    """Place of the run that diverges."""
    by: str
    """What it diverges by."""

    def microbatch(self) -> int:
        spec = self.runs[0].training
        return spec.batch_size // spec.gradient_accumulation_steps


def draw_pack(number: int, *, size: int, wild: bool) -> Drawn:
    """Return runs that share a pack and differ in what may differ in one."""
    draw = random.Random(number)
    dtype = draw.choice(("float32", "float64"))
    shape = draw.choice(ODD_SHAPES if number % 4 == 3 else SHAPES)
    # A scaling that is no power of two is shared by the whole pack, or it is no pack.
    scalings = draw.choice(((0.5, 1.0, 2.0), (0.75,)))
    runs = [
        draw_run(draw, full=number % 4 == 2, shape=shape, scalings=scalings) for _ in range(size)
    ]
    place, by = None, ""
    if wild:
        place, by = draw.randrange(size), draw.choice(("learning_rate", "sigma"))
        runs[place] = made_wild(runs[place], by, 1e38 if dtype == "float32" else 1e300)
    return Drawn(dtype, tuple(runs), place, by)


def draw_run(
    draw: random.Random,
    *,
    full: bool,
    shape: tuple[int, int],
    scalings: Sequence[float],
) -> Run:
    rank = draw.choice((2, 3, 4, 8, 16))
    lora = {"kind": "lora", "rank": rank, "alpha": draw.choice(scalings) * rank}
    training = tiny_training(
        steps=STEPS,
        method={"kind": "full"} if full else lora,
        batch_size=shape[0],
        gradient_accumulation_steps=shape[1],
        learning_rate=10 ** draw.uniform(-4, -2),
        weight_decay=draw.choice((0.0, 0.1)),
        max_grad_norm=draw.choice((1.0, 1e-2)),
    )
    dead = DeadZone(
        layers=tuple(sorted(draw.sample(range(LAYERS), draw.randint(1, 2)))),
        threshold=draw.uniform(0.05, 0.4),
        reference=draw.choice(("token_max", "tensor_max", "quantile")),
    )
    unit = RelativeGaussian(layers=(draw.randrange(LAYERS),), scale=draw.uniform(0.01, 0.1))
    device = Device(faults=draw.choice(((), (dead,), (dead,), (dead, unit))))
    policy = {
        "carrier": draw.choice(CARRIERS),
        "targeting": draw.choice(TARGETINGS),
        "schedule": draw.choice(
            ({"kind": "geometric"}, {"kind": "constant", "sigma": 10 ** draw.uniform(-3, -1)})
        ),
        "redraw": draw.choice(("step", "step", "microbatch")),
    }
    deployed = draw.choice(
        (
            Device(faults=(dead,)),
            Device(faults=(dead, unit)),
            Device(faults=(dead,), deploy="unmerged" if full else "merged"),
        )
    )
    return tiny_run(
        seed=draw.choice((2, 4, 6)),
        training=training,
        device=device.resolved(LAYERS, weights_trained=full),
        policy=policy if draw.random() < 0.75 else None,
        train_layers=draw.choice((None, None, (0, 3))),
        observed_steps=draw.choice(((), (), (0, 3))),
        conditions=(
            CLEAN,
            Condition(name="faulty", scenario="drawn", device=deployed, draws=draw.randint(1, 2)),
        ),
    )


def made_wild(run: Run, by: str, huge: float) -> Run:
    """Return a run that leaves the range of its numbers, by its learning rate or by its noise."""
    if by == "learning_rate":
        training = run.training.model_copy(update={"learning_rate": huge})
        return run.model_copy(update={"training": training})
    policy = {"targeting": "global", "schedule": {"kind": "constant", "sigma": huge}}
    noised = tiny_run(training=run.training, policy=policy)
    return run.model_copy(update={"noise": noised.noise})


def packs() -> list[Drawn]:
    """Return a pack of each size from 1 to 8, and four more; every third has a run that diverges."""
    return [
        draw_pack(number, size=number % 8 + 1, wild=number % 3 == 1 and number % 8 > 0)
        for number in NUMBERS
    ]


def interrupted(cut: int) -> Drawn:
    return draw_pack(100 + cut, size=5, wild=cut % 2 == 1)


# -- what a run comes to ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def is_exact(folder: Path, drawn: Drawn) -> bool:
    """Return whether runs are held to the last bit: see `ReplicaPack`."""
    tokens = drawn.microbatch() * tiny_data(folder).tokens.shape[1]
    return BIT_FOR_BIT and tokens % 16 == 0


class Outcome(NamedTuple):
    """What the engine says of one run."""

    trainings: list[TrainingRow]
    evaluations: list[EvaluationRow]
    state: ReplicaState


@functools.cache
def shared(folder: Path, dtype: str) -> Shared:
    return ENGINE.load(tiny_setting(folder, dtype=dtype), "test", 64)


def outcomes(folder: Path, dtype: str, runs: Sequence[Run]) -> list[Outcome]:
    """Train runs in one pack, and return what each comes to."""
    setting = tiny_setting(folder, dtype=dtype)
    keys = [run.training_key(setting) for run in runs]
    assert len(set(keys)) == len(runs)
    opened = ENGINE.open_pack(one_pack(*runs, rungs=(2, STEPS)), setting, shared(folder, dtype))
    reports = [opened.advance(), opened.advance()]
    states = torch.load(io.BytesIO(opened.state()), weights_only=True)["runs"]
    trainings = [row for report in reports for row in report.trainings]
    evaluations = [row for report in reports for row in report.evaluations]
    return [
        Outcome(
            [row for row in trainings if row.training_key == key],
            [row for row in evaluations if row.training_key == key],
            ReplicaState(**state),
        )
        for key, state in zip(keys, states, strict=True)
    ]


def assert_same_state(one: ReplicaState, other: ReplicaState, *, exactly: bool) -> None:
    assert one.failure == other.failure
    assert one.train_losses == pytest.approx(
        other.train_losses, rel=0, abs=0 if exactly else TOLERANCE
    )
    if one.failure:
        return
    assert one.row.keys() == other.row.keys()
    for name, tensor in one.row.items():
        if exactly:
            assert torch.equal(tensor, other.row[name]), name
    if exactly:
        assert one._replace(row={}) == other._replace(row={})
        return
    weights, others = one.row["weights"], other.row["weights"]
    assert torch.allclose(weights, others, rtol=0, atol=TOLERANCE)


def assert_same_evaluations(ones: Sequence[Any], others: Sequence[Any], *, exactly: bool) -> None:
    """Hold `EvaluationRow`s or `Evaluated` to one another."""
    if exactly:
        assert list(ones) == list(others)
        return
    assert [one.loss for one in ones] == pytest.approx(
        [other.loss for other in others], rel=0, abs=TOLERANCE
    )


def assert_same(one: Outcome, other: Outcome, *, exactly: bool) -> None:
    for mine, theirs in zip(one.trainings, other.trainings, strict=True):
        assert (mine.status, mine.error) == (theirs.status, theirs.error)
        assert mine.step_reached == theirs.step_reached
        if exactly:
            assert mine.model_dump(exclude=PACK) == theirs.model_dump(exclude=PACK)
    assert_same_evaluations(one.evaluations, other.evaluations, exactly=exactly)
    assert_same_state(one.state, other.state, exactly=exactly)


# -- the tests -------------------------------------------------------------------------------------


def test_the_draws_reach_all_that_a_pack_may_hold(folder: Path) -> None:
    drawn = [*packs(), *map(interrupted, CUTS)]
    assert {len(one.runs) for one in drawn} == set(range(1, 9))
    assert {one.by for one in drawn} == {"", "learning_rate", "sigma"}
    accumulations = {one.runs[0].training.gradient_accumulation_steps for one in drawn}
    assert accumulations == {1, 2, 4}
    width = tiny_data(folder).tokens.shape[1]
    shapes = {(one.microbatch() * width % 16 == 0, one.dtype) for one in packs()}
    assert shapes == {(even, dtype) for even in (True, False) for dtype in ("float32", "float64")}
    trained = {
        (run.training.method.kind, run.noise is not None) for one in drawn for run in one.runs
    }
    assert trained == {(kind, noised) for kind in ("lora", "full") for noised in (True, False)}
    noises = [run.noise for one in drawn for run in one.runs if run.noise]
    assert {noise.carrier.kind for noise in noises} == set(CARRIERS)
    assert {noise.redraw for noise in noises} == {"step", "microbatch"}
    for differing in ("learning_rate", "weight_decay", "method"):
        assert any(len({getattr(run.training, differing) for run in one.runs}) > 1 for one in drawn)
    for one in drawn:
        assert len({pack_key(run) for run in one.runs}) == 1


@pytest.mark.parametrize("number", NUMBERS)
def test_every_run_of_a_pack_is_the_run_alone(folder: Path, number: int) -> None:
    """Losses, weights, moments, evaluations, audits and observations; where one diverges, the others' too."""
    drawn = packs()[number]
    exactly = is_exact(folder, drawn)
    together = outcomes(folder, drawn.dtype, drawn.runs)
    for place, run in enumerate(drawn.runs):
        (alone,) = outcomes(folder, drawn.dtype, [run])
        assert_same(together[place], alone, exactly=exactly)
        failed = place == drawn.wild
        assert together[place].trainings[-1].status == ("failed" if failed else "finished")
        assert bool(together[place].state.failure) is failed


def through(
    folder: Path,
    dtype: str,
    runs: Sequence[Run],
    to: int,
    *,
    size: int = 1,
    states: Sequence[ReplicaState] = (),
) -> list[tuple[ReplicaState, list[Evaluated]]]:
    """Take runs on to a step, in groups of at most `size`; return where each stands and what it comes to."""
    groups = Groups(runs, lambda some: tiny_pack(folder, some, dtype=dtype), Fit(size, ""))
    if states:
        groups.restore(states, None)

    def work(group: Group) -> list[list[Evaluated]]:
        group.pack.train_to(to)
        found = list(evaluate(group.pack, tiny_data(folder, "test"), 16, stream="test"))
        return [
            [one._replace(replica=0) for one in found if one.replica == replica]
            for replica in range(len(group.pack.runs))
        ]

    found = [its for group in groups.through(work, last=False) for its in group]
    return list(zip(groups.states(), found, strict=True))


def read_back(states: Sequence[ReplicaState]) -> list[ReplicaState]:
    """Return states as another process reads them."""
    buffer = io.BytesIO()
    torch.save([state._asdict() for state in states], buffer)
    buffer.seek(0)
    return [ReplicaState(**state) for state in torch.load(buffer, weights_only=True)]


@pytest.mark.parametrize("cut", CUTS)
def test_a_run_killed_at_any_step_goes_on_in_any_pack(folder: Path, cut: int) -> None:
    drawn, draw = interrupted(cut), random.Random(cut)
    exactly = is_exact(folder, drawn)
    count = len(drawn.runs)
    before, after = (draw.sample(range(count), count) for _ in range(2))
    size, other = draw.sample(range(1, count + 1), 2)
    runs = drawn.runs
    stopped = through(folder, drawn.dtype, [runs[n] for n in before], cut, size=size)
    saved = dict(zip(before, read_back([state for state, _ in stopped]), strict=True))
    states = [saved[n] for n in after]
    ended = through(folder, drawn.dtype, [runs[n] for n in after], STEPS, size=other, states=states)
    for number, (state, evaluated) in zip(after, ended, strict=True):
        [(straight, its)] = through(folder, drawn.dtype, [runs[number]], STEPS)
        assert_same_state(state, straight, exactly=exactly)
        assert_same_evaluations(evaluated, its, exactly=exactly)
        assert bool(state.failure) is (number == drawn.wild)
