"""Whether products round alike in every pack, asked of the processor at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exactness import exact
from tiny import save_tiny_model, tiny_data, tiny_setting, tiny_training

from aqn_tune.training import rounding
from aqn_tune.training.engine import ENGINE
from aqn_tune.training.evaluate import FOLD_TOKENS

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_multiples_of_sixteen_round_alike(dtype: torch.dtype) -> None:
    rows = dict.fromkeys((16, 32, 48, 64, 96, 128, 448), 8)
    assert rounding.rounds_alike(rows, (16, 32, 64), dtype)
    assert rounding.rounds_alike({448: 3, 3584: 2}, (64, 128), dtype)


def test_parts_of_vectors_are_not_promised() -> None:
    assert not rounding.rounds_alike({16: 8, 39: 8}, (64, 72), torch.float32)
    assert not rounding.rounds_alike({16: 8}, (), torch.float32), "widths that are not known"


@exact
def test_a_product_with_a_vector_goes_another_way() -> None:
    assert not rounding._alike(1, 64, 64, 8, torch.float32)


def test_one_shape_that_differs_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int, int]] = []

    def alike(rows: int, width: int, other: int, folds: int, dtype: torch.dtype) -> bool:
        asked.append((rows, width, other, folds))
        return (rows, width, other, folds) != (32, 8, 4, 3)

    monkeypatch.setattr(rounding, "_alike", alike)
    assert not rounding.rounds_alike({16: 8, 32: 8}, (4, 8), torch.float32)
    assert rounding.rounds_alike({16: 8}, (4, 8), torch.float32)
    assert rounding.rounds_alike({16: 8, 32: 2}, (4, 8), torch.float32), "never three at a time"
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
    assert ENGINE.rounds_alike(there, tiny_training(**training), 8) is alike


@pytest.mark.parametrize(
    ("training", "most", "micro"),
    [
        ({}, 8, 4),
        ({}, 3, 4),
        ({"gradient_accumulation_steps": 2}, 8, 2),
        ({"batch_size": 8, "gradient_accumulation_steps": 2}, 8, 4),
        ({"batch_size": 8, "gradient_accumulation_steps": 4}, 2, 2),
        ({"batch_size": 12}, 8, 12),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_shapes_of_a_training_are_those_that_are_asked(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    training: dict[str, object],
    most: int,
    micro: int,
    dtype: str,
) -> None:
    """The rows of a microbatch, not of a step; the widths of keys and values, not of the layer alone."""
    asked: set[tuple[int, int]] = set()
    widths: set[tuple[int, int]] = set()
    types: set[torch.dtype] = set()

    def alike(rows: int, width: int, other: int, folds: int, its: torch.dtype) -> bool:
        asked.add((rows, folds))
        widths.add((width, other))
        types.add(its)
        return True

    monkeypatch.setattr(rounding, "_alike", alike)
    setting = tiny_setting(folder, dtype=dtype)
    assert ENGINE.rounds_alike(setting, tiny_training(**training), most)
    wanted = {(micro * tiny_data(folder).tokens.shape[1], most)}
    for split in ("validation", "test"):
        rows = 16 * tiny_data(folder, split).tokens.shape[1]
        wanted.add((rows, FOLD_TOKENS // rows))
    assert asked == {(rows, n) for rows, many in wanted for n in rounding.FOLDS if n <= many}
    assert widths == {(width, other) for width in (16, 32, 64) for other in (16, 32, 64)}
    assert types == {getattr(torch, dtype)}


@pytest.mark.parametrize("rank", [2, 3, 8, 33])
def test_a_rank_whose_products_round_by_what_is_beside_them_is_found(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Whatever this processor does: a product of several runs that is a last bit off, at one rank alone."""
    whole = torch.bmm

    def shaky(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        product = whole(x, y)
        shapes = {x.shape[1], x.shape[2], y.shape[2]}
        return torch.nextafter(product, product + 1) if len(x) > 2 and rank in shapes else product

    rounding._alike.cache_clear()
    monkeypatch.setattr(torch, "bmm", shaky)
    try:
        assert not rounding.rounds_alike({64: 8}, (16,), torch.float32)
    finally:
        rounding._alike.cache_clear()


@exact
def test_it_is_the_processor_that_is_asked() -> None:
    """Told to use AVX2 alone, the same machine adds up small products in another order."""
    code = (
        "import torch; from aqn_tune.training.rounding import rounds_alike; torch.set_num_threads(1); "
        "print(rounds_alike({32: 8}, (64, 128), torch.float32))"
    )
    env = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert shown.stdout.split() == ["False"]
