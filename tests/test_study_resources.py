"""What a trial asks of a machine, and what `compute.gpus_per_worker: auto` comes to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic import make_study

from aqn_tune.errors import UserError
from aqn_tune.models.spec import EMBEDDED, ModelSpec
from aqn_tune.study.folder import study_hash
from aqn_tune.study.loading import load_study, make_setting, parameter_count
from aqn_tune.study.resources import count_parameters, gpu_share, trial_request
from aqn_tune.study.schema import ComputeSpec, Study
from aqn_tune.study.training import Full, Lora

QWEN_HALF: dict[str, Any] = {
    "hidden_size": 896, "vocab_size": 151936, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "intermediate_size": 4864, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096, "vocab_size": 128256, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "tie_word_embeddings": False,
}  # fmt: skip
STUDY = """\
study: demo
scenario: {faults: [{kind: dead_zone, layers: [1], threshold: 0.2}]}
compute: {gpus_per_worker: auto}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(STUDY)
    return path


@pytest.mark.parametrize(
    ("method", "parameters", "gpus"),
    [
        (Lora(), 1_064_000, 0.25),
        (Lora(), 500_000_000, 0.25),
        (Lora(), 500_000_001, 0.5),
        (Lora(rank=256), 1_500_000_000, 0.5),
        (Lora(), 2_000_000_001, 1.0),
        (Full(), 1_064_000, 1.0),
        (Full(), 8_000_000_000, 1.0),
    ],
)
def test_the_share_of_a_gpu_follows_from_what_is_trained(
    method: Lora | Full, parameters: int, gpus: float
) -> None:
    assert gpu_share(method, parameters) == gpus


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (QWEN_HALF, 494),
        (LLAMA_8B, 8030),
        ({"text_config": LLAMA_8B, "vision_config": {"hidden_size": 1}}, 8030),
        (
            {"n_embd": 768, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "tie_word_embeddings": True},
            152,
        ),
        ({**LLAMA_8B, "num_local_experts": 8}, 47_500),
    ],
)  # fmt: skip
def test_parameters_are_counted_from_the_config(config: dict[str, Any], millions: int) -> None:
    assert count_parameters(config) == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize("missing", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_a_config_that_does_not_say_is_not_guessed_at(missing: str) -> None:
    assert count_parameters({k: v for k, v in QWEN_HALF.items() if k != missing}) is None


def test_the_count_of_the_embedded_model_is_close_to_its_weights() -> None:
    from safetensors import safe_open

    from aqn_tune.models.locate import EMBEDDED_FOLDER

    real = 0
    for weights in EMBEDDED_FOLDER.glob("*.safetensors"):
        with safe_open(weights, "np") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                rows, *columns = file.get_slice(name).get_shape()
                real += rows * (columns[0] if columns else 1)
    assert parameter_count(ModelSpec(path=EMBEDDED)) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        ([], 0.25),
        (["training.method={kind: full}"], 1.0),
        (["compute.gpus_per_worker=0.5"], 0.5),
        (["compute={gpus_per_worker: auto, workers: 3}"], 0.25),
    ],
)
def test_a_loaded_study_has_a_number(file: Path, overrides: list[str], gpus: float) -> None:
    study = load_study(file, overrides)
    assert study.compute.gpus_per_worker == gpus
    assert make_setting(study).device == "cuda"
    assert trial_request(study.compute) == {"CPU": 1.0, "GPU": gpus}
    text = yaml.safe_dump(study.model_dump(mode="json"))
    assert Study.model_validate(yaml.safe_load(text)) == study


def test_auto_is_the_same_study_as_its_number_and_another_than_without_gpus(file: Path) -> None:
    auto = study_hash(load_study(file))
    assert auto == study_hash(load_study(file, ["compute.gpus_per_worker=0.25"]))
    assert auto == study_hash(load_study(file, ["compute.gpus_per_worker=1"]))
    assert auto != study_hash(load_study(file, ["compute.gpus_per_worker=0"]))
    assert ComputeSpec().gpus_per_worker == 0.0
    assert trial_request(ComputeSpec(cpus_per_worker=2)) == {"CPU": 2.0}


@pytest.mark.parametrize(
    ("compute", "share"),
    [
        ({"workers": 1}, 1.0),
        ({"workers": 4}, 0.25),
        ({"workers": "auto"}, 0.125),
        ({"workers": "auto", "cpus_per_worker": 2}, 0.25),
        # of the GPU, whoever else is there
        ({"workers": 4, "gpus_per_worker": 0.5}, 0.5),
        ({"workers": 4, "gpus_per_worker": 1}, 1.0),
        ({"workers": 1, "gpus_per_worker": 4}, 1.0),
        ({"workers": 4, "gpus_per_worker": 0.5, "address": "auto"}, 0.5),
        # workers of a cluster are not all on one machine
        ({"workers": 4, "address": "auto"}, None),
        ({"workers": "auto", "address": "auto"}, None),
    ],
)
def test_the_memory_that_a_worker_may_plan_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute: dict[str, Any], share: float | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert make_setting(make_study(tmp_path, compute=compute)).memory_share == share


def test_auto_for_a_large_model_is_a_whole_gpu(file: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    assert load_study(file, [f"model.path={tmp_path}"]).compute.gpus_per_worker == 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.path=.", r"compute\.gpus_per_worker: got 'auto', but .* does not say how large"),
        ("compute.gpus_per_worker=atuo", r"compute\.gpus_per_worker: got 'atuo'"),
        ("compute.gpus_per_worker=-1", r"compute\.gpus_per_worker: got -1"),
    ],
)
def test_what_cannot_be_derived_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.chdir(file.parent)
    Path("config.json").write_text('{"num_hidden_layers": 2}')
    with pytest.raises(UserError, match=message):
        load_study(file, [override])
