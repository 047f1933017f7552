"""Whether products round alike in every pack, asked of the processor at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exactness import exact
from tiny import save_tiny_model, tiny_setting, tiny_training

from aqn_tune.training import rounding
from aqn_tune.training.engine import ENGINE

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_multiples_of_sixteen_round_alike(dtype: torch.dtype) -> None:
    assert rounding.rounds_alike((16, 48, 448, 3584), (64, 128, 320), dtype)


def test_other_numbers_of_rows_do_not() -> None:
    assert not rounding.rounds_alike((16, 39), (64, 72), torch.float32), "parts of vectors"
    assert not rounding._alike(1, 64, 64, 8, torch.float32), "a product with a vector"


def test_one_shape_that_differs_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int, int]] = []

    def alike(rows: int, width: int, other: int, folds: int, dtype: torch.dtype) -> bool:
        asked.append((rows, width, other, folds))
        return (rows, width, other, folds) != (32, 8, 4, 3)

    monkeypatch.setattr(rounding, "_alike", alike)
    assert not rounding.rounds_alike((16, 32), (4, 8), torch.float32)
    assert rounding.rounds_alike((16,), (4, 8), torch.float32)
    assert {(16, 4, 8, 2), (16, 8, 8, 8), (32, 8, 4, 3)} <= set(asked)


@pytest.mark.parametrize(
    ("setting", "training", "alike"),
    [
        pytest.param({}, {}, True, marks=exact),
        ({"device": "cuda"}, {}, False),
        ({}, {"compile": True}, False),
        ({"eval_batch_size": 3}, {}, False),
    ],
)
def test_what_the_engine_promises(
    folder: Path, setting: dict[str, object], training: dict[str, object], alike: bool
) -> None:
    there = tiny_setting(folder).model_copy(update=setting)
    assert ENGINE.rounds_alike(there, tiny_training(**training)) is alike


def test_a_product_that_rounds_by_what_is_beside_it_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever this processor does: a product of several runs that is a last bit off."""
    whole = torch.bmm

    def shaky(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        product = whole(x, y)
        return torch.nextafter(product, product + 1) if len(x) > 2 else product

    rounding._alike.cache_clear()
    monkeypatch.setattr(torch, "bmm", shaky)
    try:
        assert not rounding.rounds_alike((64,), (16,), torch.float32)
    finally:
        rounding._alike.cache_clear()


@pytest.mark.skipif(
    not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="MKL on a processor with AVX-512 alone can be told to do without it",
)
def test_it_is_the_processor_that_is_asked() -> None:
    """Told to use AVX2 alone, the same machine adds up small products in another order."""
    code = (
        "import torch; from aqn_tune.training.rounding import rounds_alike; torch.set_num_threads(1); "
        "print(rounds_alike((32,), (64, 128), torch.float32))"
    )
    env = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == ["False"]
