"""Export: a trained run as an ordinary PEFT adapter folder, or as a model folder."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from aqn_tune.models.load import build_model, load_tokenizer
from aqn_tune.models.locate import model_folder
from aqn_tune.study.engine import BaseArrays
from aqn_tune.study.runs import Run, Setting
from aqn_tune.study.training import Lora

PROVENANCE = "aqn_tune.json"
"""File beside the weights that says which run they came from."""


def export_adapter(
    folder: Path, setting: Setting, run: Run, tensors: Mapping[str, Tensor], base: BaseArrays
) -> None:
    """Write the adapter of a LoRA run so that `peft.PeftModel.from_pretrained` loads it.

    Args:
        folder: Receives adapter_config.json, adapter_model.safetensors and the provenance.
        setting: Model and task of the study.
        run: The run.
        tensors: Arena tensors, `<site>.lora_A` [in, r] and `<site>.lora_B` [r, out].
        base: Weights of the base model.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    method = run.training.method
    if not isinstance(method, Lora):
        raise ValueError(f"a {method.kind} run has no adapter")
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        target_modules=list(method.target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 has renamed.
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )
        model = get_peft_model(build_model(setting.model, base), config)
    modules = dict(model.base_model.model.named_modules())
    with torch.no_grad():
        for name, value in tensors.items():
            site, _, part = name.rpartition(".")
            modules[site].get_submodule(part)["default"].weight.copy_(value.T)
    model.peft_config["default"].base_model_name_or_path = str(model_folder(setting.model))
    with _storage_errors(folder):
        model.save_pretrained(folder, safe_serialization=True)
    _write_provenance(folder, setting, run)


def export_full(
    folder: Path, setting: Setting, run: Run, tensors: Mapping[str, Tensor], base: BaseArrays
) -> None:
    """Write the model of a full fine-tuning run as a Hugging Face model folder with its tokenizer."""
    import torch

    model = build_model(setting.model, base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(value)
    with _storage_errors(folder):
        model.save_pretrained(folder, safe_serialization=True)
    load_tokenizer(setting.model).save_pretrained(folder)
    _write_provenance(folder, setting, run)


@contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    """Raise what the system says of a failed write as the OSError that it is: safetensors has its own."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(folder)) from error


def _write_provenance(folder: Path, setting: Setting, run: Run) -> None:
    content = {
        "training_key": run.training_key(setting),
        "setting": setting.model_dump(mode="json"),
        "run": run.model_dump(mode="json"),
    }
    (folder / PROVENANCE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
