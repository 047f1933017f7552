"""What a policy comes to: phases, dose, identity, cautions, and the carriers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from aqn_tune.errors import UserError
from aqn_tune.injection.measure import NoiseAudit, declared_scale, within_sampling_error
from aqn_tune.noise import EffectiveNoise, LaterMultipliers, NoisePolicy
from aqn_tune.noise.carriers import CARRIERS, CarrierSpec
from aqn_tune.noise.carriers.hidden import Hidden
from aqn_tune.noise.carriers.linear_weight import LinearWeight
from aqn_tune.noise.carriers.rmsnorm_weight import RmsnormWeight
from aqn_tune.study.keys import content_hash


def resolve(steps: int = 12, layer_count: int = 6, **values: Any) -> EffectiveNoise:
    policy = NoisePolicy.model_validate(values)
    noise = policy.resolve(steps=steps, layer_count=layer_count, fault_layers=(2,))
    assert noise is not None
    return noise


FLAT = {"kind": "constant", "sigma": 0.1}
HALVED = {"kind": "zone", "middle": ["2-3"], "boundary": 0.5, "middle_multiplier_after": 0.5}
BEFORE, AFTER = (1.0,) * 6, (1.0, 1.0, 0.5, 0.5, 1.0, 1.0)


@pytest.mark.parametrize(
    ("steps", "boundary", "begins"),
    [(12, 0.5, 6), (13, 0.5, 7), (29, 0.5, 15), (10, 0.3, 3), (10, 0.7, 7), (3, 0.34, 2)],
)
def test_a_later_phase_begins_at_the_first_step_past_its_boundary(
    steps: int, boundary: float, begins: int
) -> None:
    noise = resolve(steps, schedule=FLAT, targeting={**HALVED, "boundary": boundary})
    assert noise.multipliers == BEFORE
    assert noise.later == (LaterMultipliers(step=begins, multipliers=AFTER),)
    assert [noise.multipliers_at(step) for step in range(steps)] == (
        [BEFORE] * begins + [AFTER] * (steps - begins)
    )


def test_a_phase_begins_with_its_first_noise() -> None:
    """With a pause on the boundary, step 6 has no noise: what happens there is nothing."""
    epochs = {"kind": "epoch_aware", "epochs": 2, "stages_per_epoch": 5}
    noise = resolve(12, schedule=epochs, targeting=HALVED)
    assert noise.sigma[6] == 0
    assert [phase.step for phase in noise.later] == [7]


@pytest.mark.parametrize(
    "values",
    [
        {"schedule": {**FLAT, "stop_fraction": 0.5}, "targeting": HALVED},
        {"schedule": FLAT, "targeting": {**HALVED, "boundary": 0.95}},
        {"schedule": FLAT, "targeting": {**HALVED, "middle_multiplier_after": 1.0}},
    ],
)
def test_a_phase_that_changes_nothing_is_none(values: dict[str, Any]) -> None:
    assert resolve(12, **values).later == ()


def test_dose_by_hand() -> None:
    """Sigma squared is 4, 4, 1, 1; the middle two of six layers end at half."""
    noise = EffectiveNoise(
        carrier=Hidden(),
        sigma=(0.2, 0.2, 0.1, 0.1),
        multipliers=BEFORE,
        later=(LaterMultipliers(step=2, multipliers=AFTER),),
    )
    assert noise.energy() == pytest.approx((8 * 6 + 2 * 4.5) / 10)
    assert noise.model_copy(update={"later": ()}).energy() == 6.0


def test_the_dose_of_a_tiny_sigma_is_the_dose() -> None:
    noise = resolve(12, schedule={"kind": "constant", "sigma": 1e-200}, targeting=HALVED)
    assert noise.energy() == pytest.approx(5.25)


@pytest.mark.parametrize(
    "schedule", [FLAT, {"kind": "geometric"}, {"kind": "linear", "stop_fraction": 0.2}]
)
@pytest.mark.parametrize(
    "targeting",
    [
        HALVED,
        {**HALVED, "edge_multiplier": 0.0, "middle_multiplier": 3.0},
        {"kind": "scores", "values": [1, 2, 3, 4, 5, 6], "alpha": -2},
        {"kind": "depth", "low": 0.2, "high": 0.5},
        {"kind": "targeted"},
    ],
)
def test_energy_gives_the_dose_of_global_and_keeps_the_shape(
    schedule: dict[str, Any], targeting: dict[str, Any]
) -> None:
    plain = resolve(60, schedule=schedule, targeting=targeting)
    noise = resolve(60, schedule=schedule, targeting=targeting, normalise="energy")
    everywhere = resolve(60, schedule=schedule)
    assert noise.energy() == pytest.approx(everywhere.energy())
    injected = math.fsum(
        (noise.sigma[t] * m) ** 2 for t in range(60) for m in noise.multipliers_at(t)
    )
    assert injected == pytest.approx(6 * math.fsum(sigma**2 for sigma in everywhere.sigma))
    factor = math.sqrt(6 / plain.energy())
    assert noise.sigma == plain.sigma
    for step in range(60):
        expected = [m * factor for m in plain.multipliers_at(step)]
        assert noise.multipliers_at(step) == pytest.approx(expected)


def test_noised_layers_are_those_of_any_phase() -> None:
    zone = {
        "kind": "zone", "edge": [0], "middle": [2, 3], "middle_multiplier": 0,
        "boundary": 0.5, "middle_multiplier_after": 1,
    }  # fmt: skip
    assert resolve(targeting=zone).noised_layers() == (0, 2, 3)
    assert resolve(targeting="targeted").noised_layers() == (2,)


SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"targeting": "targeted"}, {"targeting": {"kind": "window", "centre": 2, "width": 1}}),
    ({}, {"targeting": {"kind": "scores", "values": [3] * 6}}),
    ({}, {"targeting": {"kind": "scores", "values": [1, 2, 3, 4, 5, 6], "alpha": 0}}),
    ({}, {"targeting": {"kind": "depth", "low": 0, "high": 1}}),
    ({}, {"targeting": {"kind": "zone", "middle": [2]}}),
    ({"targeting": HALVED}, {"targeting": {**HALVED, "middle": None, "edge": ["0-1", "4-5"]}}),
    ({"targeting": HALVED}, {"targeting": {**HALVED, "boundary": 0.45}}),
    ({"schedule": {**FLAT, "stop_fraction": 0.5}},
     {"schedule": {**FLAT, "stop_fraction": 0.5}, "targeting": HALVED}),
    ({"schedule": {**FLAT, "stop_fraction": 0.5}, "targeting": "targeted"},
     {"schedule": FLAT, "targeting": {"kind": "zone", "middle": [2], "edge_multiplier": 0,
                                      "boundary": 0.5, "middle_multiplier_after": 0}}),
    ({"schedule": FLAT}, {"schedule": {"kind": "linear", "sigma_start": 0.1, "sigma_end": 0.1}}),
    ({"schedule": {"kind": "geometric", "stages": 5}},
     {"schedule": {"kind": "epoch_aware", "epochs": 1, "stages_per_epoch": 5}}),
    ({}, {"redraw": "step"}),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SAME)
def test_policies_that_come_to_the_same_noise_are_one_training(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert resolve(**one) == resolve(**other)
    assert content_hash(resolve(**one)) == content_hash(resolve(**other))


@pytest.mark.parametrize(
    "other",
    [
        {"redraw": "microbatch"},
        {"redraw": "forward"},
        {"targeting": HALVED},
        {"schedule": {"kind": "geometric", "stop_fraction": 0.5}},
        {"carrier": "linear_weight"},
        {"carrier": {"kind": "linear_weight", "relative": True}},
    ],
)
def test_other_noise_is_another_training(other: dict[str, Any]) -> None:
    assert content_hash(resolve(**other)) != content_hash(resolve())


def test_a_file_of_scores_enters_the_identity_by_its_content(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text("[1, 2, 3, 4, 5, 6]")
    second.write_text("[1, 2, 3, 4, 5, 6]")

    def key(file: Path) -> str:
        return content_hash(resolve(targeting={"kind": "scores", "file": str(file)}))

    written = {"kind": "scores", "values": [1, 2, 3, 4, 5, 6]}
    before = key(first)
    assert before == key(second) == content_hash(resolve(targeting=written))
    first.write_text("[6, 5, 4, 3, 2, 1]")
    assert key(first) != before


def test_trainings_from_before_phases_keep_their_identity() -> None:
    noise = EffectiveNoise(carrier=Hidden(), sigma=(0.1, 0.2), multipliers=(1.0, 0.0))
    assert noise.model_dump(mode="json") == {
        "carrier": {"kind": "hidden"}, "sigma": [0.1, 0.2], "multipliers": [1.0, 0.0],
    }  # fmt: skip
    assert noise.redraw == "step"
    assert noise.multipliers_at(1) == (1.0, 0.0)


@pytest.mark.parametrize("redraw", ["step", "microbatch", "forward"])
def test_effective_noise_survives_its_own_dump(redraw: str) -> None:
    noise = resolve(targeting=HALVED, redraw=redraw)
    assert noise.redraw == redraw
    assert EffectiveNoise.model_validate_json(noise.model_dump_json()) == noise


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ([(3, (1.0, 1.0))], r"allowed are increasing steps from 1 to 2"),
        ([(2, (1.0, 1.0)), (1, (1.0, 0.0))], "increasing steps"),
        ([(1, (1.0, 1.0)), (1, (1.0, 0.0))], "increasing steps"),
        ([(0, (1.0, 1.0))], "greater than or equal to 1"),
        ([(1, (1.0,))], "got 1 multipliers from step 1 on, and 2 before"),
    ],
)
def test_phases_out_of_order_are_refused(
    later: list[tuple[int, tuple[float, ...]]], message: str
) -> None:
    data = {
        "carrier": {"kind": "hidden"}, "sigma": (0.1,) * 3, "multipliers": (1.0, 0.0),
        "later": [{"step": step, "multipliers": values} for step, values in later],
    }  # fmt: skip
    with pytest.raises(ValidationError, match=message):
        EffectiveNoise.model_validate(data)


@pytest.mark.parametrize(
    "values",
    [
        {"schedule": {**FLAT, "warmup_fraction": 0.5, "stop_fraction": 0.5}},
        {"schedule": {"kind": "epoch_aware", "epochs": 12}},
        {"schedule": {**FLAT, "stop_fraction": 0.5},
         "targeting": {**HALVED, "edge_multiplier": 0, "middle_multiplier": 0}},
    ],
)  # fmt: skip
def test_a_policy_that_would_inject_nothing_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="injects nothing in 12 steps"):
        resolve(12, **values)


def test_multipliers_beyond_all_numbers_are_refused() -> None:
    huge = {"kind": "multipliers", "values": {0: 1e200}}
    with pytest.raises(UserError, match="leave the range of numbers"):
        resolve(targeting=huge, normalise="energy")


def test_an_unknown_redraw_is_refused() -> None:
    with pytest.raises(ValidationError, match="'step', 'microbatch' or 'forward'"):
        NoisePolicy.model_validate({"redraw": "epoch"})


@pytest.mark.parametrize(
    ("values", "cautioned"),
    [
        ({"carrier": "linear_weight"}, True),
        ({"carrier": "linear_weight", "schedule": {"kind": "constant", "sigma": 0.0011}}, True),
        ({"carrier": "linear_weight", "schedule": {"kind": "constant", "sigma": 0.001}}, False),
        ({"carrier": "linear_weight", "schedule": {"kind": "linear"}}, True),
        ({"carrier": "linear_weight", "schedule": {"kind": "epoch_aware"}}, True),
        ({"carrier": {"kind": "linear_weight", "relative": True}}, False),
        ({"carrier": "linear_weight", "targeting": "none"}, False),
        ({"carrier": "rmsnorm_weight"}, False),
        ({}, False),
    ],
)
def test_absolute_noise_on_linear_weights_is_cautioned(
    values: dict[str, Any], cautioned: bool
) -> None:
    cautions = NoisePolicy.model_validate(values).cautions()
    assert len(cautions) == cautioned
    if cautioned:
        assert "is above 0.001" in cautions[0]
        assert "`relative: true`" in cautions[0]


@pytest.mark.parametrize(
    ("carrier", "expected"),
    [
        (LinearWeight(), [[1.2, -1.9], [0.0, 4.0]]),
        (LinearWeight(relative=True), [[1.2, -1.8], [0.0, 4.0]]),
        (RmsnormWeight(relative=True), [[1.2, -1.8], [0.0, 4.0]]),
        (Hidden(), [[1.2, -1.8], [0.0, 4.0]]),
    ],
)
def test_weight_noise_by_hand(carrier: CarrierSpec, expected: list[list[float]]) -> None:
    w = torch.tensor([[[1.0, -2.0], [0.0, 4.0]]], dtype=torch.float64)
    z = torch.tensor([[[2.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)
    sigma = torch.full((1, 1, 1), 0.1, dtype=torch.float64)
    noised = carrier.add(w, sigma, z)
    assert torch.allclose(noised.values[0], torch.tensor(expected, dtype=torch.float64))
    moved = ((noised.values - w) / noised.scale)[noised.scale > 0]
    assert torch.allclose(moved, (0.1 * z)[noised.scale.expand_as(z) > 0])


@pytest.mark.parametrize("relative", [False, True])
def test_linear_weight_noise_differs_by_replicate_and_never_touches_the_weight(
    relative: bool,
) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
    before = weight.detach().clone()
    z = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(2))
    sigma = torch.tensor([0.0, 0.01, 0.02], dtype=torch.float64).view(3, 1, 1)
    noised = LinearWeight(relative=relative).add(weight.expand(3, 5, 7), sigma, z)
    assert noised.values.shape == (3, 5, 7)
    assert noised.values.dtype == weight.dtype
    assert torch.equal(noised.values[0], before), "sigma 0 changes no bit"
    assert not torch.equal(noised.values[1], noised.values[2])
    noised.values.sum().backward()
    assert torch.equal(weight.detach(), before)
    assert torch.equal(weight.grad, torch.full((5, 7), 3.0)), "abs(w) is taken without gradient"


CARRIED = [Hidden(), LinearWeight(), LinearWeight(relative=True), RmsnormWeight()]
LOWEST = 0.0157
"""A sigma just above the smallest that a study may have in bfloat16."""


def noised_in(
    dtype: torch.dtype, carrier: CarrierSpec, x: torch.Tensor, sigma: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x and its draws in a type, and x with noise."""
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    sigmas = torch.full((1, 1, 1), sigma, dtype=torch.float64)
    noised = carrier.add(x.to(dtype), sigmas, z)
    assert noised.values.dtype == dtype
    return x.to(dtype), z, noised.values


@pytest.mark.parametrize("carrier", CARRIED, ids=repr)
def test_noise_is_rounded_once(carrier: CarrierSpec) -> None:
    """In bfloat16 sigma itself would be off by up to 0.4 %; wider types keep every bit."""
    weights = torch.randn(1, 300, 200, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x, z, noised = noised_in(dtype, carrier, weights, LOWEST)
        wide = torch.promote_types(dtype, torch.float32)
        noise = z.to(wide) * torch.tensor(LOWEST, dtype=wide)
        if declared_scale(carrier, x).unique().numel() > 1:
            noise = noise * x.abs()
        assert torch.equal(noised, (x.to(wide) + noise).to(dtype))


@pytest.mark.parametrize(
    ("factor", "is_wrong"), [(1.0, False), (1.05, True), (0.95, True), (1.2, True)]
)
@pytest.mark.parametrize("values", ["normal", "just above a power of two"])
@pytest.mark.parametrize("carrier", CARRIED, ids=repr)
def test_an_audit_of_millions_of_draws_in_bfloat16(
    carrier: CarrierSpec, values: str, factor: float, is_wrong: bool
) -> None:
    """Rounding adds up to 1 % to the smallest sigma there is; a wrong multiplier adds more."""
    x = torch.randn(1, 2000, 1500, generator=torch.Generator().manual_seed(1))
    if values != "normal":
        x = torch.full_like(x, 1.0625)
    audit = NoiseAudit(1)
    plain, _, noised = noised_in(torch.bfloat16, carrier, x, LOWEST * factor)
    audit.look(0, 3, LOWEST, carrier, plain[0], noised[0])
    assert list(audit.failures) == [0] * is_wrong


@pytest.mark.parametrize(
    ("dtype", "realised", "is_close"),
    [
        (torch.bfloat16, 1.0104, True),
        (torch.bfloat16, 1.0143, True),
        (torch.bfloat16, 1.02, False),
        (torch.bfloat16, 0.98, False),
        (torch.float32, 1.001, True),
        (torch.float32, 1.004, False),
        (torch.float64, 0.996, False),
    ],
)
def test_what_rounding_may_do_to_a_standard_deviation(
    dtype: torch.dtype, realised: float, is_close: bool
) -> None:
    assert within_sampling_error(realised, 1.0, 10**10, dtype) == is_close
    assert not within_sampling_error(realised, 1.0, 0, dtype)


def test_every_carrier_is_registered_under_its_kind_and_has_a_site() -> None:
    sites = {name: kind.site for name, kind in CARRIERS.items()}
    assert sites == {
        "hidden": "layer_output", "rmsnorm_weight": "norm_weight", "linear_weight": "linear_weight",
    }  # fmt: skip
    assert all(kind().kind == name for name, kind in CARRIERS.items())  # type: ignore[call-arg]
