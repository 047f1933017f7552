"""Which places are faulty: exact density, axes, and what stays from call to call."""

from __future__ import annotations

import math

import pytest
import torch
from test_faults import FakeDraws, make
from torch import Tensor

from aqn_tune.faults.mask import fault_mask

SHAPE = (3, 20, 16)


def mask_of(
    *, step: int = 0, device: int = 0, shape: tuple[int, int, int] = SHAPE, **fields: object
) -> Tensor | None:
    fault = make("bias", scale=0.1, **fields)
    return fault_mask(fault, shape, FakeDraws(torch.empty(shape), step=step, device=device))


def places(**fields: object) -> Tensor:
    mask = mask_of(**fields)  # type: ignore[arg-type]
    assert mask is not None
    assert mask.dtype == torch.bool
    return mask


@pytest.mark.parametrize(
    "fields",
    [{}, {"persistence": "transient"}, {"axis": "channel"}, {"axis": "token", "density": 1.0}],
)
def test_everywhere_and_always_needs_no_mask(fields: dict[str, object]) -> None:
    assert mask_of(**fields) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("axis", "density", "shape", "count"),
    [
        ("element", 0.1, (3, 20, 16), 32),
        ("element", 0.5, (3, 20, 16), 160),
        ("element", 0.9, (3, 20, 16), 288),
        ("element", 1e-6, (3, 20, 16), 1),  # never none
        ("channel", 0.25, (3, 1, 16), 4),
        ("channel", 0.3, (3, 1, 16), 5),  # 4.8
        ("channel", 0.99, (3, 1, 16), 16),  # 15.84
        ("channel", 0.001, (3, 1, 16), 1),
        ("token", 0.2, (3, 20, 1), 4),
        ("token", 0.03, (3, 20, 1), 1),  # 0.6
    ],
)
@pytest.mark.parametrize("persistence", ["permanent", "transient"])
def test_density_is_exact(
    axis: str, density: float, shape: tuple[int, ...], count: int, persistence: str
) -> None:
    mask = places(axis=axis, density=density, persistence=persistence)
    assert mask.shape == shape
    assert mask.sum(dim=(1, 2)).tolist() == [count] * 3


@pytest.mark.parametrize("axis", ["element", "channel", "token"])
def test_permanent_places_belong_to_the_device(axis: str) -> None:
    first = places(axis=axis, density=0.3, step=0)
    assert torch.equal(first, places(axis=axis, density=0.3, step=7))
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first, places(axis=axis, density=0.3, device=1))


def test_permanent_channels_stay_when_the_batch_gets_longer() -> None:
    short = places(axis="channel", density=0.3)
    assert torch.equal(short, places(axis="channel", density=0.3, shape=(3, 99, 16)))


@pytest.mark.parametrize("axis", ["element", "channel", "token"])
def test_transient_places_move(axis: str) -> None:
    fields = {"axis": axis, "density": 0.3, "persistence": "transient"}
    first = places(**fields, step=0)
    assert torch.equal(first, places(**fields, step=0))
    assert not torch.equal(first, places(**fields, step=1))
    assert not torch.equal(first[0], first[1])


def test_transient_places_are_spread_evenly() -> None:
    fields = {"axis": "channel", "density": 0.25, "persistence": "transient"}
    hits = sum(places(**fields, step=step).double().sum(dim=(0, 1)) for step in range(400))
    expected, spread = 3 * 400 * 0.25, math.sqrt(3 * 400 * 0.25 * 0.75)
    assert bool(((torch.as_tensor(hits) - expected).abs() < 5 * spread).all())


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_an_intermittent_fault_acts_in_its_share_of_the_calls(rate: float) -> None:
    fields = {"persistence": "intermittent", "activation_rate": rate}
    masks = torch.stack([places(**fields, step=step) for step in range(400)])
    assert masks.shape == (400, 3, 1, 1)
    acted, spread = int(masks.sum()), math.sqrt(1200 * rate * (1 - rate))
    assert abs(acted - 1200 * rate) <= 5 * spread
    if rate < 1:
        assert not torch.equal(masks[:, 0], masks[:, 1])  # every replicate has its own coin


def test_an_intermittent_fault_acts_on_the_places_of_the_device() -> None:
    fields = {"density": 0.3, "axis": "channel"}
    permanent = places(**fields)
    seen = set()
    for step in range(50):
        mask = places(**fields, persistence="intermittent", activation_rate=0.5, step=step)
        for replica in range(3):
            acts = bool(mask[replica].any())
            assert torch.equal(mask[replica], permanent[replica] & acts)
            seen.add(acts)
    assert seen == {True, False}


@pytest.mark.parametrize("persistence", ["permanent", "transient"])
def test_faulty_places_and_hits_are_drawn_apart(persistence: str) -> None:
    """Drawn from one stream, the flips would all fall on the faulty places: 32 of 32 and not 3.2."""
    fault = make("bit_flip", bits="sign", count=32, density=0.1, persistence=persistence)
    x = torch.ones(1, 20, 16)
    shared = 0
    for device in range(20):
        draws = FakeDraws(x, step=device, device=device)
        mask = fault_mask(fault, x.shape, draws)
        assert mask is not None
        shared += int((mask & (fault.apply(x, {}, x[..., :1] > 0, draws) < 0)).sum())
    assert shared == pytest.approx(20 * 3.2, abs=5 * math.sqrt(20 * 3.2))


def test_a_mask_leaves_sound_places_alone_and_stops_the_gradient_of_dead_ones() -> None:
    """What the places are for: x where the mask is not, the fault where it is."""
    fault = make("stuck_at", value=5.0, density=0.25, axis="channel")
    x = torch.ones(SHAPE, requires_grad=True)
    draws = FakeDraws(x.detach())
    mask = fault_mask(fault, SHAPE, draws)
    assert mask is not None
    value = {"value": torch.full((3, 1, 1), 5.0, dtype=torch.float64)}
    faulty = fault.apply(x, value, torch.ones(3, 20, 1, dtype=torch.bool), draws)
    result = torch.where(mask, faulty, x)
    assert int((result == 5.0).sum()) == 3 * 20 * 4
    result.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, mask.expand(SHAPE))
