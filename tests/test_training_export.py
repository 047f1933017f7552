"""Exported runs load with the field's own tools and give the recorded numbers."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest
import torch
from tiny import CLEAN, one_pack, save_tiny_model, tiny_setting, tiny_training

from aqn_tune.errors import storage_error
from aqn_tune.models.load import build_model, load_tokenizer
from aqn_tune.study.engine import PackTraining
from aqn_tune.study.runs import Run, Setting
from aqn_tune.training.data import load_tokens
from aqn_tune.training.engine import ENGINE

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def plain_loss(model, tokens) -> float:
    """Answer cross-entropy by transformers alone, one row at a time."""
    total = count = 0.0
    for row in range(len(tokens.tokens)):
        length = int(tokens.valid[row].sum())
        ids = tokens.tokens[row : row + 1, :length]
        labels = torch.where(tokens.answer[row : row + 1, :length], ids, torch.tensor(-100))
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=labels).loss)
        total += loss * int((labels != -100).sum())
        count += int((labels != -100).sum())
    return total / count


def exporting(
    setting: Setting, method: str, target: Path, *, rungs: tuple[int, ...]
) -> PackTraining:
    """Return a pack of one run that is exported to `target` at its last rung."""
    changes = {"method": {"kind": "full"}, "learning_rate": 1e-3} if method == "full" else {}
    run = Run(training=tiny_training(**changes), seed=2, conditions=(CLEAN,))
    pack = one_pack(run, rungs=rungs, export={run.training_key(setting): str(target)})
    return ENGINE.open_pack(pack, setting, ENGINE.load(setting, "test", 64))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_export_reproduces_the_recorded_clean_loss(
    folder: Path, tmp_path: Path, method: str
) -> None:
    setting, target = tiny_setting(folder), tmp_path / "adapter"
    opened = exporting(setting, method, target, rungs=(3, 6))
    assert opened.advance().trainings[0].adapter == ""
    assert not target.exists()
    report = opened.advance()
    assert report.trainings[0].adapter == str(target)
    if method == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(build_model(setting.model), target)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    data = load_tokens(load_tokenizer(setting.model), setting.task.splits().test, 64)
    assert plain_loss(model.eval(), data) == pytest.approx(report.evaluations[0].loss, abs=1e-5)
    assert (target / "aqn_tune.json").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_disk_that_does_not_take_the_weights_is_an_error_of_the_storage(
    folder: Path, tmp_path: Path, method: str
) -> None:
    """safetensors has an error of its own: the pack was recorded as broken off, its runs were lost."""
    target = tmp_path / "adapter"
    opened = exporting(tiny_setting(folder), method, target, rungs=(6,))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(target))) as raised:
            opened.advance()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = str(storage_error(raised.value))
    assert said.startswith(f"{target}: the file would be larger than is allowed")
