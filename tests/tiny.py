"""A four-layer random model in a folder of its own: big enough to have layers, small enough for tests."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aqn_tune.faults import Fault
from aqn_tune.models.locate import EMBEDDED_FOLDER, fingerprint
from aqn_tune.models.spec import ModelSpec
from aqn_tune.noise import NoisePolicy
from aqn_tune.study.device import Device
from aqn_tune.study.runs import Condition, Pack, Run, Setting
from aqn_tune.study.training import TrainingSpec
from aqn_tune.tasks import WordProblems
from aqn_tune.tasks.splitting import SplitName

if TYPE_CHECKING:
    from aqn_tune.training.data import TokenSet
    from aqn_tune.training.pack import ReplicaPack

LAYERS = 4
CLEAN = Condition(name="clean")


def save_tiny_model(folder: Path, *, layers: int = LAYERS) -> Path:
    """Write a random Qwen2 model with the embedded tokenizer to `folder`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_FOLDER / name, folder / name)
    return folder


def tiny_setting(folder: Path, *, dtype: str = "float32", rows: int = 48) -> Setting:
    """Return a setting on a tiny model and a handful of word problems."""
    model = ModelSpec.model_validate({"path": str(folder), "dtype": dtype})
    return Setting(
        model=model,
        task=WordProblems(train_rows=rows, validation_rows=16, test_rows=32),
        model_fingerprint=fingerprint(model),
        eval_batch_size=16,
    )


def tiny_training(**changes: object) -> TrainingSpec:
    """Return a training of 6 steps with 4 rows each."""
    values: dict[str, object] = {
        "steps": 6,
        "batch_size": 4,
        "warmup_steps": 1,
        "learning_rate": 5e-3,
        "method": {"kind": "lora", "rank": 4, "alpha": 8},
    }
    return TrainingSpec.model_validate({**values, **changes})


def noise(training: TrainingSpec, policy: dict[str, object], fault_layers: tuple[int, ...] = (1,)):
    """Return the effective noise of a policy in the tiny model."""
    return NoisePolicy.model_validate(policy).resolve(
        steps=training.steps, layer_count=LAYERS, fault_layers=fault_layers
    )


def one_pack(*runs: Run, rungs: tuple[int, ...], **changes: object) -> Pack:
    """Return a pack of `runs` that is evaluated on the test split."""
    values = {"name": "p", "stage": "confirm", "runs": runs, "rungs": rungs, "split": "test"}
    return Pack.model_validate({**values, **changes})


def tiny_run(
    *faults: Fault,
    seed: int = 2,
    policy: dict[str, object] | None = None,
    training: TrainingSpec | None = None,
    **changes: object,
) -> Run:
    """Return a run of `tiny_training` that meets `faults` and trains with the noise of `policy`."""
    training = training or tiny_training()
    values: dict[str, object] = {
        "training": training,
        "device": Device(faults=faults),
        "noise": noise(training, policy) if policy else None,
        "seed": seed,
        "conditions": (CLEAN,),
    }
    return Run.model_validate({**values, **changes})


def tiny_data(folder: Path, split: SplitName = "train") -> TokenSet:
    """Return a split of `tiny_setting` as tensors."""
    from aqn_tune.models.load import load_tokenizer
    from aqn_tune.training.data import load_tokens

    setting = tiny_setting(folder)
    return load_tokens(load_tokenizer(setting.model), getattr(setting.task.splits(), split), 64)


def tiny_pack(
    folder: Path, runs: Sequence[Run], *, dtype: str = "float32", steps: int = 0
) -> ReplicaPack:
    """Return a pack of `runs` on the tiny model that has taken `steps` steps."""
    from aqn_tune.models.load import build_model
    from aqn_tune.training.pack import ReplicaPack

    model = build_model(tiny_setting(folder, dtype=dtype).model)
    pack = ReplicaPack(model, runs, tiny_data(folder))
    pack.train_to(steps)
    return pack
