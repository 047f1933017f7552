"""Evaluation against plain transformers with hooks, in float64, sharing nothing but the draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_training_pack import true_float64_rmsnorm
from tiny import CLEAN, one_pack, save_tiny_model, tiny_setting, tiny_training

from aqn_tune.faults import DeadZone, FaultSpec, RelativeGaussian
from aqn_tune.models.load import build_model, decoder_layers, load_tokenizer
from aqn_tune.study.device import Device
from aqn_tune.study.keys import content_hash
from aqn_tune.study.runs import Condition, Run
from aqn_tune.study.seeds import stream_seed
from aqn_tune.training import evaluate as evaluate_module
from aqn_tune.training.data import load_tokens
from aqn_tune.training.engine import ENGINE

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def oracle_loss(setting, fault: FaultSpec | None) -> float:
    """Answer cross-entropy of the untrained model under `fault`, batch by batch as declared."""
    model = build_model(setting.model)
    data = load_tokens(load_tokenizer(setting.model), setting.task.splits().test, 64)
    state: dict = {}

    def dead_zone(module, args, h):
        magnitude = h.abs()
        if fault.reference == "token_max":
            peak = magnitude.amax(dim=-1, keepdim=True)
        else:
            peak = magnitude[state["valid"]].max()
        return torch.where(magnitude < fault.threshold * peak, 0.0, h)

    def noisy(site: str):
        def forward_hook(module, args, y):
            key = content_hash({**fault.static(), "layers": None}) + ".1"
            seed = stream_seed(
                0, "eval", "test", 0, state["batch"], "fault", 0, site, "output", key
            )
            shape = (y.shape[0] * y.shape[1], y.shape[2])
            z = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
            return y + fault.scale * y.abs() * z.view_as(y)

        return forward_hook

    for layer in fault.layers if fault else ():
        block = decoder_layers(model)[layer]
        if fault.kind == "dead_zone":
            block.register_forward_hook(dead_zone)
        else:
            for name, module in block.named_modules():
                if name.endswith("_proj"):
                    module.register_forward_hook(noisy(f"model.layers.{layer}.{name}"))
    total, count = 0.0, 0
    for number, start in enumerate(range(0, len(data.tokens), setting.eval_batch_size)):
        rows = slice(start, start + setting.eval_batch_size)
        state.update(valid=data.valid[rows], batch=number)
        with torch.no_grad():
            logits = model(input_ids=data.tokens[rows]).logits[:, :-1]
        mask = data.answer[rows, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits[mask], data.tokens[rows, 1:][mask], reduction="none"
        )
        total, count = total + float(losses.sum()), count + int(mask.sum())
    return total / count


@pytest.mark.parametrize(
    "fault",
    [
        None,
        DeadZone(layers=(1,), threshold=0.2, reference="tensor_max"),
        DeadZone(layers=(0, 2), threshold=0.3),
        RelativeGaussian(layers=(1, 3), scale=0.2),
    ],
)
def test_the_recorded_loss_is_that_of_plain_transformers(
    folder: Path, fault: FaultSpec | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    monkeypatch.setattr(Qwen2RMSNorm, "forward", true_float64_rmsnorm)
    setting = tiny_setting(folder, dtype="float64")
    faulty = Condition(name="faulty", scenario="s", device=Device(faults=(fault,) if fault else ()))
    conditions = (CLEAN, faulty) if fault else (CLEAN,)
    run = Run(training=tiny_training(), seed=2, conditions=conditions)
    opened = ENGINE.open_pack(one_pack(run, rungs=(0,)), setting, ENGINE.load(setting, "test", 64))
    row = opened.advance().evaluations[-1]
    assert row.loss == pytest.approx(oracle_loss(setting, fault), abs=1e-10)


def test_validation_and_test_do_not_share_fault_draws(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the search would tune on the very errors that the confirmation scores with."""
    seen: dict[str, set[tuple]] = {"validation": set(), "test": set()}
    setting = tiny_setting(folder)
    faulty = Condition(
        name="faulty",
        scenario="s",
        device=Device(faults=(RelativeGaussian(layers=(1,), scale=0.5),)),
    )
    run = Run(training=tiny_training(), seed=2, conditions=(CLEAN, faulty))
    original = evaluate_module.stream_seed
    for split, paths in seen.items():

        def record(seed, *path, paths=paths):
            paths.add((seed, *path))
            return original(seed, *path)

        monkeypatch.setattr(evaluate_module, "stream_seed", record)
        pack = one_pack(run, rungs=(0,), split=split)
        ENGINE.open_pack(pack, setting, ENGINE.load(setting, split, 64)).advance()
    assert len(seen["validation"]) == 7  # one batch, seven projections
    assert len(seen["test"]) == 14
    assert not seen["validation"] & seen["test"]
