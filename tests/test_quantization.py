"""Number formats: golden vectors, oracles that share no code with the library, and what must always hold."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from aqn_tune.errors import UserError
from aqn_tune.quantization import (
    FORMATS,
    MXFP4,
    NVFP4,
    Quantizer,
    QuantizerSpec,
    fake_quantize,
    straight_through,
)
from aqn_tune.quantization.rounding import round_magnitude

GOLDEN = np.load(Path(__file__).parent / "data" / "quantization.npz")
CASES = sorted(name[len("in/") :] for name in GOLDEN.files if name.startswith("in/"))
MODES = ("floor", "rceil", "even", "ceil")
EVERY = [("mxfp4", mode) for mode in MODES] + [(f, "floor") for f in ("nvfp4", "fp8_e4m3", "int8")]
MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
EVEN_FIRST = np.array([0, 1, 2, 4, 0.5, 1.5, 3, 6])  # so that argmin breaks a tie to the even code
FLOAT_MAX = float(np.finfo(np.float32).max)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spec_of(format: str, mode: str = "floor") -> QuantizerSpec:
    return FORMATS[format].model_validate({"scale_mode": mode} if format == "mxfp4" else {})


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, NaN to NaN and the sign of zero included."""
    both_nan = got.isnan() & expected.isnan()
    equal = (got == expected) & (got.signbit() == expected.signbit())
    return got.dtype == expected.dtype and bool((both_nan | equal).all())


# ---- golden vectors and oracles


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_mxfp4_golden_bit_for_bit(case: str, mode: str) -> None:
    expected = torch.from_numpy(GOLDEN[f"expected/{case}/mxfp4_{mode}"])
    assert same_bits(fake_quantize(torch.from_numpy(GOLDEN[f"in/{case}"]), "mxfp4", mode), expected)


@pytest.mark.parametrize("case", CASES)
def test_nvfp4_golden(case: str) -> None:
    """Beside a rounding tie the order of float32 operations decides, by at most one code."""
    x, expected = torch.from_numpy(GOLDEN[f"in/{case}"]), GOLDEN[f"expected/{case}/nvfp4"]
    got, limit = (t.numpy().astype(np.float64) for t in NVFP4().quantize(x))
    scale = np.where(limit > 0, limit / 6, 1)
    scaled = np.abs(x.numpy().astype(np.float64)) / scale
    tie = np.abs(scaled[..., None] - MIDPOINTS).min(-1) < 1e-6 * np.maximum(scaled, 1)
    tolerance = np.where(tie, 2 * scale, 2e-6 * np.abs(expected))
    assert np.array_equal(np.isnan(got), np.isnan(expected))
    assert bool((np.isnan(got) | (np.abs(got - expected) <= tolerance)).all())


def mx_exponent(a: float, mode: str) -> int:
    """The scale's exponent by the formulas, in exact arithmetic."""
    if a == 0:
        return -127
    significand, floor = Fraction(math.frexp(a)[0]) * 2, math.frexp(a)[1] - 1
    if mode == "floor":
        e = floor - 2
    elif mode == "ceil":
        e = floor - 2 + (significand > 1)
    elif mode == "even":
        e = floor - 2 + (Fraction(round(significand * 2), 2) == 2)  # round() is half to even
    else:
        e = next(e for e in range(floor - 4, floor + 2) if 6 * Fraction(2) ** e >= Fraction(a))
    return min(max(e, -127), 127)


def mx_oracle(blocks: np.ndarray, mode: str) -> np.ndarray:
    """MXFP4 of finite float64 [B, <=32] in float64: nearest of the code values, ties to even."""
    e = np.array([[mx_exponent(float(a), mode)] for a in np.abs(blocks).max(1)])
    scaled = np.ldexp(np.abs(blocks), -e).clip(max=8)  # 6 is the nearest to all beyond
    code = EVEN_FIRST[np.abs(scaled[..., None] - EVEN_FIRST).argmin(-1)]
    return np.copysign(np.ldexp(code, e), blocks)


@cache
def adversarial(dtype: type[np.floating[Any]] = np.float32) -> np.ndarray:
    """Blocks [B, 32] of every magnitude: maxima at and beside each step of the formulas, ties, noise."""
    rng = np.random.default_rng(5)
    one = np.finfo(dtype)
    tops = []
    for k in range(-149, 128):
        for factor in (1.0, 1.25, 1.5, 1.75):
            top = dtype(np.ldexp(factor, k))
            tops += [top, np.nextafter(top, dtype(0)), np.nextafter(top, dtype(np.inf))]
    top = np.array([t for t in tops if 0 < t <= FLOAT_MAX] + [FLOAT_MAX, one.smallest_subnormal])
    blocks = top[:, None] * rng.uniform(-1, 1, (len(top), 32)) ** 3
    near = np.concatenate([MIDPOINTS, MIDPOINTS, EVEN_FIRST[1:]])
    step = 2.0 ** (np.floor(np.log2(top)) - rng.integers(1, 4, len(top)))[:, None]
    ties = np.minimum(near * step, top[:, None]).astype(dtype)
    ties[:, 7:14] = np.nextafter(
        ties[:, 7:14], rng.choice([0, np.inf], (len(top), 7)).astype(dtype)
    )
    blocks[:, 1 : 1 + near.size] = np.minimum(ties, top[:, None]) * rng.choice([-1, 1], near.size)
    blocks[:, 0] = top
    return blocks.astype(dtype)


@pytest.mark.parametrize("mode", MODES)
def test_mxfp4_against_an_exact_oracle(mode: str) -> None:
    x = adversarial()
    expected = np.clip(mx_oracle(x.astype(np.float64), mode), -FLOAT_MAX, FLOAT_MAX)
    got = fake_quantize(torch.from_numpy(x), "mxfp4", mode)
    assert same_bits(got, torch.from_numpy(expected.astype(np.float32)))


@pytest.mark.parametrize("mode", MODES)
def test_mxfp4_of_float64_is_rounded_once(mode: str) -> None:
    x = adversarial(np.float64)
    beyond = np.ldexp(
        np.linspace(-1, 1, 32)[None], np.array([[-1000], [-160], [129], [130], [1000]])
    )
    x = np.concatenate([x, beyond])
    got = fake_quantize(torch.from_numpy(x), "mxfp4", mode)
    assert same_bits(got, torch.from_numpy(mx_oracle(x, mode)))


def e4m3_values() -> np.ndarray:
    return torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e36])
def test_nvfp4_against_a_float64_oracle(scale: float, dtype: torch.dtype) -> None:
    x = (normal(32, 64).to(dtype) * torch.logspace(-4, 1, 32)[:, None] * scale).numpy()
    blocks = np.abs(x.astype(np.float64)).reshape(32, 4, 16)
    g = float(np.float32(blocks.max() / 2688))
    wanted = np.clip(blocks.max(-1, keepdims=True) / 6 / g, 2.0**-9, 448)
    distance = np.abs(wanted - e4m3_values())
    s = e4m3_values()[distance.argmin(-1)][..., None]
    two = np.sort(distance, -1)[..., :2]
    sure = (two[..., 1] - two[..., 0] > 1e-6 * wanted[..., 0])[..., None]
    scaled = blocks / (s * g)
    code = EVEN_FIRST[np.abs(scaled[..., None] - EVEN_FIRST).argmin(-1)]
    sure = sure & (np.abs(scaled[..., None] - MIDPOINTS).min(-1) > 1e-6)
    got = np.abs(NVFP4().quantize(torch.from_numpy(x)).values.numpy().reshape(32, 4, 16))
    assert sure.mean() > 0.99
    assert np.allclose(got[sure], (code * s * g)[sure], rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert {1 / 512, 448} <= set(s.flatten())


def test_short_float_rounding_is_the_cast_of_torch() -> None:
    bits = torch.arange(0, 0x43E0_0000, 0x3FFF, dtype=torch.int32)  # 0 to 448, ties among them
    y = torch.cat([bits, bits.bitwise_and(~0xFFFF)]).view(torch.float32)
    assert same_bits(round_magnitude(y.clone(), 3, -6), y.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("scale", [1e-40, 1e-3, 1.0, 1e37])
def test_eight_bit_formats_against_torch_and_numpy(scale: float) -> None:
    x = torch.cat([normal(64, 48) * scale, torch.tensor([[1.0, 127, 0.5, -1.5, 2.5] + [0] * 43])])
    top = x.abs().amax(1, keepdim=True)
    rows = (top / 448).clamp_min(2.0**-126)
    eight = (x / rows).clamp(-448, 448).to(torch.float8_e4m3fn).float() * rows
    assert same_bits(fake_quantize(x, "fp8_e4m3"), eight)
    rows = (top / 127).clamp_min(2.0**-126)
    whole = np.rint((x / rows).numpy()).clip(-127, 127) * rows.numpy()
    assert same_bits(fake_quantize(x, "int8"), torch.from_numpy(whole))
    assert fake_quantize(x[-1, :5], "int8").tolist() == [1, 127, 0, -2, 2]


# ---- what holds for every format


@pytest.mark.parametrize(("format", "mode"), EVERY)
def test_signs_powers_of_two_and_a_second_pass(format: str, mode: str) -> None:
    x = normal(16, 96)
    once = fake_quantize(x, format, mode)
    assert same_bits(fake_quantize(-x, format, mode), -once)
    for factor in (2.0**-20, 2.0**30):
        assert same_bits(fake_quantize(x * factor, format, mode), once * factor)
    again = fake_quantize(once, format, mode)
    assert torch.allclose(again, once, rtol=1e-6, atol=0)
    if format == "mxfp4":
        hard = torch.from_numpy(adversarial())
        hard = hard[hard.abs().amax(1) < 2.0**126]
        once = fake_quantize(hard, format, mode)
        assert same_bits(fake_quantize(once, format, mode), once)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, -math.nan])
@pytest.mark.parametrize(("format", "mode"), EVERY)
def test_what_shares_a_scale_with_a_non_finite_value_is_nan(
    format: str, mode: str, bad: float
) -> None:
    x = normal(2, 64)
    x[0, 3] = bad
    spec = spec_of(format, mode)
    values, limit = spec.quantize(x)
    spoilt = torch.zeros(2, 64, dtype=torch.bool)
    if format == "nvfp4":
        spoilt[:] = True
    else:
        spoilt[0, : FORMATS[format].block or 64] = True
    assert torch.equal(values.isnan(), spoilt)
    assert not (x.abs() > limit)[spoilt].any()
    clean = x.clone()
    clean[0, 3] = 0
    assert same_bits(values[~spoilt], spec.quantize(clean).values[~spoilt])


@pytest.mark.parametrize(("format", "mode"), EVERY)
def test_zeros_stay_zeros_and_empty_tensors_empty(format: str, mode: str) -> None:
    zeros = torch.zeros(3, 40)
    zeros[1] = -0.0
    assert same_bits(fake_quantize(zeros, format, mode), zeros)
    mixed = torch.cat([zeros, normal(1, 40)])
    assert same_bits(fake_quantize(mixed, format, mode)[:3], zeros)
    for shape in [(0,), (0, 64), (3, 0), (2, 0, 5)]:
        for axis in range(len(shape)):
            assert fake_quantize(torch.zeros(shape), format, mode, axis).shape == shape


@pytest.mark.parametrize("size", [1, 15, 17, 31, 33, 40, 70])
@pytest.mark.parametrize(("format", "mode"), EVERY)
def test_a_ragged_last_block_sees_no_neighbour(format: str, mode: str, size: int) -> None:
    x = normal(4, size)
    x[0, 0] = 50  # the same maximum for NVFP4's tensor scale in each tensor below
    got = fake_quantize(x, format, mode)
    padded = torch.nn.functional.pad(x, (0, 96 - size))
    assert same_bits(got, fake_quantize(padded, format, mode)[:, :size])
    louder = x.clone()
    louder[1] *= 10
    rest = torch.tensor([0, 2, 3])
    assert same_bits(fake_quantize(louder, format, mode)[rest], got[rest])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("format", "mode"), EVERY)
def test_other_dtypes_are_rounded_once_and_never_overflow(
    format: str, mode: str, dtype: torch.dtype
) -> None:
    x = normal(8, 64).to(dtype)
    got, wide = fake_quantize(x, format, mode), fake_quantize(x.float(), format, mode)
    assert got.dtype == dtype
    if dtype == torch.float64:
        assert torch.allclose(got, wide.double(), rtol=1e-6, atol=0)
    else:
        assert same_bits(got, wide.to(dtype))
    for end in (torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal):
        ends = torch.tensor([end, -end], dtype=dtype)
        assert fake_quantize(ends, format, mode).isfinite().all()


@pytest.mark.parametrize(("format", "mode"), EVERY)
def test_axis_rank_and_layout(format: str, mode: str) -> None:
    x = normal(3, 40, 5)
    before = x.clone()
    got = fake_quantize(x, format, mode, axis=1)
    assert same_bits(got, fake_quantize(x.transpose(1, 2).contiguous(), format, mode).mT)
    assert same_bits(got, fake_quantize(x, format, mode, axis=-2))
    assert torch.equal(x, before)
    assert same_bits(spec_of(format, mode).quantize(x.mT).values, got.mT)
    row = x[0, :, 0].clone()
    assert same_bits(fake_quantize(row, format, mode), fake_quantize(row[None], format, mode)[0])


@pytest.mark.parametrize(
    ("format", "mode", "low", "high"),
    [
        ("mxfp4", "floor", 18.7, 18.9),
        ("mxfp4", "rceil", 18.5, 18.8),
        ("mxfp4", "even", 18.9, 19.1),
        ("mxfp4", "ceil", 16.8, 17.3),
        ("nvfp4", "floor", 20.3, 20.5),
        ("fp8_e4m3", "floor", 31.0, 32.0),
        ("int8", "floor", 42.5, 43.5),
    ],
)
def test_signal_to_noise_on_normal_values(format: str, mode: str, low: float, high: float) -> None:
    x = normal(512, 256).double()
    error = fake_quantize(x.float(), format, mode).double() - x
    assert low < 10 * math.log10(float(x.square().mean() / error.square().mean())) < high


# ---- limits, replicas, gradients


@pytest.mark.parametrize("mode", MODES)
def test_the_limit_is_six_times_the_scale(mode: str) -> None:
    x = normal(64, 70)
    limit = MXFP4(scale_mode=mode).quantize(x).limit
    padded = np.pad(x.double().numpy(), ((0, 0), (0, 26))).reshape(-1, 32)
    e = np.array([mx_exponent(float(a), mode) for a in np.abs(padded).max(1)]).reshape(64, 3)
    assert np.array_equal(limit, (6 * 2.0**e).repeat(32, axis=1)[:, :70])
    clipped = float((x.abs() > limit).sum(1).clamp_max(1).double().mean())
    assert clipped == 0 if mode in ("rceil", "ceil") else clipped > 0.1


@pytest.mark.parametrize("format", ["nvfp4", "fp8_e4m3", "int8"])
def test_a_maximum_that_sets_the_scale_counts_as_held(format: str) -> None:
    for seed in range(20):
        x = normal(4, 48, seed=seed)
        values, limit = spec_of(format).quantize(x)
        assert limit.shape == x.shape
        at = int(x.abs().argmax())
        assert x.flatten()[at].abs() <= limit.flatten()[at]
        assert bool((values.abs() <= limit * (1 + 1e-6)).all())


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_replica_in_a_pack_gets_what_it_gets_alone(format: str) -> None:
    spec = spec_of(format)
    x = normal(4, 6, 40) * torch.tensor([1.0, 1000.0, 1e-3, 1.0])[:, None, None]
    x[3, 0, 0] = math.inf
    pack = spec.quantize(x, amax=x.abs().amax((1, 2), keepdim=True))
    for k in range(4):
        alone = spec.quantize(x[k])
        assert same_bits(pack.values[k], alone.values)
        assert same_bits(pack.limit[k], alone.limit)
    together = spec.quantize(x[:3]).values[2]
    assert torch.equal(together, pack.values[2]) != spec.uses_tensor_scale
    # A maximum that leaves a bad value out (padding, say) must not hide it.
    assert spec.quantize(x, amax=torch.tensor(5.0)).values[3, 0, 0].isnan()


@pytest.mark.parametrize(("format", "mode"), EVERY)
def test_the_gradient_passes_straight_through(format: str, mode: str) -> None:
    x = normal(5, 40).requires_grad_()
    weight = normal(5, 40, seed=1)
    (fake_quantize(x, format, mode, axis=0) * weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weight)
    with torch.no_grad():
        assert not fake_quantize(x, format, mode).requires_grad


def test_straight_through_returns_exactly_the_values() -> None:
    x = torch.tensor([1e8, 1.0], dtype=torch.float32, requires_grad=True)
    values = torch.tensor([1.0, 3.0])
    result = straight_through(x, values)
    assert result.tolist() == [1.0, 3.0]
    (first,) = torch.autograd.grad((result**2).sum(), x, create_graph=True)
    assert first.tolist() == [2.0, 6.0]
    result.mul_(2)  # in place, as a fault behind the quantizer may work
    result.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0]


# ---- specs and messages


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"format": "mxfp8"}, ["format: got 'mxfp8'", "nvfp4", "did you mean 'mxfp4'"]),
        ({"scale_mode": "flor"}, ["scale_mode: got 'flor'", "did you mean 'floor'"]),
        ({"format": "int8", "scale_mode": "even"}, ["scale_mode", "'int8'"]),
        ({"axis": 2}, ["axis: got 2", "(2, 3)", "-2 to 1"]),
        ({"axis": -3}, ["axis: got -3"]),
        ({"x": torch.tensor(1.0)}, ["axis", "no dimension"]),
        ({"x": torch.arange(3)}, ["torch.int64", "torch.bfloat16"]),
    ],
)
def test_what_cannot_be_used_is_named(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        fake_quantize(**{"x": torch.zeros(2, 3), **arguments})
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_specs(format: str) -> None:
    quantizer: TypeAdapter[QuantizerSpec] = TypeAdapter(Quantizer)
    spec = quantizer.validate_python({"format": format})
    assert type(spec) is FORMATS[format]
    assert spec == spec_of(format)
    assert (spec.operands, spec.modules, spec.layers) == ("both", ("linear",), "all")
    assert (spec.exclude, spec.when) == ((), "both")
    assert all(field.description for field in FORMATS[format].model_fields.values())
    full = {"format": format, "layers": [0, "2-3"], "operands": "weight", "when": "eval"}
    spec = quantizer.validate_python(full)
    assert quantizer.validate_json(spec.model_dump_json()) == spec
    for wrong in ({"layer": [1]}, {"layers": ["3-1"]}, {"when": "never"}, {"scale_mode": "flor"}):
        with pytest.raises(ValidationError):
            quantizer.validate_python({"format": format, **wrong})
    if format != "mxfp4":
        with pytest.raises(ValidationError, match="scale_mode"):
            quantizer.validate_python({"format": format, "scale_mode": "even"})


def test_the_room_imports_with_torch_refused(tmp_path: Path) -> None:
    code = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "numpy"):
            raise ImportError("refused: " + name)

sys.meta_path.insert(0, Refuse())
from aqn_tune.quantization import FORMATS, fake_quantize
print(len([kind().model_dump() for kind in FORMATS.values()]))
"""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [str(len(FORMATS))], done.stderr
