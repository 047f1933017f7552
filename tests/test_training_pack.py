"""Replicas in lockstep: a run in a pack is the run alone, and both are what peft would train."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from exactness import exact
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
from torch import Tensor, nn

from aqn_tune.faults import DeadZone, RelativeGaussian
from aqn_tune.models.load import build_model, decoder_layers, load_tokenizer
from aqn_tune.study.device import Device
from aqn_tune.study.keys import content_hash
from aqn_tune.study.runs import Condition, Run
from aqn_tune.study.seeds import stream_seed
from aqn_tune.training import pack as pack_module
from aqn_tune.training.engine import ENGINE
from aqn_tune.training.evaluate import evaluate
from aqn_tune.training.learning_rate import learning_rate
from aqn_tune.training.pack import ReplicaPack

torch.set_num_threads(1)

TRAINING = tiny_training(steps=20, warmup_steps=2)
FAULT = DeadZone(layers=(1,), threshold=0.2, reference="tensor_max")
FAULTY = Condition(name="faulty", scenario="s", device=Device(faults=(FAULT,)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def mixed_runs(steps: int = 20) -> list[Run]:
    """Runs that differ in everything that may differ inside a pack."""

    def run(seed: int, faults=(FAULT,), policy=None, **changes) -> Run:
        training = TRAINING.model_copy(update={"steps": steps, **changes})
        return tiny_run(
            *faults, seed=seed, policy=policy, training=training, conditions=(CLEAN, FAULTY)
        )

    harsher = FAULT.model_copy(update={"threshold": 0.4})
    elsewhere = FAULT.model_copy(update={"layers": (2, 3)})
    noisy_unit = RelativeGaussian(layers=(0, 2), scale=0.05)
    return [
        run(2, faults=()),
        run(2),
        run(2, policy={"targeting": "global"}),
        run(4, policy={"targeting": "targeted"}),
        run(4, faults=(harsher,), policy={"targeting": "healthy", "normalise": "energy"}),
        run(6, faults=(elsewhere,), learning_rate=1e-3),
        run(
            6,
            policy={
                "carrier": "rmsnorm_weight",
                "targeting": {"kind": "window", "centre": 2, "width": 2},
            },
        ),
        run(
            6, faults=(FAULT, noisy_unit), policy={"schedule": {"kind": "constant", "sigma": 0.02}}
        ),
    ]


train = functools.partial(tiny_pack, steps=20)


@exact
def test_a_run_in_a_pack_equals_the_run_alone_bit_for_bit(folder: Path) -> None:
    runs = mixed_runs()
    together = train(folder, runs)
    assert not together.failures
    for index, run in enumerate(runs):
        alone = train(folder, [run])
        assert alone.train_losses[0] == together.train_losses[index], index
        assert torch.equal(alone.arena.weights[0], together.arena.weights[index]), index
        assert alone.audit(0) == together.audit(index), index


def test_neighbours_do_not_share_draws_data_or_reductions(folder: Path) -> None:
    """Two seeds of one config differ; the same seed under another targeting shares data and init."""
    runs = mixed_runs()
    pack = train(folder, [runs[1], runs[2], runs[3]], steps=1)
    assert pack.train_losses[0][0] == pack.train_losses[1][0]  # step 0 is noiseless: QeRL's warm-up
    assert pack.train_losses[0][0] != pack.train_losses[2][0]


@exact
def test_a_diverging_neighbour_fails_alone(folder: Path) -> None:
    run = mixed_runs()[2]
    # A learning rate that overflows float32 within the first steps.
    wild = run.model_copy(update={"training": TRAINING.model_copy(update={"learning_rate": 1e38})})
    pack = train(folder, [wild, run])
    assert "training loss is nan" in pack.failures[0]
    assert "comes from model.layers.0.self_attn.q_proj" in pack.failures[0]
    assert list(pack.failures) == [0]
    assert pack.train_losses[1] == train(folder, [run]).train_losses[0]


@pytest.mark.parametrize(("row", "microbatch"), [(0, 0), (3, 1)])
def test_a_value_that_is_not_finite_is_found_in_its_microbatch(
    folder: Path, row: int, microbatch: int
) -> None:
    """Where only the first was looked at, the loss was to blame for what the second brought."""
    training = tiny_training(gradient_accumulation_steps=2)
    pack = train(folder, [tiny_run(training=training)], steps=0)
    numbers = pack._order.indices(2, 0)
    bad = pack.data.tokens[int(numbers[row])]
    seen: list[bool] = []

    def spoil(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        hit = (args[0] == bad).all(dim=1)
        seen.append(bool(hit.any()))
        return out.masked_fill(hit[:, None, None], math.nan)

    embeddings = pack.model.get_input_embeddings()  # type: ignore[operator]
    embeddings.register_forward_hook(spoil)
    pack.train_to(1)
    assert seen[:2] == [microbatch == 0, microbatch == 1]
    assert pack.failures == {
        0: "training loss is nan at step 0; the first value that is not finite comes from "
        "model.embed_tokens"
    }


def test_frozen_weights_are_read_once_for_all_runs_of_a_rung(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    hash_of = pack_module._hash_of

    def counted(tensors: Mapping[str, Tensor]) -> str:
        read.append(len(tensors))
        return hash_of(tensors)

    monkeypatch.setattr(pack_module, "_hash_of", counted)
    setting = tiny_setting(folder)
    training = tiny_training(steps=2)
    runs = [tiny_run(seed=seed, training=training) for seed in (2, 4, 6)]
    opened = ENGINE.open_pack(
        one_pack(*runs, rungs=(1, 2)), setting, ENGINE.load(setting, "test", 64)
    )
    opened.advance()
    read.clear()
    report = opened.advance()
    assert [row.status for row in report.trainings] == ["finished"] * 3
    # For the audits, and all weights before and after the evaluation.
    assert len(read) == 3


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose decoder layers drop out values themselves, by their own flag."""
    from transformers import OPTConfig, OPTForCausalLM

    folder = save_tiny_model(tmp_path_factory.mktemp("opt"))
    config = OPTConfig(
        vocab_size=384,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=128,
        dropout=0.5,
        init_std=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        OPTForCausalLM(config).save_pretrained(folder)
    return folder


def test_checkpointing_turns_no_dropout_on(dropping: Path) -> None:
    """A layer that is in training mode to be recomputed would drop values out, in evaluations too."""
    method = {"kind": "lora", "rank": 4, "target_modules": ("q_proj", "v_proj")}
    plain, saving = (
        train(
            dropping,
            [
                tiny_run(
                    FAULT,
                    training=tiny_training(method=method, gradient_checkpointing=saves),
                    conditions=(CLEAN, FAULTY),
                )
            ],
            steps=4,
        )
        for saves in (False, True)
    )
    assert saving.model.model.decoder.layers[0].training
    assert not plain.model.model.decoder.layers[0].training
    assert saving.train_losses[0] == pytest.approx(plain.train_losses[0], rel=1e-5)
    assert torch.allclose(saving.arena.weights, plain.arena.weights, atol=1e-5)
    data = tiny_data(dropping, "test")
    expected, first, second = (
        [one.loss for one in evaluate(pack, data, 16, stream="test")]
        for pack in (plain, saving, saving)
    )
    assert first == second
    assert first == pytest.approx(expected, rel=1e-5)


def test_the_search_for_a_culprit_drops_nothing_out(dropping: Path) -> None:
    """It is to repeat the pass that failed."""
    method = {"kind": "lora", "rank": 4, "target_modules": ("q_proj", "v_proj")}
    training = tiny_training(method=method, gradient_checkpointing=True)
    pack = train(dropping, [tiny_run(training=training)], steps=1)
    outputs: list[Tensor] = []
    decoder_layers(pack.model)[-1].register_forward_hook(lambda m, a, out: outputs.append(out))
    for _ in range(2):
        assert pack._first_nonfinite(0) == "the loss"
    assert torch.equal(*outputs)


def true_float64_rmsnorm(self, hidden_states):
    """Qwen2RMSNorm without its cast to float32, which would hide or invent errors of 1e-8."""
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    weight = self.weight + getattr(self, "oracle_noise", 0.0)
    return weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


def oracle_losses(folder: Path, run: Run, steps: int) -> list[float]:
    """Train `run` with transformers and, for LoRA, peft in float64, sharing only the draws with the pack."""
    from peft import LoraConfig, get_peft_model

    setting = tiny_setting(folder, dtype="float64")
    tokenizer = load_tokenizer(setting.model)
    spec = run.training
    with torch.random.fork_rng():
        model = build_model(setting.model)
        if spec.method.kind == "lora":
            config = LoraConfig(
                r=spec.method.rank,
                lora_alpha=spec.method.alpha,
                target_modules=list(spec.method.target_modules),
            )
            model = get_peft_model(model, config, autocast_adapter_dtype=False).double()
        else:
            model.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            site = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
            generator = torch.Generator().manual_seed(stream_seed(run.seed, "init", site))
            bound = 1 / math.sqrt(parameter.shape[1])
            draw = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.data = draw.double()
    state = {"step": 0}

    def draw(shape, *path):
        generator = torch.Generator().manual_seed(stream_seed(run.seed, *path))
        return torch.randn(shape, generator=generator).double()

    def hook(layer: int):
        def forward_hook(module, args, h):
            step = state["step"]
            sigma = run.noise.sigma[step] * run.noise.multipliers[layer] if run.noise else 0.0
            flat = h.reshape(-1, h.shape[-1])
            if sigma and run.noise.carrier.kind == "hidden":
                z = draw(flat.shape, "noise", step, 0, layer, str(layer))
                flat = flat + sigma * flat.detach().abs() * z
            for fault in run.device.faults:
                if fault.kind == "dead_zone" and layer in fault.layers:
                    peak = flat.detach()[state["valid"]].abs().max()
                    flat = flat * (flat.detach().abs() >= fault.threshold * peak)
            return flat.view_as(h)

        return forward_hook

    def noisy_unit(site: str, fault: RelativeGaussian):
        key = content_hash({**fault.static(), "layers": None}) + ".1"

        def forward_hook(module, args, y):
            z = draw(
                (y.numel() // y.shape[-1], y.shape[-1]),
                "fault",
                state["step"],
                0,
                site,
                "output",
                key,
            )
            return y + fault.scale * y.detach().abs() * z.view_as(y)

        return forward_hook

    layers = decoder_layers(model)
    norms = ("input_layernorm", "post_attention_layernorm")
    for number, layer in enumerate(layers):
        layer.register_forward_hook(hook(number))
        for fault in run.device.faults:
            if fault.kind == "relative_gaussian" and number in fault.layers:
                for name, module in layer.named_modules():
                    if name.endswith("_proj"):
                        site = f"model.layers.{number}.{name}"
                        module.base_layer.register_forward_hook(noisy_unit(site, fault))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=1.0, betas=(spec.beta1, spec.beta2), weight_decay=spec.weight_decay
    )
    rows = setting.task.splits().train
    order: list[int] = []
    for epoch in range(-(-steps * spec.batch_size // len(rows))):
        generator = torch.Generator().manual_seed(stream_seed(run.seed, "data", epoch))
        order += torch.randperm(len(rows), generator=generator).tolist()
    whole = [f"Question: {r.question}\nAnswer: {r.answer}{tokenizer.eos_token}" for r in rows]
    # The noise is drawn for every position, so both need rows of the same length: the longest of the
    # split, in steps of 8.
    width = -(-max(len(ids) for ids in tokenizer(whole)["input_ids"]) // 8) * 8
    losses = []
    for step in range(steps):
        state["step"] = step
        if run.noise is not None and run.noise.carrier.kind == "rmsnorm_weight":
            for number, layer in enumerate(layers):
                sigma = run.noise.sigma[step] * run.noise.multipliers[number]
                for name in norms:
                    noise = draw((1, 32), "noise", step, 0, number, name)[0] if sigma else 0.0
                    getattr(layer, name).oracle_noise = sigma * noise
        batch = [rows[i] for i in order[step * spec.batch_size : (step + 1) * spec.batch_size]]
        prompts = [f"Question: {row.question}\nAnswer:" for row in batch]
        texts = [
            f"{p} {row.answer}{tokenizer.eos_token}" for p, row in zip(prompts, batch, strict=True)
        ]
        encoded = tokenizer(texts, padding="max_length", max_length=width, return_tensors="pt")
        labels = encoded["input_ids"].clone()
        for i, text in enumerate(prompts):
            labels[i, : len(tokenizer(text)["input_ids"])] = -100
        labels[encoded["attention_mask"] == 0] = -100
        state["valid"] = encoded["attention_mask"].flatten().bool()
        # transformers' own loss casts the logits to float32.
        logits = model(**encoded).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, spec.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec, step)
        optimizer.step()
    return losses


@pytest.fixture(scope="module")
def in_float64(folder: Path) -> ReplicaPack:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen2RMSNorm, "forward", true_float64_rmsnorm)
        return train(folder, mixed_runs(50), dtype="float64", steps=50)


@pytest.mark.parametrize("index", range(8))
def test_a_pack_equals_transformers_and_peft_in_float64(
    folder: Path, in_float64: ReplicaPack, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-9 over 50 steps, loss by loss."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    monkeypatch.setattr(Qwen2RMSNorm, "forward", true_float64_rmsnorm)
    expected = oracle_losses(folder, mixed_runs(50)[index], 50)
    assert in_float64.train_losses[index] == pytest.approx(expected, rel=0, abs=1e-9)


def test_what_is_held_to_transformers_has_a_dead_zone_and_each_carrier() -> None:
    noised = [run for run in mixed_runs(50) if run.noise and FAULT in run.device.faults]
    assert {run.noise.carrier.kind for run in noised if run.noise} == {"hidden", "rmsnorm_weight"}
    assert all(min(run.noise.sigma[5:]) > 0 for run in noised if run.noise)


def test_resume_in_a_new_pack_is_bit_identical(folder: Path) -> None:
    runs = mixed_runs()[:4]
    setting = tiny_setting(folder)
    shared = ENGINE.load(setting, "test", 64)
    pack = one_pack(*runs, rungs=(5, 20))
    straight = ENGINE.open_pack(pack, setting, shared)
    first, last = straight.advance(), straight.advance()
    broken = ENGINE.open_pack(pack, setting, shared)
    broken.advance()
    state = broken.state()
    broken.close()
    resumed = ENGINE.open_pack(pack, setting, shared)
    resumed.restore(state)
    again = resumed.advance()
    assert first.step == 5
    assert again.evaluations == last.evaluations
    times = {"seconds", "eval_seconds", "generate_seconds"}
    untimed = [row.model_dump(exclude=times) for row in last.trainings]
    assert [row.model_dump(exclude=times) for row in again.trainings] == untimed
    assert {row.status for row in last.trainings} == {"finished"}


def test_state_of_other_runs_is_refused(folder: Path) -> None:
    runs = mixed_runs()
    setting = tiny_setting(folder)
    shared = ENGINE.load(setting, "test", 64)
    one = ENGINE.open_pack(one_pack(runs[0], rungs=(1, 20)), setting, shared)
    other = ENGINE.open_pack(one_pack(runs[1], rungs=(1, 20)), setting, shared)
    one.advance()
    with pytest.raises(ValueError, match="other runs"):
        other.restore(one.state())


@exact
def test_full_fine_tuning_replicates_are_separate_and_leave_the_base_alone(folder: Path) -> None:
    setting = tiny_setting(folder)
    shared = ENGINE.load(setting, "test", 64)
    base = shared.base
    before = {name: array.copy() for name, array in base.items()}
    for array in base.values():
        array.setflags(write=False)
    training = tiny_training(method={"kind": "full"}, learning_rate=1e-3)
    runs = [
        Run(
            training=training, device=Device(faults=(FAULT,)), seed=seed, conditions=(CLEAN, FAULTY)
        )
        for seed in (2, 4)
    ]
    report = ENGINE.open_pack(one_pack(*runs, rungs=(6,)), setting, shared).advance()
    assert [row.status for row in report.trainings] == ["finished", "finished"]
    losses = {(e.training_key, e.condition): e.loss for e in report.evaluations}
    assert len(set(losses.values())) == 4
    for run in runs:
        alone = ENGINE.open_pack(one_pack(run, rungs=(6,)), setting, shared).advance()
        assert {
            (e.training_key, e.condition): e.loss for e in alone.evaluations
        }.items() <= losses.items()
    for name, array in base.items():
        assert (array == before[name]).all()
    assert report.trainings[0].audit.trainable_parameters == sum(a.size for a in base.values())


def test_reused_base_arrays_give_the_same_numbers(folder: Path) -> None:
    """A, B, A on one set of shared arrays equals A on fresh ones: nothing leaks between trials."""
    setting = tiny_setting(folder)
    shared = ENGINE.load(setting, "test", 64)
    a, b = one_pack(mixed_runs()[2], rungs=(20,)), one_pack(mixed_runs()[4], rungs=(20,))
    reports = [ENGINE.open_pack(pack, setting, shared).advance() for pack in (a, b, a)]
    fresh = ENGINE.open_pack(a, setting, ENGINE.load(setting, "test", 64)).advance()
    assert reports[0].evaluations == reports[2].evaluations == fresh.evaluations


def test_adapter_targets_that_match_nothing_are_refused(folder: Path) -> None:
    from aqn_tune.errors import UserError

    method = {"kind": "lora", "rank": 2, "target_modules": ("q_prj",)}
    run = mixed_runs()[0].model_copy(update={"training": tiny_training(method=method)})
    with pytest.raises(UserError, match=r"'q_prj' matches no module; did you mean 'q_proj'"):
        train(folder, [run], steps=1)


def test_layer_count_of_the_tiny_model(folder: Path) -> None:
    assert len(decoder_layers(build_model(tiny_setting(folder).model))) == LAYERS
