"""Runs of different LoRA rank in one pack: each is the run alone, bit for bit, and the padding is nothing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import exact
from safetensors.torch import load_file
from tiny import (
    CLEAN,
    one_pack,
    save_tiny_model,
    tiny_data,
    tiny_pack,
    tiny_run,
    tiny_setting,
    tiny_training,
)

from aqn_tune.faults import DeadZone, RelativeGaussian
from aqn_tune.models.load import build_model
from aqn_tune.study.device import Device
from aqn_tune.study.runs import Condition, Run, pack_key
from aqn_tune.training import arena as arena_module
from aqn_tune.training import memory
from aqn_tune.training.arena import Arena
from aqn_tune.training.engine import ENGINE
from aqn_tune.training.evaluate import Evaluated, evaluate
from aqn_tune.training.lora import ReplicaLinear
from aqn_tune.training.pack import ReplicaPack
from aqn_tune.training.state import restore, state_of

torch.set_num_threads(1)

STEPS = 20
DEAD = DeadZone(layers=(1,), threshold=0.2)
UNIT = RelativeGaussian(layers=(0, 2), scale=0.05)
NOISE = {"targeting": "global", "schedule": {"kind": "constant", "sigma": 0.02}}
CONDITIONS = (
    CLEAN,
    Condition(name="faulty", scenario="dead", device=Device(faults=(DEAD,))),
    Condition(name="faulty", scenario="merged", device=Device(faults=(DEAD,), deploy="merged")),
    Condition(name="faulty", scenario="unit", device=Device(faults=(UNIT,), adapter_path="faulty")),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def a_run(seed: int, rank: int, scaling: float, *faults: Any, **changes: Any) -> Run:
    """Return a run with weight decay; `training` and `policy` in `changes` are keys of either."""
    training = tiny_training(
        method={"kind": "lora", "rank": rank, "alpha": scaling * rank},
        **{"steps": STEPS, "warmup_steps": 2, "weight_decay": 0.1, **changes.pop("training", {})},
    )
    return tiny_run(*faults, seed=seed, training=training, **{"conditions": CONDITIONS, **changes})


MIXED = [
    a_run(2, 4, 0.5, DEAD),
    a_run(4, 8, 1.0, DEAD, policy=NOISE),
    a_run(6, 16, 2.0, DEAD, UNIT),
    a_run(2, 4, 2.0, DEAD, observed_steps=(0, 3), training={"max_grad_norm": 1e-2}),
    a_run(6, 5, 0.5, DEAD, training={"learning_rate": 1e-3}),
    a_run(4, 8, 1.0, DEAD, train_layers=(0, 3), observed_steps=(3,)),
]
FROZEN = 5


train = functools.partial(tiny_pack, steps=STEPS)


def evaluations(folder: Path, pack: ReplicaPack, replica: int) -> list[Evaluated]:
    found = list(evaluate(pack, tiny_data(folder, "test"), 16, stream="test"))
    assert [one.error for one in found] == [""] * len(found)
    return [one._replace(replica=0) for one in found if one.replica == replica]


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.shape == other[name].shape, name
        assert torch.equal(tensor, other[name]), name


def assert_each_is_the_run_alone(folder: Path, pack: ReplicaPack) -> None:
    dtype = str(pack.arena.weights.dtype).removeprefix("torch.")
    for index, run in enumerate(pack.runs):
        alone = train(folder, [run], dtype=dtype, steps=pack.step)
        assert alone.train_losses[0] == pack.train_losses[index]
        assert_equal(alone.arena.named_row(0), pack.arena.named_row(index))


def padding(pack: ReplicaPack, block: torch.Tensor, replica: int) -> torch.Tensor:
    """Return what of a row of the arena is not the replica's own, found from the rank alone."""
    rank, found = pack.runs[replica].training.method.rank, []
    for name in pack.arena.names():
        tensor = pack.arena.view(block, name)[replica]
        found.append(tensor[:, rank:] if name.endswith("lora_A") else tensor[rank:])
    return torch.cat([each.flatten() for each in found])


# -- a run in a pack and the run alone -------------------------------------------------------------


@pytest.fixture(scope="module", params=["float32", "float64"])
def together(request: pytest.FixtureRequest, folder: Path) -> ReplicaPack:
    pack = train(folder, MIXED, dtype=request.param)
    assert not pack.failures
    return pack


@exact
@pytest.mark.parametrize("index", range(len(MIXED)))
def test_a_run_among_other_ranks_is_the_run_alone(
    folder: Path, together: ReplicaPack, index: int
) -> None:
    dtype = str(together.arena.weights.dtype).removeprefix("torch.")
    alone = train(folder, [MIXED[index]], dtype=dtype)
    assert alone.train_losses[0] == together.train_losses[index]
    assert_equal(alone.arena.named_row(0), together.arena.named_row(index))
    assert_equal(alone.arena.state(0), together.arena.state(index))
    assert alone.audit(0) == together.audit(index)
    assert alone.observations[0] == together.observations[index]
    assert evaluations(folder, alone, 0) == evaluations(folder, together, index)


def test_the_padding_is_zero_and_so_is_its_gradient(together: ReplicaPack) -> None:
    """After 20 steps with weight decay."""
    for replica, run in enumerate(MIXED):
        beyond = padding(together, together.arena.weights, replica)
        assert bool(len(beyond)) is (run.training.method.rank < 16)
        assert not beyond.any()
        assert not padding(together, together.arena.gradients, replica).any()


def test_without_the_packed_copies_the_padding_stays_zero_too(folder: Path) -> None:
    """Zeros in A and B are a fixed point of the gradient and of AdamW, not only left alone."""
    pack = train(folder, MIXED[:3], steps=0)
    pack.arena._padded.clear()
    pack.arena.optimizers.clear()
    pack.arena.start_optimizers([run.training for run in pack.runs])
    pack.train_to(STEPS)
    for replica in (0, 1):
        assert len(padding(pack, pack.arena.weights, replica))
        assert not padding(pack, pack.arena.weights, replica).any()


@exact
def test_the_norm_that_is_clipped_is_that_of_the_run_alone(folder: Path) -> None:
    def norms(runs: Sequence[Run]) -> list[float]:
        pack = train(folder, runs, steps=3)
        with pack.injection:
            pack._losses_and_gradients()
        return [pack.arena.clip_and_step(k, 1e-3, 1e-2) for k in range(len(runs))]

    assert norms(MIXED) == [norm for run in MIXED for norm in norms([run])]
    assert min(norms(MIXED)) > 1e-2


def test_frozen_layers_beside_padding(folder: Path, together: ReplicaPack) -> None:
    """Layers 1 and 2 stay as they were drawn, and are not counted."""
    at_first = train(folder, [MIXED[FROZEN]], steps=0).arena.named_row(0)
    own = together.arena.named_row(FROZEN)
    trained = 0
    for name, tensor in own.items():
        is_trained = name.startswith(("model.layers.0.", "model.layers.3."))
        assert together.arena.is_trained(FROZEN, name) is is_trained
        assert torch.equal(tensor, at_first[name].to(tensor.dtype)) is not is_trained, name
        trained += is_trained * tensor.numel()
    assert together.arena.trained_size(FROZEN) == trained
    assert together.arena.trained_size(1) == sum(tensor.numel() for tensor in own.values())


@exact
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ranks", [(2, 64), (3, 33), (64, 2, 33, 3)])
def test_ranks_far_apart_are_each_the_run_alone(
    folder: Path, ranks: tuple[int, ...], dtype: str
) -> None:
    runs = [
        a_run(2 * number, rank, (0.5, 2.0)[number % 2], DEAD, policy=NOISE)
        for number, rank in enumerate(ranks, 1)
    ]
    assert len({pack_key(run) for run in runs}) == 1
    pack = train(folder, runs, dtype=dtype, steps=8)
    assert not pack.failures
    assert_each_is_the_run_alone(folder, pack)


@exact
def test_equal_scalings_that_round_share_a_pack(folder: Path) -> None:
    runs = [a_run(2, 4, 0.7, DEAD), a_run(4, 8, 0.7, DEAD), a_run(6, 13, 0.7, policy=NOISE)]
    assert len({pack_key(run) for run in runs}) == 1
    assert_each_is_the_run_alone(folder, train(folder, runs, steps=8))


@exact
def test_a_diverging_neighbour_of_another_rank_fails_alone(folder: Path) -> None:
    wild = a_run(2, 4, 1.0, training={"learning_rate": 1e38})
    pack = train(folder, [wild, MIXED[1], MIXED[2]], steps=6)
    assert list(pack.failures) == [0]
    for index in (1, 2):
        assert pack.train_losses[index] == train(folder, [MIXED[index]], steps=6).train_losses[0]
    assert not padding(pack, pack.arena.weights, 0).any()


def test_runs_of_one_rank_and_scaling_do_nothing_that_mixed_ones_need(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def packed(*_: object) -> None:
        raise AssertionError("packed")

    monkeypatch.setattr(arena_module, "OwnPart", packed)
    pack = train(folder, [a_run(2, 8, 2.0), a_run(4, 8, 2.0, DEAD)], steps=1)
    for linear in pack.folded:
        assert isinstance(linear, ReplicaLinear)
        assert linear._factors is None
    with pytest.raises(AssertionError, match="packed"):
        train(folder, MIXED[:2], steps=0)


@exact
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_layers_take_mixed_ranks(folder: Path) -> None:
    runs = [
        a_run(2, 4, 0.5, DEAD, training={"compile": True}),
        a_run(4, 16, 2.0, DEAD, policy=NOISE, training={"compile": True}),
    ]
    assert len({pack_key(run) for run in runs}) == 1
    assert_each_is_the_run_alone(folder, train(folder, runs, steps=6))


# -- states and exports ----------------------------------------------------------------------------

ALONE, SMALL, LARGE = [0], [1, 0], [2, 0, 1]
"""Packs by their runs' numbers: run 0 has no padding, is padded to rank 8, to rank 16."""


@exact
@pytest.mark.parametrize(
    ("before", "after"),
    [(LARGE, ALONE), (ALONE, LARGE), (LARGE, SMALL), (SMALL, LARGE), (SMALL, ALONE)],
)
def test_a_state_continues_in_any_pack(folder: Path, before: list[int], after: list[int]) -> None:
    """What a run saves is what it saves alone, so that a state has no trace of the pack it is from."""
    straight = train(folder, [MIXED[0]])
    first = train(folder, [MIXED[number] for number in before], steps=7)
    alone = {number: state_of(train(folder, [MIXED[number]], steps=7), 0) for number in after}
    own = state_of(first, before.index(0))
    assert_equal(own.row, alone[0].row)
    second = train(folder, [MIXED[number] for number in after], steps=0)
    restore(second, [own if number == 0 else alone[number] for number in after])
    second.train_to(STEPS)
    at = after.index(0)
    assert second.train_losses[at] == straight.train_losses[0]
    assert_equal(second.arena.state(at), straight.arena.state(0))
    assert evaluations(folder, second, at) == evaluations(folder, straight, 0)


@exact
def test_every_run_exports_an_adapter_of_its_own_rank(folder: Path, tmp_path: Path) -> None:
    setting = tiny_setting(folder)
    runs = [a_run(2, 4, 0.5, training={"steps": 4}), a_run(4, 16, 2.0, training={"steps": 4})]
    shared = ENGINE.load(setting, "test", 64)

    def exported(where: Path, *of: Run) -> list[dict[str, torch.Tensor]]:
        folders = {run.training_key(setting): str(where / str(run.seed)) for run in of}
        pack = one_pack(*of, rungs=(4,), export=folders)
        report = ENGINE.open_pack(pack, setting, shared).advance()
        assert [row.lockstep for row in report.trainings] == [len(of)] * len(of)
        return [load_file(Path(each) / "adapter_model.safetensors") for each in folders.values()]

    both = exported(tmp_path / "together", *runs)
    for run, own in zip(runs, both, strict=True):
        (alone,) = exported(tmp_path / "alone", run)
        assert_equal(own, alone)
        rank = run.training.method.rank
        for name, tensor in own.items():
            assert tensor.shape[0 if "lora_A" in name else 1] == rank, name


# -- which runs share a pack -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ((8, 16.0), (8, 16.0), True),
        ((4, 16.0), (32, 16.0), True),  # scalings 4 and 1/2
        ((2, 2.0), (64, 16.0), True),
        ((8, 6.0), (16, 12.0), True),  # 3/4 both
        ((8, 6.0), (8, 8.0), False),
        ((6, 16.0), (8, 16.0), False),  # 8/3 and 2
        ((6, 16.0), (12, 32.0), True),
        ((1, 1.0), (2, 2.0), False),
        ((1, 1.0), (1, 2.0), True),
        ((64, 64.0), (65, 65.0), False),
    ],
)
def test_which_ranks_and_scalings_share_a_pack(
    one: tuple[int, float], other: tuple[int, float], shared: bool
) -> None:
    keys = {pack_key(a_run(2, rank, alpha / rank)) for rank, alpha in (one, other)}
    assert (len(keys) == 1) is shared


def test_other_modules_and_sizes_are_kept_apart() -> None:
    one = a_run(2, 4, 1.0)
    method = one.training.method.model_copy(update={"target_modules": ("q_proj",)})
    for changes in ({"method": method}, {"batch_size": 8}, {"compile": True}):
        other = one.model_copy(update={"training": one.training.model_copy(update=changes)})
        assert pack_key(other) != pack_key(one)


def test_memory_is_planned_for_the_largest_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = tiny_data(folder), build_model(tiny_setting(folder).model)
    runs = (a_run(2, 4, 1.0), a_run(4, 32, 1.0), a_run(6, 8, 1.0))
    alone = memory.bound_per_run(runs[1], model, data)
    bound = memory.bound_per_run(runs[1], model, data, padded=True)
    assert memory.bound_per_run(runs[0], model, data) < alone < bound
    for free, fits in ((2 * 3 * bound, True), (2 * 3 * bound - 8, False)):
        asked: list[int] = []

        def measured(*_: object, rank: int, padded: bool, asked: list[int] = asked) -> int:
            asked.append(rank)
            return bound

        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        monkeypatch.setattr(memory, "measured_per_run", measured)
        assert memory.fitting(runs, model, data, share=1.0).runs == (3 if fits else 2)
        assert asked == ([] if fits else [32])


@pytest.mark.parametrize("shape", [(4, 9), (5, 8), (4,)])
def test_a_shape_that_does_not_fit_its_entry_is_refused(shape: tuple[int, ...]) -> None:
    arena = Arena({"w": torch.Size([4, 8])}, 2, torch.float32)
    with pytest.raises(ValueError, match=r"w: .* does not fit"):
        arena.pad(0, {"w": torch.Size(shape)})
