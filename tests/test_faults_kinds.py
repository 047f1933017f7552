"""Known answers of each kind, and the realised levels of those that draw."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_faults import FakeDraws, apply, bits, make, sample

X = torch.tensor([[[1.0, -2.0, 0.5, 4.0], [0.1, -0.2, 0.3, 10.0]]])  # [1, 2, 4]


@pytest.mark.parametrize(
    ("reference", "threshold", "expected"),
    [
        ("token_max", 0.3, [[0.0, -2.0, 0.0, 4.0], [0.0, 0.0, 0.0, 10.0]]),
        ("tensor_max", 0.15, [[0.0, -2.0, 0.0, 4.0], [0.0, 0.0, 0.0, 10.0]]),
        ("tensor_max", 0.05, [[1.0, -2.0, 0.5, 4.0], [0.0, 0.0, 0.0, 10.0]]),
        ("absolute", 0.4, [[1.0, -2.0, 0.5, 4.0], [0.0, 0.0, 0.0, 10.0]]),
        ("rms", 0.5, [[0.0, -2.0, 0.0, 4.0], [0.0, 0.0, 0.0, 10.0]]),  # rms 2.3 and 5.0
        ("mean_abs", 0.5, [[1.0, -2.0, 0.0, 4.0], [0.0, 0.0, 0.0, 10.0]]),  # 1.875 and 2.65
        ("std", 0.5, [[0.0, -2.0, 0.0, 4.0], [0.0, 0.0, 0.0, 10.0]]),  # 2.13 and 4.30
        ("quantile", 0.5, [[0.0, -2.0, 0.0, 4.0], [0.0, 0.0, 0.3, 10.0]]),
        ("quantile", 1.0, [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]),
        ("token_max", 0.0, X[0].tolist()),
        ("quantile", 0.0, X[0].tolist()),
    ],
)
def test_dead_zone(reference: str, threshold: float, expected: list[list[float]]) -> None:
    fault = make("dead_zone", threshold=threshold, reference=reference)
    assert apply(fault, X)[0].tolist() == torch.tensor(expected).tolist()


def test_a_value_at_the_threshold_survives() -> None:
    fault = make("dead_zone", threshold=0.5)
    assert apply(fault, torch.tensor([[[2.0, 4.0]]])).flatten().tolist() == [2.0, 4.0]


def test_padding_does_not_silence_the_values_beside_it() -> None:
    fault = make("dead_zone", threshold=0.5, reference="tensor_max")
    x = torch.tensor([[[1.0, 2.0], [100.0, 0.0]]])
    valid = torch.tensor([[[True], [False]]])
    assert apply(fault, x, valid=valid)[0, 0].tolist() == [1.0, 2.0]
    # The original bug: the maximum over the whole tensor, padding included, silences every real value.
    assert apply(fault, x)[0, 0].tolist() == [0.0, 0.0]


RMS = [math.sqrt(21.25 / 4), math.sqrt(100.14 / 4)]  # of the two tokens of X
STD = [math.sqrt(21.25 / 4 - 0.875**2), math.sqrt(100.14 / 4 - 2.55**2)]


@pytest.mark.parametrize(
    ("fields", "errors"),
    [
        ({"scale": 0.1}, [[0.1 * RMS[0]] * 4, [0.1 * RMS[1]] * 4]),
        ({"scale": -0.1, "reference": "std"}, [[-0.1 * STD[0]] * 4, [-0.1 * STD[1]] * 4]),
        ({"scale": 0.1, "reference": "mean_abs"}, [[0.1875] * 4, [0.265] * 4]),
        ({"scale": 0.1, "reference": "token_max"}, [[0.4] * 4, [1.0] * 4]),
        ({"scale": 0.1, "reference": "tensor_max"}, [[1.0] * 4, [1.0] * 4]),
        ({"scale": 0.1, "reference": "absolute"}, [[0.1] * 4, [0.1] * 4]),
        ({"scale": 0.1, "form": "sign"}, [[0.1, -0.1, 0.1, 0.1], [0.1, -0.1, 0.1, 0.1]]),
        (
            {"scale": -0.1, "form": "sign", "reference": "token_max"},
            [[-0.4, 0.4, -0.4, -0.4], [-1.0, 1.0, -1.0, -1.0]],
        ),
        ({"scale": 0.5, "form": "gain"}, (0.5 * X[0]).tolist()),
        ({"scale": -1.0, "form": "gain"}, (-X[0]).tolist()),
    ],
)
def test_bias(fields: dict[str, Any], errors: list[list[float]]) -> None:
    x = X.double()
    expected = x[0] + torch.tensor(errors, dtype=torch.float64)
    torch.testing.assert_close(apply(make("bias", **fields), x)[0], expected, rtol=1e-6, atol=1e-7)


def test_a_push_away_from_zero_leaves_zeros_alone() -> None:
    x = torch.tensor([[[0.0, -0.0, 1.0]]])
    result = apply(make("bias", scale=0.5, form="sign"), x)
    assert result.flatten().tolist() == [0.0, 0.0, 1.5]


@pytest.mark.parametrize("form", ["offset", "gain"])
def test_the_default_scale_of_a_bias_is_its_relative_error(form: str) -> None:
    x = sample(2, 8, 32, scale=5.0)
    error = apply(make("bias", scale=-0.2, form=form), x) - x
    torch.testing.assert_close(error.norm(dim=2), 0.2 * x.norm(dim=2))


def test_a_small_gain_is_kept_in_bfloat16() -> None:
    """1 + 0.005 in bfloat16 is 1.0078: the scale has to be multiplied in before it is added to one."""
    x = sample(1, 200, 64, dtype=torch.bfloat16)
    result = apply(make("bias", scale=0.005, form="gain"), x)
    gain = float((result.double() * x.double()).sum() / x.double().square().sum())
    assert gain - 1 == pytest.approx(0.005, rel=0.2)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"limit": 0.25}, [[1.0, -1.0, 0.5, 1.0], [0.1, -0.2, 0.3, 2.5]]),
        (
            {"limit": 0.25, "reference": "tensor_max"},
            [[1.0, -2.0, 0.5, 2.5], [0.1, -0.2, 0.3, 2.5]],
        ),
        ({"limit": 1.5, "reference": "absolute"}, [[1.0, -1.5, 0.5, 1.5], [0.1, -0.2, 0.3, 1.5]]),
        (
            {"limit": 0.4, "reference": "mean_abs"},
            [[0.75, -0.75, 0.5, 0.75], [0.1, -0.2, 0.3, 1.06]],
        ),
        (
            {"limit": 1.0, "reference": "rms"},
            [[1.0, -2.0, 0.5, RMS[0]], [0.1, -0.2, 0.3, RMS[1]]],
        ),
        (
            {"limit": 0.5, "reference": "std"},
            [[1.0, -STD[0] / 2, 0.5, STD[0] / 2], [0.1, -0.2, 0.3, STD[1] / 2]],
        ),
        ({"limit": 1.0}, X[0].tolist()),
    ],
)
def test_saturation(fields: dict[str, Any], expected: list[list[float]]) -> None:
    result = apply(make("saturation", **fields), X)[0]
    torch.testing.assert_close(result, torch.tensor(expected))


def test_saturation_clips_infinity_and_hands_nan_on() -> None:
    x = torch.tensor([[[float("inf"), float("-inf"), float("nan"), 0.5]]])
    result = apply(make("saturation", limit=2.0, reference="absolute"), x).flatten()
    assert result[:2].tolist() == [2.0, -2.0]
    assert bool(result[2].isnan())
    assert float(result[3]) == 0.5


def test_a_value_at_the_limit_passes_its_gradient() -> None:
    x = torch.tensor([[[1.0, 2.0, -2.0, 2.5]]], requires_grad=True)
    apply(make("saturation", limit=2.0, reference="absolute"), x).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [1.0, 1.0, 1.0, 0.0]


def test_a_token_of_zeros_is_not_touched_by_its_limit_of_zero() -> None:
    x = torch.tensor([[[0.0, -0.0]]])
    assert torch.equal(bits(apply(make("saturation", limit=0.5), x)), bits(x))


@pytest.mark.parametrize("value", [0.0, -3.5])
def test_stuck_at_holds_its_value_whatever_it_gets(value: float) -> None:
    x = torch.tensor([[[1.0, float("nan"), float("inf"), -2.0]]])
    assert apply(make("stuck_at", value=value, density=1.0), x).flatten().tolist() == [value] * 4


def test_the_density_of_a_stuck_fault_has_to_be_written() -> None:
    with pytest.raises(ValueError, match=r"density\n  Field required"):
        make("stuck_at", value=0.0)


def test_relative_gaussian_has_the_declared_relative_error() -> None:
    x = torch.full((1, 400, 50), -3.0)
    error = (apply(make("relative_gaussian", scale=0.05), x) - x) / 3.0
    assert float(error.std()) == pytest.approx(0.05, rel=0.02)


@pytest.mark.parametrize(
    ("reference", "std"),
    [
        (None, [0.05 * math.sqrt(5.0), 0.05 * math.sqrt(25.0)]),
        ("rms", [0.05 * math.sqrt(5.0), 0.05 * math.sqrt(25.0)]),
        ("mean_abs", [0.05 * 2.0, 0.05 * 4.0]),
        ("std", [0.05 * math.sqrt(5.0), 0.05 * math.sqrt(25.0)]),
        ("token_max", [0.05 * 3.0, 0.05 * 7.0]),
        ("tensor_max", [0.05 * 7.0, 0.05 * 7.0]),
        ("absolute", [0.05, 0.05]),
    ],
)
def test_absolute_gaussian_has_the_declared_error(reference: str | None, std: list[float]) -> None:
    pattern = torch.tensor([[1.0, -1.0, 3.0, -3.0], [1.0, -1.0, 7.0, -7.0]])
    x = pattern.repeat(1, 2500).unsqueeze(0)  # 10,000 values in each of two tokens
    fields = {} if reference is None else {"reference": reference}
    error = apply(make("absolute_gaussian", scale=0.05, **fields), x) - x
    realised = error.std(dim=2).flatten().tolist()
    assert realised == pytest.approx([std[0], std[1]], rel=5 / math.sqrt(2 * 10_000))
    small = (
        error[0, :, 0::4].std(),
        error[0, :, 2::4].std(),
    )  # values of 1 err as much as larger ones
    assert float(small[0] / small[1]) == pytest.approx(1.0, rel=0.05)


def test_the_default_scale_of_an_absolute_error_is_its_relative_error() -> None:
    x = sample(1, 50, 400, scale=7.0) + 4.0
    error = apply(make("absolute_gaussian", scale=0.1), x) - x
    assert float(error.norm() / x.norm()) == pytest.approx(0.1, rel=0.02)


def test_spikes_have_the_declared_rate_and_size() -> None:
    x = sample(2, 500, 100)
    x[1] *= 40
    result = apply(make("spike", probability=0.04, factor=10.0), x, probability=[0.04, 0.2])
    hit = result != x
    for replica, probability in enumerate([0.04, 0.2]):
        n = x[replica].numel()
        spread = 5 * math.sqrt(n * probability * (1 - probability))
        count = int(hit[replica].sum())
        assert abs(count - n * probability) < spread
        spikes = result[replica][hit[replica]] / x[replica].abs().max()
        assert float(spikes.std()) == pytest.approx(10.0, rel=5 / math.sqrt(2 * count))
        assert abs(float(spikes.mean())) < 50 / math.sqrt(count)


def test_a_certain_spike_replaces_every_value() -> None:
    x = sample(1, 10, 10)
    assert bool((apply(make("spike", probability=1.0), x) != x).all())


def test_a_permanent_spike_keeps_its_places_and_not_its_values() -> None:
    fault = make("spike", probability=0.1, persistence="permanent")
    x = sample(2, 30, 20)
    first, second = (apply(fault, x, draws=FakeDraws(x, step=step)) for step in (0, 1))
    assert torch.equal(first != x, second != x)
    assert torch.equal((first != x)[0], (first != x)[1])  # one device
    assert not torch.equal(first, second)
    other = apply(fault, x, draws=FakeDraws(x, device=1))
    assert not torch.equal(first != x, other != x)


def test_a_transient_spike_moves() -> None:
    fault = make("spike", probability=0.1)
    x = sample(2, 30, 20)
    first, second = (apply(fault, x, draws=FakeDraws(x, step=step)) != x for step in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
