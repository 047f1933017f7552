"""Number formats beside independent libraries, each skipped where it is not installed.

To run them: `pip install -e '.[live]'`.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from aqn_tune.quantization import MXFP4, NVFP4, fake_quantize

MODES = ("floor", "rceil", "even", "ceil")


def library(package: str, module: str) -> Any:
    """Return a module of a library; what the library warns of on the way in is not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(package, exc_type=ImportError)
        return importlib.import_module(module)


def wide() -> torch.Tensor:
    """Return float32 [128, 64] with magnitudes from 1e-6 to 1e6 and ties in every fourth row."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(128, 64, generator=generator) * torch.logspace(-6, 6, 128)[:, None]
    eighths = torch.randint(-64, 65, (32, 64), generator=generator).float() / 8
    return torch.cat([x, eighths, eighths * 1.25])


@pytest.mark.parametrize("mode", MODES)
def test_mxfp4_elements_are_those_of_ml_dtypes(mode: str) -> None:
    ml_dtypes = library("ml_dtypes", "ml_dtypes")
    x = wide()
    values, limit = MXFP4(scale_mode=mode).quantize(x)
    scale = (limit / 6).numpy()
    assert np.array_equal(scale.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32), scale)
    code = (x.numpy() / scale).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn)
    assert np.array_equal(code.astype(np.float32) * scale, values.numpy())


def test_nvfp4_and_fp8_are_those_of_ml_dtypes() -> None:
    ml_dtypes = library("ml_dtypes", "ml_dtypes")
    x = wide().numpy()
    g = np.float32(np.abs(x).max() / np.float32(2688))
    blocks = x.reshape(-1, 4, 16)
    wanted = np.abs(blocks).max(-1, keepdims=True) / np.float32(6) / g
    s = wanted.clip(2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    code = (blocks / (s * g)).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    got = NVFP4().quantize(torch.from_numpy(x)).values.numpy()
    assert np.array_equal(got, (code * (s * g)).reshape(x.shape))
    row = np.abs(x).max(1, keepdims=True) / np.float32(448)
    eight = (x / row).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * row
    assert np.array_equal(fake_quantize(torch.from_numpy(x), "fp8_e4m3").numpy(), eight)


@pytest.mark.parametrize("mode", MODES)
def test_mxfp4_is_that_of_torchao(mode: str) -> None:
    mx = library("torchao", "torchao.prototype.mx_formats.mx_tensor")
    x = wide()
    scale, data = mx.to_mx(x, torch.float4_e2m1fn_x2, 32, mx.ScaleCalculationMode(mode))
    theirs = mx.to_dtype(data, scale, torch.float4_e2m1fn_x2, 32, torch.float32)
    assert torch.equal(fake_quantize(x, "mxfp4", mode), theirs)


def test_nvfp4_is_that_of_torchao() -> None:
    """It multiplies by a reciprocal and ends its block scales at 2**-6: compare above, and not at ties."""
    nv = library("torchao", "torchao.prototype.mx_formats.nvfp4_tensor")
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(2))
    tensor_scale = nv.per_tensor_amax_to_scale(x.abs().max())
    theirs = nv.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=tensor_scale).dequantize()
    ours = fake_quantize(x, "nvfp4")
    same = torch.isclose(ours, theirs, rtol=2e-6, atol=0)
    assert float(same.double().mean()) > 0.999


def test_mxfp4_even_is_that_of_compressed_tensors() -> None:
    mx = library("compressed_tensors", "compressed_tensors.quantization.utils.mxfp_utils")
    fp4 = library("compressed_tensors", "compressed_tensors.quantization.utils.fp4_utils")
    x = wide()
    blocks = x.view(-1, 2, 32)
    scale = 2.0 ** (mx.generate_mx_scales(blocks.abs().amax(-1, keepdim=True)) - 127)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = fp4.cast_to_fp4(blocks / scale) * scale
    assert torch.equal(fake_quantize(x, "mxfp4", "even"), theirs.view(x.shape))
