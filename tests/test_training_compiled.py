"""Compiled decoder layers: the same training to rounding, and bit for bit alike in every pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import exact
from tiny import CLEAN, noise, one_pack, save_tiny_model, tiny_setting, tiny_training

from aqn_tune.errors import UserError
from aqn_tune.faults import DeadZone, RelativeGaussian
from aqn_tune.injection.address import AddressBook
from aqn_tune.injection.fold import Entry
from aqn_tune.injection.layout import Layout
from aqn_tune.models.load import build_model, decoder_layers, load_tokenizer
from aqn_tune.quantization import MXFP4
from aqn_tune.study.device import Device
from aqn_tune.study.runs import Run
from aqn_tune.training.data import load_tokens
from aqn_tune.training.engine import ENGINE
from aqn_tune.training.pack import ReplicaPack

torch.set_num_threads(1)
TRAINING = tiny_training(steps=8, warmup_steps=1, compile=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def run(seed: int, targeting: str, fault: object = None, **changes: object) -> Run:
    dead = DeadZone(layers=(1,), threshold=0.2)
    training = TRAINING.model_copy(update=changes)
    return Run(
        training=training,
        device=Device(faults=(fault or dead,)),
        noise=noise(
            training, {"targeting": targeting, "schedule": {"kind": "constant", "sigma": 0.02}}
        ),
        seed=seed,
        conditions=(CLEAN,),
    )


def train(folder: Path, runs: list[Run]) -> ReplicaPack:
    setting = tiny_setting(folder)
    data = load_tokens(load_tokenizer(setting.model), setting.task.splits().train, 64)
    pack = ReplicaPack(build_model(setting.model), runs, data)
    pack.train_to(8)
    assert not pack.failures
    return pack


@exact
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_packs_agree_with_themselves_and_with_eager_ones(folder: Path) -> None:
    runs = [run(2, "global"), run(2, "targeted"), run(4, "global", learning_rate=1e-3)]
    together = train(folder, runs)
    for index, one in enumerate(runs):
        alone = train(folder, [one])
        assert alone.train_losses[0] == together.train_losses[index], index
        assert torch.equal(alone.arena.weights[0], together.arena.weights[index]), index
        assert alone.audit(0) == together.audit(index)
    eager = train(
        folder,
        [
            one.model_copy(update={"training": one.training.model_copy(update={"compile": False})})
            for one in runs
        ],
    )
    for mine, theirs in zip(together.train_losses, eager.train_losses, strict=True):
        assert mine[:4] == pytest.approx(theirs[:4], abs=1e-4)
    assert not any("forward" in layer.__dict__ for layer in decoder_layers(together.model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_row_says_how_long_its_pack_was_compiled(folder: Path) -> None:
    """Or a calibration takes the compiler's time for that of the steps."""
    setting = tiny_setting(folder)
    shared = ENGINE.load(setting, "test", 64)
    # what another test has compiled in this process is not compiled again
    torch.compiler.reset()
    compiling = {}
    for is_compiled in (True, False):
        pack = one_pack(run(2, "global", compile=is_compiled), rungs=(8,))
        report = ENGINE.open_pack(pack, setting, shared).advance()
        row = report.trainings[0]
        assert row.status == "finished", row.error
        assert 0 <= row.compile_seconds < row.seconds - row.eval_seconds
        compiling[is_compiled] = row.compile_seconds
    assert compiling[True] > 0
    assert compiling[False] == 0


ON_WEIGHTS: dict[str, Any] = {"layers": (0,), "modules": ("linear",), "site": "weight"}
CONSTANT = {"schedule": {"kind": "constant", "sigma": 0.02}}


def noised(carrier: str) -> Entry:
    """Return an entry with nothing but noise on every layer."""
    return Entry(noise=noise(TRAINING, {"carrier": carrier, **CONSTANT}))


@pytest.mark.parametrize(
    ("entry", "inside"),
    [
        (Entry(Device(quantization=(MXFP4(operands="weight"),))), True),
        (Entry(Device(quantization=(MXFP4(operands="activation"),))), True),
        (Entry(Device(faults=(RelativeGaussian(scale=0.05, **ON_WEIGHTS),))), True),
        (Entry(Device(faults=(RelativeGaussian(layers=(0,), scale=0.05),))), True),
        (noised("linear_weight"), True),
        (noised("rmsnorm_weight"), True),
        # on the layers themselves
        (noised("hidden"), False),
        (Entry(Device(faults=(DeadZone(layers=(1,), threshold=0.2),))), False),
        (Entry(skip=(1,)), False),
        (Entry(), False),
    ],
    ids=[
        "quantized weights", "quantized activations", "faulty weights", "faulty products",
        "noised weights", "noised norms", "noised layers", "faulty layer", "skipped layer", "nothing",
    ],
)  # fmt: skip
def test_what_reaches_inside_a_layer(folder: Path, entry: Entry, inside: bool) -> None:
    book = AddressBook(build_model(tiny_setting(folder).model))
    assert Layout(book, [entry]).reaches_inside() is inside


def test_what_reaches_inside_a_layer_is_refused(folder: Path) -> None:
    fault = RelativeGaussian(layers=(0,), scale=0.05)
    with pytest.raises(UserError, match="leave compile out"):
        train(folder, [run(2, "global", fault)])
