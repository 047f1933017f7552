"""Runs that the memory does not hold at once: a group at a time, and halves of one that ran out of it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exactness import exact
from test_training_memory import numbers, reports
from test_training_pack import mixed_runs
from test_training_stacked import full_run
from tiny import one_pack, save_tiny_model, tiny_setting

from aqn_tune.study.engine import PackTraining
from aqn_tune.study.runs import Run
from aqn_tune.training import engine as engine_module
from aqn_tune.training.engine import ENGINE
from aqn_tune.training.pack import ReplicaPack

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
    training.advance()
    again = opened(folder, mixed_runs()[1:3])
    again.restore(before)
    assert {row.step_reached for row in again.advance().trainings} == {
        mixed_runs()[1].training.steps
    }


def test_time_lost_to_the_memory_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a second whenever it is read."""
    clock = itertools.count(1.0)
    monkeypatch.setattr(engine_module.time, "perf_counter", lambda: next(clock))

    def seconds() -> float:
        return sum(row.seconds for row in opened(folder, mixed_runs()[1:3]).advance().trainings)

    whole = seconds()
    without_memory(monkeypatch, beyond=1)
    # Two groups, and the start of the training step that failed.
    assert seconds() == 2 * whole + 1
