"""Runs that the memory does not hold at once: a group at a time, and halves of one that ran out of it."""

from __future__ import annotations

import itertools
import re
import types
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exactness import exact
from test_training_memory import numbers, reports
from test_training_pack import mixed_runs
from test_training_stacked import full_run
from tiny import one_pack, save_tiny_model, tiny_pack, tiny_setting

from aqn_tune.study.engine import PackTraining
from aqn_tune.study.runs import Run
from aqn_tune.training import engine as engine_module
from aqn_tune.training.engine import ENGINE
from aqn_tune.training.pack import ReplicaPack
from aqn_tune.training.state import restore, state_of

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def living(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Count the packs that are in memory."""
    packs: list[weakref.ref[ReplicaPack]] = []
    made = ReplicaPack.__init__

    def noted(self: ReplicaPack, *args: object, **fields: object) -> None:
        made(self, *args, **fields)  # type: ignore[arg-type]
        packs.append(weakref.ref(self))

    monkeypatch.setattr(ReplicaPack, "__init__", noted)
    return lambda: sum(pack() is not None for pack in packs)


def opened(folder: Path, runs: list[Run], **changes: object) -> PackTraining:
    setting = tiny_setting(folder)
    pack = one_pack(*runs, rungs=(3, runs[0].training.steps), **changes)
    return ENGINE.open_pack(pack, setting, ENGINE.load(setting, "test", 64))


def without_memory(
    monkeypatch: pytest.MonkeyPatch, *, beyond: int, at: int = 0, where: str = "_train_step"
) -> None:
    """Let packs of more than `beyond` runs run out of memory from step `at` on."""
    whole = getattr(ReplicaPack, where)

    def scarce(self: ReplicaPack, *args: object) -> object:
        if len(self.runs) > beyond and self.step >= at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, *args)

    monkeypatch.setattr(ReplicaPack, where, scarce)


@pytest.mark.parametrize("lockstep", [1, 2])
def test_one_group_is_in_memory_at_a_time(
    folder: Path, living: Callable[[], int], monkeypatch: pytest.MonkeyPatch, lockstep: int
) -> None:
    """Groups that are all open need the weights and moments of all runs, however small they are."""
    most = 0
    step = ReplicaPack._train_step

    def watched(self: ReplicaPack) -> None:
        nonlocal most
        most = max(most, living())
        step(self)

    monkeypatch.setattr(ReplicaPack, "_train_step", watched)
    training = opened(folder, [full_run(seed) for seed in (2, 4, 6)], lockstep=lockstep)
    training.advance()
    assert living() == 0
    training.advance()
    assert (most, living()) == (1, 0)


def test_the_only_group_stays_and_a_closed_pack_is_gone(
    folder: Path, living: Callable[[], int]
) -> None:
    training = opened(folder, mixed_runs()[1:4])
    training.advance()
    assert living() == 1
    training.close()
    assert living() == 0


def test_what_ran_out_of_memory_is_gone_before_its_halves_are_opened(
    folder: Path, living: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    whole = engine_module.build_model

    def watched(*args: object) -> object:
        alive.append(living())
        return whole(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine_module, "build_model", watched)
    without_memory(monkeypatch, beyond=2)
    reports(folder, mixed_runs()[1:4])
    assert len(alive) >= 4  # to look at it, the three, and at each rung the halves
    assert not any(alive)


@exact
@pytest.mark.parametrize(
    ("where", "at"),
    [("_train_step", 0), ("_train_step", 4), ("weights_hash", 0), ("weights_hash", 4)],
    ids=["first rung", "second rung", "first evaluation", "second evaluation"],
)
def test_halves_come_to_the_same_wherever_the_memory_ended(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, at: int
) -> None:
    runs = mixed_runs()[1:5]
    together = reports(folder, runs)
    without_memory(monkeypatch, beyond=1, at=at, where=where)
    halved = reports(folder, runs)
    assert [numbers(one) for one in halved] == [numbers(one) for one in together]
    assert {row.lockstep for row in halved[-1].trainings} == {1}
    assert {row.lockstep_limit for row in halved[-1].trainings} == {
        "the memory did not hold 2 at a time"
    }


def test_what_the_memory_held_is_remembered_by_the_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a pack that goes on elsewhere begins with the size that failed, and loses a rung to it."""
    runs = mixed_runs()[1:4]
    with monkeypatch.context() as scarce:
        without_memory(scarce, beyond=2)
        first = opened(folder, runs)
        first.advance()
    again = opened(folder, runs)
    again.restore(first.state())
    rows = again.advance().trainings
    assert sorted(row.lockstep for row in rows) == [1, 2, 2]
    assert {row.lockstep_limit for row in rows} == {"the memory did not hold more than 2 at a time"}
    asked = opened(folder, runs, lockstep=1)
    asked.advance()
    usual = opened(folder, runs)
    usual.restore(asked.state())
    assert {row.lockstep for row in usual.advance().trainings} == {3}, "asked for, not run out of"


def test_saved_states_do_not_move_with_the_training(folder: Path) -> None:
    training = opened(folder, mixed_runs()[1:3])
    training.advance()
    before = training.state()
    straight = training.advance()
    again = opened(folder, mixed_runs()[1:3])
    again.restore(before)
    report = again.advance()
    assert report.evaluations
    assert numbers(report) == numbers(straight)


def test_time_lost_to_the_memory_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a second whenever it is read, and in the step that fails."""
    clock = itertools.count(1.0)
    read = types.SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(engine_module, "time", read)
    step = ReplicaPack._train_step

    def scarce(self: ReplicaPack) -> None:
        if len(self.runs) > 1:
            next(clock)
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self)

    def seconds() -> float:
        return sum(row.seconds for row in opened(folder, mixed_runs()[1:3]).advance().trainings)

    whole = seconds()
    monkeypatch.setattr(ReplicaPack, "_train_step", scarce)
    # Two groups, and the second in which the step failed.
    assert seconds() == 2 * whole + 1


# -- states with a failed run ----------------------------------------------------------------------


def wild(run: Run) -> Run:
    """Return a run whose learning rate overflows float32 within the first steps."""
    training = run.training.model_copy(update={"learning_rate": 1e38})
    return run.model_copy(update={"training": training})


@exact
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize(("before", "after"), [(3, 3), (3, 1), (1, 3), (2, 3), (3, 2)])
def test_a_run_that_failed_stays_failed_in_other_groups(
    folder: Path, place: int, before: int, after: int
) -> None:
    """By itself it stands at the step where it failed, among others at theirs: neither holds them up."""
    runs = mixed_runs()[1:3]
    runs.insert(place, wild(mixed_runs()[3]))
    first, straight = reports(folder, runs)
    failed = first.trainings[place]
    assert failed.status == "failed"
    assert "training loss is nan" in failed.error

    saved = opened(folder, runs, lockstep=before)
    saved.advance()
    resumed = opened(folder, runs, lockstep=after)
    resumed.restore(saved.state())
    report = resumed.advance()
    assert numbers(report) == numbers(straight)
    again = report.trainings[place]
    assert (again.status, again.error, again.step_reached) == (
        "failed",
        failed.error,
        failed.step_reached,
    )
    assert not again.train_losses
    assert failed.training_key not in {row.training_key for row in report.evaluations}
    others = [row for row in report.trainings if row is not again]
    assert {row.status for row in others} == {"finished"}


@pytest.mark.parametrize(
    ("steps", "failed", "goes_on_at"),
    [
        ((2, 2), (), 2),
        ((1, 2), (), None),
        ((2, 1), (), None),
        ((1, 2), (0,), 2),
        ((1, 2), (1,), 1),
        ((1, 2, 2), (0,), 2),
        ((1, 2, 1), (0,), None),
        ((1, 2), (0, 1), 2),
    ],
)
def test_living_runs_of_a_pack_stand_at_one_step(
    folder: Path, steps: tuple[int, ...], failed: tuple[int, ...], goes_on_at: int | None
) -> None:
    runs = mixed_runs()[1 : 1 + len(steps)]
    states = [
        state_of(tiny_pack(folder, [run], steps=step), 0)
        for run, step in zip(runs, steps, strict=True)
    ]
    for number in failed:
        states[number] = states[number]._replace(failure="planted")
    pack = tiny_pack(folder, runs)
    if goes_on_at is None:
        living = [step for number, step in enumerate(steps) if number not in failed]
        message = f"runs at different steps cannot share a pack: {re.escape(str(living))}$"
        with pytest.raises(ValueError, match=message):
            restore(pack, states)
        return
    restore(pack, states)
    assert pack.step == goes_on_at
    assert pack.failures == dict.fromkeys(failed, "planted")
