"""Twenty mistakes of the original research, 11 to 20; see `test_audit_of_the_twenty.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import synthetic
import torch
from pydantic import ValidationError
from test_audit_of_the_twenty import (
    FAULT,
    QUANTIZED,
    TOKENS,
    VALID,
    Arrays,
    Outcome,
    failure,
    folder,
    renoised,
    run_of,
    seed_of,
    sound,
    train,
)
from tiny import CLEAN, LAYERS, one_pack, tiny_setting
from torch import Tensor

from aqn_tune.errors import UserError
from aqn_tune.evidence import Regime, judge, paired_contrast, regime_of
from aqn_tune.evidence.assemble import contrast_of
from aqn_tune.evidence.declared import Declared
from aqn_tune.evidence.tables import CellResult, Tables
from aqn_tune.evidence.verdicts import Undetermined, Verdict
from aqn_tune.faults import Bias
from aqn_tune.faults.base import Site
from aqn_tune.injection.address import Address, AddressBook
from aqn_tune.injection.fold import Entry, FaultSlot
from aqn_tune.injection.injection import Injection
from aqn_tune.injection.measure import FaultTally
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import CellRow
from aqn_tune.models.load import build_model
from aqn_tune.noise.schedules.epoch_aware import EpochAware
from aqn_tune.noise.schedules.geometric import Geometric
from aqn_tune.noise.schedules.linear import Linear
from aqn_tune.quantization import MXFP4
from aqn_tune.quantization.base import Quantized
from aqn_tune.search.record import Recorder
from aqn_tune.study import cells as cells_module
from aqn_tune.study.arms import ArmSpec
from aqn_tune.study.cells import Cell, Finalist, conditions_of, stage_cells
from aqn_tune.study.device import HEALTHY, Device
from aqn_tune.study.loading import load_study
from aqn_tune.study.margin import GainMargin
from aqn_tune.study.plan import make_plan
from aqn_tune.study.runs import Run
from aqn_tune.study.schema import ConfirmSpec, SearchSpec, Study
from aqn_tune.study.sweep import resolve_scenarios
from aqn_tune.training import engine as engine_module
from aqn_tune.training import evaluate as evaluate_module
from aqn_tune.training import pack as pack_module
from aqn_tune.training.engine import TorchPack
from aqn_tune.training.evaluate import Evaluated
from aqn_tune.training.pack import ReplicaPack

__all__ = ["folder"]

torch.set_num_threads(1)
DECLARED = Declared(
    family=(("s", "arm", "reference"),),
    scenarios=("s",),
    replicates=6,
    generation=0,
    alpha=0.05,
    margin=0.05,
    margin_rule=GainMargin(share=0.05),
    power=0.8,
    seed=0,
    decisions=None,
)


def result_of(run: Run, *outcomes: Outcome) -> CellResult:
    """Return the number that evidence reads from a ledger with these rows."""
    rows: list[Any] = [row for one in outcomes for row in (*one.evaluations, one.training)]
    key = outcomes[0].training.training_key
    rows.append(
        CellRow(
            stage="confirm", scenario="s", arm="arm", replicate=0, seed=run.seed, training_key=key
        )
    )
    (result,) = Tables(rows).cells("confirm", "s", "arm", replicates=1)
    return result


# -- 11 to 13: what becomes a number -----------------------------------------------------------------


def test_11_an_earlier_step_reported_as_the_last(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final validation was skipped, and step 20 of 29 was printed beside final numbers."""
    run = run_of()
    whole = result_of(run, sound(folder, run))
    assert whole.loss is not None
    assert whole.step == 6

    early = result_of(run, train(folder, run, rungs=(4,)))
    assert early.loss is None
    assert early.problem == "unfinished at step 4"
    space = synthetic.SPACE
    assert SearchSpec.model_validate({"space": space, "rungs": (0.25, 1.0)}).rungs == (0.25, 1.0)
    with pytest.raises(ValidationError, match="rungs rise from above 0 and end at 1"):
        SearchSpec.model_validate({"space": space, "rungs": (0.25, 20 / 29)})

    with monkeypatch.context() as planted:
        planted.setattr(TorchPack, "_evaluate", lambda self, member: [])
        skipped = result_of(run, train(folder, run, rungs=(4, 6)))
    assert skipped.loss is None
    assert skipped.problem == "not evaluated on the test split"

    arm = [whole._replace(replicate=i, loss=0.5 + i) for i in range(6)]
    reference = [
        one._replace(training_key=f"b{i}", loss=0.4 + 1.1 * i) for i, one in enumerate(arm)
    ]
    assert not isinstance(contrast_of("a", arm, "b", reference, DECLARED), Undetermined)
    shorter = [one._replace(step=4) for one in reference]
    assert contrast_of("a", arm, "b", shorter, DECLARED) == Undetermined(
        "runs of different length are never compared (steps 4, 6)"
    )

    row_of = TorchPack._evaluation_row
    monkeypatch.setattr(
        TorchPack,
        "_evaluation_row",
        lambda self, *given: row_of(self, *given).model_copy(update={"final": True}),
    )
    relabelled = train(folder, run, rungs=(4,))
    recorder = Recorder(Ledger(tmp_path / "ledger.jsonl"), tmp_path)
    with pytest.raises(ValueError, match="step 4 of 6 was reported as final"):
        recorder.report(one_pack(run, rungs=(4,)), relabelled.evaluations)


WEIGHTS = Device(quantization=(MXFP4(operands="weight"),))


def test_12_adapters_merged_before_a_quantized_evaluation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters were merged and only then quantized: another model than the trained one was measured."""
    file = tmp_path / "study.yaml"
    file.write_text(
        "study: demo\n"
        "scenario: {quantization: {format: mxfp4, operands: weight}}\n"
        "sweep: {deploy: [unmerged, merged]}\n"
    )
    scenarios = resolve_scenarios(load_study(file))
    conditions = [conditions_of(scenario, LAYERS)[1] for scenario in scenarios]
    run = run_of(device=WEIGHTS).model_copy(update={"conditions": (CLEAN, *conditions)})
    losses = {row.scenario: row.loss for row in sound(folder, run).evaluations}
    unmerged, is_merged = (scenario.name for scenario in scenarios)
    assert set(losses) == {"", unmerged, is_merged}
    assert unmerged.endswith("unmerged")
    assert is_merged == unmerged.replace("unmerged", "merged"), "a row says which it is"
    assert losses[unmerged] != losses[is_merged]
    plain = run_of(device=WEIGHTS)
    assert sound(folder, plain).losses["faulty"] == losses[unmerged]

    def merging(pack: ReplicaPack, *given: Any, **rest: Any) -> Iterator[Evaluated]:
        for linear in pack.folded:
            linear.base_layer.weight.data.copy_(linear.merged_weight(0).detach())
            linear.lora_b.data.zero_()
        return evaluate_module.evaluate(pack, *given, **rest)

    with monkeypatch.context() as planted:
        planted.setattr(engine_module, "evaluate", merging)
        assert failure(folder, plain) == "weight audit: weights changed during evaluation"

    def merged(device: Device, skip: tuple[int, ...]) -> Entry:
        return Entry(device.model_copy(update={"deploy": "merged"}))

    monkeypatch.setattr(evaluate_module, "Entry", merged)
    assert failure(folder, plain).endswith("adapters are merged, declared is unmerged")


def test_13_one_name_for_two_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step ids were used again, logs overwritten, and one id stands for different numbers in the papers."""
    setting = tiny_setting(folder)
    run, other = run_of(), run_of().model_copy(update={"seed": 4})
    same = run.model_copy(update={"conditions": (CLEAN,)})
    assert run.training_key(setting) == same.training_key(setting) != other.training_key(setting)

    recorder = Recorder(Ledger(tmp_path / "ledger.jsonl"), tmp_path)
    pack, outcome = one_pack(run, rungs=(6,)), sound(folder, run)
    rows = (*outcome.evaluations, outcome.training)
    recorder.report(pack, rows)
    before = recorder.ledger.path.read_bytes()
    recorder.report(pack, rows)
    assert recorder.ledger.path.read_bytes() == before, "a row is written once"
    later = sound(folder, other)
    recorder.report(one_pack(other, rungs=(6,)), (*later.evaluations, later.training))
    after = recorder.ledger.path.read_bytes()
    assert after.startswith(before), "and never again touched"
    assert len(after) > len(before)

    cell = Cell("confirm", "s", "arm", "", 0, run, run.training_key(setting))
    recorder.cells([cell])
    recorder.cells([cell])
    with pytest.raises(
        UserError, match=r"confirm/s/arm/0 is recorded with training \w+, the study"
    ):
        recorder.cells([cell._replace(run=other, training_key=other.training_key(setting))])

    monkeypatch.setattr(Run, "training_key", lambda self, setting: "E5a")
    named = Recorder(Ledger(tmp_path / "named.jsonl"), tmp_path)
    for number, each in enumerate((run, other)):
        outcome = sound(folder, each)
        assert outcome.training.training_key == "E5a"
        if number == 0:
            named.report(pack, (*outcome.evaluations, outcome.training))
            kept = named.ledger.path.read_bytes()
    with pytest.raises(UserError, match=r"gave other numbers than those recorded \(loss: "):
        named.report(pack, outcome.evaluations)
    assert named.ledger.path.read_bytes() == kept


# -- 14 to 16: comparisons ---------------------------------------------------------------------------


def differing(one: Any, other: Any, key: str = "") -> set[str]:
    """Return the dotted keys in which two dumps differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {
            found
            for name in one.keys() | other.keys()
            for found in differing(one.get(name), other.get(name), f"{key}.{name}".strip("."))
        }
    return set() if one == other else {key}


def twins_of(study: Study) -> dict[str, set[str]]:
    """Return in what each twin of the first finalist differs from it, by arm."""
    (scenario,) = synthetic.make_scenarios(study, (0.1,))
    params = {"sigma_start": 0.02, "targeting": "targeted", "learning_rate": 1e-3}
    cells = stage_cells(
        study,
        synthetic.make_setting(study),
        (scenario,),
        stage="confirm",
        layer_count=synthetic.LAYERS,
        finalists=(Finalist(scenario.name, 1, "c000", params),),
    ).cells
    runs = {cell.arm: cell.run.model_dump() for cell in cells if cell.replicate == 0}
    return {
        arm: differing(runs["finalist1"], runs[arm])
        for arm in ("finalist1_none", "finalist1_global")
    }


def test_14_arms_that_differ_in_more_than_one_thing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sigma and targeting, or the number of epochs, were changed together, and one got the credit.

    Covers what makes a claim today: contrasts are pairs declared beforehand, a finalist's twins differ
    from it in their targeting alone, no arm has a length of its own. A command that compares any two
    runs and lists every key in which they differ does not exist yet.
    """
    study = synthetic.make_study(tmp_path)
    assert twins_of(study) == {
        "finalist1_none": {"noise"},
        "finalist1_global": {"noise.multipliers"},
    }
    twin = cells_module.twin

    def confounded(arm: ArmSpec, targeting: str) -> ArmSpec | None:
        made = twin(arm, targeting)
        if made is None or made.noise is None:
            return made
        schedule = Geometric(sigma_start=0.05)
        changed = made.noise.model_copy(update={"schedule": schedule})
        return made.model_copy(update={"noise": changed, "learning_rate": 2e-3})

    with monkeypatch.context() as planted:
        planted.setattr(cells_module, "twin", confounded)
        assert twins_of(study)["finalist1_global"] == {
            "noise.multipliers",
            "noise.sigma",
            "training.learning_rate",
        }

    assert ArmSpec.model_validate({"learning_rate": 1e-3}).learning_rate == 1e-3
    for key in ("steps", "epochs", "batch_size", "task"):
        with pytest.raises(ValidationError, match=f"{key}\n  Extra inputs are not permitted"):
            ArmSpec.model_validate({key: 2})
    declared = [("targeted", "fault_only")]
    made = synthetic.make_study(tmp_path, confirm={"contrasts": declared})
    assert made.primary_contrasts() == tuple(declared)
    for pairs, message in (
        ([("E5b", "fault_only")], "unknown arm 'E5b'"),
        ([("targeted", "targeted")], "targeted vs targeted compares nothing new"),
    ):
        with pytest.raises(ValidationError, match=message):
            synthetic.make_study(tmp_path, confirm={"contrasts": pairs})


def test_15_one_seed_and_a_fault_beyond_repair(tmp_path: Path) -> None:
    """One run each, +2.4 % inside +-2.5 %, and arms that had all lost more than training ever gives."""
    file = tmp_path / "study.yaml"
    file.write_text(
        "study: demo\n"
        "scenario: {faults: [{kind: dead_zone, layers: [10], threshold: 0.2}]}\n"
        "confirm: {replicates: 6}\n"
    )
    assert load_study(file).confirm == ConfirmSpec(replicates=6)
    for few in (1, 5):
        with pytest.raises(UserError, match=rf"confirm.replicates: got {few}; allowed: .* 6"):
            load_study(file, [f"confirm.replicates={few}"])

    reference = [0.70, 0.73, 0.68, 0.71, 0.72, 0.69, 0.70, 0.71]
    gains = {
        "one seed": [0.024],
        "inside its interval": [0.09, -0.05, 0.07, -0.04, 0.08, -0.02, 0.06, 0.0],
        "real": [0.19, 0.21, 0.2, 0.2, 0.18, 0.22, 0.2, 0.19],
    }
    contrasts = {
        name: paired_contrast(
            [loss - gain for loss, gain in zip(reference, own, strict=False)], reference[: len(own)]
        )
        for name, own in gains.items()
    }
    judged = {one.name: one for one in judge(contrasts, margin=0.05)}
    assert judged["real"].verdict is Verdict.BETTER
    assert judged["inside its interval"].contrast is not None
    assert judged["inside its interval"].contrast.improvement == pytest.approx(0.024, abs=1e-3)
    assert judged["inside its interval"].verdict is Verdict.INCONCLUSIVE
    assert judged["one seed"].verdict is Verdict.INCONCLUSIVE
    assert "fewer than two pairs" in judged["one seed"].words

    base, clean = 3.6, [3.17, 3.18]
    for fault_only, regime in (
        ([3.30, 3.32], Regime.DEGRADING),
        ([12.85, 12.86], Regime.CATASTROPHIC),
        ([3.18, 3.18], Regime.HARMLESS),
    ):
        assert regime_of(base, clean, fault_only).regime is regime


def test_16_a_training_that_ended_early(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rejection loop found nothing to train on under noise and stopped at step 3; a number came out."""
    run = run_of({"targeting": "global"})
    outcome = sound(folder, run)
    assert outcome.training.step_reached == 6
    assert result_of(run, outcome).loss is not None

    train_to = ReplicaPack.train_to
    with monkeypatch.context() as planted:
        planted.setattr(ReplicaPack, "train_to", lambda self, step: train_to(self, min(step, 3)))
        assert failure(folder, run) == "training ended at step 3 of 6"
        broken = result_of(run, train(folder, run))
    assert broken.loss is None
    assert broken.failed
    contrast = contrast_of("a", [broken] * 6, "b", [result_of(run, outcome)] * 6, DECLARED)
    assert contrast == Undetermined("6 of 6 seeds failed in arm a (training ended at step 3 of 6)")

    step = ReplicaPack._train_step

    def rejecting(self: ReplicaPack) -> None:
        if self.step < 3:
            step(self)

    monkeypatch.setattr(ReplicaPack, "_train_step", rejecting)
    assert "training ended at step 3 of 6" in failure(folder, run_of())


# -- 17 to 20: gradients, schedules, dose, numbers that are none -------------------------------------


def gradients(folder: Path, site: Site | None) -> dict[str, Tensor]:
    """Return the gradient of every weight, with a fault of gradients at the linears of layer 2."""
    model = build_model(tiny_setting(folder).model)
    model.requires_grad_(True)
    device = Device(faults=(backward_fault(site, 2),)) if site else HEALTHY
    injection = Injection(AddressBook(model), [Entry(device)], seed_of=seed_of)
    with injection:
        injection.begin(VALID)
        logits = model(input_ids=TOKENS).logits[0, :-1]
        injection.forward_done()
        torch.nn.functional.cross_entropy(logits, TOKENS[0, 1:]).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def backward_fault(site: Site, *layers: int) -> Bias:
    """Return a fault that doubles the gradient at a site of every linear of `layers`."""
    return Bias(layers=layers, modules=("linear",), site=site, form="gain", scale=1.0)


def test_17_the_layer_is_forgotten_in_the_backward_pass(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A global held the current layer: in the backward pass it was the last one, for every product."""
    plain, weights, outputs = (gradients(folder, s) for s in (None, "grad_weight", "grad_output"))
    linears = {n for n in plain if ".layers.2." in n and n.endswith("_proj.weight")}
    assert len(linears) == 7
    for name, gradient in plain.items():
        if name in linears:
            assert torch.allclose(weights[name], 2 * gradient)
        else:
            assert torch.equal(weights[name], gradient), name
        # An error of the gradient itself goes on to what lies below, and never up.
        if ".layers.3." in name or name == "model.norm.weight":
            assert torch.equal(outputs[name], gradient), name
        elif name in linears:
            assert not torch.equal(outputs[name], gradient), name

    run = run_of(device=Device(faults=(backward_fault("grad_output", 1, 2),)), deployed=HEALTHY)
    audit = sound(folder, run).training.audit
    assert audit is not None
    assert audit.fault_calls == 6 * 14

    current = {"layer": -1}

    def by_global(
        self: Injection, address: Address, slot: FaultSlot, tally: FaultTally, x: Tensor
    ) -> Tensor:
        current["layer"] = address.layer  # set on the way forward, read on the way back
        tally.due[list(slot.owners)] += 1

        def on_gradient(gradient: Tensor) -> Tensor:
            if current["layer"] != address.layer:
                return gradient
            tally.calls[list(slot.owners)] += 1
            return 2 * gradient

        x = x.clone()
        x.register_hook(on_gradient)
        return x

    monkeypatch.setattr(Injection, "watched", by_global)
    assert "fault audit: declared 84, happened 42" in failure(folder, run)


def test_18_schedules_that_come_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stage gave an empty schedule, two gave [nan], and an end of zero gave 0 ** 0."""
    for stages, expected in ((1, [0.0, 0.05]), (2, [0.0, 0.05, 0.0005])):
        table = Geometric(stages=stages).table(6)
        assert list(dict.fromkeys(table)) == pytest.approx(expected)
        study = synthetic.make_study(
            tmp_path, controls={"schedule": {"kind": "geometric", "stages": stages}}
        )
        assert [stage.sigma for stage in make_plan(study).schedule] == pytest.approx(expected)
    assert Linear(sigma_end=0.0).sigma_at(6, 6) == 0.0
    for refused in (
        lambda: Geometric(stages=0),
        lambda: Geometric(sigma_end=0.0),
        lambda: Geometric(sigma_start=math.nan),
        lambda: EpochAware(sigma_end=0.0),
        lambda: EpochAware(stages_per_epoch=0),
    ):
        with pytest.raises(ValidationError, match=r"greater than|finite number"):
            refused()
    with pytest.raises(UserError, match="injects nothing in 6 steps"):
        run_of({"schedule": {"kind": "constant", "sigma": 0.0}})

    def the_original(self: Geometric, step: int, total_steps: int) -> float:
        count = self.stages + 1  # num_stages
        ratio = self.sigma_end / self.sigma_start
        values = [
            self.sigma_start * ratio ** (i / (count - 2) if count > 2 else math.nan)
            for i in range(count - 1)
        ]
        interval = step * count // total_steps
        return 0.0 if interval == 0 else values[min(interval, count - 1) - 1]

    monkeypatch.setattr(Geometric, "level_at", the_original)
    policy = {"schedule": {"kind": "geometric", "stages": 2}}
    noise = run_of(policy).noise
    assert noise is not None
    assert noise.sigma == pytest.approx((0, 0, 0.05, 0.05, 0.0005, 0.0005))
    with pytest.raises(UserError, match="'geometric' gives a sigma of nan at step 3 of 6"):
        run_of({"schedule": {"kind": "geometric", "stages": 1}})


def test_19_targeted_means_a_smaller_dose(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`targeted` was one layer of 28 at the same sigma: a 28th of the energy that it was compared with."""
    doses = {}
    for normalise in ("none", "energy"):
        study = synthetic.make_study(tmp_path, controls={"normalise": normalise})
        (scenario,) = make_plan(study).scenarios
        doses[normalise] = {arm.arm: arm.dose for arm in scenario.arms}
    assert doses["none"]["targeted"] == 1.0
    assert doses["none"]["global"] == 28.0
    assert doses["energy"]["targeted"] == pytest.approx(28.0)
    assert doses["energy"]["global"] == pytest.approx(28.0)

    constant = {"schedule": {"kind": "constant", "sigma": 0.1}}
    targeted = run_of({**constant, "targeting": "targeted", "normalise": "energy"})
    realised = []
    for run in (run_of(constant), targeted):
        audit = sound(folder, run).training.audit
        assert audit is not None
        realised.append(math.fsum(measure.realised**2 for measure in audit.noise))
    assert realised == pytest.approx([4 * 0.1**2] * 2, rel=0.05)

    unscaled = (0.0, 1.0, 0.0, 0.0)
    monkeypatch.setattr(
        pack_module,
        "Entry",
        lambda device, noise, skip: Entry(device, renoised(noise, multipliers=unscaled)),
    )
    assert "noise audit: layer 1 was scheduled 0.2 and got 0.1" in failure(folder, targeted)


def infinite(base: Arrays) -> None:
    """Plant one infinite weight."""
    base["model.layers.1.mlp.up_proj.weight"][0, 0] = math.inf


def hiding(self: MXFP4, x: Tensor, *, amax: Tensor | None = None) -> Quantized:
    """Quantize as the original did, where an infinity came out as 2.55e38."""
    return quantize(self, x.nan_to_num(0.0, 2.55e38, -2.55e38), amax=amax)


quantize: Callable[..., Quantized] = MXFP4.quantize


def test_20_infinities_made_finite(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantizer turned an infinity into 2.55e38 and its neighbours into 0: divergence never showed."""
    named = "the first value that is not finite comes from model.layers.1.mlp.up_proj"
    for device in (HEALTHY, QUANTIZED, Device(faults=(FAULT,))):
        run = run_of(device=device, deployed=device if device.faults else QUANTIZED)
        sound(folder, run)
        assert f"training loss is nan at step 0; {named}" in failure(folder, run, spoil=infinite)

    monkeypatch.setattr(MXFP4, "quantize", hiding)
    hides = "mxfp4 on activations hides a value that is not finite"
    assert failure(folder, run_of(device=QUANTIZED)) == f"quantizer audit: {hides}"
    deployed_only = run_of(device=HEALTHY, deployed=QUANTIZED)
    assert failure(folder, deployed_only).endswith(f"'faulty' s: {hides}")
    sound(folder, run_of())
