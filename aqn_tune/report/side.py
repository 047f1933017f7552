"""One side of a comparison: what it is called, and the arm of a study that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from aqn_tune.errors import UserError, nearest
from aqn_tune.evidence.tables import CellResult
from aqn_tune.report.manifest import read_manifest
from aqn_tune.report.results import Results
from aqn_tune.study.arms import ArmSpec
from aqn_tune.study.cells import named_arms, training_of, twin
from aqn_tune.study.resolve import conditions_of
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.seeds import Stage
from aqn_tune.study.space import arm_of

STAGES: tuple[Stage, ...] = ("confirm", "search")
CONTENTS = {"model": "files of the model", "task": "rows of the task"}
"""What a key of a study only names, so that it may change under one name."""


class Named(NamedTuple):
    """What one side of a comparison was called: a folder, and how much of it."""

    folder: Path
    stage: Stage = "confirm"
    scenario: str = ""
    """Empty for every scenario."""
    arm: str = ""
    """Empty for every arm."""
    replicate: int | None = None
    """None for every seed."""


class Side(NamedTuple):
    """One arm in one scenario of one study."""

    results: Results
    stage: Stage
    scenario: Scenario
    arm: str
    declared: dict[str, Any]
    """What it trains, and how: the keys that are held against the other side."""
    judged: dict[str, Any]
    """What its losses are losses of; the same on both sides, or they are not comparable."""
    contents: dict[str, str]
    """Content hashes of `CONTENTS`, from the manifest; without those that it does not have."""

    @property
    def name(self) -> str:
        """The side as it is printed: scenario and arm."""
        return f"{self.scenario.name}/{self.arm}"


def parse_name(text: str, default: Path | None = None) -> Named:
    """Return what `FOLDER`, `FOLDER:ARM`, `FOLDER:[STAGE/]SCENARIO/ARM[/REPLICATE]` stands for.

    Without a folder, that of the other side (`default`) is meant.
    """
    if Path(text).is_dir():
        return Named(Path(text))
    folder, sign, name = text.rpartition(":")
    if not sign and default is None:
        raise UserError(
            f"{text}: no such folder; write FOLDER, FOLDER:ARM or FOLDER:SCENARIO/ARM, with the folder of a "
            "study"
        )
    place = Path(folder) if folder else default
    if place is None or not place.is_dir():
        raise UserError(f"{text}: {folder or 'it'} is no folder of a study")
    parts = name.split("/")
    stage: Stage = "confirm"
    if len(parts) > 2:
        if parts[0] not in STAGES:
            raise UserError(
                f"{text}: got stage {parts[0]!r}; allowed are {', '.join(STAGES)}{nearest(parts[0], STAGES)}"
            )
        stage = "search" if parts[0] == "search" else "confirm"
        parts = parts[1:]
    replicate = None
    if len(parts) > 2:
        if len(parts) > 3 or not parts[2].isdigit():
            raise UserError(
                f"{text}: got replicate {'/'.join(parts[2:])!r}; write a number from 0, as in "
                "confirm/SCENARIO/ARM/0"
            )
        replicate = int(parts[2])
    scenario, arm = ("", parts[0]) if len(parts) == 1 else (parts[0], parts[1])
    return Named(place, stage, scenario, arm, replicate)


def sides_of(results: Results, named: Named) -> list[Side]:
    """Return every arm in every scenario of a study that a name stands for.

    Raises UserError where there is none.
    """
    names = [scenario.name for scenario in results.scenarios]
    if named.scenario and named.scenario not in names:
        raise UserError(
            f"{named.folder}: got scenario {named.scenario!r}; allowed are {', '.join(names)}"
            f"{nearest(named.scenario, names)}"
        )
    sides = []
    known: dict[str, None] = {}
    for scenario in results.scenarios:
        if named.scenario not in ("", scenario.name):
            continue
        arms = results.tables.arms(
            named.stage, scenario.name, generation=_generation(results, named.stage)
        )
        known |= dict.fromkeys(arms)
        sides += [
            _side(results, named.stage, scenario, arm) for arm in arms if named.arm in ("", arm)
        ]
    if named.arm and not sides:
        there = f"allowed are {', '.join(known)}" if known else f"its {named.stage} has no runs yet"
        raise UserError(
            f"{named.folder}: got arm {named.arm!r}; {there}{nearest(named.arm, known)}"
        )
    return sides


def _generation(results: Results, stage: Stage) -> int:
    return results.study.confirm.generation if stage == "confirm" else 0


def _side(results: Results, stage: Stage, scenario: Scenario, arm: str) -> Side:
    study = results.study
    spec = _arm_spec(results, scenario, arm)
    training = training_of(study, spec).model_dump(mode="json")
    steps = training.pop("steps")
    model = study.model.model_dump(mode="json")
    from aqn_tune.study.loading import layer_count

    conditions = conditions_of(scenario, layer_count(study.model))
    changed_by_training = {"learning_rate", "rank", "weight_decay"}
    manifest = read_manifest(results.folder)
    known = {key: manifest.get(f"{key}_fingerprint") for key in CONTENTS}
    return Side(
        results=results,
        stage=stage,
        scenario=scenario,
        arm=arm,
        declared={
            "model": {"dtype": model.pop("dtype")},
            "training": training,
            "scenario": scenario.spec.model_dump(mode="json"),
            "arm": spec.model_dump(mode="json", exclude=changed_by_training),
            "compute": {"gpu": bool(study.compute.gpus_per_worker)},
        },
        judged={
            "model": model,
            "task": study.task.model_dump(mode="json"),
            "training": {"steps": steps},
            "eval_batch_size": study.eval_batch_size,
            "conditions": [
                condition.model_dump(mode="json", exclude={"scenario"}) for condition in conditions
            ],
        },
        contents={key: str(content) for key, content in known.items() if content},
    )


def _arm_spec(results: Results, scenario: Scenario, arm: str) -> ArmSpec:
    """Return what a recorded arm declares: a control, an own arm, a finalist or its twin, a config."""
    named = named_arms(results.study)
    if arm in named:
        return named[arm]
    config = next(
        (
            cell.config
            for cell in results.cells
            if (cell.scenario, cell.arm) == (scenario.name, arm)
        ),
        "",
    )
    for one in results.searched:
        if (one.scenario, one.config) == (scenario.name, config):
            found = arm_of(dict(one.params))
            which = arm.rpartition("_")[2]
            changed = twin(found, which) if which in ("none", "global") else found
            if changed is not None:
                return changed
    raise UserError(
        f"{results.folder.root}: arm {arm!r} of {scenario.name} is recorded, but the study no longer "
        "says what it is; was study.yaml changed?"
    )


def cells_of(side: Side, replicate: int | None) -> list[CellResult]:
    """Return the results of a side, seed by seed, or those of one replicate.

    Raises UserError for a replicate that it has not.
    """
    results, stage = side.results, side.stage
    where = (side.scenario.name, side.arm)
    count = sum((cell.scenario, cell.arm) == where for cell in results.stage_cells(stage))
    generation = _generation(results, stage)
    cells = results.tables.cells(stage, *where, replicates=count, generation=generation)
    if replicate is not None and replicate >= count:
        raise UserError(f"{side.name}: got replicate {replicate}; allowed are 0 to {count - 1}")
    return [cell for cell in cells if replicate is None or cell.replicate == replicate]
