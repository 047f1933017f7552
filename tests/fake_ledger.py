"""A study folder with a ledger of planted numbers: what the report must say is known beforehand."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from aqn_tune.confirm.lock import ConfirmLock, LockFile, MissingArm
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import (
    Audit,
    CellRow,
    EvaluationRow,
    FaultMeasure,
    LedgerRow,
    SearchRow,
    TrainingRow,
)
from aqn_tune.models.spec import ModelSpec
from aqn_tune.study.cells import ArmCells, Cell, Finalist, config_cells, stage_cells, unique_runs
from aqn_tune.study.folder import StudyFolder, study_folder, study_hash
from aqn_tune.study.runs import Run, Setting
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study
from aqn_tune.study.space import Params
from aqn_tune.study.sweep import resolve_scenarios
from aqn_tune.tasks.word_problems import WordProblems

LAYERS = 28
STEPS = 20
BASE_LOSS, CLEAN_LOSS = 1.5, 0.5
"""G = 1 nat, so a damage of 0.3 is 0.3 nats."""
DAMAGE = {0.01: 0.01, 0.1: 0.3, 0.2: 0.6, 0.5: 1.6}
AFFECTED = {0.01: 0.35, 0.1: 0.84, 0.2: 0.95, 0.5: 0.99}
BENEFIT = {"global": 0.2, "targeted": 0.5, "healthy": 0.0, "random": 0.1, "finalist1": 0.6}
"""Share of the damage that an arm wins back."""


class Fake(NamedTuple):
    """A study folder with planted numbers."""

    folder: StudyFolder
    study: Study
    rows: tuple[LedgerRow, ...]


def make_study(output: Path, **changes: Any) -> Study:
    """Return a small study: four dead zones, trained through and met at deployment."""
    content: dict[str, Any] = {
        "study": "planted",
        "description": "Does noise help on a device with a dead zone?",
        "training": {"steps": STEPS, "warmup_steps": 2},
        "scenario": {
            "faults": [{"kind": "dead_zone", "layers": [10], "threshold": 0.1}],
        },
        "sweep": {"during": ["both", "eval"], "faults.0.threshold": list(DAMAGE)},
        "search": {
            "space": {
                "dimensions": {
                    "sigma_start": {"kind": "float", "low": 0.005, "high": 0.2, "log": True},
                    "targeting": {"kind": "choice", "values": ["global", "window"]},
                    "window_centre": {
                        "kind": "int", "low": 0, "high": 27, "when": {"targeting": ["window"]},
                    },
                    "window_width": {
                        "kind": "fixed", "value": 3, "when": {"targeting": ["window"]},
                    },
                }
            },
            "configs": 3,
            "replicates": 2,
        },
        "confirm": {"finalists": 1, "replicates": 8},
        "decisions": {
            "contrasts": [["targeted", "fault_only"], ["targeted", "global"]],
            "rows": [
                {"when": [">", ">"], "say": "noise helps, and targeting helps on top"},
                {"when": [">", ["~", "<"]], "say": "noise helps; targeting adds nothing"},
                {"when": [["~", "<"], "any"], "say": "no benefit at this margin"},
            ],
        },
        "output": str(output),
    }  # fmt: skip
    if "confirm_spec" in changes:
        changes["confirm"] = changes.pop("confirm_spec")
    content.update(changes)
    return Study.model_validate(content)


def make_setting(study: Study) -> Setting:
    return Setting(
        model=ModelSpec(), task=WordProblems(), model_fingerprint="f" * 16,
        eval_batch_size=study.eval_batch_size,
    )  # fmt: skip


CONFIGS: tuple[Params, ...] = (
    {"sigma_start": 0.08, "targeting": "window", "window_centre": 12, "window_width": 3},
    {"sigma_start": 0.01, "targeting": "global"},
    {"sigma_start": 0.19, "targeting": "window", "window_centre": 25, "window_width": 3},
)
CONFIG_BENEFIT = {"c000": 0.6, "c001": 0.1, "c002": -0.5}


def threshold_of(scenario: Scenario) -> float:
    """Return the threshold of the scenario's only fault."""
    return float(scenario.spec.faults[0].model_dump()["threshold"])


def planted_loss(run: Run, arm: str, scenario: Scenario | None, *, jitter: float = 0.01) -> float:
    """Return the loss of an arm under a scenario's faults, None for no fault."""
    shared = random.Random(run.seed).gauss(0, 0.03)
    own = random.Random(f"{run.seed} {arm} {scenario and scenario.name}").gauss(0, jitter)
    if scenario is None:
        return CLEAN_LOSS + shared + own
    threshold = threshold_of(scenario)
    damage = DAMAGE[threshold] * (1.0 if scenario.spec.during == "both" else 1.3)
    if arm == "clean":
        damage = DAMAGE[threshold] * 1.3
    parent = arm.removesuffix("_none").removesuffix("_global")
    benefit = BENEFIT.get(arm, CONFIG_BENEFIT.get(arm, 0.0))
    if parent != arm:
        benefit = 0.3 if arm.endswith("_global") else 0.0
    return CLEAN_LOSS + damage * (1 - benefit) + shared + own


def _evaluations(
    cells: Sequence[Cell], scenarios: Sequence[Scenario], *, step: int, jitter: float
) -> Iterator[EvaluationRow]:
    """One row per training and condition, the first arm of a training giving its name."""
    by_name = {scenario.name: scenario for scenario in scenarios}
    names: dict[str, str] = {}
    for cell in cells:
        names.setdefault(cell.training_key, cell.arm)
    for key, run in unique_runs(cells).items():
        for condition in run.conditions:
            scenario = by_name.get(condition.scenario)
            loss = planted_loss(run, names[key], scenario, jitter=jitter)
            loss += 0.4 * (1 - step / STEPS)
            faults: tuple[FaultMeasure, ...] = ()
            if scenario is not None:
                share = AFFECTED[threshold_of(scenario)]
                faults = (
                    FaultMeasure(
                        kind="dead_zone", calls=8, sites=1, affected_fraction=share,
                        relative_error=share / 10,
                    ),
                )  # fmt: skip
            yield EvaluationRow(
                training_key=key, step=step, final=step == STEPS, condition=condition.name,
                scenario=condition.scenario, rows=64,
                split="validation" if cells[0].stage == "search" else "test",
                loss=loss, exact_match=min(1.0, 0.9 * math.exp(-(loss - 0.4))), faults=faults,
                draws=condition.draws,
            )  # fmt: skip


def _cells(cells: Sequence[Cell], generation: int = 0) -> Iterator[CellRow]:
    for cell in cells:
        yield CellRow(
            stage=cell.stage, scenario=cell.scenario, arm=cell.arm, config=cell.config,
            replicate=cell.replicate, seed=cell.run.seed, generation=generation,
            training_key=cell.training_key,
        )  # fmt: skip


def _trainings(
    cells: Sequence[Cell], *, after: int, step: int, failed: set[str] | None = None
) -> Iterator[TrainingRow]:
    for key, run in unique_runs(cells).items():
        bad = key in (failed or set())
        status = "failed" if bad else "finished" if step == STEPS else "unfinished"
        yield TrainingRow(
            training_key=key, stage=cells[0].stage, seed=run.seed, steps=STEPS, step_reached=step,
            status=status, error="loss is not finite at step 7" if bad else "", seconds=1.5,
            pack="p000", pack_size=4, audit=None if bad else Audit(trainable_parameters=1000),
            train_losses=tuple(2.0 / (1 + s) for s in range(after, step)),
        )  # fmt: skip


def _base(cells: Sequence[Cell], scenarios: Sequence[Scenario]) -> Iterator[EvaluationRow]:
    split = "validation" if cells[0].stage == "search" else "test"
    for name, scenario in [("clean", None), *(("faulty", s) for s in scenarios)]:
        threshold = 0.0 if scenario is None else threshold_of(scenario)
        yield EvaluationRow(
            training_key=cells[0].training_key, step=0, final=False, condition=name,
            scenario="" if scenario is None else scenario.name, split=split, rows=64,
            loss=BASE_LOSS + threshold, exact_match=0.5 - threshold / 2,
        )  # fmt: skip


def search_rows(study: Study, scenarios: Sequence[Scenario]) -> Iterator[LedgerRow]:
    """A search: c000 wins, c001 finishes, c002 is stopped and in the last scenario fails."""
    setting = make_setting(study)
    controls = stage_cells(study, setting, scenarios, stage="search", layer_count=LAYERS).cells
    yield from _cells(controls)
    yield from _base(controls, scenarios)
    for after, step in ((0, 5), (5, 10), (10, STEPS)):
        yield from _evaluations(controls, scenarios, step=step, jitter=0.01)
        yield from _trainings(controls, after=after, step=step)
    for scenario in scenarios:
        for number, params in enumerate(CONFIGS):
            yield from _config(study, setting, scenario, number, params, scenarios)


def _config(
    study: Study,
    setting: Setting,
    scenario: Scenario,
    number: int,
    params: Params,
    scenarios: Sequence[Scenario],
) -> Iterator[LedgerRow]:
    config = f"c{number:03d}"

    def event(name: str, **fields: Any) -> SearchRow:
        return SearchRow.model_validate(
            {"scenario": scenario.name, "event": name, "config": config, "number": number, **fields}
        )

    yield event("asked", params=params)
    cells = config_cells(study, setting, scenario, config=config, params=params, layer_count=LAYERS)
    yield from _cells(cells)
    stopped = config == "c002"
    if stopped and scenario is scenarios[-1]:
        yield from _trainings(cells, after=0, step=3, failed={cell.training_key for cell in cells})
        yield event("failed")
        return
    for rung, (after, step) in enumerate([(0, 5)] if stopped else [(0, 5), (5, 10), (10, STEPS)]):
        evaluations = tuple(_evaluations(cells, scenarios, step=step, jitter=0.01))
        yield from evaluations
        yield from _trainings(cells, after=after, step=step)
        losses = [row.loss for row in evaluations if row.condition == "faulty" and row.loss]
        yield event("rung", rung=rung, value=sum(losses) / len(losses))
    yield event("stopped" if stopped else "finished")


def confirm_rows(
    study: Study,
    scenarios: Sequence[Scenario],
    *,
    jitter: float = 0.01,
    fail: Sequence[tuple[str, str, int]] = (),
    first: int | None = None,
) -> Iterator[LedgerRow]:
    """A confirmation with c000 as the finalist.

    `fail` names (scenario, arm, replicate) whose training fails; `first` trains only that many
    replicates, as an interrupted study has.
    """
    cells = confirm_cells(study, scenarios).cells
    failed = {c.training_key for c in cells if (c.scenario, c.arm, c.replicate) in fail}
    yield from _cells(cells, study.confirm.generation)
    yield from _base(cells, scenarios)
    done = [cell for cell in cells if first is None or cell.replicate < first]
    good = [cell for cell in done if cell.training_key not in failed]
    if good:
        yield from _evaluations(good, scenarios, step=STEPS, jitter=jitter)
    if done:
        yield from _trainings(done, after=0, step=STEPS, failed=failed)


def confirm_cells(study: Study, scenarios: Sequence[Scenario]) -> ArmCells:
    finalists = tuple(Finalist(s.name, 1, "c000", CONFIGS[0]) for s in scenarios)
    return stage_cells(
        study,
        make_setting(study),
        scenarios,
        stage="confirm",
        layer_count=LAYERS,
        finalists=finalists if study.search else (),
    )


def _keys(cells: ArmCells) -> dict[tuple[str, str], list[str]]:
    keys: dict[tuple[str, str], list[str]] = {}
    for cell in cells.cells:
        keys.setdefault((cell.scenario, cell.arm), []).append(cell.training_key)
    return keys


def make_lock_file(study: Study, scenarios: Sequence[Scenario], **changes: Any) -> str:
    """Return the text of the lock that the confirmation of `study` is held to."""
    cells = confirm_cells(study, scenarios)
    lock = {
        "generation": study.confirm.generation,
        "study": study_hash(study),
        "replicates": study.confirm.replicates,
        "looks": study.confirm.looks,
        "seeds": tuple({cell.replicate: cell.run.seed for cell in cells.cells}.values()),
        "finalists": (),
        "arms": [
            {"scenario": scenario, "arm": arm, "training_keys": keys}
            for (scenario, arm), keys in _keys(cells).items()
        ],
        "missing": [MissingArm.model_validate(one._asdict()) for one in cells.missing],
        "contrasts": study.primary_contrasts(),
        "alpha": study.confirm.alpha,
        "power": study.confirm.power,
        "margin_fraction": study.confirm.margin.model_dump()["share"],
        "gain": None,
        "margin": None,
        "version": "0",
        "code": "0" * 16,
        "created": "2026-01-01T00:00:00+00:00",
    }
    return LockFile(
        generations=(ConfirmLock.model_validate({**lock, **changes}),)
    ).model_dump_json()


def write_fake(
    output: Path,
    *,
    search: bool = True,
    confirm: bool = True,
    jitter: float = 0.01,
    fail: Sequence[tuple[str, str, int]] = (),
    first: int | None = None,
    **changes: Any,
) -> Fake:
    """Write a study folder and return it."""
    study = make_study(output, **changes)
    folder = study_folder(study)
    folder.root.mkdir(parents=True)
    text = yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False)
    folder.study.write_text(text, encoding="utf-8")
    scenarios = resolve_scenarios(study)
    rows: list[LedgerRow] = []
    if search and study.search is not None:
        rows += search_rows(study, scenarios)
    if confirm:
        folder.lock.write_text(make_lock_file(study, scenarios), encoding="utf-8")
        rows += confirm_rows(study, scenarios, jitter=jitter, fail=fail, first=first)
    Ledger(folder.ledger).append(rows)
    return Fake(folder, study, tuple(rows))
