"""Injection into random models of several architectures, beside plain hooks on copies of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from aqn_tune.errors import UserError
from aqn_tune.faults import Bias, DeadZone, FaultSpec, RelativeGaussian
from aqn_tune.injection.address import AddressBook
from aqn_tune.injection.fold import Entry
from aqn_tune.injection.injection import Injection
from aqn_tune.noise import EffectiveNoise
from aqn_tune.quantization import MXFP4
from aqn_tune.study.device import HEALTHY, Device
from aqn_tune.study.keys import content_hash
from aqn_tune.study.seeds import stream_seed

torch.set_num_threads(1)

LAYERS, WIDTH, TOKENS, ROWS = 4, 32, 8, 2
SHAPE = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SEVEN = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = (*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
VALID = torch.ones(1, ROWS * TOKENS, dtype=torch.bool)
VALID[0, -3:] = False  # padding at the end of the last row


class Architecture(NamedTuple):
    """A family of models, as its own code names its parts."""

    config: Callable[..., Any]
    prefix: str = "model.layers."
    linears: tuple[str, ...] = SEVEN
    norms: tuple[str, ...] = TWO_NORMS
    attention: tuple[str, ...] = ("eager", "sdpa")


def gpt2(**values: Any) -> GPT2Config:
    return GPT2Config(
        vocab_size=64,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=2,
        n_inner=48,
        n_positions=64,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )


ARCHITECTURES = {
    "qwen2": Architecture(Qwen2Config),
    "qwen3": Architecture(Qwen3Config),
    "llama": Architecture(LlamaConfig),
    "mistral": Architecture(MistralConfig),
    "gemma": Architecture(GemmaConfig),
    "gemma2": Architecture(Gemma2Config, norms=FOUR_NORMS, attention=("eager",)),
    "gemma3": Architecture(Gemma3TextConfig, norms=FOUR_NORMS),
    "gpt2": Architecture(
        gpt2,
        "transformer.h.",
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        (),
    ),
}


def build(
    name: str,
    *,
    attention: str = "eager",
    dtype: torch.dtype = torch.float64,
    adapters: bool = False,
    heads: int = 2,
) -> nn.Module:
    """Return a frozen random model, with PEFT adapters that do something if asked."""
    from peft import LoraConfig, get_peft_model

    kind = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(
            kind.config(**{**SHAPE, "num_attention_heads": heads}),
            attn_implementation=attention,
            dtype=dtype,
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms that are all ones would hide a mistake
                    parameter.add_(0.2 * torch.randn(parameter.shape).to(dtype))
        model.requires_grad_(False).eval()
        if not adapters:
            return model
        config = LoraConfig(
            r=2,
            target_modules=sorted({part.rpartition(".")[2] for part in kind.linears}),
            fan_in_fan_out=name == "gpt2",
            init_lora_weights=False,
        )
        return get_peft_model(model, config, autocast_adapter_dtype=False).eval()


def part(model: nn.Module, name: str) -> nn.Module:
    """Return a module of the model by its name without adapters: the leaf itself."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    module = base.get_submodule(name)
    return getattr(module, "base_layer", module)


def seed_of(replica: int, path: tuple[str | int, ...]) -> int:
    return stream_seed(100 + replica, *path)


def draw(*path: str | int, shape: tuple[int, ...]) -> Tensor:
    """Return what replica 1 draws for `path`."""
    generator = torch.Generator().manual_seed(stream_seed(101, *path))
    return torch.randn(shape, generator=generator)


# -- the same injections, once declared and once by hand -------------------------------------------


class Treatment(NamedTuple):
    """What replica 1 gets, and the plain hooks that do the same to a copy of the model."""

    entry: Entry
    by_hand: Callable[[Architecture, nn.Module], None]
    layers: tuple[int, ...]


CODES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def nearest_code(y: Tensor) -> Tensor:
    """Return the E2M1 value nearest to each y >= 0, ties to the even code, 6 beyond 6."""
    distance = (y.unsqueeze(-1) - CODES).abs()
    best = distance.min(dim=-1, keepdim=True).values == distance
    rank = best * torch.tensor([2, 1, 2, 1, 2, 1, 2, 1])  # an even code outranks its odd neighbour
    return CODES[rank.argmax(dim=-1)]


def mxfp4(x: Tensor) -> Tensor:
    """Return x as MXFP4 along its last dimension, by looking for the nearest code."""
    size = x.shape[-1]
    padded = nn.functional.pad(x.detach().double(), (0, -size % 32)).unflatten(-1, (-1, 32))
    amax = padded.abs().amax(dim=-1, keepdim=True)
    exponent = torch.where(amax > 0, torch.frexp(amax).exponent - 1 - 2, 0)
    scale = torch.ldexp(torch.ones_like(amax), exponent)
    values = (nearest_code(padded.abs() / scale) * scale).copysign(padded)
    return values.flatten(-2)[..., :size].to(x.dtype)


def straight(x: Tensor, values: Tensor) -> Tensor:
    return x + (values - x).detach()


def replace_weight(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Set a weight to `change` of it as [out, in]."""
    turned = type(module).__name__ == "Conv1D"
    weight = module.weight.detach()
    new = change(weight.T if turned else weight)
    module.weight = nn.Parameter((new.T if turned else new).clone(), requires_grad=False)


def key_of(fault: FaultSpec) -> str:
    return content_hash({**fault.static(), "layers": None}) + ".1"


DEAD = DeadZone(layers=(1, 3), threshold=0.05, reference="tensor_max")
NOISY = RelativeGaussian(layers=(0, 2), scale=0.1)
WORN = DeadZone(layers=(1, 2), modules=("linear",), site="weight", threshold=0.3)


def dead_by_hand(kind: Architecture, model: nn.Module) -> None:
    def hook(module: nn.Module, args: Any, h: Tensor) -> Tensor:
        peak = h.detach().flatten(0, 1)[VALID[0]].abs().max()
        return h * (h.detach().abs() >= DEAD.threshold * peak)

    for layer in (1, 3):
        part(model, f"{kind.prefix}{layer}").register_forward_hook(hook)


def noisy_by_hand(kind: Architecture, model: nn.Module) -> None:
    def hook_at(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            shape = (ROWS * TOKENS, y.shape[-1])
            z = draw("fault", 0, name, "output", key_of(NOISY), shape=shape)
            return y + y.detach().abs() * z.view(y.shape).to(y.dtype) * 0.1

        return hook

    for layer in (0, 2):
        for linear in kind.linears:
            name = f"{kind.prefix}{layer}.{linear}"
            part(model, name).register_forward_hook(hook_at(name))


def four_bits_by_hand(kind: Architecture, model: nn.Module) -> None:
    for layer in range(LAYERS):
        for linear in kind.linears:
            module = part(model, f"{kind.prefix}{layer}.{linear}")
            replace_weight(module, mxfp4)
            module.register_forward_pre_hook(lambda m, args: (straight(args[0], mxfp4(args[0])),))


def worn_by_hand(kind: Architecture, model: nn.Module) -> None:
    for layer in (1, 2):
        for linear in kind.linears:
            replace_weight(
                part(model, f"{kind.prefix}{layer}.{linear}"),
                lambda w: w * (w.abs() >= 0.3 * w.abs().amax(dim=1, keepdim=True)),
            )


def hidden_by_hand(kind: Architecture, model: nn.Module) -> None:
    def hook_at(layer: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, h: Tensor) -> Tensor:
            z = draw("noise", 0, layer, str(layer), shape=(ROWS * TOKENS, WIDTH))
            return h + z.view(h.shape).to(h.dtype) * 0.2 * h.detach().abs()

        return hook

    for layer in range(LAYERS):
        part(model, f"{kind.prefix}{layer}").register_forward_hook(hook_at(layer))


def norms_by_hand(kind: Architecture, model: nn.Module) -> None:
    for layer in range(LAYERS):
        for name in kind.norms:
            z = draw("noise", 0, layer, name, shape=(1, WIDTH))[0]
            norm = part(model, f"{kind.prefix}{layer}.{name}")
            replace_weight(norm, lambda w, z=z: w + 0.2 * z.to(w.dtype))


def weights_by_hand(kind: Architecture, model: nn.Module) -> None:
    for layer in range(LAYERS):
        for name in kind.linears:
            module = part(model, f"{kind.prefix}{layer}.{name}")

            def noised(w: Tensor, layer: int = layer, name: str = name) -> Tensor:
                z = draw("noise", 0, layer, name, shape=tuple(w.shape))
                return w + z.to(w.dtype) * 0.2 * w.abs()

            replace_weight(module, noised)


def constant_noise(sigma: float = 0.2, **carrier: Any) -> EffectiveNoise:
    return EffectiveNoise.model_validate(
        {"carrier": carrier, "sigma": [sigma], "multipliers": [1.0] * LAYERS}
    )


def device(*faults: FaultSpec, **fields: Any) -> Device:
    return Device(faults=faults, **fields)


EVERYWHERE = tuple(range(LAYERS))
TREATMENTS = {
    "dead zone": Treatment(Entry(device(DEAD)), dead_by_hand, (1, 3)),
    "noisy unit": Treatment(Entry(device(NOISY)), noisy_by_hand, (0, 2)),
    "W4A4": Treatment(Entry(Device(quantization=(MXFP4(),))), four_bits_by_hand, EVERYWHERE),
    "worn weights": Treatment(Entry(device(WORN)), worn_by_hand, (1, 2)),
    "hidden noise": Treatment(
        Entry(HEALTHY, constant_noise(kind="hidden")), hidden_by_hand, EVERYWHERE
    ),
    "norm noise": Treatment(
        Entry(HEALTHY, constant_noise(kind="rmsnorm_weight")), norms_by_hand, EVERYWHERE
    ),
    "weight noise": Treatment(
        Entry(HEALTHY, constant_noise(kind="linear_weight", relative=True)),
        weights_by_hand,
        EVERYWHERE,
    ),
}


DIFFERENT = ("qwen2", "gemma", "gemma3", "gpt2")
"""Architectures that differ in structure; the others differ in numbers, and get fewer treatments."""


def cases(names: Iterable[str], treatments: Iterable[str]) -> list[Any]:
    return [
        pytest.param(name, treatment, id=f"{name}-{treatment}".replace(" ", "-"))
        for name in names
        for treatment in treatments
        if (name, treatment) != ("gpt2", "norm noise")  # refused below
    ]


ALIKE = [name for name in ARCHITECTURES if name not in DIFFERENT]


def two_replicas(model: nn.Module, treatment: Treatment) -> Injection:
    """Return an injection into replica 1; replica 0 has nothing."""
    return Injection(AddressBook(model), [Entry(), treatment.entry], seed_of=seed_of)


def inputs(dtype: torch.dtype) -> Tensor:
    """Return embedded tokens of two replicas, each its own."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2 * ROWS, TOKENS, WIDTH, generator=generator).to(dtype)
    return x.requires_grad_()


DIRECTION = torch.randn(ROWS, TOKENS, 64, generator=torch.Generator().manual_seed(6)).double()


def close(got: Tensor, wanted: Tensor) -> bool:
    """Compare in units of the largest value; norms compute in float32, whatever the model's type."""
    return bool((got - wanted).abs().max() <= 1e-6 * wanted.abs().max())


@pytest.mark.parametrize(
    ("name", "treatment"),
    [
        *cases(DIFFERENT, TREATMENTS),
        *cases(ALIKE, ("dead zone", "W4A4", "norm noise")),
    ],
)
def test_the_treated_replica_is_a_model_with_plain_hooks_and_its_neighbour_is_untouched(
    name: str, treatment: str
) -> None:
    """Logits, gradients of the input and of the adapters; eager without PEFT, sdpa with it."""
    kind, treated = ARCHITECTURES[name], TREATMENTS[treatment]
    for attention, adapters in ((kind.attention[0], False), (kind.attention[-1], True)):
        model = build(name, attention=attention, adapters=adapters)
        by_hand = copy.deepcopy(model)
        x, y = inputs(torch.float64), inputs(torch.float64)
        plain = model(inputs_embeds=x, use_cache=False).logits.detach()
        injection = two_replicas(model, treated)
        with injection:
            injection.begin(VALID.expand(2, -1))
            logits = model(inputs_embeds=x, use_cache=False).logits
            (logits[ROWS:] * DIRECTION).sum().backward()
        treated.by_hand(kind, by_hand)
        wanted = by_hand(inputs_embeds=y[ROWS:], use_cache=False).logits
        (wanted * DIRECTION).sum().backward()
        assert close(logits[:ROWS], plain[:ROWS])
        assert not close(plain[ROWS:], wanted)
        assert close(logits[ROWS:], wanted)
        assert close(x.grad[ROWS:], y.grad[ROWS:])
        assert not x.grad[:ROWS].any()
        theirs = dict(by_hand.named_parameters())
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert close(parameter.grad, theirs[parameter_name].grad), parameter_name


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return everything that an injection could leave behind."""
    left: dict[str, Any] = {}
    for name, module in model.named_modules():
        left[name] = (
            set(module.__dict__) - {"_is_full_backward_hook"},
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
            len(module._backward_pre_hooks),
        )
    return left


@pytest.mark.parametrize(("name", "treatment"), cases(DIFFERENT, TREATMENTS))
def test_types_are_kept_and_nothing_is_left_behind(name: str, treatment: str) -> None:
    for dtype, adapters in ((torch.float32, True), (torch.bfloat16, False)):
        model = build(name, dtype=dtype, adapters=adapters)
        x = inputs(dtype).detach()
        before, state = fingerprint(model), copy.deepcopy(model.state_dict())
        plain = model(inputs_embeds=x, use_cache=False).logits
        seen: set[torch.dtype] = set()
        injection = two_replicas(model, TREATMENTS[treatment])
        with injection:
            watcher = part(model, f"{ARCHITECTURES[name].prefix}3").register_forward_hook(
                lambda m, args, out, seen=seen: seen.add(out.dtype)
            )
            for _ in range(2):
                injection.begin(VALID.expand(2, -1))
                logits = model(inputs_embeds=x, use_cache=False).logits
            watcher.remove()
        assert seen == {dtype}
        assert logits.dtype == dtype
        assert torch.isfinite(logits).all()
        assert not torch.equal(logits[ROWS:], plain[ROWS:])
        assert torch.equal(model(inputs_embeds=x, use_cache=False).logits, plain)
        assert fingerprint(model) == before
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def counters(injection: Injection) -> list[Any]:
    return [
        [fault.tally.calls.tolist() for fault in injection.layout.faults],
        [fault.tally.due.tolist() for fault in injection.layout.faults],
        [placed.tally.calls.tolist() for placed in injection.layout.quantizers],
        injection.audit.calls,
        injection.audit.sums,
    ]


def trained_pass(
    model: nn.Module, entries: list[Entry], *, checkpoints: bool
) -> tuple[Tensor, dict[str, Tensor], list[Any]]:
    """Return loss, gradients and counters of one injected training pass."""
    if checkpoints:
        model.train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
    injection = Injection(AddressBook(model), entries, seed_of=seed_of)
    x = inputs(torch.float32)[: ROWS * len(entries)].detach()
    with injection:
        injection.begin(VALID.expand(len(entries), -1), audited=frozenset({len(entries) - 1}))
        loss = model(inputs_embeds=x, use_cache=False).logits.logsumexp(dim=2).sum()
        injection.forward_done()
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, counters(injection)


@pytest.mark.parametrize("trained", ["adapters", "everything"])
@pytest.mark.parametrize(
    ("name", "treatment"),
    [
        *cases(("qwen2",), TREATMENTS),
        *cases(("gemma3", "gpt2"), ("W4A4", "worn weights", "weight noise")),
    ],
)
def test_gradient_checkpointing_changes_nothing(name: str, treatment: str, trained: str) -> None:
    """Same loss, same gradients, bit for bit; and what runs twice is counted once."""
    treated = TREATMENTS[treatment].entry
    # Errors of the backward pass and a second fault at the same place are recomputed as well.
    backward = (
        RelativeGaussian(layers=(0, 2), site="grad_input", scale=0.1),
        Bias(layers=(1,), modules=("linear",), site="grad_output", form="gain", scale=0.1),
    )
    faults = (*treated.device.faults, *backward)
    treated = treated._replace(device=treated.device.model_copy(update={"faults": faults}))
    results = []
    for checkpoints in (False, True):
        model = build(name, dtype=torch.float32, adapters=trained == "adapters")
        if trained == "everything":
            model.requires_grad_(True)
        entries = [Entry(), treated] if trained == "adapters" else [treated]
        results.append(trained_pass(model, entries, checkpoints=checkpoints))
    (loss, gradients, counts), (again, recomputed, recounts) = results
    assert torch.equal(loss, again)
    assert counts == recounts
    assert gradients.keys() == recomputed.keys()
    assert len(gradients) >= LAYERS * len(ARCHITECTURES[name].linears)
    for parameter, gradient in gradients.items():
        assert torch.equal(gradient, recomputed[parameter]), parameter


# -- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_addresses_are_those_of_the_model_without_adapters(name: str, adapters: bool) -> None:
    kind = ARCHITECTURES[name]
    book = AddressBook(build(name, adapters=adapters))
    assert book.layer_count == LAYERS
    for layer in range(LAYERS):
        prefix = f"{kind.prefix}{layer}"
        assert book.layer_output(layer).name == prefix
        assert [a.name for a in book.linears(layer)] == [f"{prefix}.{n}" for n in kind.linears]
        assert sorted(a.name for a in book.norms(layer)) == sorted(
            f"{prefix}.{n}" for n in kind.norms
        )
        for address in book.linears(layer):
            assert type(address.module).__name__ == ("Conv1D" if name == "gpt2" else "Linear")
            assert (book.outer(address) is not address.module) == adapters
    first = f"{kind.prefix}0.{kind.linears[0]}"
    for pattern in (kind.linears[0], f"*{kind.linears[0].rpartition('.')[2]}", first):
        assert [a.name for a in book.find(noisy_at(pattern))] == [first]


def noisy_at(pattern: str) -> RelativeGaussian:
    return RelativeGaussian(layers=(0,), modules=(pattern,))


@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "peft"])
def test_the_message_names_what_a_site_can_be(adapters: bool) -> None:
    book = AddressBook(build("llama", adapters=adapters))
    with pytest.raises(UserError) as error:
        book.find(noisy_at("self_attn.q_prj"))
    shown = str(error.value).partition("modules there: ")[2].split(", ")
    assert set(shown) == {"linear", ".", *SEVEN, *TWO_NORMS, "mlp.act_fn"}


def test_gpt2_has_no_rmsnorm_to_noise() -> None:
    entry = TREATMENTS["norm noise"].entry
    with pytest.raises(
        UserError,
        match=r"carrier 'rmsnorm_weight' matches no module in layer 0.*\*RMSNorm: use carrier 'hidden'",
    ):
        Injection(AddressBook(build("gpt2")), [entry], seed_of=seed_of)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_two_sites_share_a_draw(name: str) -> None:
    """GPT-2 has two `c_proj` in each layer; noise keyed by that name would be the same in both."""
    seen: list[tuple[Any, ...]] = []

    def recorded(replica: int, path: tuple[str | int, ...]) -> int:
        seen.append(path)
        return stream_seed(replica, *path)

    model = build(name)
    entry = Entry(device(NOISY), constant_noise(kind="linear_weight", relative=True))
    with Injection(AddressBook(model), [entry], seed_of=recorded) as injection:
        injection.begin(VALID)
        model(inputs_embeds=inputs(torch.float64)[:ROWS], use_cache=False)
    linears = len(ARCHITECTURES[name].linears)
    assert len(seen) == len(set(seen)) == linears * LAYERS + linears * 2


# -- weights that no linear layer holds --------------------------------------------------------------


def on_meta(config: Any) -> AddressBook:
    """Return the addresses of a model of two layers without values."""
    with torch.device("meta"):
        return AddressBook(AutoModelForCausalLM.from_config(config))


QKVO = [f"model.layers.1.{name}" for name in SEVEN[:4]]
EXPERTS = r"mlp\.gate \(MixtralTopKRouter\), mlp\.experts \(MixtralExperts\)"
LINEARS = (
    RelativeGaussian(layers=(1,)),
    DeadZone(layers=(1,), modules=("linear",), site="weight", threshold=0.3),
    MXFP4(layers=(1,)),
)


@pytest.fixture(scope="module")
def mixtral() -> AddressBook:
    return on_meta(MixtralConfig(**{**SHAPE, "num_hidden_layers": 2}))


@pytest.mark.parametrize("where", LINEARS, ids=["output", "weight", "mxfp4"])
def test_linear_does_not_pass_experts_by(mixtral: AddressBook, where: Any) -> None:
    """Their weights are parameters of one module: most of the model was left as it is, unsaid."""
    with pytest.raises(
        UserError,
        match=rf"^x: modules 'linear' is every linear layer, but layer 1 .*: {EXPERTS}; .*"
        r"exclude: \[mlp\.gate, mlp\.experts\]$",
    ):
        mixtral.find(where, "x")
    for globs in (("mlp.gate", "mlp.experts"), ("mlp.*",), ("model.layers.*.mlp.*",)):
        found = mixtral.find(where.model_copy(update={"exclude": globs}))
        assert [address.name for address in found] == QKVO
    with pytest.raises(UserError, match=r"reach: mlp\.experts \(MixtralExperts\); "):
        mixtral.find(where.model_copy(update={"exclude": ("mlp.gate",)}))


def test_what_is_named_is_not_passed_by(mixtral: AddressBook) -> None:
    own = {"modules": ("linear", "mlp.gate"), "exclude": ("mlp.experts",)}
    found = mixtral.find(LINEARS[0].model_copy(update=own))
    assert [address.name for address in found] == [*QKVO, "model.layers.1.mlp.gate"]
    alone = LINEARS[0].model_copy(update={"modules": ("*q_proj",)})
    assert [address.name for address in mixtral.find(alone)] == QKVO[:1]


def test_noise_on_linear_weights_does_not_pass_experts_by(mixtral: AddressBook) -> None:
    refusal = rf"^noise: carrier 'linear_weight' .* layer 1 .*: {EXPERTS}; use carrier 'hidden'$"
    with pytest.raises(UserError, match=refusal):
        mixtral.carrier_sites(constant_noise(kind="linear_weight").carrier, 1)
    for kind, sites in (("hidden", 1), ("rmsnorm_weight", 2)):
        assert len(mixtral.carrier_sites(constant_noise(kind=kind).carrier, 1)) == sites


@pytest.mark.parametrize(
    ("config", "linears"),
    [
        (PhiConfig(num_hidden_layers=2), 6),
        (FalconConfig(num_hidden_layers=2), 4),
        (OPTConfig(num_hidden_layers=2), 6),
        (GPTNeoXConfig(num_hidden_layers=2), 4),
        (BloomConfig(n_layer=2), 4),
        (CohereConfig(num_hidden_layers=2, use_qk_norm=True), 7),
        (StableLmConfig(num_hidden_layers=2, qk_layernorm=True), 7),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_ordinary_layers_are_not_refused(config: Any, linears: int) -> None:
    """The norm of Cohere's heads holds a matrix as well."""
    book = on_meta(config)
    assert len(book.find(MXFP4())) == 2 * linears
    assert len(book.carrier_sites(constant_noise(kind="linear_weight").carrier, 1)) == linears


HEADS = [
    pytest.param(name, first, heads, id=f"{name}-{heads}-heads")
    for name, first in (("qwen3", False), ("gemma3", True))
    for heads in (2, TOKENS)
]


@pytest.mark.parametrize(("name", "heads_first", "heads"), HEADS)
def test_a_norm_of_attention_heads_is_a_site(name: str, heads_first: bool, heads: int) -> None:
    """A token's reference spans its heads; padding enters no maximum over the tensor.

    With as many heads as tokens the shape does not say which are which.
    """
    for reference in ("token_max", "tensor_max"):
        fault = DeadZone(
            layers=(1,), modules=("self_attn.q_norm",), threshold=0.6, reference=reference
        )
        model = build(name, heads=heads)
        by_hand = copy.deepcopy(model)

        def hook(module: nn.Module, args: Any, q: Tensor, reference: str = reference) -> Tensor:
            by_token = q.transpose(1, 2) if heads_first else q  # [rows, T, heads, d]
            assert by_token.shape == (ROWS, TOKENS, heads, 16)
            size = by_token.abs().flatten(2).amax(dim=2)
            if reference == "tensor_max":
                size = size.flatten()[VALID[0]].max().expand_as(size)
            kept = by_token * (by_token.abs() >= 0.6 * size[..., None, None])
            return kept.transpose(1, 2) if heads_first else kept

        part(by_hand, "model.layers.1.self_attn.q_norm").register_forward_hook(hook)
        x = inputs(torch.float64)
        injection = two_replicas(model, Treatment(Entry(device(fault)), hidden_by_hand, ()))
        with injection:
            injection.begin(VALID.expand(2, -1))
            logits = model(inputs_embeds=x, use_cache=False).logits
        assert close(logits[:ROWS], model(inputs_embeds=x, use_cache=False).logits[:ROWS])
        assert close(logits[ROWS:], by_hand(inputs_embeds=x[ROWS:], use_cache=False).logits)


def test_a_pass_of_another_size_than_announced_is_refused() -> None:
    model = build("llama")
    with Injection(AddressBook(model), [Entry(device(DEAD))], seed_of=seed_of) as injection:
        injection.begin(VALID[:, :4])
        with pytest.raises(RuntimeError, match=r"announced with 1 replicas of 4 tokens"):
            model(inputs_embeds=inputs(torch.float64)[:ROWS], use_cache=False)


def test_adapters_of_peft_cannot_be_merged_for_a_pass() -> None:
    """It would leave them unmerged without a word."""
    entry = Entry(device(DEAD, deploy="merged"))
    with pytest.raises(UserError, match=r"merge it beforehand \(merge_and_unload\)"):
        Injection(AddressBook(build("llama", adapters=True)), [entry], seed_of=seed_of)
    Injection(AddressBook(build("llama")), [entry], seed_of=seed_of)


def test_a_forward_of_ones_own_is_given_back() -> None:
    """Tools that wrap a module set its `forward`; it must be there again afterwards."""
    model = build("llama")
    module = part(model, "model.layers.1.mlp.up_proj")
    mine = module.forward
    module.forward = mine
    with Injection(AddressBook(model), [Entry(device(WORN))], seed_of=seed_of):
        assert module.__dict__["forward"] is not mine
    assert module.__dict__["forward"] is mine
