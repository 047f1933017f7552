"""How many runs share a pack: what memory and the model allow, said and never silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import exact
from test_training_pack import mixed_runs
from test_training_stacked import full_run
from tiny import noise, one_pack, save_tiny_model, tiny_data, tiny_setting

from aqn_tune.errors import UserError
from aqn_tune.models.load import build_model
from aqn_tune.quantization import MXFP4
from aqn_tune.study.device import Device
from aqn_tune.study.engine import RungReport
from aqn_tune.study.runs import Run
from aqn_tune.training import engine as engine_module
from aqn_tune.training import memory
from aqn_tune.training.engine import ENGINE
from aqn_tune.training.pack import ReplicaPack

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def model_of(folder: Path) -> Any:
    return build_model(tiny_setting(folder).model)


def busy(run: Run) -> Run:
    """Return a run in which everything that keeps activations is on."""
    constant = {"kind": "constant", "sigma": 0.02}
    return run.model_copy(
        update={
            "noise": noise(run.training, {"targeting": "global", "schedule": constant}),
            "device": Device(faults=run.device.faults, quantization=(MXFP4(),)),
        }
    )


@pytest.mark.parametrize(
    "run",
    [mixed_runs()[0], busy(mixed_runs()[7]), full_run(2), busy(full_run(2))],
    ids=["lora", "lora with everything", "full", "full with everything"],
)
def test_the_bound_of_a_run_is_one(folder: Path, run: Run) -> None:
    data = tiny_data(folder)
    measured = memory.measured_per_run(run, model_of(folder), data)
    bound = memory.bound_per_run(run, model_of(folder), data)
    assert measured < bound < 10 * measured


def test_what_a_step_keeps_grows_with_the_runs(folder: Path) -> None:
    runs = tuple(mixed_runs()[1:4])
    alone = ReplicaPack(model_of(folder), runs[:1], tiny_data(folder)).saved_bytes()
    together = ReplicaPack(model_of(folder), runs, tiny_data(folder)).saved_bytes()
    assert 2.5 * alone < together < 3.5 * alone


@pytest.mark.parametrize(
    ("packs_that_fit", "runs"),
    [(0.1, 1), (1.0, 1), (2.5, 2), (3.9, 3), (4.1, 4)],
)
def test_as_many_runs_as_fit_share_a_pack(
    folder: Path, monkeypatch: pytest.MonkeyPatch, packs_that_fit: float, runs: int
) -> None:
    """By the measured size of a run: half of a worker's share of the free memory is for packs."""
    one = full_run(2)
    needed = memory.measured_per_run(one, model_of(folder), tiny_data(folder))
    free = int(packs_that_fit * needed * 2 * 2 + 8)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    four = tuple(full_run(seed) for seed in (2, 4, 6, 8))
    fit = memory.fitting(four, model_of(folder), tiny_data(folder), share=0.5)
    assert fit.runs == runs
    assert fit.why.startswith("a run takes ") is (runs < 4)


def test_nothing_is_measured_where_memory_is_plenty(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object) -> int:
        raise AssertionError("measured")

    monkeypatch.setattr(memory, "measured_per_run", measured)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 33)
    runs = (full_run(2), full_run(4))
    assert memory.fitting(runs, model_of(folder), tiny_data(folder), share=0.5) == (2, "")


@pytest.mark.parametrize(
    ("limit", "used", "cached", "free"),
    [
        (None, None, 50, 900),
        (1000, 400, 0, 600),
        (1000, 400, 200, 800),
        (1000, 400, 700, 900),
        (5000, 400, 0, 900),
        (1000, 1400, 0, 0),
        (1000, 1400, 500, 100),
        (None, 400, 50, 900),
        (1000, None, 50, 900),
    ],
)
def test_free_memory_is_what_the_container_leaves(
    monkeypatch: pytest.MonkeyPatch,
    limit: int | None,
    used: int | None,
    cached: int,
    free: int,
) -> None:
    """What its files take is given up before anything of a run is, and counts as free."""

    class Machine:
        available = 900

    monkeypatch.setattr(memory.psutil, "virtual_memory", Machine)
    monkeypatch.setattr(memory, "_number", lambda path: limit if "max" in path.name else used)
    monkeypatch.setattr(memory, "_cached_files", lambda stat: cached)
    assert memory.free_bytes(torch.device("cpu")) == free


@pytest.mark.parametrize(
    ("file", "number"),
    [("limited", 1 << 30), ("unlimited", None), ("missing", None), ("unreadable", None)],
)
def test_a_limit_of_the_container_is_read_from_its_file(
    tmp_path: Path, file: str, number: int | None
) -> None:
    (tmp_path / "limited").write_text("1073741824\n")
    (tmp_path / "unlimited").write_text("max\n")
    (tmp_path / "unreadable").mkdir()
    assert memory._number(tmp_path / file) == number


@pytest.mark.parametrize(
    ("text", "cached"),
    [
        ("anon 100\nfile 300\ninactive_file 200\nactive_file 90\n", 200),
        ("inactive_file 4096\n", 4096),
        ("inactive_anon 7\nactive_file 8\ntotal_inactive_file 9\n", 0),
        ("inactive_file\nanon 1\n", 0),
        ("", 0),
        (None, 0),
    ],
    ids=["among others", "alone", "others alone", "no number", "empty", "no file"],
)
def test_cached_files_are_the_inactive_ones(tmp_path: Path, text: str | None, cached: int) -> None:
    """Active ones are not given up first."""
    if text is not None:
        (tmp_path / "memory.stat").write_text(text)
    assert memory._cached_files(tmp_path / "memory.stat") == cached


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, is_memory: bool) -> None:
    assert memory.is_out_of_memory(error) is is_memory


# -- the engine ------------------------------------------------------------------------------------


def reports(folder: Path, runs: list[Run], **changes: Any) -> list[RungReport]:
    setting = tiny_setting(folder)
    pack = one_pack(*runs, rungs=(3, runs[0].training.steps), **changes)
    opened = ENGINE.open_pack(pack, setting, ENGINE.load(setting, "test", 64))
    return [opened.advance(), opened.advance()]


def numbers(report: RungReport) -> list[Any]:
    apart = {"seconds", "eval_seconds", "generate_seconds", "lockstep", "lockstep_limit"}
    return [
        *report.evaluations,
        *(row.model_dump(exclude=apart) for row in report.trainings),
    ]


@exact
@pytest.mark.parametrize("lockstep", [1, 2])
def test_a_limit_changes_no_number_and_is_said(folder: Path, lockstep: int) -> None:
    runs = mixed_runs()[1:4]
    together, apart = reports(folder, runs), reports(folder, runs, lockstep=lockstep)
    for one, other in zip(together, apart, strict=True):
        assert {row.lockstep for row in one.trainings} == {3}
        assert {row.lockstep_limit for row in one.trainings} == {""}
        assert max(row.lockstep for row in other.trainings) == lockstep
        assert {row.lockstep_limit for row in other.trainings} == {
            f"at most {lockstep} were asked for"
        }
        assert numbers(one) == numbers(other)


@exact
def test_a_model_that_cannot_be_stacked_trains_one_run_after_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [full_run(2), full_run(4)]
    together = reports(folder, runs)
    monkeypatch.setattr(engine_module, "obstacle", lambda model: "its embedding is odd")
    apart = reports(folder, runs)
    assert [row.lockstep for row in apart[-1].trainings] == [1, 1]
    assert {row.lockstep_limit for row in apart[-1].trainings} == {"its embedding is odd"}
    assert numbers(together[-1]) == numbers(apart[-1])


@exact
@pytest.mark.parametrize(
    ("at", "again_from", "lockstep"),
    [(2, 0, ([1, 2, 2], [1, 2, 2])), (4, 3, ([3, 3, 3], [1, 2, 2]))],
    ids=["in the first rung", "in the second rung"],
)
def test_out_of_memory_halves_the_pack_and_says_so(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    again_from: int,
    lockstep: tuple[list[int], list[int]],
) -> None:
    """Three runs do not fit, two do: they go on from the rung before, and give what they gave."""
    runs = mixed_runs()[1:4]
    together = reports(folder, runs)
    step = ReplicaPack._train_step
    halves: list[int] = []

    def scarce(self: ReplicaPack) -> None:
        if len(self.runs) < 3:
            halves.append(self.step)
        elif self.step == at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self)

    monkeypatch.setattr(ReplicaPack, "_train_step", scarce)
    halved = reports(folder, runs)
    for one, other, sizes in zip(together, halved, lockstep, strict=True):
        assert sorted(row.lockstep for row in other.trainings) == sizes
        limit = "the memory did not hold 3 at a time" if sizes[0] < 3 else ""
        assert {row.lockstep_limit for row in other.trainings} == {limit}
        assert numbers(one) == numbers(other)
    assert min(halves) == again_from


def test_a_run_that_does_not_fit_alone_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spent(self: ReplicaPack) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ReplicaPack, "_train_step", spent)
    with pytest.raises(torch.OutOfMemoryError):
        reports(folder, mixed_runs()[1:3])


def test_another_error_is_no_reason_to_try_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def broken(self: ReplicaPack) -> None:
        tries.append(len(self.runs))
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(ReplicaPack, "_train_step", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        reports(folder, mixed_runs()[1:3])
    assert tries == [2]


@exact
@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (2, 3)])
def test_a_state_continues_in_other_groups(folder: Path, before: int, after: int) -> None:
    """What a pack saved at a rung, groups of another size take up, to the same numbers."""
    runs = [mixed_runs()[index] for index in (2, 4, 7)]
    setting = tiny_setting(folder)
    shared = ENGINE.load(setting, "test", 64)
    straight = reports(folder, runs)[-1]
    pack = one_pack(*runs, rungs=(3, runs[0].training.steps))
    first = ENGINE.open_pack(pack.model_copy(update={"lockstep": before}), setting, shared)
    first.advance()
    second = ENGINE.open_pack(pack.model_copy(update={"lockstep": after}), setting, shared)
    second.restore(first.state())
    assert numbers(second.advance()) == numbers(straight)


def test_a_gpu_that_torch_does_not_find_is_a_user_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    setting = tiny_setting(folder)
    with pytest.raises(UserError, match=r"compute\.gpus_per_worker: .* finds no CUDA GPU"):
        ENGINE.open_pack(
            one_pack(mixed_runs()[0], rungs=(20,)),
            setting.model_copy(update={"device": "cuda"}),
            ENGINE.load(setting, "test", 64),
        )
    run = mixed_runs()[0]
    assert run.training_key(setting) != run.training_key(
        setting.model_copy(update={"device": "cuda"})
    )
