"""Twenty mistakes of the original research, 1 to 10: each is planted here and has to be caught.

Every test first shows that the sound code passes, then makes the very mistake and sees it refused,
or the training failed, with a message that names it. Mistakes 11 to 20 are in
`test_audit_of_the_twenty_more.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import CLEAN, LAYERS, noise, one_pack, save_tiny_model, tiny_setting, tiny_training
from torch import Tensor, nn

from aqn_tune.errors import UserError
from aqn_tune.faults import DeadZone, FaultSpec, RelativeGaussian
from aqn_tune.injection import address as address_module
from aqn_tune.injection import apply as apply_module
from aqn_tune.injection import injection as injection_module
from aqn_tune.injection import weights as weights_module
from aqn_tune.injection.address import Address, AddressBook
from aqn_tune.injection.fold import Entry, NoiseSlot
from aqn_tune.injection.injection import Injection
from aqn_tune.injection.layout import Layout
from aqn_tune.ledger.rows import EvaluationRow, TrainingRow
from aqn_tune.models.load import build_model, decoder_layers
from aqn_tune.noise import EffectiveNoise
from aqn_tune.noise.carriers.rmsnorm_weight import RmsnormWeight
from aqn_tune.noise.schedules.epoch_aware import EpochAware
from aqn_tune.quantization import MXFP4, NVFP4
from aqn_tune.study.device import HEALTHY, Device
from aqn_tune.study.loading import load_study
from aqn_tune.study.runs import Condition, Run
from aqn_tune.study.seeds import stream_seed
from aqn_tune.training import evaluate as evaluate_module
from aqn_tune.training import pack as pack_module
from aqn_tune.training.engine import ENGINE

torch.set_num_threads(1)
TRAINING = tiny_training()
FULL: dict[str, Any] = {"method": {"kind": "full"}}
FAULT = DeadZone(layers=(1,), threshold=0.2, reference="tensor_max")
DEAD = Device(faults=(FAULT,))
QUANTIZED = Device(quantization=(MXFP4(),))
TOKENS = torch.arange(1, 17).view(1, 16)
VALID = torch.ones(1, 16, dtype=torch.bool)

Arrays = dict[str, Any]


class Outcome(NamedTuple):
    """What became of one training."""

    training: TrainingRow
    evaluations: tuple[EvaluationRow, ...]

    @property
    def losses(self) -> Mapping[str, float | None]:
        """Loss by condition."""
        return {row.condition: row.loss for row in self.evaluations}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    return save_tiny_model(tmp_path_factory.mktemp("twenty"))


@pytest.fixture
def model(folder: Path) -> nn.Module:
    """The tiny model."""
    return build_model(tiny_setting(folder).model)


def run_of(
    policy: dict[str, Any] | None = None,
    device: Device = DEAD,
    *,
    deployed: Device | None = None,
    **changes: Any,
) -> Run:
    """Return a run that is evaluated clean and on its device, or on another one."""
    training = tiny_training(**changes)
    faulty = Condition(name="faulty", scenario="s", device=device if deployed is None else deployed)
    return Run(
        training=training,
        device=device,
        noise=noise(training, policy) if policy else None,
        seed=2,
        conditions=(CLEAN, faulty),
    )


def train(
    folder: Path,
    run: Run,
    *,
    rungs: tuple[int, ...] = (6,),
    spoil: Callable[[Arrays], None] | None = None,
) -> Outcome:
    """Train a run through the product's own engine; `spoil` may change the base weights."""
    setting = tiny_setting(folder)
    shared = ENGINE.load(setting, "test", 64)
    base: Arrays = dict(shared.base)
    if spoil is not None:
        spoil(base)
    opened = ENGINE.open_pack(one_pack(run, rungs=rungs), setting, shared._replace(base=base))
    for _ in rungs:
        report = opened.advance()
    (row,) = report.trainings
    return Outcome(row, tuple(report.evaluations))


def sound(folder: Path, run: Run) -> Outcome:
    """Train a run that nothing is wrong with."""
    outcome = train(folder, run)
    assert outcome.training.status == "finished", outcome.training.error
    assert outcome.training.audit is not None
    assert set(outcome.losses) == {"clean", "faulty"}
    return outcome


def failure(folder: Path, run: Run, **options: Any) -> str:
    """Train a run that has to fail, and return why; it must leave no number."""
    outcome = train(folder, run, **options)
    assert outcome.training.status == "failed"
    assert outcome.training.audit is None
    assert outcome.evaluations == ()
    return outcome.training.error


def seed_of(replica: int, path: tuple[str | int, ...]) -> int:
    """Return the seed of a stream for injections that are built by hand."""
    return stream_seed(7, *path)


def peft_model(folder: Path) -> nn.Module:
    """Return the tiny model wrapped by peft itself, every linear layer with an adapter that acts."""
    from peft import LoraConfig, get_peft_model

    names = list(TRAINING.method.target_modules)  # type: ignore[union-attr]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=names, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        wrapped: nn.Module = get_peft_model(build_model(tiny_setting(folder).model), config)
    return wrapped.eval()


# -- 1 to 5: noise ----------------------------------------------------------------------------------


def test_01_noise_on_no_layer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norms were told by `isinstance` of another library's class: every noise run had no noise."""
    run = run_of({"carrier": "rmsnorm_weight"})
    audit = sound(folder, run).training.audit
    assert audit is not None
    assert len(audit.noise_sites) == 2 * LAYERS
    assert audit.noise_calls == 5 * 2 * LAYERS  # the first of the six steps is the warm-up

    with monkeypatch.context() as planted:
        planted.setattr(address_module, "is_rmsnorm", lambda module: isinstance(module, nn.RMSNorm))
        with pytest.raises(
            UserError, match="carrier 'rmsnorm_weight' matches no module in layer 0"
        ):
            train(folder, run)

    place = Layout._place_noise

    def half(self: Layout, slot: NoiseSlot, layer: int) -> None:
        if layer < LAYERS // 2:
            place(self, slot, layer)

    monkeypatch.setattr(Layout, "_place_noise", half)
    assert "noise audit: declared 40, happened 20" in failure(folder, run)


def test_02_sigma_of_zero_throughout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The epoch-aware schedule was asked for step 0 of 1, its warm-up; elsewhere the step never rose."""
    policy = {"schedule": {"kind": "epoch_aware", "epochs": 1, "stages_per_epoch": 2}}
    run = run_of(policy)
    audit = sound(folder, run).training.audit
    assert audit is not None
    assert audit.noise_calls == 4 * LAYERS
    for measure in audit.noise:
        assert measure.realised == pytest.approx(measure.scheduled, rel=0.1)
        assert measure.realised > 0

    level, begin = EpochAware.level_at, Injection.begin
    with monkeypatch.context() as planted:
        planted.setattr(EpochAware, "level_at", lambda self, step, total: level(self, 0, 1))
        with pytest.raises(UserError, match="'epoch_aware' injects nothing in 6 steps"):
            run_of(policy)

    def stuck(self: Injection, valid: Tensor, *, step: int = 0, **rest: Any) -> None:
        begin(self, valid, step=0, **rest)

    monkeypatch.setattr(Injection, "begin", stuck)
    assert "noise audit: declared 16, happened 0" in failure(folder, run)


STUDY = """\
study: demo
scenario: {faults: [{kind: dead_zone, layers: [10], threshold: 0.2}]}
"""
LINEARS = RelativeGaussian(layers=(1,), modules=("linear",), exclude=("*mlp*",), scale=0.05)


def without_exclude(device: Device) -> Device:
    """Return `device` as read by someone who does not know the key `exclude`."""
    faults = tuple(fault.model_copy(update={"exclude": ()}) for fault in device.faults)
    return device.model_copy(update={"faults": faults})


def renoised(effective: EffectiveNoise | None, **changes: Any) -> EffectiveNoise | None:
    """Return noise of which some keys were not read."""
    return None if effective is None else effective.model_copy(update=changes)


def test_03_keys_that_nobody_reads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer multipliers, layer types and excluded modules were written in configurations, and unread."""
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    assert load_study(file).scenario.faults[0].layers == (10,)
    for override, message in (
        ("controls.layer_sigma_config={14: 1.5}", "controls.layer_sigma_config: unknown key"),
        ("controls.layer_types=[linear]", "controls.layer_types: unknown key"),
        ("scenario.faults.0.exclude_modules=[lm_head]", "unknown key; allowed are .*exclude"),
    ):
        with pytest.raises(UserError, match=message):
            load_study(file, [override])

    scaled = run_of({"targeting": {"kind": "multipliers", "values": [0.5, 2, 1, 1]}})
    linear = run_of({"carrier": "linear_weight", "schedule": {"kind": "constant", "sigma": 0.01}})
    excluding = run_of(device=Device(faults=(LINEARS,)))
    unread: tuple[tuple[Run, Callable[..., Entry], str], ...] = (
        (
            scaled,
            lambda device, noise, skip: Entry(device, renoised(noise, multipliers=(1.0,) * LAYERS)),
            "noise audit: layer 0 was scheduled",
        ),
        (
            linear,
            lambda device, noise, skip: Entry(device, renoised(noise, carrier=RmsnormWeight())),
            "noise audit: declared 168, happened 48",
        ),
        (
            excluding,
            lambda device, noise, skip: Entry(without_exclude(device)),
            "fault audit: declared ['model.layers.1.self_attn.k_proj', ",
        ),
    )
    for run, entry, message in unread:
        sound(folder, run)
        with monkeypatch.context() as planted:
            planted.setattr(pack_module, "Entry", entry)
            assert message in failure(folder, run)

    # And five names of one effective configuration are one training, found by its content.
    everywhere = {"targeting": {"kind": "multipliers", "values": {0: 1, 2: 1}, "default": 1}}
    setting = tiny_setting(folder)
    assert run_of(everywhere).training_key(setting) == run_of({"targeting": "global"}).training_key(
        setting
    )
    assert scaled.training_key(setting) != run_of(everywhere).training_key(setting)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "weight audit: frozen weights changed during training"),
        (FULL, "weight audit: weights changed before the update of step 1"),
    ],
)
def test_04_noise_that_stays_in_the_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    """Noise was added into the norms' weights with `add_` and never taken out again.

    Step 0 has no noise, so that its weights are as they should be.
    """
    run = run_of({"carrier": "rmsnorm_weight"}, **changes)
    assert run.noise is not None
    sigma = run.noise.sigma
    assert sigma[0] == 0 < sigma[1]
    audit = sound(folder, run).training.audit
    assert audit is not None
    assert audit.weights_unchanged
    assert audit.noise_calls > 0

    begin = Injection.begin

    def into_the_weights(self: Injection, valid: Tensor, *, step: int = 0, **rest: Any) -> None:
        begin(self, valid, step=step, **rest)
        for layer in range(LAYERS if sigma[step] > 0 else 0):
            for norm in self.layout._book.norms(layer):
                norm.module.get_parameter("weight").data.add_(0.01)

    monkeypatch.setattr(Injection, "begin", into_the_weights)
    assert message in failure(folder, run)


def test_05_noise_behind_the_dead_zone(model: nn.Module) -> None:
    """Noise and dead zone were two hooks of one module, and the noise came last: where it is useless."""
    policy = noise(TRAINING, {"schedule": {"kind": "constant", "sigma": 0.5}})
    book = AddressBook(model)
    layer = decoder_layers(model)[1]

    def seen(*parts: Entry) -> Tensor:
        """Return what the next layer sees, with one injection for each of `parts`, in this order."""
        injections = [Injection(book, [part], seed_of=seed_of) for part in parts]
        found: list[Tensor] = []
        try:
            for injection in injections:
                injection.__enter__()
                injection.begin(VALID)
            assert len(layer._forward_hooks) == len(parts)
            handle = layer.register_forward_hook(lambda m, a, out: found.append(out))
            model(input_ids=TOKENS)
            handle.remove()
        finally:
            for injection in injections:
                injection.__exit__(None, None, None)
        return found[0]

    def left_through_the_dead_zone(h: Tensor) -> bool:
        return not bool(((h != 0) & (h.abs() < FAULT.threshold * h.abs().max())).any())

    healthy = seen(Entry(HEALTHY, policy))
    both = seen(Entry(DEAD, policy))
    assert not left_through_the_dead_zone(healthy), "else the check below would see nothing"
    assert not torch.equal(both, seen(Entry(DEAD)))
    assert left_through_the_dead_zone(both)
    assert torch.equal(both, seen(Entry(HEALTHY, policy), Entry(DEAD)))

    planted = seen(Entry(DEAD), Entry(HEALTHY, policy))
    assert not left_through_the_dead_zone(planted)
    assert not torch.equal(both, planted)


# -- 6 to 9: quantizers, addresses -------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, FULL], ids=["lora", "full"])
def test_06_a_quantizer_without_gradient(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """The straight-through estimator was written and never called: nothing below a quantizer learnt."""
    run = run_of(device=QUANTIZED, **changes)
    sound(folder, run)

    def cut(x: Tensor, values: Tensor) -> Tensor:
        return values

    def staircase(x: Tensor, values: Tensor) -> Tensor:
        return values.detach() + 0.0 * x  # what the derivative of rounding is

    for module, operand in ((apply_module, "weights"), (injection_module, "activations")):
        with monkeypatch.context() as planted:
            planted.setattr(module, "straight_through", cut)
            message = f"quantizer audit: mxfp4 on {operand} passes no gradient"
            assert failure(folder, run) == message
            planted.setattr(module, "straight_through", staircase)
            message = f"quantizer audit: mxfp4 on {operand} changes the gradient"
            assert message in failure(folder, run)
    if not changes:
        return
    # The gradients that arrive are looked at as well, whatever it is that cuts them off.
    monkeypatch.setattr(Injection, "quantizer_defects", lambda self: {})
    monkeypatch.setattr(apply_module, "straight_through", cut)
    monkeypatch.setattr(injection_module, "straight_through", cut)
    assert failure(folder, run) == "gradient audit: layer 0 gets no gradient"


Call = Callable[[nn.Module, Tensor, Tensor], Tensor]


def swapping(how: str) -> Call:
    """Return a stand-in that swaps the quantized weight in, as the original did, and leaves it there."""

    def call(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
        parameter = module.get_parameter("weight")
        if how == "rebound":
            parameter.data = weight.detach()
        else:
            # An evaluation holds a row of a stacked weight for each condition, the faulty one last.
            own = weight.detach().flatten()[-parameter.numel() :]
            parameter.data.copy_(own.view_as(parameter))
        out: Tensor = type(module).forward(module, x)
        return out

    return call


@pytest.mark.parametrize("how", ["rebound", "overwritten"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "frozen weights changed during training"),
        ({"gradient_checkpointing": True}, "frozen weights changed during training"),
        (FULL, "weights changed before the update of step 0"),
    ],
    ids=["lora", "checkpointing", "full"],
)
def test_07_master_weights_overwritten(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    """Quantized weights were swapped in through `.data`: two forward passes and the masters were gone."""
    run = run_of(device=QUANTIZED, **changes)
    sound(folder, run)
    healthy_call, planted_call = weights_module._call, swapping(how)
    with monkeypatch.context() as planted:
        planted.setattr(weights_module, "_call", planted_call)
        assert f"weight audit: {message}" in failure(folder, run)

    def in_evaluation(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
        call = healthy_call if torch.is_grad_enabled() else planted_call
        return call(module, weight, x)

    monkeypatch.setattr(weights_module, "_call", in_evaluation)
    assert failure(folder, run) == "weight audit: weights changed during evaluation"


def test_08_adapters_head_and_wrappers_quantized(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever had `linear` in its class name was hooked: adapters, lm_head, wrapper and base both."""
    model = peft_model(folder)
    bases = [module for module in model.modules() if isinstance(module, nn.Linear)]
    bases = [
        module for module in bases if module.weight.shape[0] > 2 and module.weight.shape[1] > 2
    ]
    (head,) = [module for module in bases if module.weight.shape[0] == 384]
    bases.remove(head)
    assert len(bases) == 7 * LAYERS

    book = AddressBook(model)
    everything: tuple[MXFP4 | FaultSpec, ...] = (MXFP4(), RelativeGaussian(layers="all"))
    for spec in everything:
        assert [id(address.module) for address in book.find(spec)] == [id(base) for base in bases]

    for pattern in ("lm_head", "*embed_tokens", "*lora_A*", "*lora_?*", "*base_layer"):
        with pytest.raises(UserError, match=re.escape(f"{pattern!r} matches nothing in layer 0")):
            book.find(MXFP4(modules=(pattern,)))
    # By name or by wildcard, a wrapped projection is one unit, and it is the base layer.
    for pattern in ("self_attn.q_proj", "*q_proj*"):
        (address,) = book.find(MXFP4(modules=(pattern,), layers=(0,)))
        assert address.module is decoder_layers(model)[0].self_attn.q_proj.base_layer  # type: ignore[union-attr]
    twice = Device(quantization=(MXFP4(), NVFP4(modules=("*q_proj*",))))
    with pytest.raises(UserError, match=r"q_proj is quantized twice, as mxfp4 and as nvfp4"):
        Injection(book, [Entry(twice)], seed_of=seed_of)

    # The adapter branch computes on exact values, unless the study declares it part of the unit.
    wrapper = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    heard: dict[str, list[Tensor]] = {"wrapper": [], "adapter": []}
    wrapper.register_forward_pre_hook(lambda m, a: heard["wrapper"].append(a[0]))
    adapter = wrapper.get_submodule("lora_A.default")
    adapter.register_forward_pre_hook(lambda m, a: heard["adapter"].append(a[0]))
    for path, is_exact in (("exact", True), ("faulty", False)):
        device = QUANTIZED.model_copy(update={"adapter_path": path})
        injection = Injection(book, [Entry(device)], seed_of=seed_of, measure=True)
        with injection:
            injection.begin(VALID)
            model(input_ids=TOKENS)
        ((_, _, tally),) = injection.layout.quantizers
        assert tally.sites == int(tally.calls[0]) == 2 * len(bases), "weight and activation of each"
        assert torch.equal(heard["wrapper"][-1], heard["adapter"][-1]) is is_exact

    # The original's rule alone still finds the bases: adapters are refused by name as well. Only
    # without that, too, they come in, and the number of sites shows it.
    monkeypatch.setattr(
        address_module, "is_linear", lambda module: "linear" in type(module).__name__.lower()
    )
    assert len(book.find(MXFP4())) == 7 * LAYERS
    monkeypatch.setattr(address_module, "REFUSED", ())
    assert len(book.find(MXFP4())) == 3 * 7 * LAYERS


def test_09_a_fault_on_no_layer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer numbers were cut out of names as `.layers.N.`, which `model.layers.N` itself does not have."""
    for model in (build_model(tiny_setting(folder).model), peft_model(folder)):
        (address,) = AddressBook(model).find(FAULT)
        assert address.module is decoder_layers(model)[1]
        with pytest.raises(UserError, match="there is no layer 7 of 4; allowed are 0 to 3"):
            AddressBook(model).find(DeadZone(layers=(7,), threshold=0.1))
        with pytest.raises(UserError, match="matches nothing in layer 1"):
            AddressBook(model).find(FAULT.model_copy(update={"modules": ("*.layers.1.",)}))
    audit = sound(folder, run_of()).training.audit
    assert audit is not None
    assert audit.fault_sites == ("model.layers.1",)
    assert audit.fault_calls == 6

    match = AddressBook._match

    def by_name(
        self: AddressBook, layer: int, pattern: str, exclude: tuple[str, ...]
    ) -> Iterator[Address]:
        for found in match(self, layer, pattern, exclude):
            number = re.search(r"\.layers\.(\d+)\.", found.name)
            if number and int(number[1]) == layer:
                yield found

    with monkeypatch.context() as planted:
        planted.setattr(AddressBook, "_match", by_name)
        sound(folder, run_of(device=Device(faults=(LINEARS,))))  # why nobody noticed
        with pytest.raises(UserError, match=r"modules '\.' matches nothing in layer 1"):
            train(folder, run_of())
    monkeypatch.setattr(Layout, "_place_fault", lambda self, slot: None)
    assert "fault audit: declared ['model.layers.1'], happened []" in failure(folder, run_of())


# -- 10: evaluation ----------------------------------------------------------------------------------


class Deaf(Injection):
    """An injection whose hooks hang on another model than the one that runs."""

    def __enter__(self) -> Deaf:
        return self


def test_10_evaluated_under_another_condition(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faulty numbers came from a healthy device; others had the training noise on, or hooks unheard."""
    run = run_of({"targeting": "global"})
    rows = {row.condition: row for row in sound(folder, run).evaluations}
    assert rows["clean"].faults == ()
    (measure,) = rows["faulty"].faults
    assert measure.calls == 2
    assert measure.affected_fraction > 0
    assert rows["clean"].loss != rows["faulty"].loss

    assert run.noise is not None
    mistakes: dict[str, Callable[..., Entry]] = {
        "'faulty' s declares 1 faults, 0 are attached": lambda device, skip: Entry(HEALTHY),
        "'clean' declares 0 faults, 1 are attached": lambda device, skip: Entry(DEAD),
        "'clean': training noise is on": lambda device, skip: Entry(device, run.noise),
    }
    for message, entry in mistakes.items():
        with monkeypatch.context() as planted:
            planted.setattr(evaluate_module, "Entry", entry)
            assert failure(folder, run) == f"evaluation audit: condition {message}"
    quantized = run_of(device=QUANTIZED)
    sound(folder, quantized)
    with monkeypatch.context() as planted:
        planted.setattr(evaluate_module, "Entry", lambda device, skip: Entry(HEALTHY))
        said = failure(folder, quantized)
        assert said.endswith("'faulty' s declares 1 quantizers, 0 are attached")
    monkeypatch.setattr(evaluate_module, "Injection", Deaf)
    assert failure(folder, run).endswith("'faulty' s: dead_zone was in place 0 times of 2")
    assert failure(folder, quantized).endswith("'faulty' s: mxfp4 quantized 0 operands of 112")
