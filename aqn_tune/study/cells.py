"""From a study to its cells: which run stands for which arm, scenario and replicate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from aqn_tune.errors import UserError
from aqn_tune.noise.targeting.uniform import Global, NoTargeting
from aqn_tune.study.arms import ArmSpec
from aqn_tune.study.resolve import conditions_of as conditions_of
from aqn_tune.study.resolve import resolve_run as resolve_run
from aqn_tune.study.resolve import training_of as training_of
from aqn_tune.study.runs import Run, Setting
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study
from aqn_tune.study.seeds import Stage, replicate_seed
from aqn_tune.study.space import Params, arm_of


class Cell(NamedTuple):
    """One arm x scenario x replicate, and the training that gives it its numbers."""

    stage: Stage
    scenario: str
    arm: str
    config: str
    replicate: int
    run: Run
    training_key: str

    @property
    def name(self) -> str:
        """The cell as `aqn-tune rerun` takes it: stage/scenario/arm/replicate."""
        return f"{self.stage}/{self.scenario}/{self.arm}/{self.replicate}"


class NotAvailable(NamedTuple):
    """An arm that cannot exist in a scenario, and why."""

    scenario: str
    arm: str
    reason: str


class Finalist(NamedTuple):
    """A config that goes to the confirmation."""

    scenario: str
    rank: int
    """1 for the best."""
    config: str
    params: Params


class ArmCells(NamedTuple):
    """The cells of a stage, and the arms that cannot exist."""

    cells: tuple[Cell, ...]
    missing: tuple[NotAvailable, ...]


def twin(arm: ArmSpec, targeting: str) -> ArmSpec | None:
    """Return `arm` with another targeting and nothing else changed; None when it has no noise to target."""
    if targeting == "none":
        return arm.model_copy(update={"noise": None})
    if arm.noise is None:
        return None
    chosen = {"global": Global(), "none": NoTargeting()}[targeting]
    return arm.model_copy(update={"noise": arm.noise.model_copy(update={"targeting": chosen})})


def named_arms(study: Study) -> dict[str, ArmSpec]:
    """Return the controls and the study's own arms by name, controls first."""
    controls = {str(name): study.controls.arm(name) for name in study.controls.include}
    return {**controls, **study.arms}


def finalist_arms(finalists: Iterable[Finalist]) -> dict[str, ArmSpec | None]:
    """Return the arms that the finalists of one scenario bring: each with its two twins."""
    arms: dict[str, ArmSpec | None] = {}
    for finalist in finalists:
        arm = arm_of(finalist.params)
        name = f"finalist{finalist.rank}"
        arms[name] = arm
        arms[f"{name}_none"] = twin(arm, "none")
        arms[f"{name}_global"] = twin(arm, "global")
    return arms


def stage_cells(
    study: Study,
    setting: Setting,
    scenarios: Sequence[Scenario],
    *,
    stage: Stage,
    layer_count: int,
    finalists: Sequence[Finalist] = (),
) -> ArmCells:
    """Return the cells of the arms that are known before a stage starts, replicate by replicate.

    All arms of replicate i come before replicate i + 1, so that an interrupted stage is balanced.
    """
    replicates = study.confirm.replicates
    generation = study.confirm.generation
    if stage == "search":
        replicates, generation = (study.search.replicates if study.search else 0), 0
    cells: list[Cell] = []
    missing: dict[tuple[str, str], NotAvailable] = {}
    for replicate in range(replicates):
        seed = replicate_seed(study.seed, stage, replicate, generation=generation)
        for scenario in scenarios:
            own = [f for f in finalists if f.scenario == scenario.name]
            # A finalist's twins carry its config id.
            configs = {f"finalist{f.rank}": f.config for f in own}
            for name, arm in {**named_arms(study), **finalist_arms(own)}.items():
                try:
                    if arm is None:
                        raise UserError(
                            "the finalist trains without noise, there is none to target"
                        )
                    run = resolve_run(study, scenario, arm, seed=seed, layer_count=layer_count)
                except UserError as error:
                    if name in study.arms:
                        raise UserError(f"arms.{name}: {error}") from None
                    missing[scenario.name, name] = NotAvailable(scenario.name, name, str(error))
                    continue
                key = run.training_key(setting)
                config = configs.get(name.partition("_")[0], "")
                cells.append(Cell(stage, scenario.name, name, config, replicate, run, key))
    return ArmCells(tuple(cells), tuple(missing.values()))


def config_cells(
    study: Study,
    setting: Setting,
    scenario: Scenario,
    *,
    config: str,
    params: Params,
    layer_count: int,
) -> tuple[Cell, ...]:
    """Return the cells of one config of the search, one per search replicate."""
    if study.search is None:
        raise ValueError("the study has no search")
    arm = arm_of(params)
    cells = []
    for replicate in range(study.search.replicates):
        seed = replicate_seed(study.seed, "search", replicate)
        run = resolve_run(study, scenario, arm, seed=seed, layer_count=layer_count)
        key = run.training_key(setting)
        cells.append(Cell("search", scenario.name, config, config, replicate, run, key))
    return tuple(cells)


def unique_runs(cells: Iterable[Cell]) -> dict[str, Run]:
    """Return one run per training key, in order, evaluated under the conditions of all its cells.

    This is what trains nothing twice: the clean arm, and every arm of every `during: eval` scenario,
    are one training with many evaluations.
    """
    runs: dict[str, Run] = {}
    for cell in cells:
        known = runs.get(cell.training_key)
        if known is None:
            runs[cell.training_key] = cell.run
            continue
        added = tuple(c for c in cell.run.conditions if c not in known.conditions)
        if added:
            conditions = known.conditions + added
            runs[cell.training_key] = known.model_copy(update={"conditions": conditions})
    return runs
