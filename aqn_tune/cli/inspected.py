"""What an arm attaches to the model of a study: built, read back, and as data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from aqn_tune.cli.output import ProgressLine
from aqn_tune.cli.targets import find_arm, find_scenario
from aqn_tune.errors import UserError, nearest
from aqn_tune.report.sigma_picture import SigmaMap
from aqn_tune.study.loading import layer_count

if TYPE_CHECKING:
    from aqn_tune.injection.address import AddressBook
    from aqn_tune.injection.fold import Entry
    from aqn_tune.injection.injection import Injection
    from aqn_tune.injection.inspect import Inspection
    from aqn_tune.study.arms import ArmSpec
    from aqn_tune.study.runs import Run
    from aqn_tune.study.scenario import Scenario
    from aqn_tune.study.schema import Study

CONDITIONS = ("train", "clean", "faulty")


class Inspected(NamedTuple):
    """An arm under a scenario, and what it attaches."""

    study: Study
    scenario: Scenario
    arm: str
    condition: str
    run: Run
    adapters: int
    """Linear layers that have a LoRA adapter."""
    found: Inspection
    sigma: tuple[float, ...]
    """Sigma at steps 0 to T: every training step, and the value that the schedule ends on."""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return layer_count(self.study.model)

    def picture(self) -> SigmaMap:
        """Return the attached noise of each layer at each training step."""
        steps = self.run.training.steps
        levels = [[0.0] * steps for _ in range(self.layers)]
        for step, multipliers in enumerate(self.found.multipliers):
            for layer, multiplier in enumerate(multipliers):
                levels[layer][step] = self.found.sigma[step] * multiplier
        faulty = frozenset(site.layer for site in self.found.sites if site.what == "fault")
        return SigmaMap(tuple(tuple(row) for row in levels), faulty)


def inspect_arm(
    study: Study, arm: str, scenario: str | None, condition: str, *, progress: ProgressLine
) -> Inspected:
    """Attach an arm to the study's model, as a training or an evaluation does, and read it back.

    Raises UserError for an unknown arm, scenario or condition, and for an arm that cannot exist in
    the scenario; all of them before the model is loaded.
    """
    from aqn_tune.study.cells import resolve_run
    from aqn_tune.study.seeds import replicate_seed

    spec, found = find_arm(study, arm), find_scenario(study, scenario)
    if condition not in CONDITIONS:
        allowed = ", ".join(CONDITIONS)
        raise UserError(
            f"--condition: got {condition!r}; allowed are {allowed}{nearest(condition, CONDITIONS)}"
        )
    seed = replicate_seed(study.seed, "search", 0)
    try:
        run = resolve_run(study, found, spec, seed=seed, layer_count=layer_count(study.model))
    except UserError as error:
        raise UserError(f"--arm: {arm} cannot exist in scenario {found.name}: {error}") from None
    progress("loading the model")
    from aqn_tune.injection.inspect import inspect_injection

    made = _attach(study, run, condition)
    inspection = inspect_injection(made.book, made.injection, made.entry)
    sigma = _sigma(spec, run, inspection)
    return Inspected(study, found, arm, condition, run, made.adapters, inspection, sigma)


class _Made(NamedTuple):
    """A model with adapters, and what is about to be attached to it."""

    book: AddressBook
    injection: Injection
    entry: Entry
    adapters: int


def _attach(study: Study, run: Run, condition: str) -> _Made:
    """Build the model as a pack of this one run has it, and the injection of the condition."""
    import torch

    from aqn_tune.injection.address import AddressBook
    from aqn_tune.injection.fold import Entry
    from aqn_tune.injection.injection import Injection
    from aqn_tune.models.load import build_model
    from aqn_tune.study.training import Lora
    from aqn_tune.training.arena import Arena
    from aqn_tune.training.lora import adapter_shapes, adapter_sites, attach_adapters

    model = build_model(study.model)
    book = AddressBook(model)
    method, adapters = run.training.method, 0
    if isinstance(method, Lora):
        sites = adapter_sites(model, method)
        arena = Arena(adapter_shapes(sites, method.rank), 1, torch.float32)
        adapters = len(attach_adapters(model, arena, sites, [method]))
    else:
        model.requires_grad_(True)
    if condition == "train":
        entry = Entry(run.device, run.noise, run.skip)
    else:
        (device,) = (c.device for c in run.conditions if c.name == condition)
        entry = Entry(device, skip=run.skip)
    injection = Injection(book, [entry], seed_of=lambda replica, path: run.seed)
    return _Made(book, injection, entry, adapters)


def _sigma(arm: ArmSpec, run: Run, found: Inspection) -> tuple[float, ...]:
    """Return the attached sigma of every step, and what the schedule ends on."""
    steps = run.training.steps
    if arm.noise is None or not found.sigma:
        return (0.0,) * (steps + 1)
    last = arm.noise.schedule.sigma_at(steps, steps) if any(found.multipliers[-1]) else 0.0
    return (*found.sigma, last)


def as_data(inspected: Inspected) -> dict[str, Any]:
    """Return what `--json` prints.

    `sigma` holds steps 0 to T, `multipliers` one number per layer; where they change on the way,
    `later` says from which step on they are what.
    """
    found, layers = inspected.found, inspected.layers
    changes = [
        {"step": step, "multipliers": list(now)}
        for step, (before, now) in enumerate(
            zip(found.multipliers, found.multipliers[1:], strict=False), start=1
        )
        if now != before
    ]
    return {
        "study": inspected.study.study,
        "scenario": inspected.scenario.name,
        "arm": inspected.arm,
        "condition": inspected.condition,
        "layer_count": layers,
        "steps": inspected.run.training.steps,
        "sites": [site._asdict() for site in found.sites],
        "missing": [site._asdict() for site in found.missing],
        "sigma": list(inspected.sigma),
        "multipliers": list(found.multipliers[0]) if found.multipliers else [0.0] * layers,
        "later": changes,
    }
