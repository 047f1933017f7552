"""What is seen of gradients and activations: against planted faults, and without changing a bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import exact
from fake_ledger import make_study
from tiny import (
    LAYERS,
    one_pack,
    save_tiny_model,
    tiny_pack,
    tiny_run,
    tiny_setting,
    tiny_training,
)

from aqn_tune.errors import UserError
from aqn_tune.faults import AbsoluteGaussian, DeadZone, RelativeGaussian
from aqn_tune.injection.fold import Entry
from aqn_tune.injection.injection import Injection
from aqn_tune.injection.observe import activation
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import MechanismRow, Observation, SiteActivation
from aqn_tune.quantization import Quantizer
from aqn_tune.search.record import Recorder
from aqn_tune.study.cells import resolve_run
from aqn_tune.study.device import Device
from aqn_tune.study.runs import Run
from aqn_tune.study.schema import MechanismSpec
from aqn_tune.study.sweep import resolve_scenarios
from aqn_tune.training.engine import ENGINE
from aqn_tune.training.mechanism import Mechanism
from aqn_tune.training.pack import ReplicaPack
from aqn_tune.training.state import state_of

torch.set_num_threads(1)

STEPS = (0, 2, 4)
FAULT = DeadZone(layers=(1,), threshold=0.4)
NOISE: dict[str, Any] = {
    "targeting": "global",
    "schedule": {"kind": "constant", "sigma": 0.05},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def a_run(*faults: Any, **changes: Any) -> Run:
    return tiny_run(*faults, **{"observed_steps": STEPS, **changes})


def train(folder: Path, *runs: Run, steps: int = 6) -> ReplicaPack:
    return tiny_pack(folder, runs, steps=steps)


def unobserved(run: Run) -> Run:
    return run.model_copy(update={"observed_steps": ()})


def numbers(seen: Observation, what: str) -> dict[int, float | None]:
    return {layer.layer: getattr(layer, what) for layer in seen.layers}


def injected(seen: Observation, what: str) -> list[SiteActivation]:
    return [site for site in seen.sites if site.injected == what]


def various_runs() -> list[Run]:
    mxfp4 = Device(quantization=(_quantizer(operands="both", layers=(0, 2)),))
    return [
        a_run(),
        a_run(FAULT),
        a_run(FAULT, policy=NOISE),
        a_run(RelativeGaussian(layers=(0, 2), scale=0.05), seed=4),
        a_run(device=mxfp4),
        a_run(FAULT, skip=(2,)),
        a_run(FAULT, train_layers=(0, 3), policy={"carrier": "rmsnorm_weight", **NOISE}),
    ]


def _quantizer(**changes: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Quantizer).validate_python({"format": "mxfp4", **changes})


# -- the gradient ----------------------------------------------------------------------------------


def test_without_a_fault_the_gradient_is_the_clean_gradient_in_every_layer(folder: Path) -> None:
    pack = train(folder, a_run(), a_run(FAULT, policy=NOISE))
    assert [seen.step for seen in pack.observations[0]] == list(STEPS)
    for seen in pack.observations[0]:
        assert numbers(seen, "cosine") == dict.fromkeys(range(LAYERS), 1.0)
        assert numbers(seen, "norm_ratio") == dict.fromkeys(range(LAYERS), 1.0)
        assert all(value and value > 0 for value in numbers(seen, "gradient_norm").values())


def test_the_norm_is_that_of_the_gradient_before_clipping(folder: Path) -> None:
    clipped = tiny_training(max_grad_norm=1e-3)
    run = a_run(FAULT, training=clipped)
    pack = train(folder, unobserved(run), steps=2)
    with pack.injection:
        pack._losses_and_gradients()
    wanted = {
        layer: math.sqrt(
            sum(
                float(pack.arena.view(pack.arena.gradients, name).double().square().sum())
                for name in pack.arena.names()
                if name.startswith(f"model.layers.{layer}.")
            )
        )
        for layer in range(LAYERS)
    }
    seen = train(folder, run, steps=3).observations[0][1]
    assert numbers(seen, "gradient_norm") == pytest.approx(wanted, rel=1e-5)
    assert min(wanted.values()) > 1e-3


def test_a_dead_gradient_is_zero_below_the_place_where_it_dies_and_clean_above(
    folder: Path,
) -> None:
    """The gradient at the output of layer 1 is flushed; the forward pass is untouched."""
    fault = DeadZone(layers=(1,), threshold=1e9, reference="absolute", site="grad_output")
    seen = train(folder, a_run(fault), steps=1).observations[0][0]
    wanted = {0: 0.0, 1: 0.0, 2: 1.0, 3: 1.0}
    assert numbers(seen, "cosine") == wanted
    assert numbers(seen, "norm_ratio") == wanted
    assert injected(seen, "fault") == []  # what it acts on is no activation


def test_the_mask_of_a_dead_zone_stops_the_gradient_where_straight_through_does_not(
    folder: Path,
) -> None:
    """Layer 1 puts out zeros: the forward pass is the same with and without ste, the gradient is not."""
    dead = DeadZone(layers=(1,), threshold=1e9, reference="absolute")
    runs = a_run(dead), a_run(dead.model_copy(update={"ste": True}))
    mask, ste = (seen[0] for seen in train(folder, *runs, steps=1).observations)
    assert mask.sites == ste.sites
    # No adapter above learns from an input of zeros, in either.
    for layer in range(LAYERS):
        if layer > 1:
            assert numbers(mask, "gradient_norm")[layer] == 0.0
            assert numbers(ste, "gradient_norm")[layer] == 0.0
        else:
            assert numbers(mask, "norm_ratio")[layer] == 0.0
            assert numbers(mask, "cosine")[layer] == 0.0
            assert numbers(ste, "norm_ratio")[layer] > 0  # type: ignore[operator]


def test_above_a_dead_zone_straight_through_changes_nothing(folder: Path) -> None:
    runs = a_run(FAULT), a_run(FAULT.model_copy(update={"ste": True}))
    mask, ste = (seen[0] for seen in train(folder, *runs, steps=1).observations)
    for layer, (a, b) in enumerate(zip(mask.layers, ste.layers, strict=True)):
        assert (a == b) == (layer > 1)
        assert a.cosine is not None
        assert 0 < a.cosine < 1


def test_the_counterfactual_is_at_the_weights_of_the_step(folder: Path) -> None:
    """Noise that ends after step 1 leaves its trace in the weights, not in the comparison."""
    schedule = {"kind": "constant", "sigma": 0.3, "stop_fraction": 0.7}
    run = a_run(policy={"targeting": "global", "schedule": schedule})
    assert run.noise is not None
    assert [bool(sigma) for sigma in run.noise.sigma] == [True, True, False, False, False, False]
    first, _, last = train(folder, run, steps=5).observations[0]
    assert max(numbers(first, "cosine").values()) < 1  # type: ignore[type-var]
    assert numbers(last, "cosine") == dict.fromkeys(range(LAYERS), 1.0)
    other = train(folder, a_run(), steps=5).observations[0][-1]
    assert numbers(last, "gradient_norm") != numbers(other, "gradient_norm")


def test_ratio_and_cosine_are_to_the_gradient_of_a_healthy_pack_with_these_weights(
    folder: Path,
) -> None:
    run = a_run(FAULT, policy=NOISE)
    trained = train(folder, unobserved(run), steps=2)
    healthy = train(folder, unobserved(a_run()), steps=0)
    healthy.arena.weights.copy_(trained.arena.weights)
    healthy.step = 2
    for pack in (trained, healthy):
        with pack.injection:
            pack._losses_and_gradients()
    seen = train(folder, run, steps=3).observations[0][1]
    for layer in seen.layers:
        a, b = (
            torch.cat(
                [
                    pack.arena.view(pack.arena.gradients, name).flatten()
                    for name in pack.arena.names()
                    if name.startswith(f"model.layers.{layer.layer}.")
                ]
            ).double()
            for pack in (trained, healthy)
        )
        assert layer.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), rel=1e-5)
        assert layer.norm_ratio == pytest.approx(float(a.norm() / b.norm()), rel=1e-5)
        assert layer.cosine < 0.99


def test_gradient_accumulation_adds_up_to_the_same_gradients(folder: Path) -> None:
    """Token counts weigh the microbatches, so that the step is the step; activations are of the first."""
    whole = train(folder, a_run(FAULT), steps=1).observations[0][0]
    halves = tiny_training(gradient_accumulation_steps=2)
    parts = train(folder, a_run(FAULT, training=halves), steps=1).observations[0][0]
    for a, b in zip(whole.layers, parts.layers, strict=True):
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-3)
        assert a.norm_ratio == pytest.approx(b.norm_ratio, rel=1e-3)
        assert a.cosine == pytest.approx(b.cosine, abs=1e-3)
    assert len(parts.sites) == len(whole.sites)
    assert parts.sites != whole.sites


def test_full_fine_tuning(folder: Path) -> None:
    full = tiny_training(method={"kind": "full"}, learning_rate=1e-3)
    clean = train(folder, a_run(training=full)).observations[0]
    assert all(numbers(seen, "cosine") == dict.fromkeys(range(LAYERS), 1.0) for seen in clean)
    masked = train(folder, a_run(FAULT, training=full)).observations[0]
    below = [numbers(seen, "cosine")[0] for seen in masked]
    assert all(cosine is not None and cosine < 1 for cosine in below)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointing_recomputes_without_being_seen_twice(folder: Path) -> None:
    plain = train(folder, a_run(FAULT, policy=NOISE), steps=3)
    again = tiny_training(gradient_checkpointing=True)
    pack = train(folder, a_run(FAULT, policy=NOISE, training=again), steps=3)
    assert pack.observations == plain.observations
    assert pack.audit(0) == plain.audit(0)


def test_layers_that_are_left_out_or_frozen_are_absent(folder: Path) -> None:
    skipping, frozen = train(
        folder, a_run(FAULT, skip=(1,)), a_run(FAULT, train_layers=(0, 3))
    ).observations
    for seen in skipping:
        assert set(numbers(seen, "cosine")) == {0, 2, 3}
        assert {site.layer for site in seen.sites} == {0, 2, 3}
        # The only fault is in the layer that is left out: what remains is its own clean model.
        assert set(numbers(seen, "cosine").values()) == {1.0}
    for seen in frozen:
        assert set(numbers(seen, "cosine")) == {0, 3}
        assert {site.layer for site in seen.sites} == {0, 1, 2, 3}


def test_what_is_not_finite_is_null(folder: Path) -> None:
    """A learning rate that overflows float32 in the first step; step 1 fails, and is seen to."""
    wild = a_run(training=tiny_training(learning_rate=1e38), observed_steps=(0, 1, 2))
    pack = train(folder, wild)
    assert "training loss is nan at step 1" in pack.failures[0]
    assert [seen.step for seen in pack.observations[0]] == [0, 1]
    last = pack.observations[0][-1]
    assert set(numbers(last, "cosine").values()) == {None}
    assert last.sites[-1].after.rms is None
    assert Observation.model_validate_json(last.model_dump_json()) == last


@exact
def test_a_neighbour_that_is_not_finite_is_not_seen(folder: Path) -> None:
    wild = a_run(training=tiny_training(learning_rate=1e38), observed_steps=(0, 1, 2))
    pack = train(folder, wild, a_run())
    assert list(pack.failures) == [0]
    assert pack.observations[1] == train(folder, a_run()).observations[0]


# -- activations -----------------------------------------------------------------------------------


def test_statistics_of_known_values() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 8)
    x[:, 0] = 0.0
    valid = torch.arange(4000) < 3000
    x[~valid] = 1e6  # padding
    seen = activation(x, valid)
    assert seen is not None
    assert seen.zero_fraction == 0.125
    assert seen.rms == pytest.approx(math.sqrt(7 / 8), rel=0.02)
    # A normal with a share 1/8 of zeros: E x^4 / (E x^2)^2 - 3 = 3 / (7/8) - 3.
    assert seen.kurtosis == pytest.approx(3 * 8 / 7 - 3, abs=0.1)
    assert seen.max_abs == pytest.approx(float(x[valid].abs().max()), rel=1e-5)


def test_statistics_of_odd_values() -> None:
    valid = torch.ones(2, dtype=torch.bool)
    constant = activation(torch.full((2, 3), 2.0), valid)
    assert constant is not None
    assert (constant.rms, constant.kurtosis) == (2.0, None)
    infinite = activation(torch.tensor([[1.0, math.inf], [0.0, math.nan]]), valid)
    assert infinite is not None
    assert (infinite.rms, infinite.max_abs, infinite.kurtosis) == (None, None, None)
    assert infinite.zero_fraction == 0.25
    assert activation(torch.ones(2, 3), ~valid) is None


def test_zeros_before_and_after_a_dead_zone_differ_by_what_it_affects(folder: Path) -> None:
    run = a_run(DeadZone(layers=(1, 3), threshold=0.3))
    seen = train(folder, run, steps=1).observations[0][0]
    pack = train(folder, unobserved(run), steps=0)
    injection = Injection(
        pack.book, [Entry(run.device)], seed_of=lambda replica, path: 0, measure=True
    )
    batch = pack._microbatches()[0]
    with injection, torch.no_grad():
        injection.begin(batch.valid.view(1, -1))
        pack._replica_totals(batch)
    sites = injected(seen, "fault")
    assert [(s.layer, s.module, s.site, s.kind) for s in sites] == [
        (1, ".", "output", "dead_zone"),
        (3, ".", "output", "dead_zone"),
    ]
    shares = [s.after.zero_fraction - s.before.zero_fraction for s in sites if s.before]
    wanted = injection.layout.faults[0].tally.measure(0).affected_fraction
    assert sum(shares) / 2 == pytest.approx(wanted, abs=1e-5)
    assert 0.1 < wanted < 0.9


def test_a_quantile_zeroes_the_share_that_it_declares(folder: Path) -> None:
    run = a_run(DeadZone(layers=(0,), threshold=0.25, reference="quantile"))
    [site] = injected(train(folder, run, steps=1).observations[0][0], "fault")
    assert site.after.zero_fraction == 0.25
    assert site.before is not None
    assert site.after.max_abs == site.before.max_abs
    output = next(
        s for s in train(folder, run, steps=1).observations[0][0].sites
        if s.injected == "nothing" and s.layer == 0
    )  # fmt: skip
    assert output.after == site.after


def test_every_injection_into_activations_has_its_record_in_order(folder: Path) -> None:
    fault = DeadZone(layers=(1,), threshold=0.3, modules=("*.down_proj",), site="input")
    device = Device(faults=(FAULT, fault), quantization=(_quantizer(operands="both", layers=(1,)),))
    policy = {**NOISE, "targeting": "targeted"}
    seen = train(folder, a_run(device=device, policy=policy), steps=1).observations[0][0]
    records = [(s.module, s.site, s.injected, s.kind) for s in seen.sites if s.layer == 1]
    linears = [
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]
    assert records == [
        *((name, "input", "quantizer", "mxfp4") for name in linears),
        ("mlp.down_proj", "input", "fault", "dead_zone"),
        (".", "output", "noise", "hidden"),
        (".", "output", "fault", "dead_zone"),
        (".", "output", "nothing", ""),
    ]
    assert [(s.injected, s.before) for s in seen.sites if s.layer == 2] == [("nothing", None)]


def test_noise_of_sigma_zero_has_no_record(folder: Path) -> None:
    policy = {"targeting": "targeted", "schedule": {"kind": "geometric"}}  # begins with a warm-up
    first = train(folder, a_run(FAULT, policy=policy), steps=1).observations[0][0]
    assert injected(first, "noise") == []


# -- observing changes nothing ---------------------------------------------------------------------


@exact
def test_a_run_in_a_pack_is_seen_as_the_run_alone(folder: Path) -> None:
    runs = various_runs()
    together = train(folder, *runs)
    for replica, run in enumerate(runs):
        assert together.observations[replica] == train(folder, run).observations[0], replica
        assert len(together.observations[replica]) == len(STEPS)


def test_losses_weights_and_audits_are_the_same_without_observation(folder: Path) -> None:
    runs = various_runs()
    seen, plain = train(folder, *runs), train(folder, *(unobserved(run) for run in runs))
    assert not seen.failures
    assert seen.train_losses == plain.train_losses
    assert torch.equal(seen.arena.weights, plain.arena.weights)
    assert [seen.audit(i) for i in range(len(runs))] == [plain.audit(i) for i in range(len(runs))]
    for replica in range(len(runs)):
        a, b = state_of(seen, replica), state_of(plain, replica)
        assert a._replace(row={}, observations=[]) == b._replace(row={}, observations=[])
    assert plain.observations == [[] for _ in runs]


def test_a_run_that_is_not_observed_costs_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    forward = ReplicaPack._replica_totals
    monkeypatch.setattr(
        ReplicaPack, "_replica_totals", lambda self, b: passes.append(1) or forward(self, b)
    )
    pack = train(folder, unobserved(a_run(FAULT)))
    assert len(passes) == 6
    assert pack.mechanism is None
    passes.clear()
    train(folder, a_run(FAULT))
    assert len(passes) == 6 + len(STEPS)


def test_runs_of_a_pack_may_be_observed_at_different_steps(folder: Path) -> None:
    other = a_run(seed=4, observed_steps=(1, 2))
    first, second, third = train(folder, a_run(), other, unobserved(a_run(seed=6))).observations
    assert [seen.step for seen in first] == list(STEPS)
    assert [seen.step for seen in second] == [1, 2]
    assert third == []


def test_the_hooks_are_gone_after_the_counterfactual_and_after_training(folder: Path) -> None:
    run = a_run(FAULT, policy={"carrier": "rmsnorm_weight", **NOISE})
    pack = train(folder, run)
    for module in pack.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__


def test_a_healthy_device_draws_nothing(folder: Path) -> None:
    """Planted: noise in the counterfactual would show as a cosine below 1 of a run without any."""
    pack = train(folder, a_run(AbsoluteGaussian(layers=(0,), scale=0.1), policy=NOISE))
    assert isinstance(pack.mechanism, Mechanism)
    healthy = pack.mechanism.healthy
    assert (
        healthy.audit.calls,
        healthy.layout.faults,
        healthy.layout.quantizers,
    ) == ([0], [], [])


def test_the_training_key_does_not_know_of_observation(folder: Path) -> None:
    setting = tiny_setting(folder)
    run = a_run(FAULT)
    assert run.training_key(setting) == unobserved(run).training_key(setting)


# -- the study key ---------------------------------------------------------------------------------


def test_steps_count_from_the_end_as_well() -> None:
    assert MechanismSpec(steps=(-1, 0, 50)).resolved(100) == (0, 50, 99)


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ([20], r"mechanism.steps: there is no step 20 in a training of 20 steps; allowed are 0 to 19"),
        ([-21], r"mechanism.steps: there is no step -21 .* or -1 to -20 from the end"),
        ([19, -1], r"mechanism.steps: got \[19, -1\], which names a step twice"),
        ([], r"mechanism.steps"),
    ],
)  # fmt: skip
def test_steps_that_do_not_exist_are_refused(
    tmp_path: Path, steps: list[int], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        make_study(tmp_path, mechanism={"steps": steps})


def test_a_study_file_names_the_line(tmp_path: Path) -> None:
    from aqn_tune.study.loading import load_study

    file = tmp_path / "s.yaml"
    file.write_text(
        "study: s\n"
        "scenario: {faults: [{kind: dead_zone, layers: [1], threshold: 0.1}]}\n"
        "training: {steps: 20}\n"
        "mechanism: {steps: [0, 20]}\n"
    )
    with pytest.raises(UserError, match=r"s\.yaml:4: mechanism\.steps: there is no step 20"):
        load_study(file)


def test_every_run_of_a_study_is_observed_and_no_other_studys_hash_moves(tmp_path: Path) -> None:
    plain, study = make_study(tmp_path), make_study(tmp_path, mechanism={"steps": [0, -1]})
    assert "mechanism" not in plain.model_dump(mode="json")
    scenario = resolve_scenarios(study)[0]
    arm = study.controls.arm("global")
    run = resolve_run(study, scenario, arm, seed=1, layer_count=28)
    assert run.observed_steps == (0, 19)
    assert resolve_run(plain, scenario, arm, seed=1, layer_count=28) == unobserved(run)


# -- the ledger ------------------------------------------------------------------------------------


def recorded(folder: Path, root: Path, *, rungs: tuple[int, ...] = (2, 6)) -> Any:
    """Return a pack of two observed runs, its open training, and a recorder of an empty ledger."""
    setting = tiny_setting(folder)
    pack = one_pack(a_run(FAULT), a_run(FAULT, policy=NOISE, seed=4), rungs=rungs)
    shared = ENGINE.load(setting, "test", 64)
    ledger = Ledger(root / "ledger.jsonl")
    return pack, lambda: ENGINE.open_pack(pack, setting, shared), Recorder(ledger, root)


def rows_of(report: Any) -> tuple[Any, ...]:
    return (*report.evaluations, *report.trainings)


def test_each_step_of_each_training_is_recorded_once_and_read_back(
    folder: Path, tmp_path: Path
) -> None:
    pack, opened, recorder = recorded(folder, tmp_path)
    training = opened()
    first, second = training.advance(), training.advance()
    recorder.report(pack, rows_of(first))
    assert [seen.step for seen in first.trainings[0].observations] == [0]
    recorder.report(pack, rows_of(first))  # a worker that died after it had reported
    recorder.report(pack, rows_of(second))
    read = Ledger(tmp_path / "ledger.jsonl")
    rows = [row for row in read.recorded() if isinstance(row, MechanismRow)]
    keys = [row.training_key for row in first.trainings]
    assert sorted((row.training_key, row.step) for row in rows) == sorted(
        (key, step) for key in keys for step in STEPS
    )
    assert read.mechanism == {(row.training_key, row.step): row for row in rows}
    assert not any(isinstance(row, MechanismRow) for row in read.rows())
    assert all(not row.observations for row in read.trainings.values())
    seen = second.trainings[0].observations[-1]
    assert dict(read.mechanism[keys[0], 4]).items() >= dict(seen).items()


def test_a_resumed_pack_reports_what_the_whole_one_does(folder: Path, tmp_path: Path) -> None:
    pack, opened, recorder = recorded(folder, tmp_path)
    whole = opened()
    reports = [whole.advance(), whole.advance()]
    cut = opened()
    cut.advance()
    state = cut.state()
    resumed = opened()
    resumed.restore(state)
    last = resumed.advance()
    for mine, theirs in zip(last.trainings, reports[1].trainings, strict=True):
        assert mine.observations == theirs.observations
        assert [seen.step for seen in mine.observations] == [2, 4]
    for report in (*reports, last):
        recorder.report(pack, rows_of(report))
    assert len(recorder.ledger.mechanism) == 2 * len(STEPS)
    text = (tmp_path / "ledger.jsonl").read_text()
    assert text.count('"kind": "mechanism"') == 2 * len(STEPS)


def test_another_observation_of_the_same_training_is_refused(folder: Path, tmp_path: Path) -> None:
    pack, opened, recorder = recorded(folder, tmp_path)
    report = opened().advance()
    recorder.report(pack, rows_of(report))
    row = report.trainings[0]
    seen = row.observations[0]
    layer = seen.layers[0].model_copy(update={"cosine": 0.123})
    changed = seen.model_copy(update={"layers": (layer, *seen.layers[1:])})
    row = row.model_copy(update={"observations": (changed,)})
    with pytest.raises(UserError, match="gave other numbers"):
        recorder.report(pack, [row])


def test_rows_are_small(folder: Path, tmp_path: Path) -> None:
    pack, opened, recorder = recorded(folder, tmp_path)
    recorder.report(pack, rows_of(opened().advance()))
    [row, *_] = recorder.ledger.mechanism.values()
    assert len(row.model_dump_json()) < 400 * LAYERS
