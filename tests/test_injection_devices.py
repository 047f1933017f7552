"""Devices: what a training and an evaluation on one come to, beside peft and plain hooks in float64."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from exactness import exact
from test_injection_models import key_of, mxfp4, nearest_code, part, replace_weight, straight
from test_injection_sites import Toy, sample
from test_training_pack import true_float64_rmsnorm
from tiny import CLEAN, LAYERS, noise, one_pack, save_tiny_model, tiny_setting, tiny_training
from torch import Tensor, nn

from aqn_tune.faults import (
    AbsoluteGaussian,
    Bias,
    BitFlip,
    DeadZone,
    FaultSpec,
    RelativeGaussian,
    Saturation,
    Spike,
    StuckAt,
)
from aqn_tune.injection import apply as apply_module
from aqn_tune.injection import weights as weights_module
from aqn_tune.injection.address import AddressBook
from aqn_tune.injection.fold import Entry
from aqn_tune.injection.injection import Injection
from aqn_tune.models.load import build_model, decoder_layers, load_tokenizer
from aqn_tune.noise import EffectiveNoise
from aqn_tune.quantization import MXFP4, NVFP4, Int8, QuantizerSpec
from aqn_tune.study.cells import named_arms, resolve_run
from aqn_tune.study.device import HEALTHY, Device
from aqn_tune.study.engine import Shared
from aqn_tune.study.runs import Condition, Run, Setting
from aqn_tune.study.scenario import ScenarioSpec
from aqn_tune.study.schema import Study
from aqn_tune.study.seeds import stream_seed
from aqn_tune.study.sweep import resolve_scenarios
from aqn_tune.study.training import TrainingSpec
from aqn_tune.training import evaluate as evaluate_module
from aqn_tune.training.data import TokenSet, load_tokens
from aqn_tune.training.engine import ENGINE
from aqn_tune.training.evaluate import Evaluated, evaluate
from aqn_tune.training.learning_rate import learning_rate
from aqn_tune.training.pack import ReplicaPack
from aqn_tune.training.streams import BatchOrder

torch.set_num_threads(1)

STEPS = 10
TRAINING = tiny_training(steps=STEPS)
SEVEN = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def true_float64() -> Iterator[None]:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen2RMSNorm, "forward", true_float64_rmsnorm)
        yield


def split(setting: Setting, name: str) -> TokenSet:
    return load_tokens(load_tokenizer(setting.model), getattr(setting.task.splits(), name), 64)


def open_replicas(
    folder: Path, runs: Sequence[Run], *, dtype: str = "float32", steps: int | None = None
) -> ReplicaPack:
    """Train `runs` in one pack, to the end or to `steps`."""
    setting = tiny_setting(folder, dtype=dtype)
    pack = ReplicaPack(build_model(setting.model), runs, split(setting, "train"))
    pack.train_to(runs[0].training.steps if steps is None else steps)
    return pack


def run_on(device: Device = HEALTHY, *, seed: int = 2, **fields: Any) -> Run:
    values = {"training": TRAINING, "conditions": (CLEAN,), **fields}
    return Run(device=device, seed=seed, **values)


# -- devices by hand -------------------------------------------------------------------------------


def nvfp4(x: Tensor, amax: Tensor | None = None) -> Tensor:
    """Return x as NVFP4 along its last dimension, by looking for the nearest code."""
    size = x.shape[-1]
    values = x.detach().double()
    top = values.abs().max() if amax is None else amax.double()
    g = (top / (448 * 6)).float().double()
    blocks = nn.functional.pad(values, (0, -size % 16)).unflatten(-1, (-1, 16))
    wanted = blocks.abs().amax(dim=-1, keepdim=True) / 6 / g
    s = wanted.clamp(2.0**-9, 448.0).float().to(torch.float8_e4m3fn).double()
    codes = nearest_code(blocks.abs() / (s * g)).copysign(blocks)
    return (codes * s * g).flatten(-2)[..., :size].to(x.dtype)


class Scene(NamedTuple):
    """What hooks by hand need to know of the pass they are in."""

    run: Run
    valid: list[Tensor]
    """One mask [N], False at padding, of the present batch."""
    draw_seed: Callable[..., int]
    """Seed of a stream of the present pass."""
    before_pass: list[Callable[[], None]]
    """Called before every forward pass."""

    def normal(self, like: Tensor, *path: str | int) -> Tensor:
        """Return what the streams hold for `like`, drawn as [tokens, features]."""
        shape = like.flatten(0, -2).shape
        generator = torch.Generator().manual_seed(self.draw_seed(*path))
        return torch.randn(shape, generator=generator).double().view(like.shape)


Attach = Callable[[nn.Module, Scene], None]
Change = Callable[[Tensor], Tensor]


def names(layers: Sequence[int]) -> list[str]:
    return [f"model.layers.{layer}.{linear}" for layer in layers for linear in SEVEN]


def wrapper(model: nn.Module, name: str) -> nn.Module:
    """Return what stands at a name: the adapter's wrapper, where there is one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_submodule(name)


def on_output(module: nn.Module, change: Change) -> None:
    module.register_forward_hook(lambda m, args, out: change(out))


def on_input(module: nn.Module, change: Change) -> None:
    module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))


def weights(layers: Sequence[int], change: Change) -> Attach:
    def attach(model: nn.Module, scene: Scene) -> None:
        for name in names(layers):
            replace_weight(part(model, name), change)

    return attach


def activations(layers: Sequence[int], kind: str, *, faulty_path: bool = False) -> Attach:
    def attach(model: nn.Module, scene: Scene) -> None:
        def quantized(x: Tensor) -> Tensor:
            if kind == "mxfp4":
                return straight(x, mxfp4(x))
            return straight(x, nvfp4(x, x.detach().flatten(0, 1)[scene.valid[0]].abs().max()))

        for name in names(layers):
            on_input(wrapper(model, name) if faulty_path else part(model, name), quantized)

    return attach


def layer_outputs(layers: Sequence[int], change: Callable[[Tensor, Scene], Tensor]) -> Attach:
    def attach(model: nn.Module, scene: Scene) -> None:
        for layer in layers:
            on_output(part(model, f"model.layers.{layer}"), lambda h: change(h, scene))

    return attach


def linear_outputs(layers: Sequence[int], change: Change, *, faulty_path: bool = False) -> Attach:
    def attach(model: nn.Module, scene: Scene) -> None:
        for name in names(layers):
            on_output(wrapper(model, name) if faulty_path else part(model, name), change)

    return attach


def both(*attaches: Attach) -> Attach:
    def attach(model: nn.Module, scene: Scene) -> None:
        for each in attaches:
            each(model, scene)

    return attach


def worn(threshold: float) -> Change:
    def change(w: Tensor) -> Tensor:
        return w * (w.abs() >= threshold * w.abs().amax(dim=1, keepdim=True))

    return change


def dead(threshold: float) -> Callable[[Tensor, Scene], Tensor]:
    def change(h: Tensor, scene: Scene) -> Tensor:
        peak = h.detach().flatten(0, 1)[scene.valid[0]].abs().max()
        return h * (h.detach().abs() >= threshold * peak)

    return change


def saturated(h: Tensor, scene: Scene) -> Tensor:
    limit = 1.2 * h.detach().square().mean(dim=-1, keepdim=True).sqrt()
    return h.clamp(-limit, limit)


def offset(y: Tensor) -> Tensor:
    return y + 0.1 * y.detach().square().mean(dim=-1, keepdim=True).sqrt()


def places(fault: FaultSpec, name: str, count: int, of: int, *, device_seed: int) -> Tensor:
    """Return which `count` of `of` places of a site are faulty for good."""
    site_seed = stream_seed(device_seed, "device", fault.mask_seed, name, fault.site, key_of(fault))
    generator = torch.Generator().manual_seed(stream_seed(site_seed, "places", "mask"))
    mask = torch.zeros(of, dtype=torch.bool)
    mask[torch.randperm(of, generator=generator)[:count]] = True
    return mask


STUCK_CHANNELS = StuckAt(layers=(1,), value=0.5, density=0.1, axis="channel")
STUCK_WEIGHTS = StuckAt(
    layers=(2,), modules=("linear",), site="weight", value=0.0, density=0.1, mask_seed=3
)
BACKWARD = RelativeGaussian(layers=(1, 2), scale=0.05, backward_scale=0.1)
AT_OUTPUT = RelativeGaussian(layers=(0, 2), scale=0.1, site="grad_output")


def stuck_channels(model: nn.Module, scene: Scene) -> None:
    mask = places(STUCK_CHANNELS, "model.layers.1", 3, 32, device_seed=scene.run.device.seed)
    on_output(part(model, "model.layers.1"), lambda h: torch.where(mask, 0.5, h))


def stuck_weights(model: nn.Module, scene: Scene) -> None:
    for name in names((2,)):

        def change(w: Tensor, name: str = name) -> Tensor:
            count = round(0.1 * w.numel())
            seed = scene.run.device.seed
            mask = places(STUCK_WEIGHTS, name, count, w.numel(), device_seed=seed)
            return w.masked_fill(mask.view(w.shape), 0.0)

        replace_weight(part(model, name), change)


def noisy_gradients(model: nn.Module, scene: Scene) -> None:
    """Err in the products of layers 1 and 2, forward and backward."""
    backward = BACKWARD.companions(weights_trained=False)[0]
    for name in names((1, 2)):
        module = part(model, name)

        def forward(y: Tensor, name: str = name) -> Tensor:
            z = scene.normal(y, "fault", 0, name, "output", key_of(BACKWARD))
            return y + 0.05 * y.detach().abs() * z

        on_output(module, forward)
        on_input(module, err_backward(scene, name, "grad_input", key_of(backward)))


def noisy_output_gradients(model: nn.Module, scene: Scene) -> None:
    for name in names((0, 2)):
        on_output(part(model, name), err_backward(scene, name, "grad_output", key_of(AT_OUTPUT)))


def err_backward(scene: Scene, name: str, site: str, key: str) -> Change:
    def watch(x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x
        seed = scene.draw_seed("fault", 0, name, site, key)

        def on_gradient(g: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            z = torch.randn(g.flatten(0, -2).shape, generator=generator).double()
            return g + 0.1 * g.abs() * z.view(g.shape)

        x = x.clone()
        x.register_hook(on_gradient)
        return x

    return watch


def noisy_weights(model: nn.Module, scene: Scene) -> None:
    stored = {name: part(model, name).weight.detach().clone() for name in names(range(LAYERS))}

    def draw_anew() -> None:
        for name, weight in stored.items():
            _, _, layer, inside = name.split(".", maxsplit=3)
            z = scene.normal(weight, "noise", 0, int(layer), inside)
            part(model, name).weight.data = weight + 0.05 * weight.abs() * z

    scene.before_pass.append(draw_anew)


def left_out(model: nn.Module, scene: Scene) -> None:
    part(model, "model.layers.2").register_forward_hook(lambda m, args, out: args[0])


def nothing(model: nn.Module, scene: Scene) -> None:
    pass


class Case(NamedTuple):
    """A run and the hooks that do by hand what it declares."""

    run: Run
    by_hand: Attach


def quantizer(kind: str, operands: str, layers: Any = "all") -> QuantizerSpec:
    return {"mxfp4": MXFP4, "nvfp4": NVFP4}[kind](operands=operands, layers=layers)


def device(*faults: FaultSpec, quantized: Sequence[QuantizerSpec] = (), **fields: Any) -> Device:
    values = Device(faults=faults, quantization=tuple(quantized), **fields)
    return values.resolved(LAYERS, weights_trained=False)


EVERY = tuple(range(LAYERS))
DEAD = DeadZone(layers=(1,), threshold=0.05, reference="tensor_max")
WORN = DeadZone(layers=(1, 2), modules=("linear",), site="weight", threshold=0.1)
OFFSET = Bias(layers=(0, 1), modules=("linear",), scale=0.1)
WEIGHT_NOISE = {
    "carrier": {"kind": "linear_weight", "relative": True},
    "schedule": {"kind": "constant", "sigma": 0.05},
}
CASES = {
    "healthy": Case(run_on(), nothing),
    "W4 mxfp4": Case(
        run_on(device(quantized=[quantizer("mxfp4", "weight")])), weights(EVERY, mxfp4)
    ),
    "W4 nvfp4": Case(
        run_on(device(quantized=[quantizer("nvfp4", "weight", (1, 2))]), seed=4),
        weights((1, 2), nvfp4),
    ),
    "A4 mxfp4": Case(
        run_on(device(quantized=[quantizer("mxfp4", "activation")])), activations(EVERY, "mxfp4")
    ),
    "A4 nvfp4": Case(
        run_on(device(quantized=[quantizer("nvfp4", "activation", (0, 3))]), seed=4),
        activations((0, 3), "nvfp4"),
    ),
    "W4A4 adapters too": Case(
        run_on(device(quantized=[quantizer("mxfp4", "both")], adapter_path="faulty")),
        both(weights(EVERY, mxfp4), activations(EVERY, "mxfp4", faulty_path=True)),
    ),
    "worn": Case(run_on(device(WORN)), weights((1, 2), worn(0.1))),
    "worn harder": Case(
        run_on(device(WORN.model_copy(update={"threshold": 0.3})), seed=6), weights((1, 2), worn(0.3))
    ),
    "saturation": Case(
        run_on(device(Saturation(layers=(0, 2), limit=1.2, reference="rms"))),
        layer_outputs((0, 2), saturated),
    ),
    "stuck channels": Case(run_on(device(STUCK_CHANNELS, seed=5)), stuck_channels),
    "stuck weights": Case(run_on(device(STUCK_WEIGHTS, seed=5)), stuck_weights),
    "stuck weights elsewhere": Case(run_on(device(STUCK_WEIGHTS, seed=7)), stuck_weights),
    "offset beside adapters": Case(run_on(device(OFFSET)), linear_outputs((0, 1), offset)),
    "offset of adapters too": Case(
        run_on(device(OFFSET, adapter_path="faulty")),
        linear_outputs((0, 1), offset, faulty_path=True),
    ),
    "layer left out": Case(run_on(device(DEAD), skip=(2,)), both(layer_outputs((1,), dead(0.05)), left_out)),
    "some layers trained": Case(
        run_on(device(DEAD), train_layers=(1, 3)), layer_outputs((1,), dead(0.05))
    ),
    "noisy both ways": Case(run_on(device(BACKWARD)), noisy_gradients),
    "noisy gradients of outputs": Case(run_on(device(AT_OUTPUT)), noisy_output_gradients),
    "noisy weights": Case(run_on(noise=noise(TRAINING, WEIGHT_NOISE)), noisy_weights),
}  # fmt: skip


def peft_model(setting: Setting, spec: TrainingSpec) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.method.rank,
        lora_alpha=spec.method.alpha,
        target_modules=list(spec.method.target_modules),
    )
    with torch.random.fork_rng():
        return get_peft_model(build_model(setting.model), config, autocast_adapter_dtype=False)


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter parameters by `<site>.lora_A` and `<site>.lora_B`."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def answer_loss(model: nn.Module, batch: TokenSet) -> Tensor:
    """Return the summed cross-entropy of the answer tokens."""
    logits = model(input_ids=batch.tokens, use_cache=False).logits[:, :-1]
    mask = batch.answer[:, 1:]
    return nn.functional.cross_entropy(logits[mask], batch.tokens[:, 1:][mask], reduction="sum")


def losses_by_hand(folder: Path, run: Run, by_hand: Attach, steps: int) -> list[float]:
    """Train `run` with transformers and peft in float64."""
    setting = tiny_setting(folder, dtype="float64")
    spec = run.training
    model = peft_model(setting, spec)
    at = {"step": 0}
    scene = Scene(
        run, [], lambda stream, *path: stream_seed(run.seed, stream, at["step"], *path), []
    )
    trained = []
    for name, parameter in adapters(model).items():
        if name.endswith("lora_A"):
            site = name.removesuffix(".lora_A")
            generator = torch.Generator().manual_seed(stream_seed(run.seed, "init", site))
            bound = 1 / math.sqrt(parameter.shape[1])
            start = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.data = start.double()
        layer = int(name.split(".")[2])
        if run.train_layers is None or layer in run.train_layers:
            trained.append(parameter)
        else:
            parameter.requires_grad_(False)
    by_hand(model, scene)
    optimizer = torch.optim.AdamW(
        trained, betas=(spec.beta1, spec.beta2), weight_decay=spec.weight_decay
    )
    data = split(setting, "train")
    order = BatchOrder(len(data.tokens), spec.batch_size)
    losses = []
    for step in range(steps):
        at["step"] = step
        batch = data.batch(order.indices(run.seed, step))
        scene.valid[:] = [batch.valid.flatten()]
        for prepare in scene.before_pass:
            prepare()
        loss = answer_loss(model, batch) / batch.answer.sum()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            [p for p in trained if p.grad is not None], spec.max_grad_norm
        )
        optimizer.param_groups[0]["lr"] = learning_rate(spec, step)
        optimizer.step()
    return losses


@pytest.fixture(scope="module")
def pack_in_float64(folder: Path, true_float64: None) -> ReplicaPack:
    """Return every case trained in one pack."""
    return open_replicas(folder, [case.run for case in CASES.values()], dtype="float64")


@pytest.mark.parametrize("name", CASES)
def test_a_pack_of_devices_equals_peft_with_plain_hooks(
    folder: Path, name: str, pack_in_float64: ReplicaPack
) -> None:
    """Loss by loss in float64, all devices side by side in one pack."""
    assert not pack_in_float64.failures
    index = list(CASES).index(name)
    expected = losses_by_hand(folder, *CASES[name], STEPS)
    assert pack_in_float64.train_losses[index] == pytest.approx(expected, rel=0, abs=1e-9)
    pack_in_float64.audit(index)
    assert not pack_in_float64.failures


def test_the_cases_differ(pack_in_float64: ReplicaPack) -> None:
    """Else a device that does nothing would equal hooks that do nothing."""
    losses = pack_in_float64.train_losses
    assert len({tuple(row[1:]) for row in losses}) == len(CASES)


# -- a pack is its runs alone ----------------------------------------------------------------------


def at_linears(kind: type[FaultSpec], site: str = "output", **fields: Any) -> FaultSpec:
    return kind(layers=(1, 3), modules=("linear",), site=site, **fields)


def more_devices() -> list[Device]:
    """Return devices with faults that the cases above have not."""
    flips = {"bits": "mantissa", "rate": 0.05}
    return [
        device(at_linears(Spike, probability=0.01, factor=0.5)),
        device(at_linears(Spike, "input", probability=0.01, factor=0.5, persistence="permanent")),
        device(at_linears(BitFlip, **flips), seed=3),
        device(at_linears(BitFlip, "weight", **flips, persistence="permanent"), seed=3),
        device(at_linears(AbsoluteGaussian, scale=0.05, density=0.3, axis="token")),
        device(at_linears(AbsoluteGaussian, "weight", scale=0.05)),
        device(at_linears(Bias, "input", form="sign", scale=0.01), adapter_path="faulty"),
        device(
            at_linears(
                Bias,
                form="gain",
                scale=0.2,
                persistence="intermittent",
                activation_rate=0.5,
                density=0.5,
            ),
            adapter_path="faulty",
        ),
        device(at_linears(DeadZone, threshold=0.3, ste=True, persistence="transient", density=0.5)),
        device(at_linears(Saturation, "grad_output", limit=0.5), quantized=[Int8()]),
        device(
            DEAD,
            at_linears(RelativeGaussian, scale=0.05, backward_scale=0.05),
            quantized=[MXFP4(operands="activation", layers=(0, 1)), Int8(operands="weight")],
            adapter_path="faulty",
        ),
    ]


SHORT = tiny_training(steps=4)


def every_run() -> list[Run]:
    """Return the cases above, and more, most of them evaluated on a faulty device as well."""
    runs = [case.run for case in CASES.values()]
    runs += [run_on(each, seed=2 + 2 * (n % 3)) for n, each in enumerate(more_devices())]
    policies: tuple[dict[str, Any], ...] = (
        {"carrier": "rmsnorm_weight"},
        {"carrier": "hidden", "targeting": "targeted", "redraw": "microbatch"},
        {"carrier": "linear_weight", "schedule": {"kind": "constant", "sigma": 0.001}},
    )
    runs += [
        run_on(device(WORN, quantized=[MXFP4()]), noise=noise(SHORT, policy), seed=6)
        for policy in policies
    ]
    deployed = []
    for n, run in enumerate(runs):
        if run.noise is not None:
            shorter = {"sigma": run.noise.sigma[: SHORT.steps]}
            run = run.model_copy(update={"noise": run.noise.model_copy(update=shorter)})
        faults = tuple(f for f in run.device.faults if not f.site.startswith("grad"))
        bare = run.device.model_copy(update={"faults": faults})
        if bare.is_healthy():
            bare = device(DEAD, quantized=[NVFP4()])
        changes = ([{}], [], [{}, {"deploy": "merged"}])[n % 3]
        deployed.append(
            run.model_copy(
                update={
                    "training": SHORT,
                    "conditions": (
                        CLEAN,
                        *(
                            Condition(
                                name="faulty",
                                scenario=f"s{i}",
                                device=bare.model_copy(update=change),
                                draws=1 + n % 2,
                            )
                            for i, change in enumerate(changes)
                        ),
                    ),
                }
            )
        )
    return deployed


@functools.cache
def shared(setting: Setting) -> Shared:
    return ENGINE.load(setting, "test", 64)


def results(folder: Path, runs: Sequence[Run]) -> list[tuple[Any, ...]]:
    """Return, run by run, everything that is recorded of it but the times."""
    setting = tiny_setting(folder)
    task = setting.task.model_copy(update={"train_rows": 16, "test_rows": 16})
    setting = setting.model_copy(update={"task": task})
    steps = runs[0].training.steps
    report = ENGINE.open_pack(one_pack(*runs, rungs=(steps,)), setting, shared(setting)).advance()
    recorded = []
    for training in report.trainings:
        own = [e for e in report.evaluations if e.training_key == training.training_key]
        recorded.append(
            (training.status, training.error, training.train_losses, training.audit, own)
        )
    return recorded


@exact
@pytest.mark.slow
def test_a_run_on_any_device_in_a_pack_is_the_run_alone_bit_for_bit(folder: Path) -> None:
    """Losses, audits and evaluations; one neighbour diverges to NaN on a device with everything."""
    runs = every_run()
    wild = run_on(
        device(WORN, OFFSET, BACKWARD, quantized=[NVFP4()]),
        training=SHORT.model_copy(update={"learning_rate": 1e38}),
        seed=8,
    )
    together = results(folder, [*runs[:9], wild, *runs[9:]])
    failed = together.pop(9)
    assert failed[0] == "failed"
    assert "training loss is nan" in failed[1]
    for index, run in enumerate(runs):
        (alone,) = results(folder, [run])
        assert alone[:2] == ("finished", ""), index
        assert together[index] == alone, index


# -- gradient accumulation -------------------------------------------------------------------------


def accumulated(
    folder: Path, microbatches: int, *, dtype: str, method: str = "lora", **fields: Any
) -> list[float]:
    changes: dict[str, Any] = {"gradient_accumulation_steps": microbatches}
    if method == "full":
        changes |= {"method": {"kind": "full"}, "learning_rate": 1e-3}
    training = tiny_training(steps=5, **changes)
    pack = open_replicas(folder, [run_on(training=training, **fields)], dtype=dtype)
    assert not pack.failures
    return pack.train_losses[0]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "on"),
    [
        ("float64", 1e-12, device(DeadZone(layers=(1,), threshold=0.1), quantized=[MXFP4()])),
        ("float64", 1e-12, device(WORN, OFFSET, quantized=[NVFP4(operands="weight")])),
        ("float32", 1e-6, device(OFFSET, quantized=[MXFP4(operands="weight")])),
    ],
    ids=["W4A4-and-dead-zone", "worn-and-offset", "float32"],
)
def test_microbatches_add_up_to_the_batch(
    folder: Path, method: str, dtype: str, tolerance: float, on: Device, true_float64: None
) -> None:
    """Each of these devices computes a token from that token alone, so the split cannot show.

    Full fine-tuning quantizes weights that move: in float32 a difference in the last bit may change a
    code, and only float64 is sure not to.
    """
    if (method, dtype) == ("full", "float32"):
        on = device(OFFSET)
    losses = [
        accumulated(folder, count, dtype=dtype, method=method, device=on) for count in (1, 2, 4)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=tolerance)
    assert losses[2] == pytest.approx(losses[0], rel=0, abs=tolerance)
    assert len(set(losses[0])) == 5


@pytest.mark.parametrize("carrier", ["rmsnorm_weight", "linear_weight"])
def test_a_draw_lasts_as_long_as_the_policy_says(
    folder: Path, carrier: str, true_float64: None
) -> None:
    """Weight noise held over a step is that of the undivided batch; drawn by microbatch it is not."""
    losses: dict[tuple[str, int], list[float]] = {}
    for redraw in ("step", "microbatch", "forward"):
        policy = {
            "carrier": {"kind": carrier, "relative": True},
            "schedule": {"kind": "constant", "sigma": 0.2},
            "redraw": redraw,
        }
        for count in (1, 2):
            losses[redraw, count] = accumulated(
                folder, count, dtype="float64", noise=noise(TRAINING, policy)
            )
    assert losses["step", 2] == pytest.approx(losses["step", 1], rel=0, abs=1e-12)
    assert losses["microbatch", 1] == losses["forward", 1] == losses["step", 1]
    assert losses["microbatch", 2] == losses["forward", 2]
    apart = [abs(a - b) for a, b in zip(losses["microbatch", 2], losses["step", 2], strict=True)]
    assert min(apart) > 1e-6


# -- permanent, transient, unseen ------------------------------------------------------------------


def stuck_places(
    fault: FaultSpec, device_seeds: Sequence[int], *, step: int = 0, tokens: int = 24
) -> Tensor:
    """Return which values of each replica are stuck, [K, ...]; replicate seeds are 0, 1, 2, ..."""

    def seed_of(replica: int, path: tuple[str | int, ...]) -> int:
        return stream_seed(replica, step, *path)

    toy = Toy()
    entries = [Entry(Device(faults=(fault,), seed=seed)) for seed in device_seeds]
    fold = sample(1, tokens, 32).expand(len(entries), -1, -1)
    with Injection(AddressBook(toy), entries, seed_of=seed_of) as injection:
        injection.begin(torch.ones(len(entries), tokens, dtype=torch.bool))
        if fault.site == "weight":
            toy.layers[0].up(torch.eye(32, dtype=torch.float64).expand(len(entries), -1, -1))
            (site,) = injection.layout.weights.values()
            versions = site.variants(injection)
            return torch.stack([v.weight for v in versions for _ in range(v.first, v.last)]) == 7.0
        return toy(fold) == 7.0


@pytest.mark.parametrize(
    ("axis", "site"),
    [
        ("element", "output"),
        ("channel", "output"),
        ("token", "output"),
        ("element", "weight"),
        ("channel", "weight"),
    ],
)
def test_permanent_places_belong_to_the_device_and_transient_ones_to_the_call(
    axis: str, site: str
) -> None:
    at = {"layers": (0,), "site": site, "modules": ("up",) if site == "weight" else (".",)}
    fault = StuckAt(**at, value=7.0, density=0.3, axis=axis)
    first = stuck_places(fault, (4, 4, 9))
    assert torch.equal(first[0], first[1])  # whatever the replicate seed
    assert not torch.equal(first[0], first[2])
    assert torch.equal(first, stuck_places(fault, (4, 4, 9), step=3))
    assert torch.equal(first[:1], stuck_places(fault, (4,)))
    other_mask = fault.model_copy(update={"mask_seed": 1})
    assert not torch.equal(first, stuck_places(other_mask, (4, 4, 9)))
    assert torch.equal(first.sum(dim=(1, 2)), stuck_places(other_mask, (4, 4, 9)).sum(dim=(1, 2)))
    transient = fault.model_copy(update={"persistence": "transient"})
    moving = stuck_places(transient, (4, 4, 9))
    assert torch.equal(moving, stuck_places(transient, (4, 4, 9)))
    assert not torch.equal(moving[0], moving[1])
    for replica, again in enumerate(stuck_places(transient, (4, 4, 9), step=3)):
        assert not torch.equal(moving[replica], again)


@pytest.mark.parametrize("axis", ["channel", "element"])
def test_training_and_evaluation_on_a_device_meet_the_same_places(folder: Path, axis: str) -> None:
    """Of activations: the same channels. Of a weight: the same elements."""
    if axis == "channel":
        fault: FaultSpec = STUCK_CHANNELS.model_copy(update={"value": 3.25})
    else:
        fault = STUCK_WEIGHTS.model_copy(update={"value": 3.25, "modules": ("mlp.up_proj",)})
    seen: list[Tensor] = []

    def observe(weight_or_output: Tensor) -> None:
        rows = weight_or_output.detach().flatten(0, -2)
        seen.append((rows == 3.25).all(dim=0) if axis == "channel" else rows == 3.25)

    with pytest.MonkeyPatch.context() as patch:
        if axis == "channel":
            original = apply_module.put_back

            def put_back(x: Tensor, values: Tensor, active: Sequence[int]) -> Tensor:
                out = original(x, values, active)
                observe(out)
                return out

            patch.setattr(apply_module, "put_back", put_back)
        else:
            call = weights_module._call

            def record(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
                observe(weight)
                return call(module, weight, x)

            patch.setattr(weights_module, "_call", record)
        on = device(fault, seed=11)
        condition = Condition(name="faulty", scenario="s", device=on)
        run = run_on(on, training=tiny_training(steps=2), conditions=(condition,))
        setting = tiny_setting(folder)
        report = ENGINE.open_pack(
            one_pack(run, rungs=(2,)), setting, ENGINE.load(setting, "test", 64)
        ).advance()
    assert report.trainings[0].error == ""
    assert len(seen) == 4  # two steps, two batches
    assert 0 < int(seen[0].sum()) < seen[0].numel()
    assert all(torch.equal(mask, seen[0]) for mask in seen)


def evaluated(
    folder: Path, conditions: Sequence[Condition], *, dtype: str = "float32", **fields: Any
) -> list[Any]:
    """Return the evaluations of the untrained model."""
    run = run_on(conditions=tuple(conditions), **fields)
    setting = tiny_setting(folder, dtype=dtype)
    opened = ENGINE.open_pack(one_pack(run, rungs=(0,)), setting, ENGINE.load(setting, "test", 64))
    report = opened.advance()
    assert report.trainings[0].error == ""
    return list(report.evaluations)


def on_device(device_: Device, name: str = "s", **fields: Any) -> Condition:
    return Condition(name="faulty", scenario=name, device=device_, **fields)


@pytest.mark.parametrize("fault", [STUCK_CHANNELS, STUCK_WEIGHTS], ids=["channels", "weights"])
def test_unseen_devices_are_others_each_and_their_mean_is_recorded(
    folder: Path, fault: FaultSpec
) -> None:
    trained = device(fault, seed=5)
    conditions = [on_device(trained, "seen"), on_device(trained, "unseen", unseen=True, draws=3)]
    for draw in range(3):
        seed = stream_seed(5, "unseen", draw) | 1 << 63
        conditions.append(on_device(trained.model_copy(update={"seed": seed}), f"as {draw}"))
    seen, unseen, *each = evaluated(folder, conditions)
    losses = [row.loss for row in each]
    assert len({seen.loss, *losses}) == 4
    assert (unseen.draws, seen.draws) == (3, 1)
    assert unseen.loss == pytest.approx(statistics.mean(losses), rel=1e-12)
    assert unseen.loss_sd == pytest.approx(statistics.stdev(losses), rel=1e-12)
    assert unseen.exact_match == pytest.approx(statistics.mean(row.exact_match for row in each))
    assert seen.loss_sd is None
    (pooled,) = unseen.faults
    assert pooled.calls == sum(row.faults[0].calls for row in each)
    errors = [row.faults[0].relative_error for row in each]
    assert pooled.relative_error == pytest.approx(statistics.mean(errors))


# -- evaluation beside peft and plain hooks --------------------------------------------------------


def loss_by_hand(
    model: nn.Module, setting: Setting, run: Run, by_hand: Attach, draw: int = 0
) -> float:
    """Evaluate `model`, batch by batch, under hooks that see the evaluation's own streams."""
    data = split(setting, "test")
    at = {"batch": 0}
    scene = Scene(
        run, [], lambda *path: stream_seed(0, "eval", "test", draw, at["batch"], *path), []
    )
    by_hand(model, scene)
    total, count = 0.0, 0
    for number, first in enumerate(range(0, len(data.tokens), setting.eval_batch_size)):
        rows = torch.arange(first, min(first + setting.eval_batch_size, len(data.tokens)))
        batch = data.batch(rows)
        at["batch"] = number
        scene.valid[:] = [batch.valid.flatten()]
        with torch.no_grad():
            total += float(answer_loss(model, batch))
        count += int(batch.answer.sum())
    return total / count


NOISY = RelativeGaussian(layers=(0, 3), scale=0.1)


def at_place(model: nn.Module, name: str, path: str) -> nn.Module:
    """Return the module that the faulty unit stands for: with the adapter, or without."""
    return part(model, name) if path == "exact" else wrapper(model, name)


def noisy_unit(path: str) -> Attach:
    def attach(model: nn.Module, scene: Scene) -> None:
        for name in names((0, 3)):

            def change(y: Tensor, name: str = name) -> Tensor:
                z = scene.normal(y, "fault", 0, name, "output", key_of(NOISY))
                return y + 0.1 * y.abs() * z

            on_output(at_place(model, name, path), change)

    return attach


def clipped_inputs(path: str) -> Attach:
    def attach(model: nn.Module, scene: Scene) -> None:
        def change(x: Tensor) -> Tensor:
            limit = 0.5 * x.abs().amax(dim=-1, keepdim=True)
            return x.clamp(-limit, limit)

        for name in names((1, 2)):
            on_input(at_place(model, name, path), change)

    return attach


def stuck_weights_by_hand(path: str) -> Attach:
    return stuck_weights


CLIPPED = Saturation(layers=(1, 2), modules=("linear",), site="input", limit=0.5)
DEPLOYED: dict[str, tuple[Device, Callable[[str], Attach]]] = {
    "dead zone": (device(DEAD), lambda path: layer_outputs((1,), dead(0.05))),
    "noisy unit": (device(NOISY), noisy_unit),
    "clipped inputs": (device(CLIPPED), clipped_inputs),
    "stuck weights": (device(STUCK_WEIGHTS, seed=5), stuck_weights_by_hand),
    "W4 mxfp4": (
        device(quantized=[quantizer("mxfp4", "weight")]),
        lambda path: weights(EVERY, mxfp4),
    ),
    "W4A4 nvfp4 and a dead zone": (
        device(DEAD, quantized=[quantizer("nvfp4", "both")]),
        lambda path: both(
            weights(EVERY, nvfp4),
            activations(EVERY, "nvfp4", faulty_path=path != "exact"),
            layer_outputs((1,), dead(0.05)),
        ),
    ),
}
PATHS = ("exact", "faulty", "merged")


def deployed(name: str, path: str) -> Device:
    changes = {"deploy": "merged"} if path == "merged" else {"adapter_path": path}
    return DEPLOYED[name][0].model_copy(update=changes)


@pytest.fixture(scope="module")
def trained_pack(folder: Path, true_float64: None) -> tuple[ReplicaPack, list[Evaluated]]:
    """Return two trained runs in float64, and every evaluation of them."""
    conditions = (
        CLEAN,
        *(on_device(deployed(name, path), f"{name} {path}") for name in DEPLOYED for path in PATHS),
        on_device(deployed("noisy unit", "exact"), "drawn", draws=3),
    )
    runs = [run_on(seed=seed, conditions=conditions) for seed in (2, 4)]
    pack = open_replicas(folder, runs, dtype="float64", steps=5)
    setting = tiny_setting(folder, dtype="float64")
    return pack, list(evaluate(pack, split(setting, "test"), 16, stream="test"))


def trained_model(folder: Path, pack: ReplicaPack, replica: int) -> nn.Module:
    """Return one trained run of a pack as a model of peft."""
    model = peft_model(tiny_setting(folder, dtype="float64"), TRAINING)
    own = pack.arena.named_row(replica)
    parameters = adapters(model)
    assert own.keys() == parameters.keys()
    for name, parameter in parameters.items():
        parameter.data = own[name].T.clone()
    return model.eval()


def recorded_loss(outcomes: Sequence[Evaluated], replica: int, scenario: str) -> Evaluated:
    (found,) = (o for o in outcomes if (o.replica, o.condition.scenario) == (replica, scenario))
    assert found.error == ""
    return found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", DEPLOYED)
def test_a_deployed_device_is_peft_with_plain_hooks(
    folder: Path, name: str, path: str, trained_pack: tuple[ReplicaPack, list[Evaluated]]
) -> None:
    """exact: the unit without the adapters; faulty: with them; merged: peft's own merge_and_unload."""
    pack, outcomes = trained_pack
    setting = tiny_setting(folder, dtype="float64")
    own = deployed(name, path)
    for replica in (0, 1):
        model = trained_model(folder, pack, replica)
        if path == "merged":
            model = model.merge_and_unload()
        by_hand = DEPLOYED[name][1](path)
        wanted = loss_by_hand(model, setting, run_on(own), by_hand)
        assert recorded_loss(outcomes, replica, f"{name} {path}").loss == pytest.approx(
            wanted, rel=0, abs=1e-10
        )


def test_the_deployments_differ(trained_pack: tuple[ReplicaPack, list[Evaluated]]) -> None:
    """But for a fault of layer outputs, which has no adapter path: and W4 beside an exact adapter."""
    _, outcomes = trained_pack
    by_path = {
        name: [recorded_loss(outcomes, 0, f"{name} {path}").loss for path in PATHS]
        for name in DEPLOYED
    }
    for name, (apart, faulty, merged) in by_path.items():
        assert (apart == faulty) == (name in ("dead zone", "stuck weights", "W4 mxfp4")), name
        assert (apart == pytest.approx(merged, abs=1e-9)) == (name == "dead zone"), name


def test_draws_of_a_random_fault_are_separate_evaluations(
    folder: Path, trained_pack: tuple[ReplicaPack, list[Evaluated]]
) -> None:
    pack, outcomes = trained_pack
    setting = tiny_setting(folder, dtype="float64")
    outcome = recorded_loss(outcomes, 0, "drawn")
    losses = []
    for draw in range(3):
        model = trained_model(folder, pack, 0)
        losses.append(loss_by_hand(model, setting, run_on(), noisy_unit("exact"), draw))
    assert outcome.losses == pytest.approx(losses, rel=0, abs=1e-10)
    assert outcome.loss == pytest.approx(statistics.mean(losses), rel=0, abs=1e-10)
    assert outcome.loss_sd == pytest.approx(statistics.stdev(losses), rel=0, abs=1e-10)
    assert outcome.losses[0] == recorded_loss(outcomes, 0, "noisy unit exact").loss
    assert len(set(losses)) == 3


def test_the_clean_condition_is_never_touched(
    folder: Path, trained_pack: tuple[ReplicaPack, list[Evaluated]]
) -> None:
    """It is the plain model, whatever is evaluated beside it, whatever the training device was."""
    pack, outcomes = trained_pack
    setting = tiny_setting(folder, dtype="float64")
    for replica in (0, 1):
        wanted = loss_by_hand(trained_model(folder, pack, replica), setting, run_on(), nothing)
        (clean,) = (o for o in outcomes if o.replica == replica and o.condition == CLEAN)
        assert clean.loss == pytest.approx(wanted, rel=0, abs=1e-10)
        assert (clean.faults, clean.quantizers) == ((), ())
    crowd = [CLEAN, *(on_device(each, f"s{n}") for n, each in enumerate(more_devices()[:9]))]
    (alone,) = evaluated(folder, [CLEAN])
    assert evaluated(folder, crowd)[0] == alone


# -- adapters on the faulty unit, by hand ----------------------------------------------------------


@pytest.mark.parametrize("path", ["exact", "faulty"])
@pytest.mark.parametrize("site", ["input", "output", "grad_input", "grad_output"])
def test_the_adapter_path_in_numbers(path: str, site: str) -> None:
    """y = x W^T + s x A B, with a gain of 1/2 on the unit: of W alone, or of both."""
    from aqn_tune.training.lora import ReplicaLinear

    toy = Toy()
    book = AddressBook(toy)
    base = toy.layers[0].up.requires_grad_(False)
    v = toy.layers[0].down.weight.detach()
    a, b = sample(2, 32, 3, seed=8), sample(2, 3, 48, seed=9)
    toy.layers[0].up = ReplicaLinear(base, nn.Parameter(a), nn.Parameter(b), 2.0)
    fault = Bias(layers=(0,), modules=("up",), site=site, form="gain", scale=-0.5)
    entries = [Entry(), Entry(Device(faults=(fault,), adapter_path=path))]
    x = sample(2, 6, 32).requires_grad_()
    g = sample(2, 6, 32, seed=3)
    with Injection(book, entries, seed_of=lambda replica, where: 0) as injection:
        injection.begin(torch.ones(2, 6, dtype=torch.bool))
        y = toy(x)
        y.backward(g)
    for replica, gain in ((0, 1.0), (1, 0.5)):
        w, update = base.weight, 2.0 * a[replica] @ b[replica]
        on_adapter = gain if path == "faulty" else 1.0
        forward = site in ("input", "output")
        of_base, of_adapter = (gain, on_adapter) if forward else (1.0, 1.0)
        up = of_base * (x[replica] @ w.T) + of_adapter * (x[replica] @ update)
        back = g[replica] @ v
        dx = gain * (back @ w) + on_adapter * (back @ update.T)
        of_gradient = on_adapter if site != "grad_input" else 1.0
        da = of_gradient * 2.0 * x[replica].T @ (back @ b[replica].T)
        assert torch.allclose(y[replica], up @ v.T, rtol=0, atol=1e-12)
        assert torch.allclose(x.grad[replica], dx, rtol=0, atol=1e-12)
        assert torch.allclose(toy.layers[0].up.lora_a.grad[replica], da, rtol=0, atol=1e-12)


# -- when a part of the device is there ------------------------------------------------------------


@pytest.mark.parametrize("when", ["both", "train", "eval"])
@pytest.mark.parametrize("during", ["both", "train", "eval"])
def test_a_part_acts_when_it_says_so(when: str, during: str) -> None:
    spec = ScenarioSpec(
        faults=(
            DEAD.model_copy(update={"when": when}),
            OFFSET.model_copy(update={"site": "grad_input"}),
        ),
        quantization=(MXFP4(when=when),),
        during=during,
        deploy="merged",
        adapter_path="faulty",
        device_seed=3,
    )
    trains = during in ("both", "train")
    deploys = during in ("both", "eval")
    trained, then = spec.trained(), spec.deployed()
    assert [f.kind for f in trained.faults] == (
        ["dead_zone"] * (trains and when != "eval") + ["bias"] * trains
    )
    assert [f.kind for f in then.faults] == ["dead_zone"] * (deploys and when != "train")
    assert len(trained.quantization) == (trains and when != "eval")
    assert len(then.quantization) == (deploys and when != "train")
    for each in (trained, then):
        assert each == HEALTHY or (each.seed, each.adapter_path) == (3, "faulty")
    assert trained.deploy == "unmerged"


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("during", ["both", "train", "eval"])
def test_errors_of_the_backward_products_stay_in_the_training(
    folder: Path, during: str, method: str
) -> None:
    """From the declaration to the last row: a companion that was deployed too failed every such run."""
    noisy = {"kind": "relative_gaussian", "layers": "all", "scale": 0.05, "backward_scale": 0.05}
    made = Study.model_validate(
        {
            "study": "s",
            "scenario": {"faults": [noisy], "during": during},
            "search": {
                "space": {"dimensions": {"sigma_start": {"kind": "fixed", "value": 0.1}}},
                "replicates": 2,
            },
            "confirm": {"replicates": 6},
        }
    )
    changes = {"method": {"kind": "full"}, "learning_rate": 1e-3} if method == "full" else {}
    made = made.model_copy(update={"training": tiny_training(steps=2, **changes)})
    (scenario,) = resolve_scenarios(made)
    arm = named_arms(made)["fault_only"]
    run = resolve_run(made, scenario, arm, seed=2, layer_count=LAYERS)
    ((status, error, _, audit, (clean, faulty)),) = results(folder, [run])
    assert (status, error) == ("finished", "")
    assert len(audit.fault_sites) == 28 * ({"lora": 2, "full": 3}[method]) * (during != "eval")
    assert [fault.calls for fault in faulty.faults] == [28] * (during != "train")
    assert (clean.loss == faulty.loss) == (during == "train")


def test_a_format_of_the_evaluation_alone_does_not_train(folder: Path) -> None:
    spec = ScenarioSpec(quantization=(MXFP4(when="eval"),), faults=(DEAD,), during="both")
    run = run_on(spec.trained(), conditions=(CLEAN, on_device(spec.deployed())))
    ((_, _, losses, audit, (clean, faulty)),) = results(folder, [run])
    ((_, _, plain, _, _),) = results(folder, [run_on(device(DEAD))])
    assert losses == plain
    assert audit.quantizer_calls == 0
    assert clean.quantizers == ()
    assert {(q.format, q.operand) for q in faulty.quantizers} == {
        ("mxfp4", "weight"),
        ("mxfp4", "activation"),
    }
    assert {q.layer for q in faulty.quantizers} == set(EVERY)


# -- audits ----------------------------------------------------------------------------------------


def error_of(folder: Path, *conditions: Condition) -> str:
    setting = tiny_setting(folder)
    run = run_on(conditions=(CLEAN, *conditions))
    opened = ENGINE.open_pack(one_pack(run, rungs=(0,)), setting, ENGINE.load(setting, "test", 64))
    report = opened.advance()
    (row,) = report.trainings
    assert (row.status == "failed") == bool(row.error)
    assert not (row.error and report.evaluations)
    return row.error


def lose(patch: pytest.MonkeyPatch) -> None:
    """The device reaches the evaluation without its formats."""

    def bare(own: Device, **fields: Any) -> Entry:
        return Entry(own.model_copy(update={"quantization": ()}), **fields)

    patch.setattr(evaluate_module, "Entry", bare)


def spread(patch: pytest.MonkeyPatch) -> None:
    """What is computed for one replica is written to all."""

    def everywhere(x: Tensor, values: Tensor, active: Sequence[int]) -> Tensor:
        return values[:1].expand_as(x)

    patch.setattr(apply_module, "put_back", everywhere)


def skip_some(patch: pytest.MonkeyPatch) -> None:
    """The hook of one product forgets to quantize."""
    original = Injection._quantize

    def forgetful(self: Injection, site: Any, x: Tensor) -> Tensor:
        if site.address.name.endswith("0.mlp.down_proj"):
            return x
        return original(self, site, x)

    patch.setattr(Injection, "_quantize", forgetful)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (None, ""),
        (lose, "declares 1 quantizers, 0 are attached"),
        (spread, "condition 'clean': mxfp4 acted, though it is not declared"),
        (skip_some, "mxfp4 quantized 54 operands of 56"),
    ],
    ids=["sound", "lost", "strayed", "forgotten"],
)
def test_a_quantizer_that_is_not_where_it_should_be_is_not_a_number(
    folder: Path, plant: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module, "FOLD_TOKENS", 10**6)  # clean and faulty in one pass
    if plant is not None:
        plant(monkeypatch)
    condition = on_device(device(quantized=[MXFP4(operands="activation")]))
    error = error_of(folder, condition)
    assert bool(error) == bool(message)
    assert message in error


# -- the noise of every step -----------------------------------------------------------------------

POLICY: dict[str, Any] = {
    "schedule": {
        "kind": "geometric",
        "sigma_start": 0.2,
        "sigma_end": 0.05,
        "stages": 3,
        "warmup_fraction": 0.1,
        "stop_fraction": 0.2,
    },
    "targeting": {
        "kind": "zone",
        "edge": [0],
        "edge_multiplier": 0.5,
        "middle_multiplier": 1.0,
        "boundary": 0.5,
        "middle_multiplier_after": 2.0,
    },
}


def declared_level(step: int, layer: int) -> float:
    """Return the standard deviation of POLICY over ten steps, written out."""
    sigma = (0.0, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.05, 0.0, 0.0)[step]
    multiplier = 0.5 if layer == 0 else 1.0 if step < 5 else 2.0
    return sigma * multiplier


CARRIERS = [
    {"kind": "hidden"},
    {"kind": "rmsnorm_weight"},
    {"kind": "rmsnorm_weight", "relative": True},
    {"kind": "linear_weight"},
    {"kind": "linear_weight", "relative": True},
]


@pytest.mark.parametrize("carrier", CARRIERS, ids=lambda c: "-".join(map(str, c.values())))
def test_the_noise_of_every_step_is_the_declared_one(
    folder: Path, carrier: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured where it is used: in front of the next module, or in the weight that is multiplied by."""
    policy = {**POLICY, "carrier": carrier}
    effective: EffectiveNoise = noise(TRAINING, policy)
    runs = [run_on(noise=effective, seed=seed) for seed in (2, 4)]
    setting = tiny_setting(folder)
    model = build_model(setting.model)
    layers = decoder_layers(model)
    seen: dict[tuple[int, int], list[Tensor]] = {}
    plain: dict[int, Tensor] = {}
    layer_of = {id(m): n for n, layer in enumerate(layers) for m in layer.modules()}
    relative = carrier["kind"] == "hidden" or carrier.get("relative", False)

    def note(layer: int, before: Tensor, after: Tensor) -> None:
        before, after = before.detach().double(), after.detach().double()
        z = (after - before) / before.abs() if relative else after - before
        seen.setdefault((pack.step, layer), []).append(z.flatten())

    if carrier["kind"] == "hidden":
        following = [*layers[1:], model.model.norm]
        for number, (layer, after) in enumerate(zip(layers, following, strict=True)):
            layer.register_forward_hook(
                lambda m, args, out, number=number: plain.update({number: out})
            )
            after.register_forward_pre_hook(
                lambda m, args, kwargs, number=number: note(
                    number, plain[number], args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )
    else:
        original = weights_module._call

        def recorded(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
            stored = module.get_parameter("weight")
            versions = weight.reshape(-1, *stored.shape)
            each = (
                len(versions) // 2 if len(versions) > 1 else 1
            )  # a norm's rows, replica by replica
            for version in versions[::each]:
                note(layer_of[id(module)], stored, version)
            return original(module, weight, x)

        monkeypatch.setattr(weights_module, "_call", recorded)
    pack = ReplicaPack(model, runs, split(setting, "train"))
    pack.train_to(STEPS)
    assert not pack.failures
    for step in range(STEPS):
        pooled = []
        for layer in range(LAYERS):
            level = declared_level(step, layer)
            z = torch.cat(seen.get((step, layer), [torch.zeros(1)]))
            if level == 0:
                assert not z.any(), (step, layer)
                continue
            pooled.append(z / level)
            realised = float(z.square().mean().sqrt())
            tolerance = 5 / math.sqrt(2 * len(z)) + 1e-3
            assert realised == pytest.approx(level, rel=tolerance), (step, layer)
        if pooled:
            every = torch.cat(pooled)
            assert float(every.square().mean()) == pytest.approx(
                1.0, abs=5 * math.sqrt(2 / len(every)) + 2e-3
            )
            assert float(every.mean()) == pytest.approx(0.0, abs=5 / math.sqrt(len(every)) + 1e-3)
