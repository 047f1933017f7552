"""Full fine-tuning in lockstep: a run in a pack is the run alone, and is what transformers would train."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import exact
from test_injection_models import ARCHITECTURES, build
from test_training_pack import oracle_losses, true_float64_rmsnorm
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
from torch import nn

from aqn_tune.errors import UserError
from aqn_tune.faults import BitFlip, DeadZone, RelativeGaussian
from aqn_tune.faults.base import GRADIENT_SITES
from aqn_tune.injection.address import AddressBook
from aqn_tune.quantization import MXFP4
from aqn_tune.study.device import Device
from aqn_tune.study.runs import Condition, Run, pack_key
from aqn_tune.training.arena import Arena
from aqn_tune.training.engine import ENGINE
from aqn_tune.training.evaluate import evaluate
from aqn_tune.training.pack import ReplicaPack
from aqn_tune.training.stacked import Stacked, computes_in, obstacle, stack, transposed_weights
from aqn_tune.training.trained import make_trained

torch.set_num_threads(1)

STEPS = 8
TRAINING = tiny_training(steps=STEPS, warmup_steps=1, method={"kind": "full"}, learning_rate=1e-3)
DEAD = DeadZone(layers=(1,), threshold=0.2, reference="tensor_max")
FAULTY = Condition(name="faulty", scenario="s", device=Device(faults=(DEAD,)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def full_run(
    seed: int,
    *faults: Any,
    policy: dict[str, Any] | None = None,
    quantized: tuple[Any, ...] = (),
    train_layers: tuple[int, ...] | None = None,
    steps: int = STEPS,
    **changes: Any,
) -> Run:
    training = TRAINING.model_copy(update={"steps": steps, **changes})
    device = Device(faults=faults, quantization=quantized).resolved(4, weights_trained=True)
    forward = tuple(fault for fault in device.faults if fault.site not in GRADIENT_SITES)
    met = device.model_copy(update={"faults": tuple(f for f in forward if not f.is_off())})
    own = (Condition(name="faulty", scenario="t", device=met),)
    return tiny_run(
        seed=seed,
        policy=policy,
        training=training,
        device=device,
        train_layers=train_layers,
        conditions=(CLEAN, FAULTY, *own) if met.faults or quantized else (CLEAN, FAULTY),
    )


def mixed_runs() -> list[Run]:
    """Runs that differ in everything that may differ inside a pack, the weights' part above all."""
    flips = BitFlip(layers=(0, 2), modules=("linear",), site="weight", rate=1e-3, bits="mantissa")
    erring_norm = RelativeGaussian(
        layers=(1,), modules=("input_layernorm",), site="weight", scale=0.05
    )
    backward = RelativeGaussian(layers=(2,), scale=0.0, backward_scale=0.05)
    constant = {"kind": "constant", "sigma": 0.02}
    return [
        full_run(2),
        full_run(2, DEAD),
        full_run(2, DEAD, policy={"targeting": "global"}),
        full_run(4, DEAD, policy={"carrier": "rmsnorm_weight", "schedule": constant}),
        full_run(4, flips, learning_rate=5e-4),
        full_run(6, erring_norm, policy={"carrier": "linear_weight", "schedule": constant}),
        full_run(6, quantized=(MXFP4(),), train_layers=(1, 3)),
        full_run(8, backward, weight_decay=0.1),
    ]


train = functools.partial(tiny_pack, steps=STEPS)


@exact
def test_a_run_in_a_pack_equals_the_run_alone_bit_for_bit(folder: Path) -> None:
    runs = mixed_runs()
    together = train(folder, runs)
    assert not together.failures
    data = tiny_data(folder, "test")
    evaluated = list(evaluate(together, data, 16, stream="test"))
    assert not [one.error for one in evaluated if one.error]
    for index, run in enumerate(runs):
        alone = train(folder, [run])
        assert alone.train_losses[0] == together.train_losses[index], index
        assert torch.equal(alone.arena.weights[0], together.arena.weights[index]), index
        assert alone.audit(0) == together.audit(index), index
        mine = [one for one in evaluated if one.replica == index]
        assert [one._replace(replica=0) for one in mine] == list(
            evaluate(alone, data, 16, stream="test")
        )
    assert not together.failures


def held_to_transformers() -> list[Run]:
    return [
        full_run(2, DEAD, steps=50),
        full_run(4, DEAD, steps=50, policy={"targeting": "global"}),
        full_run(6, DEAD, steps=50, policy={"carrier": "rmsnorm_weight"}, learning_rate=5e-4),
    ]


@pytest.fixture(scope="module")
def in_float64(folder: Path) -> ReplicaPack:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen2RMSNorm, "forward", true_float64_rmsnorm)
        return train(folder, held_to_transformers(), dtype="float64", steps=50)


@pytest.mark.parametrize("index", range(3))
def test_a_pack_equals_transformers_in_float64(
    folder: Path, in_float64: ReplicaPack, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-9 over 50 steps, loss by loss."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    monkeypatch.setattr(Qwen2RMSNorm, "forward", true_float64_rmsnorm)
    expected = oracle_losses(folder, held_to_transformers()[index], 50)
    assert in_float64.train_losses[index] == pytest.approx(expected, rel=0, abs=1e-9)


@exact
def test_a_diverging_neighbour_fails_alone(folder: Path) -> None:
    run = mixed_runs()[2]
    wild = run.model_copy(update={"training": TRAINING.model_copy(update={"learning_rate": 1e38})})
    pack = train(folder, [wild, run])
    assert list(pack.failures) == [0]
    assert pack.train_losses[1] == train(folder, [run]).train_losses[0]


def test_seeds_of_a_config_share_a_pack_and_train_apart(folder: Path) -> None:
    setting = tiny_setting(folder)
    runs = [full_run(seed, DEAD) for seed in (2, 4)]
    assert len({pack_key(run) for run in runs}) == 1
    report = ENGINE.open_pack(
        one_pack(*runs, rungs=(STEPS,)), setting, ENGINE.load(setting, "test", 64)
    ).advance()
    assert [row.status for row in report.trainings] == ["finished", "finished"]
    assert report.trainings[0].train_losses != report.trainings[1].train_losses


def test_a_weight_changed_by_anything_but_the_update_fails_its_own_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise written into a stacked weight and left there, in one replica of two."""
    losses = ReplicaPack._losses_and_gradients

    def leaves_noise(self: ReplicaPack, *args: Any) -> list[float]:
        out = losses(self, *args)
        self.arena.weights.data[1, :5] += 0.01
        return out

    monkeypatch.setattr(ReplicaPack, "_losses_and_gradients", leaves_noise)
    pack = train(folder, [full_run(2), full_run(4)])
    assert pack.failures == {1: "weight audit: weights changed before the update of step 0"}


@pytest.mark.parametrize(
    "first", [0, -1], ids=["in every noised step", "in the last noised step alone"]
)
def test_noise_that_stays_in_a_weight_fails_its_run_where_noise_begins_and_where_it_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """Step 0, before any noise, is as it should be: the steps with noise are watched themselves."""
    runs = [full_run(2), full_run(4, policy={"targeting": "global"})]
    assert runs[1].noise is not None
    noised = [step for step, sigma in enumerate(runs[1].noise.sigma) if sigma > 0]
    assert 0 < noised[0] < noised[-1]
    leaking = noised[first:]
    losses = ReplicaPack._losses_and_gradients

    def leaves_noise(self: ReplicaPack, *args: Any) -> list[float]:
        out = losses(self, *args)
        if self.step in leaking:
            self.arena.weights.data[1, :5] += 0.01
        return out

    assert not train(folder, runs).failures
    monkeypatch.setattr(ReplicaPack, "_losses_and_gradients", leaves_noise)
    message = f"weight audit: weights changed before the update of step {noised[first]}"
    assert train(folder, runs).failures == {1: message}


# -- architectures ---------------------------------------------------------------------------------


def stacked_copy(model: nn.Module, replicas: int) -> tuple[nn.Module, Arena]:
    """Return a stacked copy whose replica k has every weight scaled by 1 + k / 10."""
    twin = copy.deepcopy(model)
    shapes = {name: parameter.shape for name, parameter in twin.named_parameters()}
    arena = Arena(shapes, replicas, torch.float64, transposed=transposed_weights(twin))
    stack(twin, arena)
    for replica in range(replicas):
        arena.weights[replica] *= 1 + replica / 10
    return twin, arena


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits
    return logits.square().mean(dim=(1, 2))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gpt2"])
def test_a_stacked_model_computes_what_its_replicas_would(name: str) -> None:
    """Outputs and gradients in float64, for every family of models."""
    base = build(name)
    assert obstacle(base) is None
    twin, arena = stacked_copy(base, 3)
    ids = torch.randint(0, 64, (3 * 2, 8), generator=torch.Generator().manual_seed(5))
    got = loss_of(twin, ids)
    arena.backward(got.sum())
    for replica in range(3):
        alone = copy.deepcopy(base).requires_grad_(True)
        with torch.no_grad():
            for parameter in alone.parameters():
                parameter *= 1 + replica / 10
        wanted = loss_of(alone, ids[2 * replica : 2 * replica + 2])
        wanted.sum().backward()
        assert torch.allclose(got[2 * replica : 2 * replica + 2], wanted, rtol=1e-9, atol=0)
        for parameter_name, parameter in alone.named_parameters():
            mine = arena.view(arena.gradients, parameter_name)[replica]
            assert torch.allclose(mine, parameter.grad, rtol=1e-7, atol=1e-12), parameter_name


def test_a_replica_may_fill_several_folds() -> None:
    twin, _ = stacked_copy(build("qwen2"), 2)
    ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(5))
    first, second = loss_of(twin, ids.repeat(2, 1)).chunk(2)
    for module in twin.modules():
        if isinstance(module, Stacked):
            module.replica_of_fold = torch.tensor([1, 0, 1])
    assert torch.equal(loss_of(twin, ids.repeat(3, 1)), torch.cat([second, first, second]))


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))


def with_(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    model.add_module(name, module)
    return model


def with_embedding(option: str, value: object) -> nn.Module:
    model = build("qwen2")
    setattr(model.get_input_embeddings(), option, value)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: build("gpt2"),
            "transformer.wpe embeds something other than the tokens of its rows",
        ),
        (
            lambda: with_(build("qwen2"), "odd", Odd()),
            "odd is a Odd, which has no stacked form",
        ),
        (
            lambda: with_(build("qwen2"), "conv", nn.Conv1d(2, 2, 1)),
            "conv is a Conv1d, which has no stacked form",
        ),
        *(
            (
                functools.partial(with_embedding, option, value),
                "model.embed_tokens is an embedding with max_norm, sparse or scale_grad_by_freq",
            )
            for option, value in [("max_norm", 1.0), ("sparse", True), ("scale_grad_by_freq", True)]
        ),
    ],
    ids=["positions", "own parameter", "convolution", "max_norm", "sparse", "scale_grad_by_freq"],
)
def test_what_cannot_be_stacked_is_named(model: Any, message: str) -> None:
    assert str(obstacle(model())) == message


def test_several_runs_of_a_model_that_cannot_be_stacked_are_refused() -> None:
    model = build("gpt2")
    book = AddressBook(model)
    refusal = "^this model takes one run per pack: transformer.wpe embeds something other"
    with pytest.raises(ValueError, match=refusal):
        make_trained(model, [full_run(2), full_run(4)], book)
    assert make_trained(model, [full_run(2)], book).folded == ()


# -- fewer bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gpt2"])
def test_a_stacked_bfloat16_model_computes_what_the_model_does(name: str) -> None:
    """Its weights lie in the arena in float32, and it computes with them rounded: those it came with."""
    base = build(name, dtype=torch.bfloat16)
    twin = copy.deepcopy(base)
    shapes = {name: parameter.shape for name, parameter in twin.named_parameters()}
    arena = Arena(shapes, 2, torch.float32, transposed=transposed_weights(twin))
    stack(twin, arena)
    assert computes_in(twin) == computes_in(base) == torch.bfloat16
    ids = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(5))
    embedded = [model.get_input_embeddings()(ids) for model in (base, twin)]
    assert torch.equal(*embedded), "Gemma scales by a number of the weight's own format"
    got, wanted = (model(input_ids=ids).logits for model in (twin, base))
    assert got.dtype == wanted.dtype
    got, wanted = got.float(), wanted.float()
    assert float((got.detach() - wanted).norm() / wanted.norm()) < 0.02
    arena.backward(got.square().mean())
    assert all(arena.view(arena.gradients, name).any() for name in shapes)


def test_updates_that_bfloat16_would_lose_are_kept(folder: Path) -> None:
    """At a rate of 1e-6 no weight above 5e-4 would move in bfloat16."""
    run = full_run(2, learning_rate=1e-6, warmup_steps=0, weight_decay=0.0)
    pack = train(folder, [run], dtype="bfloat16")
    assert not pack.failures
    at_first = train(folder, [run], dtype="bfloat16", steps=0)
    before, after = at_first.arena.weights, pack.arena.weights
    large = before.abs() > 5e-4
    moved = (after != before)[large].float().mean()
    assert large.float().mean() > 0.5
    assert moved > 0.8
    assert (after.bfloat16() != before.bfloat16())[large].float().mean() < 0.2


@exact
def test_a_bfloat16_run_in_a_pack_is_near_the_run_alone(folder: Path) -> None:
    constant = {"kind": "constant", "sigma": 0.05}
    policy = {"carrier": "linear_weight", "schedule": constant}
    runs = [full_run(2, DEAD), full_run(4, policy=policy), full_run(6, quantized=(MXFP4(),))]
    together = train(folder, runs, dtype="bfloat16")
    data = tiny_data(folder, "test")
    evaluated = list(evaluate(together, data, 16, stream="test"))
    assert not together.failures
    assert not [one.error for one in evaluated if one.error]
    for index, run in enumerate(runs):
        alone = train(folder, [run], dtype="bfloat16")
        assert alone.train_losses[0] == pytest.approx(together.train_losses[index], abs=0.02)
        assert alone.audit(0) == together.audit(index)


def test_bfloat16_one_run_at_a_time_is_refused() -> None:
    model = build("gpt2", dtype=torch.bfloat16)
    refusal = r"^model.dtype: got bfloat16 with training.method full.*transformer.wpe.*give float32"
    with pytest.raises(UserError, match=refusal):
        make_trained(model, [full_run(2)], AddressBook(model))
