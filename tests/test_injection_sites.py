"""Sites and their order, against forward and backward passes written out by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_injection_models import constant_noise, draw, key_of, mxfp4
from tiny import CLEAN, LAYERS, save_tiny_model, tiny_setting, tiny_training
from torch import Tensor, nn

from aqn_tune.errors import UserError
from aqn_tune.faults import (
    AbsoluteGaussian,
    Bias,
    BitFlip,
    DeadZone,
    FaultSpec,
    RelativeGaussian,
    Saturation,
    StuckAt,
)
from aqn_tune.faults.base import GRADIENT_SITES
from aqn_tune.injection import injection as injection_module
from aqn_tune.injection import weights as weights_module
from aqn_tune.injection.address import AddressBook
from aqn_tune.injection.fold import Entry
from aqn_tune.injection.injection import Injection
from aqn_tune.models.load import build_model, load_tokenizer
from aqn_tune.quantization import MXFP4, NVFP4, QuantizerSpec
from aqn_tune.study.device import HEALTHY, Device
from aqn_tune.study.runs import Run
from aqn_tune.study.seeds import stream_seed
from aqn_tune.training.data import load_tokens
from aqn_tune.training.pack import ReplicaPack

torch.set_num_threads(1)

WIDTH, OUT, TOKENS = 32, 48, 6
VALID = torch.ones(1, TOKENS, dtype=torch.bool)


class Block(nn.Module):
    """A decoder layer of one matrix product each way, or of two side by side."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, OUT, bias=False)
        self.side = nn.Linear(WIDTH, OUT, bias=False) if branches == 2 else None
        self.down = nn.Linear(OUT, WIDTH, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        up: Tensor = self.up(hidden_states)
        if self.side is not None:
            up = up + self.side(hidden_states)
        down: Tensor = self.down(up)
        return down


class Config(NamedTuple):
    num_hidden_layers: int

    def get_text_config(self, decoder: bool) -> Config:
        return self


class Toy(nn.Module):
    """Linear layers and nothing else: every gradient is a product that fits on a line."""

    def __init__(self, layers: int = 1, branches: int = 1) -> None:
        super().__init__()
        self.config = Config(layers)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.layers = nn.ModuleList(Block(branches) for _ in range(layers))
            for parameter in self.parameters():
                # Numbers that float32 holds too, so that flipping their sign there is exact.
                parameter.data = parameter.data.float().double()

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states=hidden_states)
        return hidden_states


def seed_of(replica: int, path: tuple[str | int, ...]) -> int:
    return stream_seed(101, *path)


def sample(*shape: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).double()


class Pass(NamedTuple):
    """What came out of a forward and backward pass of the toy."""

    y: Tensor
    dx: Tensor
    dw: dict[str, Tensor]
    injection: Injection


def run(toy: Toy, entry: Entry, g: Tensor | None = None) -> Pass:
    """Run the toy forward on `sample` and backward from `g` with every weight trained."""
    x = sample(1, TOKENS, WIDTH).requires_grad_()
    injection = Injection(AddressBook(toy), [entry], seed_of=seed_of)
    with injection:
        injection.begin(VALID)
        y = toy(x)
        injection.forward_done()
        y.backward(sample(1, TOKENS, WIDTH, seed=3) if g is None else g)
    assert x.grad is not None
    return Pass(y.detach()[0], x.grad[0], {n: p.grad for n, p in toy.named_parameters()}, injection)


def same(got: Tensor, wanted: Tensor) -> bool:
    return got.shape == wanted.shape and bool((got - wanted).abs().max() <= 1e-12)


# -- every kind at every site ----------------------------------------------------------------------


class Kind(NamedTuple):
    """A fault, what it does to x given its normal draws, and its derivative."""

    spec: type[FaultSpec]
    fields: dict[str, Any]
    value: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


KINDS = {
    "dead_zone": Kind(
        DeadZone,
        {"threshold": 0.2, "reference": "absolute"},
        lambda x, z: torch.where(x.abs() < 0.2, 0.0, x),
        lambda x: (x.abs() >= 0.2).double(),
    ),
    "saturation": Kind(
        Saturation,
        {"limit": 0.1, "reference": "absolute"},
        lambda x, z: x.clamp(-0.1, 0.1),
        lambda x: (x.abs() <= 0.1).double(),
    ),
    "stuck_at": Kind(
        StuckAt,
        {"value": 0.5, "density": 1.0},
        lambda x, z: torch.full_like(x, 0.5),
        torch.zeros_like,
    ),
    "gain": Kind(
        Bias,
        {"form": "gain", "scale": -0.25},
        lambda x, z: 0.75 * x,
        lambda x: torch.full_like(x, 0.75),
    ),
    "offset": Kind(
        Bias,
        {"form": "offset", "scale": 0.5},
        lambda x, z: x + 0.5 * x.square().mean(dim=-1, keepdim=True).sqrt(),
        torch.ones_like,
    ),
    "relative_gaussian": Kind(
        RelativeGaussian,
        {"scale": 0.3},
        lambda x, z: x + 0.3 * x.abs() * z,
        torch.ones_like,
    ),
    "absolute_gaussian": Kind(
        AbsoluteGaussian,
        {"scale": 0.3, "reference": "absolute"},
        lambda x, z: x + 0.3 * z,
        torch.ones_like,
    ),
    "bit_flip": Kind(
        BitFlip, {"bits": "sign", "rate": 1.0}, lambda x, z: -x.float().double(), torch.ones_like
    ),
}
SITES = ("input", "output", "weight", *GRADIENT_SITES)


STRAIGHT = [
    (kind, site, True)
    for kind, (spec, *_) in KINDS.items()
    for site in ("input", "output", "weight")
    if "ste" in spec.model_fields
]


@pytest.mark.parametrize(
    ("kind", "site", "ste"),
    [*((kind, site, False) for kind in KINDS for site in SITES), *STRAIGHT],
)
def test_every_kind_acts_where_it_is_declared(kind: str, site: str, ste: bool) -> None:
    spec, fields, value, slope = KINDS[kind]
    if ste:
        fields = {**fields, "ste": True}
        slope = torch.ones_like
    fault = spec.model_validate({**fields, "layers": (0,), "modules": ("up",), "site": site})
    toy = Toy()
    w, v = toy.layers[0].up.weight.detach(), toy.layers[0].down.weight.detach()
    x, g = sample(TOKENS, WIDTH), sample(TOKENS, WIDTH, seed=3) @ v

    def erring(t: Tensor) -> Tensor:
        z = draw("fault", 0, "layers.0.up", site, key_of(fault), shape=tuple(t.shape))
        return value(t, z.double())

    at = erring(x) if site == "input" else x
    weight = erring(w) if site == "weight" else w
    product = at @ weight.T
    y = erring(product) if site == "output" else product
    back = g * slope(product) if site == "output" else g
    back = erring(back) if site == "grad_output" else back
    dx, dw = back @ weight, back.T @ at
    if site == "input":
        dx = dx * slope(x)
    if site == "weight":
        dw = dw * slope(w)
    dx = erring(dx) if site == "grad_input" else dx
    dw = erring(dw) if site == "grad_weight" else dw
    got = run(toy, Entry(Device(faults=(fault,))))
    assert same(got.y, y @ v.T)
    assert same(got.dx, dx)
    assert same(got.dw["layers.0.up.weight"], dw)
    assert same(got.dw["layers.0.down.weight"], sample(TOKENS, WIDTH, seed=3).T @ y)
    ((_, _, tally),) = got.injection.layout.faults
    assert tally.calls.tolist() == [1]
    assert tally.due.tolist() == [int(site in GRADIENT_SITES)]


def test_a_gradient_that_nothing_needs_meets_no_fault() -> None:
    """The weight of a frozen model has no gradient, and a constant input gets none."""
    toy = Toy()
    toy.requires_grad_(False)
    fault = Bias(layers=(0,), modules=("up",), site="grad_input", form="gain", scale=1.0)
    with Injection(AddressBook(toy), [Entry(Device(faults=(fault,)))], seed_of=seed_of) as hooked:
        hooked.begin(VALID)
        assert not toy(sample(1, TOKENS, WIDTH)).requires_grad
    assert hooked.layout.faults[0].tally.due.tolist() == [0]
    of_weight = fault.model_copy(update={"site": "grad_weight"})
    with pytest.raises(UserError, match=r"the weight of layers\.0\.up is frozen"):
        Injection(AddressBook(toy), [Entry(Device(faults=(of_weight,)))], seed_of=seed_of)


def test_a_module_without_a_weight_has_no_faulty_one() -> None:
    fault = Bias(layers=(0,), site="weight", scale=0.1)
    with pytest.raises(UserError, match=r"site weight: layers\.0 has no weight of its own"):
        Injection(AddressBook(Toy()), [Entry(Device(faults=(fault,)))], seed_of=seed_of)


# -- order -----------------------------------------------------------------------------------------


def in_order(steps: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def check_order(
    got: Tensor, steps: Sequence[Callable[[Tensor], Tensor]], x: Tensor, fixed: int | None = None
) -> None:
    """Check that `steps` were taken in their order, and that any other order would have shown.

    `fixed` is a step that changes the width: the others are only moved on their own side of it.
    """
    assert same(got, in_order(steps, x))
    others = 0
    for order in itertools.permutations(range(len(steps))):
        if fixed is not None and order[fixed] != fixed:
            continue
        if order == tuple(range(len(steps))):
            continue
        others += 1
        assert not same(got, in_order([steps[i] for i in order], x)), order
    assert others


def test_noise_comes_before_the_faults_of_a_layer_output() -> None:
    """After a dead zone it would let nothing through that the dead zone took: it is relative."""
    dead = DeadZone(layers=(0,), threshold=0.2)
    clipped = Saturation(layers=(0,), limit=0.5, reference="rms")
    toy = Toy()
    entry = Entry(Device(faults=(dead, clipped)), one_layer_noise(kind="hidden", sigma=0.5))
    z = draw("noise", 0, 0, "0", shape=(TOKENS, WIDTH)).double()

    def noise(h: Tensor) -> Tensor:
        return h + 0.5 * h.abs() * z

    def dead_zone(h: Tensor) -> Tensor:
        return torch.where(h.abs() < 0.2 * h.abs().amax(dim=1, keepdim=True), 0.0, h)

    def saturation(h: Tensor) -> Tensor:
        limit = 0.5 * h.square().mean(dim=1, keepdim=True).sqrt()
        return h.clamp(-limit, limit)

    x = run(toy, Entry()).y
    check_order(run(toy, entry).y, (noise, dead_zone, saturation), x)


def one_layer_noise(*, sigma: float, kind: str, **fields: Any) -> Any:
    noise = constant_noise(sigma, kind=kind, **fields)
    return noise.model_copy(update={"multipliers": (1.0,)})


def test_an_operand_is_quantized_then_spoilt_then_multiplied_then_spoilt_again() -> None:
    toy = Toy()
    w, v = toy.layers[0].up.weight.detach(), toy.layers[0].down.weight.detach()
    faults = (
        Saturation(layers=(0,), modules=("up",), limit=0.3, site="output"),
        DeadZone(layers=(0,), modules=("up",), threshold=0.25, site="input"),
        Bias(layers=(0,), modules=("up",), scale=0.2, site="input"),
    )
    quantizer = MXFP4(modules=("up",), operands="activation")

    def dead_zone(x: Tensor) -> Tensor:
        return torch.where(x.abs() < 0.25 * x.abs().amax(dim=1, keepdim=True), 0.0, x)

    def offset(x: Tensor) -> Tensor:
        return x + 0.2 * x.square().mean(dim=1, keepdim=True).sqrt()

    def product(x: Tensor) -> Tensor:
        return x @ w.T

    def saturation(y: Tensor) -> Tensor:
        limit = 0.3 * y.abs().amax(dim=1, keepdim=True)
        return y.clamp(-limit, limit)

    seen = hooked_output(toy, Entry(Device(faults=faults, quantization=(quantizer,))), "up")
    steps = (mxfp4, dead_zone, offset, product, saturation)
    check_order(seen, steps, sample(TOKENS, WIDTH), fixed=3)
    assert v.shape == (WIDTH, OUT)


def hooked_output(toy: Toy, entry: Entry, name: str) -> Tensor:
    """Return what a module of layer 0 hands on under an injection."""
    seen: list[Tensor] = []
    with Injection(AddressBook(toy), [entry], seed_of=seed_of) as injection:
        injection.begin(VALID)
        module = toy.layers[0].get_submodule(name)
        handle = module.register_forward_hook(lambda m, args, out: seen.append(out.detach()[0]))
        toy(sample(1, TOKENS, WIDTH))
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("operands", ["weight", "both"])
def test_a_weight_is_noised_then_spoilt_then_quantized(operands: str) -> None:
    toy = Toy()
    w = toy.layers[0].up.weight.detach()
    fault = Saturation(layers=(0,), modules=("up",), limit=0.4, site="weight")
    quantizer = MXFP4(modules=("up",), operands=operands)
    entry = Entry(
        Device(faults=(fault,), quantization=(quantizer,)),
        one_layer_noise(kind="linear_weight", sigma=0.3, relative=True),
    )
    z = draw("noise", 0, 0, "up", shape=(OUT, WIDTH)).double()

    def noise(t: Tensor) -> Tensor:
        return t + 0.3 * t.abs() * z

    def saturation(t: Tensor) -> Tensor:
        limit = 0.4 * t.abs().amax(dim=1, keepdim=True)
        return t.clamp(-limit, limit)

    x = sample(TOKENS, WIDTH)
    x = mxfp4(x) if operands == "both" else x
    steps = (noise, saturation, mxfp4)
    got = hooked_output(toy, entry, "up")
    assert same(got, x @ in_order(steps, w).T)
    for order in itertools.permutations(steps):
        if order != steps:
            assert not same(got, x @ in_order(order, w).T)


def test_gradients_meet_their_faults_in_the_declared_order() -> None:
    """Two faults of one gradient act in the order of the list, as two faults of one activation do."""
    toy = Toy()
    v, w = toy.layers[0].down.weight.detach(), toy.layers[0].up.weight.detach()
    at = {"layers": (0,), "modules": ("up",)}
    faults = (
        DeadZone(**at, threshold=0.3, site="grad_input"),
        Bias(**at, scale=0.3, site="grad_input"),
        DeadZone(**at, threshold=0.3, site="grad_output"),
    )

    def dead_zone(t: Tensor) -> Tensor:
        return torch.where(t.abs() < 0.3 * t.abs().amax(dim=1, keepdim=True), 0.0, t)

    def offset(t: Tensor) -> Tensor:
        return t + 0.3 * t.square().mean(dim=1, keepdim=True).sqrt()

    got = run(toy, Entry(Device(faults=faults)))
    g = dead_zone(sample(TOKENS, WIDTH, seed=3) @ v)
    assert same(got.dx, offset(dead_zone(g @ w)))
    assert not same(got.dx, dead_zone(offset(g @ w)))
    assert same(got.dw["layers.0.up.weight"], g.T @ sample(TOKENS, WIDTH))


@pytest.mark.parametrize("site", ["input", "output", "grad_input", "grad_output"])
def test_a_fault_of_a_skipped_layer_reaches_nothing(site: str) -> None:
    toy = Toy(layers=3)
    without = Toy(layers=3)
    without.layers = nn.ModuleList([without.layers[0], without.layers[2]])
    without.config = Config(2)
    fault = Bias(layers=(1,), modules=(".",), scale=0.3, site=site)
    wanted = run(without, Entry())
    got = run(toy, Entry(Device(faults=(fault,)), skip=(1,)))
    assert torch.equal(got.y, wanted.y)
    assert torch.equal(got.dx, wanted.dx)
    assert not bool(got.dw["layers.1.up.weight"].any())


# -- gradients of quantized and of noisy products --------------------------------------------------


@pytest.mark.parametrize("operands", ["weight", "activation", "both"])
def test_the_gradient_passes_a_quantizer_straight(operands: str) -> None:
    """grad_x = g W_q and grad_W = g^T x_q, also where values were clipped."""
    toy = Toy()
    w, v = toy.layers[0].up.weight.detach(), toy.layers[0].down.weight.detach()
    x, g = sample(TOKENS, WIDTH), sample(TOKENS, WIDTH, seed=3)
    on_x = mxfp4 if operands in ("activation", "both") else lambda t: t
    on_w = mxfp4 if operands in ("weight", "both") else lambda t: t
    got = run(toy, Entry(Device(quantization=(MXFP4(operands=operands),))))
    up = on_x(x) @ on_w(w).T
    assert same(got.y, on_x(up) @ on_w(v).T)
    back = g @ on_w(v)
    assert same(got.dx, back @ on_w(w))
    assert same(got.dw["layers.0.up.weight"], back.T @ on_x(x))
    assert same(got.dw["layers.0.down.weight"], g.T @ on_x(up))


@pytest.mark.parametrize("quantized", [False, True], ids=["exact", "W4A4"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_backward_scale_errs_in_the_gradients_of_the_module_and_nowhere_else(
    quantized: bool, trained: bool
) -> None:
    toy = Toy(layers=3)
    device = Device(
        faults=(RelativeGaussian(layers=(1,), modules=("up",), scale=0.0, backward_scale=0.05),),
        quantization=(MXFP4(),) if quantized else (),
    )
    plain = run(toy, Entry(device.model_copy(update={"faults": ()})))
    plain = plain._replace(dw={name: dw.clone() for name, dw in plain.dw.items()})
    for parameter in toy.parameters():
        parameter.grad = None
    got = run(toy, Entry(device.resolved(3, weights_trained=trained)))
    assert torch.equal(got.y, plain.y)
    for name, dw in got.dw.items():
        erring = "layers.0" in name or (trained and name == "layers.1.up.weight")
        assert torch.equal(dw, plain.dw[name]) != erring, name
    assert not torch.equal(got.dx, plain.dx)


@pytest.mark.parametrize("scale", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_backward_scale_is_the_relative_error_of_the_gradient(scale: float, trained: bool) -> None:
    fault = RelativeGaussian(layers=(0,), modules=("up",), scale=0.0, backward_scale=scale)
    errors: dict[str, list[Tensor]] = {"dx": [], "dw": []}
    for attempt in range(30):
        toy = Toy()
        plain = run(toy, Entry())
        exact = {"dx": plain.dx, "dw": plain.dw["layers.0.up.weight"].clone()}
        toy.zero_grad()
        x = sample(1, TOKENS, WIDTH).requires_grad_()
        entry = Entry(Device(faults=(fault,)).resolved(1, weights_trained=trained))
        with Injection(AddressBook(toy), [entry], seed_of=step_seed(attempt)) as injection:
            injection.begin(VALID)
            toy(x).backward(sample(1, TOKENS, WIDTH, seed=3))
        erring = {"dx": x.grad[0], "dw": toy.layers[0].up.weight.grad}
        for name, seen in errors.items():
            seen.append(((erring[name] - exact[name]) / exact[name].abs()).flatten())
    for name, seen in errors.items():
        every = torch.cat(seen)
        declared = scale if name == "dx" or trained else 0.0
        tolerance = 5 * declared / (2 * len(every)) ** 0.5
        assert abs(float(every.square().mean().sqrt()) - declared) <= tolerance, name
        assert len(every) > 5000


def step_seed(step: int) -> Callable[[int, tuple[str | int, ...]], int]:
    return lambda replica, path: stream_seed(7, step, *path)


def test_products_that_share_a_quantized_input_keep_gradients_of_their_own() -> None:
    """The values are computed once; an error of one product's gradient must not meet the other's."""
    toy = Toy(branches=2)
    block = toy.layers[0]
    w, s = mxfp4(block.up.weight.detach()), mxfp4(block.side.weight.detach())
    g = sample(TOKENS, WIDTH, seed=3) @ mxfp4(block.down.weight.detach())
    noisy = RelativeGaussian(layers=(0,), modules=("up", "side"), site="grad_input", scale=0.2)
    dead = DeadZone(layers=(0,), modules=("side",), site="grad_input", threshold=0.3)

    def erring(t: Tensor, module: str) -> Tensor:
        z = draw("fault", 0, f"layers.0.{module}", "grad_input", key_of(noisy), shape=t.shape)
        return t + 0.2 * t.abs() * z

    through_side = g @ s
    peak = through_side.abs().amax(dim=1, keepdim=True)
    dead_side = torch.where(through_side.abs() < 0.3 * peak, 0.0, through_side)
    for faults, dx in (
        ((noisy,), erring(g @ w, "up") + erring(through_side, "side")),
        ((dead,), g @ w + dead_side),
    ):
        got = run(toy, Entry(Device(faults=faults, quantization=(MXFP4(),))))
        assert same(got.dx, dx)
        assert [fault.tally.calls.tolist() for fault in got.injection.layout.faults] == [
            [len(faults[0].modules)]
        ]
        assert got.injection.layout.quantizers[0].tally.calls.tolist() == [6]


# -- what is computed how often --------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_frozen_weight_is_quantized_once_and_a_trained_one_in_every_forward(
    folder: Path, method: str, microbatches: int, checkpoints: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"weight": 0, "activation": 0}

    def counted(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def apply(slot: Any, x: Tensor, valid: Tensor, operand: str, *rest: Any) -> Tensor:
            counts[operand] += 1
            return original(slot, x, valid, operand, *rest)

        return apply

    method_fields = {"kind": "full"} if method == "full" else {"kind": "lora", "rank": 2}
    training = tiny_training(
        method=method_fields,
        gradient_accumulation_steps=microbatches,
        gradient_checkpointing=checkpoints,
    )
    device = Device(quantization=(MXFP4(layers=(0, 1, 2)),))
    one = Run(training=training, device=device, seed=2, conditions=(CLEAN,))
    setting = tiny_setting(folder)
    data = load_tokens(load_tokenizer(setting.model), setting.task.splits().train, 64)
    pack = ReplicaPack(build_model(setting.model), [one] * (2 if method == "lora" else 1), data)
    for module in (weights_module, injection_module):
        monkeypatch.setattr(module, "apply_quantizer", counted(module.apply_quantizer))
    pack.train_to(4)
    assert not pack.failures
    forwards = 4 * microbatches * (2 if checkpoints else 1)
    weights = 3 * 7
    assert counts["weight"] == weights * (forwards if method == "full" else 1)
    # q, k and v share their input, gate and up theirs: four in a layer.
    assert counts["activation"] == 3 * 4 * forwards
    assert pack.injection.layout.quantizers[0].tally.calls[0] == 4 * microbatches * weights * 2


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_products_of_one_input_quantize_it_once(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of another input at the same address anew: memory is used again, and written in place."""
    calls: list[Tensor] = []
    original = injection_module.apply_quantizer

    def recorded(slot: Any, x: Tensor, *rest: Any) -> Tensor:
        calls.append(x)
        return original(slot, x, *rest)

    monkeypatch.setattr(injection_module, "apply_quantizer", recorded)
    toy = Toy(layers=2, branches=2)
    entry = Entry(Device(quantization=(MXFP4(operands="activation"),)))
    x = sample(1, TOKENS, WIDTH)

    def expected(x: Tensor) -> Tensor:
        for layer in toy.layers:
            up = mxfp4(x) @ layer.up.weight.T + mxfp4(x) @ layer.side.weight.T
            x = mxfp4(up) @ layer.down.weight.T
        return x

    with Injection(AddressBook(toy), [entry], seed_of=seed_of) as injection, mode():
        for count in (1, 2, 3):
            injection.begin(VALID)
            assert same(toy(x).detach(), expected(x).detach())
            assert len(calls) == 4 * count
            x.mul_(-1.5)


def test_a_trained_weight_is_never_stale() -> None:
    """A forward pass without gradient, between two steps, sees the weight as it is by then."""
    toy = Toy()
    entry = Entry(Device(quantization=(MXFP4(operands="weight"),)))
    x = sample(1, TOKENS, WIDTH)

    def expected() -> Tensor:
        up, down = mxfp4(toy.layers[0].up.weight), mxfp4(toy.layers[0].down.weight)
        return x[0] @ up.T @ down.T

    with Injection(AddressBook(toy), [entry], seed_of=seed_of) as injection:
        for gradient in (True, False, False, True, False):
            injection.begin(VALID)
            with torch.set_grad_enabled(gradient):
                assert same(toy(x)[0].detach(), expected())
            with torch.no_grad():
                for parameter in toy.parameters():
                    parameter.mul_(-1.5)


# -- scales and references stay inside a replica ---------------------------------------------------


@pytest.mark.parametrize("quantizer", [MXFP4(operands="activation"), NVFP4(operands="activation")])
@pytest.mark.parametrize("reference", ["token_max", "tensor_max", "rms", "mean_abs", "std"])
def test_a_neighbour_and_padding_enter_no_scale(quantizer: QuantizerSpec, reference: str) -> None:
    """A thousand times larger, infinite or NaN: the replica between them computes as if alone."""
    toy = Toy()
    fault = Saturation(layers=(0,), limit=0.7, reference=reference)
    entry = Entry(Device(faults=(fault,), quantization=(quantizer,)))
    x = sample(1, TOKENS, WIDTH)
    padded = VALID.clone()
    padded[0, -2:] = False
    with Injection(AddressBook(toy), [entry], seed_of=seed_of) as injection:
        injection.begin(padded)
        alone = toy(x)
    for bad in (1e3, float("inf"), float("nan")):
        huge = x.clone()
        huge[0, -2:] *= 1e3  # of its own padding
        fold = torch.cat([x * bad, huge, x * bad])
        with Injection(AddressBook(toy), [entry] * 3, seed_of=seed_of) as injection:
            injection.begin(padded.expand(3, -1))
            together = toy(fold)
        assert same(together[1, :-2], alone[0, :-2])


def test_layers_are_those_of_the_tiny_model(folder: Path) -> None:
    assert AddressBook(build_model(tiny_setting(folder).model)).layer_count == LAYERS
    assert HEALTHY.is_healthy()
