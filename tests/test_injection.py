"""Injection: addresses, order, audits. Each guard sees the original bug planted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import exact
from tiny import (
    CLEAN,
    LAYERS,
    noise,
    one_pack,
    save_tiny_model,
    tiny_pack,
    tiny_run,
    tiny_setting,
    tiny_training,
)

from aqn_tune.errors import UserError
from aqn_tune.faults import DeadZone, FaultSpec, RelativeGaussian
from aqn_tune.injection import apply as apply_module
from aqn_tune.injection import layout as layout_module
from aqn_tune.injection.address import AddressBook
from aqn_tune.injection.draws import keyed_normal
from aqn_tune.injection.fold import Entry, fault_slots, noise_slots
from aqn_tune.injection.injection import Injection
from aqn_tune.models.load import build_model, decoder_layers
from aqn_tune.noise.carriers.hidden import Hidden
from aqn_tune.study.device import HEALTHY, Device
from aqn_tune.study.runs import Condition, Run
from aqn_tune.study.seeds import stream_seed
from aqn_tune.training import evaluate as evaluate_module
from aqn_tune.training import pack as pack_module
from aqn_tune.training.engine import ENGINE

torch.set_num_threads(1)
TRAINING = tiny_training()
FAULT = DeadZone(layers=(1,), threshold=0.2, reference="tensor_max")
FAULTY = Condition(name="faulty", scenario="s", device=Device(faults=(FAULT,)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(folder: Path):
    return build_model(tiny_setting(folder).model)


def seed_of(replica: int, path: tuple) -> int:
    return stream_seed(7, *path)


def faulty(*faults: FaultSpec) -> Device:
    return Device(faults=faults)


TOKENS = torch.arange(1, 17).view(1, 16)
VALID = torch.ones(1, 16, dtype=torch.bool)


def hidden_after(model, layer: int, injection: Injection | None) -> torch.Tensor:
    seen = {}
    handle = decoder_layers(model)[layer].register_forward_hook(
        lambda m, a, out: seen.setdefault("out", out)
    )
    if injection is None:
        model(input_ids=TOKENS)
    else:
        with injection:
            injection.begin(VALID)
            # Registered last, so that the observer sees what the next layer sees.
            handle.remove()
            handle = decoder_layers(model)[layer].register_forward_hook(
                lambda m, a, out: seen.setdefault("out", out)
            )
            model(input_ids=TOKENS)
    handle.remove()
    return seen["out"]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (DeadZone(layers=(1,), threshold=0.1), ["model.layers.1"]),
        (DeadZone(layers=(-1,), threshold=0.1), ["model.layers.3"]),
        (DeadZone(layers=("0-1",), threshold=0.1, modules=("mlp",)), None),
        (
            RelativeGaussian(layers=(0,), modules=("*down_proj", "self_attn.q_proj")),
            ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"],
        ),
        (
            RelativeGaussian(layers=(2,), modules=("model.layers.2.mlp.up_proj",)),
            ["model.layers.2.mlp.up_proj"],
        ),
        (RelativeGaussian(layers=(0,), modules=("*_proj",), exclude=("*mlp*",)), 4),
        (RelativeGaussian(layers="all"), 7 * LAYERS),
    ],
)
def test_addresses(model, fault, expected) -> None:
    if expected is None:
        with pytest.raises(UserError, match="matches nothing in layer 0"):
            AddressBook(model).find(fault)
        return
    names = [address.name for address in AddressBook(model).find(fault)]
    assert names == expected if isinstance(expected, list) else len(names) == expected


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            RelativeGaussian(layers=(0,), modules=("self_attn.q_prj",)),
            r"did you mean 'self_attn.q_proj'",
        ),
        (RelativeGaussian(layers=(LAYERS,)), r"there is no layer 4 of 4; allowed are 0 to 3"),
        (RelativeGaussian(layers=(0,), modules=("lm_head",)), r"matches nothing in layer 0"),
    ],
)
def test_a_fault_that_matches_nothing_is_refused(model, fault, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AddressBook(model).find(fault)


def test_a_model_without_rmsnorm_refuses_that_carrier(model) -> None:
    for layer in decoder_layers(model):
        layer.input_layernorm = torch.nn.LayerNorm(32)
        layer.post_attention_layernorm = torch.nn.LayerNorm(32)
    entry = Entry(HEALTHY, noise(TRAINING, {"carrier": "rmsnorm_weight"}))
    with pytest.raises(UserError, match="use carrier 'hidden'"):
        Injection(AddressBook(model), [entry], seed_of=seed_of)


def test_noise_comes_before_the_dead_zone_of_the_same_output(model) -> None:
    """After the dead zone it would be useless: it is relative, and dead values are zero."""
    policy = {"schedule": {"kind": "constant", "sigma": 0.5}, "targeting": "targeted"}
    entry = Entry(faulty(FAULT), noise(TRAINING, policy))
    plain = hidden_after(model, 1, None)
    got = hidden_after(model, 1, Injection(AddressBook(model), [entry], seed_of=seed_of))
    z = keyed_normal(plain[:1], [seed_of(0, ("noise", 0, 1, "1"))])[0]
    noised = plain[0] + z * 0.5 * plain[0].abs()
    dead = noised.abs() < 0.2 * noised.abs().max()
    assert torch.equal(got[0], torch.where(dead, torch.zeros(()), noised))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sigma_itself_is_not_rounded_to_bfloat16(dtype: torch.dtype) -> None:
    policy = noise(TRAINING, {"schedule": {"kind": "constant", "sigma": 0.0157}})
    (slot,) = noise_slots([Entry(HEALTHY, policy)], LAYERS)
    wide = torch.promote_types(dtype, torch.float32)
    got = slot.sigmas(0, 1, torch.zeros(1, dtype=dtype))
    assert torch.equal(got, torch.full((1, 1, 1), 0.0157, dtype=wide))


@pytest.mark.parametrize(
    ("dtype", "factor", "found"),
    [("bfloat16", 1.01, 0), ("bfloat16", 1.05, LAYERS), ("float32", 1.01, LAYERS)],
)
def test_the_audit_of_a_run_allows_what_rounding_does(
    folder: Path, dtype: str, factor: float, found: int
) -> None:
    policy = {"schedule": {"kind": "constant", "sigma": 0.02}}
    pack = tiny_pack(folder, [tiny_run(policy=policy)], dtype=dtype, steps=6)
    assert not pack.failures
    for record in pack.injection.audit.sums[0].values():
        draws = 1e10
        record[1:] = [draws, draws * 0.02**2, draws * (factor * 0.02) ** 2]
    pack.audit(0)
    assert ("noise audit: layer 0 was scheduled 0.02" in pack.failures.get(0, "")) == bool(found)


@pytest.mark.parametrize("carrier", ["hidden", "rmsnorm_weight"])
def test_noise_is_functional_and_leaves_no_trace(model, carrier: str) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    policy = {"carrier": carrier, "schedule": {"kind": "constant", "sigma": 0.5}}
    plain = model(input_ids=TOKENS).logits
    injection = Injection(
        AddressBook(model), [Entry(HEALTHY, noise(TRAINING, policy))], seed_of=seed_of
    )
    with injection:
        injection.begin(VALID)
        noisy = model(input_ids=TOKENS).logits
    assert not torch.equal(plain, noisy)
    assert torch.equal(plain, model(input_ids=TOKENS).logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("weight" in m.__dict__ for m in model.modules())


def test_an_exception_in_the_model_removes_every_hook(model) -> None:
    entry = Entry(faulty(FAULT), noise(TRAINING, {"carrier": "rmsnorm_weight"}))
    injection = Injection(AddressBook(model), [entry], seed_of=seed_of)
    with pytest.raises(RuntimeError), injection:
        injection.begin(VALID[:, :3])  # a mask of the wrong length
        model(input_ids=TOKENS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layer_noise_does_not_depend_on_the_targeting(model) -> None:
    """One generator consumed in layer order would give layer 1 other noise under global and targeted."""
    constant = {"kind": "constant", "sigma": 0.1}
    draws: dict[str, list] = {"global": [], "targeted": []}
    for targeting, seen in draws.items():
        policy = noise(TRAINING, {"schedule": constant, "targeting": targeting})

        def record(replica, path, seen=seen):
            seen.append((path, seed_of(replica, path)))
            return seed_of(replica, path)

        injection = Injection(AddressBook(model), [Entry(HEALTHY, policy)], seed_of=record)
        with injection:
            injection.begin(VALID)
            model(input_ids=TOKENS)
    everywhere = dict(draws["global"])
    assert len(everywhere) == LAYERS
    for path, value in draws["targeted"]:
        assert everywhere[path] == value


def run_of(policy=None, faults=(FAULT,), **changes) -> Run:
    training = TRAINING.model_copy(update=changes)
    return Run(
        training=training,
        device=Device(faults=faults),
        noise=noise(training, policy) if policy else None,
        seed=2,
        conditions=(CLEAN, FAULTY),
    )


def advance(folder: Path, run: Run):
    setting = tiny_setting(folder)
    return ENGINE.open_pack(
        one_pack(run, rungs=(6,)), setting, ENGINE.load(setting, "test", 64)
    ).advance()


@pytest.mark.parametrize("carrier", ["hidden", "rmsnorm_weight", "linear_weight"])
@pytest.mark.parametrize("targeting", ["global", "targeted", "healthy"])
def test_realised_noise_equals_the_schedule_at_every_step(
    folder: Path, carrier: str, targeting: str
) -> None:
    policy = {
        "carrier": carrier,
        "targeting": targeting,
        "schedule": {"kind": "geometric", "stages": 5},
    }
    run = run_of(policy)
    (row,) = advance(folder, run).trainings
    assert row.status == "finished", row.error
    layers = [k for k, m in enumerate(run.noise.multipliers) if m]
    assert [measure.layer for measure in row.audit.noise] == layers
    for measure in row.audit.noise:
        assert measure.realised == pytest.approx(
            measure.scheduled, rel=6 / (2 * measure.draws) ** 0.5
        )
    per_layer = {"hidden": 1, "rmsnorm_weight": 2, "linear_weight": 7}[carrier]
    assert row.audit.noise_calls == 5 * len(layers) * per_layer
    assert row.audit.fault_calls == 6


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("zero sigma", "noise audit: layer 0 was scheduled"),
        ("mean of abs", "noise audit: layer 0 was scheduled"),
        ("multipliers unread", "noise audit: layer 0 was scheduled"),
    ],
)
def test_noise_that_is_not_what_was_scheduled_fails_the_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bug: str, message: str
) -> None:
    """Plants three bugs of the original work; each must end as `failed`, never as a number."""
    original = Hidden.add

    def broken(self, x, sigma, z):
        if bug == "zero sigma":
            return original(self, x, sigma * 0, z)
        if bug == "multipliers unread":
            return original(self, x, torch.full_like(sigma, 0.05), z)
        noised = original(self, x, sigma, z)
        return noised._replace(values=x + z * sigma.to(x.dtype) * noised.scale.mean())

    policy = {"targeting": {"kind": "multipliers", "values": [0.5, 1, 1, 1]}}
    monkeypatch.setattr(Hidden, "add", broken)
    report = advance(folder, run_of(policy))
    (row,) = report.trainings
    assert row.status == "failed"
    assert message in row.error
    assert row.audit is None
    assert report.evaluations == ()


def test_noise_that_is_skipped_fails_the_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise hooked nowhere: the count of injections differs from the count declared."""
    monkeypatch.setattr(Injection, "noised", lambda self, address, slot, x, owners: x)
    (row,) = advance(folder, run_of({"targeting": "global"})).trainings
    assert row.status == "failed"
    assert "noise audit: declared 20, happened 0" in row.error


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("lora", "frozen weights changed during training"),
        ("full", "changed before the update of step 1"),
    ],
)
def test_noise_that_stays_in_the_weights_fails_the_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, message: str
) -> None:
    """The original added noise into the norms' weights and left it there."""
    original = Injection.noised

    def sticky(self, address, slot, x, owners):
        if self._step == 1:
            address.module._parameters["weight"].data.add_(1e-3)
        return original(self, address, slot, x, owners)

    monkeypatch.setattr(Injection, "noised", sticky)
    changes = {"method": {"kind": "full"}} if method == "full" else {}
    run = run_of({"carrier": "rmsnorm_weight"}).model_copy(
        update={"training": tiny_training(**changes)}
    )
    (row,) = advance(folder, run).trainings
    assert row.status == "failed"
    assert "weight audit" in row.error
    assert message in row.error


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda device, noise, skip: Entry(device), "noise audit: declared 20, happened 0"),
        (
            lambda device, noise, skip: Entry(HEALTHY, noise),
            "fault audit: declared ['model.layers.1'], happened []",
        ),
    ],
)
def test_a_declaration_that_never_reaches_the_model_fails_the_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, plant, message: str
) -> None:
    """Noise or fault lost between the run and the hooks: what was attached agrees with itself."""
    monkeypatch.setattr(pack_module, "Entry", plant)
    report = advance(folder, run_of({"targeting": "global"}))
    (row,) = report.trainings
    assert row.status == "failed"
    assert message in row.error
    assert report.evaluations == ()


@pytest.mark.parametrize("bug", ["multipliers of one", "one sigma for all steps"])
def test_a_schedule_that_is_read_wrongly_fails_the_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    """Wrong already where the fold is laid out, so that every later number agrees with it."""
    original = layout_module.noise_slots

    def broken(entries, layer_count):
        slots = original(entries, layer_count)
        if bug == "multipliers of one":
            return [replace(slot, multipliers=(slot.multipliers > 0).double()) for slot in slots]
        return [replace(slot, sigma=(slot.sigma > 0).double() * 0.001) for slot in slots]

    monkeypatch.setattr(layout_module, "noise_slots", broken)
    policy = {"targeting": {"kind": "multipliers", "values": [0.5, 2, 1, 0.1]}}
    (row,) = advance(folder, run_of(policy)).trainings
    assert row.status == "failed"
    assert "noise audit: layer 0 was scheduled" in row.error


def test_a_layer_without_gradient_fails_the_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantiser without a straight-through gradient trains nothing below it."""

    def no_gradient(self, x, params, valid, draws):
        return original(self, x.detach(), params, valid, draws)

    original = DeadZone.apply
    monkeypatch.setattr(DeadZone, "apply", no_gradient)
    (row,) = advance(folder, run_of()).trainings
    assert row.status == "failed"
    assert "gradient audit: layer 0 gets no gradient" in row.error


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (
            lambda device, skip: Entry(HEALTHY),
            "condition 'faulty' s declares 1 faults, 0 are attached",
        ),
        (
            lambda device, skip: Entry(faulty(FAULT)),
            "condition 'clean' declares 0 faults, 1 are attached",
        ),
    ],
)
def test_an_evaluation_under_another_condition_is_not_a_number(
    folder: Path, monkeypatch: pytest.MonkeyPatch, plant, message: str
) -> None:
    """The original evaluated without the fault and reported it as faulty."""
    monkeypatch.setattr(evaluate_module, "Entry", plant)
    report = advance(folder, run_of())
    (row,) = report.trainings
    assert row.status == "failed"
    assert f"evaluation audit: {message}" in row.error
    assert report.evaluations == ()


@pytest.mark.parametrize("bug", ["does nothing", "acts where it is not"])
def test_a_fault_without_effect_or_without_cause_is_not_a_number(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    """Hooks that are called prove nothing: what counts is what they changed."""
    monkeypatch.setattr(evaluate_module, "FOLD_TOKENS", 10**6)  # clean and faulty in one pass
    if bug == "does nothing":
        apply = DeadZone.apply

        def in_training_alone(self: DeadZone, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            return x if torch.is_inference_mode_enabled() else apply(self, x, *rest)

        monkeypatch.setattr(DeadZone, "apply", in_training_alone)
    else:
        monkeypatch.setattr(
            apply_module, "put_back", lambda x, values, active: values.expand_as(x) * 0.5
        )
    (row,) = advance(folder, run_of()).trainings
    assert row.status == "failed"
    assert "evaluation audit" in row.error


@exact
def test_a_diverging_run_does_not_break_its_pack(folder: Path) -> None:
    """It diverges before its first noisy step: there is no noise to audit, and no audit to fail."""
    healthy = run_of({"targeting": "global"})
    late = {
        "targeting": "global",
        "schedule": {"kind": "constant", "sigma": 0.1, "warmup_fraction": 0.6},
    }
    wild = run_of(late, learning_rate=1e38)
    setting = tiny_setting(folder)
    opened = ENGINE.open_pack(
        one_pack(wild, healthy, rungs=(6,)), setting, ENGINE.load(setting, "test", 64)
    )
    report = opened.advance()
    assert [row.status for row in report.trainings] == ["failed", "finished"]
    assert {row.training_key for row in report.evaluations} == {healthy.training_key(setting)}
    alone = advance(folder, healthy)
    assert report.evaluations == alone.evaluations


def test_evaluation_reports_what_the_fault_did(folder: Path) -> None:
    rows = {row.condition: row for row in advance(folder, run_of()).evaluations}
    assert rows["clean"].faults == ()
    (measure,) = rows["faulty"].faults
    assert measure.calls == 2  # 32 rows in batches of 16
    assert 0 < measure.affected_fraction < 1
    assert 0 < measure.relative_error < 1
    assert rows["faulty"].rows == 32
    assert rows["faulty"].final


def test_faults_keep_their_declared_order_whatever_the_pack() -> None:
    first = DeadZone(layers=(0,), threshold=0.1)
    second = RelativeGaussian(layers=(0,), modules=(".",), scale=0.1)
    slots = fault_slots(
        [Entry(faulty(first)), Entry(faulty(second)), Entry(faulty(first, second))], LAYERS
    )
    assert [slot.spec.kind for slot in slots] == ["dead_zone", "relative_gaussian"]
    assert [slot.active for slot in slots] == [(0, 2), (1, 2)]
    crossed = fault_slots([Entry(faulty(first, second)), Entry(faulty(second, first))], LAYERS)
    order = [(slot.spec.kind, slot.active) for slot in crossed]
    assert order == [
        ("dead_zone", (0,)),
        ("relative_gaussian", (0, 1)),
        ("dead_zone", (1,)),
    ]
