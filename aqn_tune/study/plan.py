"""What a study will do, before it does it: scenarios, arms, runs, time, and what it can detect."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aqn_tune.errors import UserError
from aqn_tune.search.cluster import worker_count
from aqn_tune.search.rungs import rung_steps
from aqn_tune.study.arms import ArmSpec
from aqn_tune.study.calibration import find_costs, workload_of
from aqn_tune.study.cautions import study_cautions
from aqn_tune.study.cells import NotAvailable, named_arms, resolve_run, stage_cells
from aqn_tune.study.compiling import Compiled, compare_compiled, compile_wait
from aqn_tune.study.describe import arm_text, device_text, fault_text, quantizer_text
from aqn_tune.study.describe import ranges as ranges
from aqn_tune.study.detectable import detectable_effect, t_quantile
from aqn_tune.study.effort import (
    Load,
    StagePlan,
    confirm_plan,
    most_seconds_of,
    search_plan,
    seconds_of,
)
from aqn_tune.study.folder import study_folder, study_hash
from aqn_tune.study.loading import layer_count, make_setting, resolve_scenarios
from aqn_tune.study.looks import alpha_at_look
from aqn_tune.study.margin import SdMargin, origin_words, written_margin
from aqn_tune.study.packing import pack_size
from aqn_tune.study.runs import Run, Setting
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study

MOST_STAGES = 12
"""Stretches of one sigma that a schedule is spelled out in; one with more is summed up."""


@dataclass(frozen=True)
class SigmaStage:
    """A stretch of steps with one noise level, or with one that falls from step to step."""

    first_step: int
    last_step: int
    sigma: float
    """Sigma at the first step."""
    last_sigma: float
    """Sigma at the last step."""


@dataclass(frozen=True)
class ArmPlan:
    """An arm in a scenario."""

    arm: str
    carrier: str
    """Empty without noise."""
    layers: str
    """Noised layers, as `10` or `0-9,11-27`; empty without noise."""
    dose: float
    """In units of one layer at the schedule's sigma; the sum of squared multipliers."""
    otherwise: str
    """What it changes beside the noise; empty for nothing."""
    reason: str
    """Why the arm cannot exist here; empty when it can."""


@dataclass(frozen=True)
class ScenarioPlan:
    """A scenario and its arms."""

    name: str
    values: dict[str, str | int | float]
    during: str
    faults: tuple[str, ...]
    quantization: tuple[str, ...]
    device: str
    """What of the device itself and of its evaluation is not the default."""
    arms: tuple[ArmPlan, ...]


@dataclass(frozen=True)
class Detectable:
    """What the confirmation claims and can detect."""

    contrasts: tuple[tuple[str, str], ...]
    """Primary contrasts of each scenario."""
    family: int
    """Primary contrasts of the whole study, without those that cannot exist."""
    replicates: int
    looks: tuple[int, ...]
    """Numbers of seeds at which it is judged; empty: once, at the end."""
    alpha: float
    look_alpha: float
    """Alpha of each look; all of it without looks."""
    level: float
    """Level of the hardest contrast: alpha of a look over the family."""
    power: float
    effect_sd: float
    """Minimum detectable effect at the last seed, in standard deviations of the paired difference."""
    floor: float
    """Smallest p of the exact sign-flip test at this number of seeds."""
    margin: float | dict[str, Any]
    """As studies hold it: a share of the gain G, or a mapping with its kind."""
    margin_text: str
    """The same in words, with where its number in nats will come from."""
    half_interval: float
    """Half the interval that `~` holds to the margin, in standard deviations of the paired difference."""


@dataclass(frozen=True)
class Estimate:
    """Expected time and disk."""

    source: str
    """Where the rates come from, or `not measured`."""
    seconds: float | None
    most_seconds: float | None
    bytes: float | None
    compiled: Compiled | None
    """What `training.compile` would change; None where that cannot be told."""


@dataclass(frozen=True)
class Plan:
    """Everything that a study declares, resolved."""

    study: str
    hash: str
    folder: str
    exists: bool
    """Whether the folder is there already, so that a run continues it."""
    model: str
    layer_count: int
    workers: int | None
    """Trials at a time; None where the size of the cluster decides."""
    pack_replicas: int
    """Most runs that share a forward pass."""
    reuse: bool
    """Whether cells that train alike share a run, and search runs come from other studies."""
    training_steps: int
    schedule: tuple[SigmaStage, ...]
    """Sigma of the noised controls."""
    scenarios: tuple[ScenarioPlan, ...]
    configs: int
    """Configs of the search in each scenario."""
    rungs: tuple[int, ...]
    """Steps at which ASHA decides."""
    search: StagePlan | None
    confirm: StagePlan
    detectable: Detectable
    estimate: Estimate
    cautions: tuple[str, ...]
    """What is allowed and should be known, a sentence each."""


def make_plan(study: Study) -> Plan:
    """Return what `study` will do. Needs neither torch nor Ray, trains nothing, writes nothing.

    Raises UserError as `load_study` does, and where the model or the data cannot be read.
    """
    setting = make_setting(study)
    scenarios = resolve_scenarios(study)
    layers = layer_count(study.model)
    folder = study_folder(study).root
    confirm_cells = stage_cells(study, setting, scenarios, stage="confirm", layer_count=layers)
    search = None
    if study.search is not None and study.search.configs:
        search_cells = stage_cells(study, setting, scenarios, stage="search", layer_count=layers)
        search = search_plan(study, scenarios, search_cells)
    confirm = confirm_plan(study, scenarios, confirm_cells)
    detectable = _detectable(study, scenarios, confirm_cells.missing)
    return Plan(
        study=study.study,
        hash=study_hash(study),
        folder=str(folder),
        exists=folder.exists(),
        model=study.model.path,
        layer_count=layers,
        workers=_worker_count(study),
        pack_replicas=pack_size(study),
        reuse=study.compute.reuse,
        training_steps=study.training.steps,
        schedule=_stages(study.controls.schedule.table(study.training.steps)),
        scenarios=tuple(_scenario_plan(study, s, layers) for s in scenarios),
        configs=study.search.configs if study.search else 0,
        rungs=rung_steps(study.search, study.training.steps) if study.search else (),
        search=search,
        confirm=confirm,
        detectable=detectable,
        estimate=_estimate(study, setting, search, confirm),
        cautions=(*study_cautions(study, scenarios), *_margin_cautions(study, detectable)),
    )


def _worker_count(study: Study) -> int | None:
    if study.compute.address is not None and study.compute.workers == "auto":
        return None
    return worker_count(study.compute)


def _scenario_plan(study: Study, scenario: Scenario, layers: int) -> ScenarioPlan:
    spec = scenario.spec
    arms = []
    for name, arm in named_arms(study).items():
        try:
            run = resolve_run(study, scenario, arm, seed=0, layer_count=layers)
        except UserError as error:
            arms.append(ArmPlan(name, "", "", 0.0, "", str(error)))
            continue
        arms.append(_arm_plan(name, arm, run))
    return ScenarioPlan(
        name=scenario.name,
        values=scenario.values,
        during=spec.during,
        faults=tuple(fault_text(fault) for fault in spec.faults),
        quantization=tuple(quantizer_text(quantizer) for quantizer in spec.quantization),
        device=device_text(spec),
        arms=tuple(arms),
    )


def _arm_plan(name: str, arm: ArmSpec, run: Run) -> ArmPlan:
    otherwise, noise = arm_text(arm, run), run.noise
    if noise is None:
        return ArmPlan(name, "", "", 0.0, otherwise, "")
    layers = ranges(noise.noised_layers())
    return ArmPlan(name, noise.carrier.kind, layers, noise.energy(), otherwise, "")


def _stages(table: Sequence[float]) -> tuple[SigmaStage, ...]:
    """Return a schedule as stretches of one sigma; if there are too many, as stretches that fall."""
    stages: list[SigmaStage] = []
    step = 0
    for sigma, group in itertools.groupby(table):
        length = len(list(group))
        stages.append(SigmaStage(step, step + length - 1, sigma, sigma))
        step += length
    if len(stages) <= MOST_STAGES:
        return tuple(stages)
    falling: list[SigmaStage] = []
    for stage in stages:
        if falling and falling[-1].last_sigma > stage.sigma > 0:
            last = falling[-1]
            falling[-1] = SigmaStage(last.first_step, stage.last_step, last.sigma, stage.last_sigma)
        else:
            falling.append(stage)
    return tuple(falling)


def _detectable(
    study: Study, scenarios: Sequence[Scenario], missing: Sequence[NotAvailable]
) -> Detectable:
    absent = {(item.scenario, item.arm) for item in missing}
    contrasts = study.primary_contrasts()
    family = sum(
        not absent & {(scenario.name, arm), (scenario.name, reference)}
        for scenario in scenarios
        for arm, reference in contrasts
    )
    confirm = study.confirm
    look_alpha = alpha_at_look(confirm.alpha, confirm.looks)
    level = look_alpha / max(family, 1)
    return Detectable(
        contrasts=contrasts,
        family=family,
        replicates=confirm.replicates,
        looks=confirm.looks,
        alpha=confirm.alpha,
        look_alpha=look_alpha,
        level=level,
        power=confirm.power,
        effect_sd=detectable_effect(confirm.replicates, level, confirm.power),
        floor=2.0 ** (1 - confirm.replicates),
        margin=written_margin(confirm.margin),
        margin_text=origin_words(
            confirm.margin, searched=study.search is not None and study.search.configs > 0
        ),
        # Of the interval at 1 - 2 alpha / m, see `aqn_tune.evidence.verdicts.judge`.
        half_interval=t_quantile(1 - level, confirm.replicates - 1) / confirm.replicates**0.5,
    )


def _margin_cautions(study: Study, found: Detectable) -> tuple[str, ...]:
    """Return what is to be known of a margin in sd: one below half the interval is as good as none."""
    rule = study.confirm.margin
    if not isinstance(rule, SdMargin) or rule.factor > found.half_interval:
        return ()
    return (
        f"confirm.margin: {rule.words()} is not above {found.half_interval:.2f} sd, half the interval that "
        f"{found.replicates} seeds give {found.family} contrasts: nothing is called equivalent unless its "
        "pairs spread less than in the search; give a larger factor or more confirm.replicates",
    )


def _estimate(
    study: Study, setting: Setting, search: StagePlan | None, confirm: StagePlan
) -> Estimate:
    workload = workload_of(setting, study.training)
    costs = find_costs(study.output, workload, pack_size(study))
    if costs is None:
        return Estimate("not measured", None, None, None, None)
    stages = [stage for stage in (search, confirm) if stage is not None]
    workers = _worker_count(study) or 1
    exports = {
        "finalists": study.finalist_count()
        * study.confirm.replicates
        * len(resolve_scenarios(study)),
        "all": confirm.most.trainings,
        "none": 0,
    }[study.confirm.export]
    disk = None
    if costs.bytes_per_training is not None and (costs.bytes_per_adapter or not exports):
        trainings = sum(stage.most.trainings for stage in stages)
        disk = trainings * costs.bytes_per_training + exports * (costs.bytes_per_adapter or 0)
    source = costs.source
    if study.confirm.generate:
        source += ", without the answers that are written (confirm.generate)"
    compiling = compile_wait(study, costs)
    expected = [Load(stage.expected, stage.parts) for stage in stages]
    most = [Load(stage.most, stage.parts) for stage in stages]
    return Estimate(
        source=source,
        seconds=seconds_of(expected, costs, workers) + compiling,
        most_seconds=most_seconds_of(most, costs, workers) + compiling,
        bytes=disk,
        compiled=compare_compiled(
            study, setting, resolve_scenarios(study), expected, workers=workers
        ),
    )
