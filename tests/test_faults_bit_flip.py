"""Bit flips against patterns worked out by hand, and how many values they hit."""

from __future__ import annotations

import math

import pytest
import torch
from test_faults import FakeDraws, apply, bits, make, sample

from aqn_tune.errors import UserError
from aqn_tune.faults import BitFlip
from aqn_tune.faults.places import distinct_places, draw_count
from aqn_tune.quantization.straight_through import straight_through

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("form", "value", "bit", "expected"),
    [
        ("fp32", 1.0, 31, -1.0),
        ("fp32", 1.0, 30, INF),  # 3f800000 -> 7f800000
        ("fp32", -1.0, 30, -INF),
        ("fp32", 1.5, 30, NAN),  # 3fc00000 -> 7fc00000
        ("fp32", 0.5, 30, 2.0**127),  # 3f000000 -> 7f000000
        ("fp32", 2.0, 30, 0.0),  # 40000000 -> 00000000
        ("fp32", 3.0, 30, 2.0**-127),  # 40400000 -> 00400000, subnormal
        ("fp32", 1.0, 23, 0.5),
        ("fp32", 2.0, 23, 4.0),
        ("fp32", 1.0, 22, 1.5),
        ("fp32", 1.0, 0, 1.0 + 2.0**-23),
        ("fp32", 0.0, 0, 2.0**-149),
        ("bf16", 1.0, 15, -1.0),
        ("bf16", 1.0, 14, INF),  # 3f80 -> 7f80
        ("bf16", 1.5, 14, NAN),
        ("bf16", 0.5, 14, 2.0**127),  # 3f00 -> 7f00
        ("bf16", 3.0, 14, 2.0**-127),  # 4040 -> 0040
        ("bf16", 1.0, 7, 0.5),
        ("bf16", 1.0, 6, 1.5),
        ("bf16", 1.0, 0, 1.0 + 2.0**-7),
        ("bf16", 1.0 + 2.0**-12, 6, 1.5),  # rounded to 1 on its way in
        ("fp16", 1.0, 15, -1.0),
        ("fp16", 1.0, 14, INF),  # 3c00 -> 7c00
        ("fp16", 1.5, 14, NAN),
        ("fp16", 0.5, 14, 2.0**15),  # 3800 -> 7800
        ("fp16", 3.0, 14, 2.0**-15),  # 4200 -> 0200, subnormal
        ("fp16", 1.0, 10, 0.5),
        ("fp16", 1.0, 9, 1.5),
        ("fp16", 1.0, 0, 1.0 + 2.0**-10),
        ("fp16", 1e6, 15, -INF),  # beyond 65504
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_patterns(
    form: str, value: float, bit: int, expected: float, dtype: torch.dtype
) -> None:
    x = torch.full((1, 2, 3), value, dtype=dtype)
    result = apply(make("bit_flip", bits=[bit], format=form, count=6), x)
    torch.testing.assert_close(result, torch.full_like(x, expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("value", "bit", "expected"),
    [(1.0, 31, -1.0), (1.0, 30, INF), (1.0, 16, 1.0 + 2.0**-7), (1.0, 14, 1.0)],
)
def test_a_bfloat16_model_rounds_what_comes_back_from_fp32(
    value: float, bit: int, expected: float
) -> None:
    x = torch.full((1, 1, 2), value, dtype=torch.bfloat16)
    assert apply(make("bit_flip", bits=[bit], count=2), x).flatten().tolist() == [expected] * 2


@pytest.mark.parametrize(
    ("form", "named", "numbers"),
    [
        ("fp32", "mantissa", range(23)),
        ("fp32", "exponent", range(23, 31)),
        ("fp32", "sign", [31]),
        ("bf16", "mantissa", range(7)),
        ("bf16", "exponent", range(7, 15)),
        ("bf16", "sign", [15]),
        ("fp16", "mantissa", range(10)),
        ("fp16", "exponent", range(10, 15)),
        ("fp16", "sign", [15]),
        ("fp32", "0-22", range(23)),
        ("bf16", "4 - 4", [4]),
        ("fp16", (3, 1), [3, 1]),
    ],
)
def test_names_and_ranges_of_bits(form: str, named: object, numbers: list[int]) -> None:
    fault = make("bit_flip", bits=named, format=form, count=1)
    assert isinstance(fault, BitFlip)
    assert fault.bit_numbers() == tuple(numbers)


@pytest.mark.parametrize(("form", "size"), [("fp32", 32), ("bf16", 16), ("fp16", 16)])
def test_each_hit_flips_one_bit_and_all_bits_alike(form: str, size: int) -> None:
    held = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[form]
    integer = torch.int32 if size == 32 else torch.int16
    x = sample(1, 200, 80, dtype=held)
    result = apply(make("bit_flip", bits=f"0-{size - 1}", format=form, count=16_000), x)
    flipped = (result.view(integer) ^ x.view(integer)).long() & ((1 << size) - 1)
    counts = torch.tensor([int((flipped == 1 << n).sum()) for n in range(size)])
    assert int(counts.sum()) == 16_000
    expected = 16_000 / size
    assert bool(((counts - expected).abs() < 5 * math.sqrt(expected)).all())


def test_a_count_is_met_by_distinct_values_and_never_by_padding() -> None:
    valid = torch.zeros(3, 9, 1, dtype=torch.bool)
    valid[0, 2:7], valid[1, :1], valid[2] = True, True, True
    x = sample(3, 9, 4)
    for step in range(20):
        fault = make("bit_flip", bits="sign", count=4)
        hit = bits(apply(fault, x, valid=valid, draws=FakeDraws(x, step=step))) != bits(x)
        assert hit.sum(dim=(1, 2)).tolist() == [4, 4, 4]
        assert not bool((hit & ~valid).any())


def test_more_flips_than_values_are_a_clear_error() -> None:
    fault = make("bit_flip", bits="sign", count=13)
    with pytest.raises(
        UserError, match=r"hits 13 places of a call, which has 12 .*allowed are 0 to"
    ):
        apply(fault, sample(1, 3, 4))
    valid = torch.tensor([[[True], [True], [False]]])
    with pytest.raises(UserError, match="which has 8 in each replicate"):
        apply(make("bit_flip", bits="sign", count=9), sample(1, 3, 4), valid=valid)


def test_a_count_hits_nothing_where_all_is_padding() -> None:
    """So it is for rows that are over while others of the pass are written on."""
    x = sample(2, 3, 4)
    valid = torch.tensor([True, False]).view(2, 1, 1).expand(2, 3, 1)
    hit = bits(apply(make("bit_flip", bits="sign", count=2), x, valid=valid)) != bits(x)
    assert hit.sum(dim=(1, 2)).tolist() == [2, 0]


@pytest.mark.parametrize("rate", [1e-3, 0.3, 0.9])
def test_a_rate_is_met_within_sampling_error(rate: float) -> None:
    x = sample(2, 500, 100)
    hit = bits(apply(make("bit_flip", bits="sign", rate=rate), x)) != bits(x)
    spread = 5 * math.sqrt(x[0].numel() * rate * (1 - rate))
    for count in hit.sum(dim=(1, 2)).tolist():
        assert abs(count - x[0].numel() * rate) < spread


def test_a_certain_flip_hits_everything_once() -> None:
    x = sample(1, 10, 10)
    assert torch.equal(apply(make("bit_flip", bits="sign", rate=1.0), x), -x)


@pytest.mark.parametrize(
    ("persistence", "same_step", "same_replica"),
    [("permanent", True, True), ("transient", False, False)],
)
def test_places_and_bits_follow_the_persistence(
    persistence: str, same_step: bool, same_replica: bool
) -> None:
    fault = make("bit_flip", bits="0-31", rate=0.1, persistence=persistence)
    x = sample(1, 30, 20).repeat(2, 1, 1)
    first, second = (bits(apply(fault, x, draws=FakeDraws(x, step=step))) for step in (0, 1))
    assert torch.equal(first, second) is same_step
    assert torch.equal(first[0], first[1]) is same_replica
    assert torch.equal(first, bits(apply(fault, x, draws=FakeDraws(x, step=0))))


def test_an_intermittent_flip_keeps_to_the_places_of_the_device() -> None:
    fields = {"bits": "0-31", "rate": 0.1}
    x = sample(2, 30, 20)
    permanent = apply(make("bit_flip", **fields, persistence="permanent"), x)
    fault = make("bit_flip", **fields, persistence="intermittent", activation_rate=0.5)
    for step in range(3):
        assert torch.equal(bits(apply(fault, x, draws=FakeDraws(x, step=step))), bits(permanent))


def test_permanent_places_do_not_follow_the_padding() -> None:
    fault = make("bit_flip", bits="sign", count=10, persistence="permanent")
    x = sample(1, 10, 10)
    valid = torch.arange(10).view(1, 10, 1) < 6
    assert torch.equal(apply(fault, x, valid=valid), apply(fault, x))


# -- choosing places ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("places", "count"), [(1, 0), (0, 0), (1, 1), (10, 6), (10, 10), (3200, 100), (10**9, 1000)]
)
def test_distinct_places(places: int, count: int) -> None:
    chosen = distinct_places(places, count, torch.Generator().manual_seed(5))
    assert chosen.dtype == torch.int64
    assert len(chosen) == len(set(chosen.tolist())) == count
    assert all(0 <= place < places for place in chosen.tolist())


@pytest.mark.parametrize(("places", "count"), [(5, 2), (64, 2)])  # by a permutation, by rounds
def test_every_subset_is_equally_likely(places: int, count: int) -> None:
    generator = torch.Generator().manual_seed(6)
    subsets = math.comb(places, count)
    draws = max(4000, 10 * subsets)
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        subset = tuple(sorted(distinct_places(places, count, generator).tolist()))
        seen[subset] = seen.get(subset, 0) + 1
    expected = draws / subsets
    assert len(seen) >= subsets - 3  # of 2016 with 10 draws each, one is missed in ten runs
    assert max(abs(n - expected) for n in seen.values()) < 6 * math.sqrt(expected)


@pytest.mark.parametrize(("places", "rate"), [(10**12, 1e-12), (10**9, 3e-9), (1000, 0.25)])
def test_the_number_of_hits_is_binomial_at_any_rate(places: int, rate: float) -> None:
    """A uniform float32 would give every rate below 2^-24 = 6e-8 the same number of hits."""
    generator = torch.Generator().manual_seed(7)
    counts = torch.tensor([draw_count(places, rate, generator) for _ in range(3000)]).double()
    mean, variance = places * rate, places * rate * (1 - rate)
    assert abs(float(counts.mean()) - mean) < 5 * math.sqrt(variance / 3000)
    assert float(counts.var()) == pytest.approx(variance, rel=0.2)


# -- the gradient ------------------------------------------------------------------------------------


def test_straight_through_hands_on_every_bit_and_the_whole_gradient() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, -0.0], requires_grad=True)
    values = torch.tensor([INF, NAN, -0.0, 1e-45])
    passed = straight_through(x, values)
    assert torch.equal(bits(passed), bits(values))
    passed.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert not straight_through(x.detach(), values).requires_grad
