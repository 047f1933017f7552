"""A training engine with a closed-form objective, for studies that take seconds and have a known answer.

Noise on the faulty layers lowers the faulty loss by `effect` times the share of the noise's energy
that falls on them: `targeted` gets all of it, `global` one layer's worth, `healthy` nothing.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from aqn_tune.confirm.runner import run_confirm
from aqn_tune.errors import UserError
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import Audit, EvaluationRow, FaultMeasure, TrainingRow
from aqn_tune.search.cluster import ray_session
from aqn_tune.search.ranking import finalists
from aqn_tune.search.runner import run_search
from aqn_tune.search.work import Work
from aqn_tune.study.cells import Finalist
from aqn_tune.study.engine import (
    BaseArrays,
    Engine,
    RungReport,
    Shared,
    SplitArrays,
    SplitsByName,
)
from aqn_tune.study.folder import StudyFolder
from aqn_tune.study.layers import resolve_layers
from aqn_tune.study.runs import Condition, Pack, Run, Setting
from aqn_tune.study.scenario import Scenario, ScenarioSpec
from aqn_tune.study.schema import ComputeSpec, Study
from aqn_tune.study.seeds import stream_seed
from aqn_tune.study.training import TrainingSpec
from aqn_tune.tasks import WordProblems
from aqn_tune.tasks.splitting import SplitName

LAYERS = 28


class Behaviour(NamedTuple):
    """What the engine does beside computing its objective."""

    effect: float = 0.3
    """Loss that noise on exactly the faulty layers saves."""
    noise_sd: float = 0.01
    """Standard deviation of what no arm shares."""
    offsets: tuple[tuple[str, float], ...] = ()
    """Added to every faulty loss of a scenario."""
    late: float = 0.0
    """Added to the loss in proportion to the steps taken: a metric that worsens with training."""
    nan_above: float = math.inf
    """Runs whose first sigma lies above it diverge in their first steps."""
    die_at: int = -1
    """The worker is killed at this step; once, when `flag` names a file that is made then, or once for
    every pack, when it names a folder."""
    die_in: str = ""
    """Only packs whose name starts with it kill their worker."""
    raise_in: str = "-"
    """Packs whose name starts with it raise."""
    user_error: str = ""
    """Every pack raises a UserError with this text."""
    vandal: str = ""
    """Write into what packs share: base or tokens."""
    flag: str = ""
    log: str = ""
    """File that gets a line `pack step pid` per rung trained."""
    sleep: float = 0.0
    """Seconds per rung."""


USUAL = Behaviour()


def engine(behaviour: Behaviour = USUAL) -> Engine:
    """Return an engine that behaves like this, in any process."""
    import ray.cloudpickle

    # Workers do not have the tests on their path.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return Engine(
        load_base=load_base,
        load_splits=load_splits,
        open_pack=functools.partial(Synthetic, behaviour=behaviour),
        rounds_alike=rounds_alike,
    )


def rounds_alike(setting: Setting, training: TrainingSpec, most: int) -> bool:
    """Return True: every run is computed by itself."""
    return True


def load_base(setting: Setting) -> BaseArrays:
    """Return a base that must come back unchanged."""
    return {"weight": np.arange(64, dtype=np.float32)}


def load_splits(setting: Setting, names: Sequence[SplitName], max_length: int) -> SplitsByName:
    """Return one row per split that must come back unchanged."""
    row = np.arange(max_length)[np.newaxis]
    return {name: SplitArrays(row, row > 8, row >= 0, 8, max_length) for name in names}


class Synthetic:
    """A `PackTraining`. Its state is a random walk per run, so that a lost state changes results."""

    def __init__(
        self, pack: Pack, setting: Setting, shared: Shared, *, behaviour: Behaviour
    ) -> None:
        self.pack, self.setting, self.shared, self.behaviour = pack, setting, shared, behaviour
        self.keys = [run.training_key(setting) for run in pack.runs]
        self.walk = [0.0] * len(pack.runs)
        self.failed = [False] * len(pack.runs)
        self.index = 0

    def advance(self) -> RungReport:
        step = self.pack.rungs[self.index]
        first = self.pack.rungs[self.index - 1] if self.index else 0
        behave = self.behaviour
        if self.pack.name.startswith(behave.raise_in):
            raise RuntimeError("no such kernel")
        if behave.user_error:
            raise UserError(behave.user_error)
        if behave.vandal == "base":
            self.shared.base["weight"][0] = 1.0
        if behave.vandal == "tokens":
            self.shared.splits["train"].tokens[0, 0] = 1
        if behave.sleep:
            time.sleep(behave.sleep)
        self._maybe_die(step)
        if behave.log:
            with open(behave.log, "a", encoding="utf-8") as file:
                file.write(f"{self.pack.name} {step} {os.getpid()}\n")
        trainings, evaluations = [], []
        for k, (run, key) in enumerate(zip(self.pack.runs, self.keys, strict=True)):
            was_failed = self.failed[k]
            self.failed[k] |= step > 0 and _sigma(run) > behave.nan_above
            for t in range(first, step):
                self.walk[k] += 1e-3 * _normal(run.seed, "walk", t)
            if not self.failed[k]:
                evaluations += [self._evaluate(k, run, key, step, c) for c in run.conditions]
            last = step == self.pack.rungs[-1]
            status = "failed" if self.failed[k] else "finished" if last else "unfinished"
            if was_failed:
                first = step
            trainings.append(
                TrainingRow(
                    training_key=key,
                    stage=self.pack.stage,
                    seed=run.seed,
                    steps=run.training.steps,
                    step_reached=first if self.failed[k] else step,
                    status=status,
                    error="loss is not finite" if self.failed[k] else "",
                    seconds=0.01 + time.monotonic() % 1e-3,
                    pack=self.pack.name,
                    pack_size=len(self.pack.runs),
                    lockstep=min(self.pack.lockstep or len(self.pack.runs), len(self.pack.runs)),
                    train_losses=tuple(1.0 / (t + 1) for t in range(first, step)),
                    audit=None if self.failed[k] else Audit(),
                    adapter=self._export(key) if status == "finished" else "",
                )
            )
        self.index += 1
        return RungReport(step, tuple(evaluations), tuple(trainings))

    def _maybe_die(self, step: int) -> None:
        behave = self.behaviour
        if behave.die_at != step or not self.pack.name.startswith(behave.die_in):
            return
        if behave.flag:
            flag = Path(behave.flag)
            flag = flag / self.pack.name if flag.is_dir() else flag
            if flag.exists():
                return
            flag.touch()
        os.kill(os.getpid(), 9)

    def _export(self, key: str) -> str:
        folder = self.pack.export.get(key, "")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
        return folder

    def _evaluate(self, k: int, run: Run, key: str, step: int, to: Condition) -> EvaluationRow:
        loss = objective(run, step, to, self.behaviour) + self.walk[k]
        return EvaluationRow(
            training_key=key,
            step=step,
            final=step == self.pack.rungs[-1] and step > 0,
            condition=to.name,
            scenario=to.scenario,
            split=self.pack.split,
            rows=_rows(self.setting, self.pack.split),
            loss=loss,
            exact_match=math.exp(-loss),
            draws=to.draws,
            faults=tuple(
                FaultMeasure(
                    kind=fault.kind, calls=1, sites=1, affected_fraction=0.5, relative_error=0.1
                )
                for fault in to.device.faults
            ),
        )

    def state(self) -> bytes:
        return json.dumps([self.index, self.walk, self.failed]).encode()

    def restore(self, state: bytes) -> None:
        self.index, self.walk, self.failed = json.loads(state)

    def close(self) -> None:
        if not np.array_equal(self.shared.base["weight"], np.arange(64)):
            raise AssertionError("the base was written to")
        for name in ("train", self.pack.split):
            row = self.shared.splits[name].tokens[0]
            if not np.array_equal(row, np.arange(self.pack.runs[0].training.max_length)):
                raise AssertionError(f"the {name} split was written to")


def _rows(setting: Setting, split: str) -> int:
    if not isinstance(setting.task, WordProblems):
        return 100
    return setting.task.validation_rows if split == "validation" else setting.task.test_rows


def objective(run: Run, step: int, to: Condition, behaviour: Behaviour) -> float:
    """Return the loss of a run: falls from 3 towards 1, plus the damage of the fault that is left."""
    progress = step / run.training.steps
    seed_effect = 0.05 * _normal(run.seed, "seed") * progress
    own = (
        behaviour.noise_sd * progress * _normal(run.seed, _digest(run), step, to.name, to.scenario)
    )
    clean = 1.0 + 2.0 * math.exp(-3.0 * progress) + behaviour.late * progress
    if to.name == "clean":
        return clean + seed_effect + own
    offset = dict(behaviour.offsets).get(to.scenario, 0.0)
    damage = sum(2.0 * float(getattr(fault, "threshold", 0.1)) for fault in to.device.faults)
    if run.device.faults:
        damage *= 0.6
    relief = (
        behaviour.effect * _share_on_fault(run, to) * progress * (1.0 - abs(_sigma(run) - 0.05))
    )
    return clean + seed_effect + own + damage - relief + offset


def _share_on_fault(run: Run, to: Condition) -> float:
    if run.noise is None:
        return 0.0
    faulty = {n for fault in to.device.faults for n in resolve_layers(fault.layers, LAYERS)}
    multipliers = run.noise.multipliers
    on_fault = sum(m * m for layer, m in enumerate(multipliers) if layer in faulty)
    return on_fault / run.noise.energy()


def _sigma(run: Run) -> float:
    return max(run.noise.sigma) if run.noise else 0.0


def _digest(run: Run) -> str:
    return run.model_copy(update={"conditions": ()}).model_dump_json()


def _normal(seed: int, *path: str | int) -> float:
    return random.Random(stream_seed(seed, *path)).gauss(0.0, 1.0)


SPACE: dict[str, Any] = {
    "dimensions": {
        "sigma_start": {"kind": "float", "low": 0.005, "high": 0.2, "log": True},
        "sigma_ratio": {"kind": "float", "low": 0.01, "high": 1.0, "log": True},
        "targeting": {"kind": "choice", "values": ["global", "targeted", "healthy", "window"]},
        "window_centre": {
            "kind": "int", "low": 0, "high": 27, "when": {"targeting": ["window"]},
        },
        "window_width": {"kind": "int", "low": 1, "high": 9, "when": {"targeting": ["window"]}},
    }
}  # fmt: skip


def make_study(output: Path | str, **changes: Any) -> Study:
    """Return a small study: one fault layer, 8 configs, rungs at 5, 10 and 20 steps."""
    spec: dict[str, Any] = {
        "study": "synthetic",
        "seed": 7,
        "scenario": {
            "faults": [{"kind": "dead_zone", "threshold": 0.1, "layers": [10]}],
        },
        "training": {"steps": 20, "warmup_steps": 2},
        "search": {"space": SPACE, "configs": 8, "replicates": 2, "startup_configs": 3},
        "confirm": {"finalists": 1, "replicates": 6},
        "compute": {"workers": 1},
        "output": str(output),
    }
    for key, value in changes.items():
        merge = isinstance(spec.get(key), dict) and isinstance(value, dict)
        spec[key] = {**spec[key], **value} if merge else value
    return Study.model_validate(spec)


def make_scenarios(
    study: Study, thresholds: tuple[float, ...] = (0.1, 0.3)
) -> tuple[Scenario, ...]:
    """Return one scenario per threshold."""
    made = []
    for threshold in thresholds:
        fault = study.scenario.faults[0].model_copy(update={"threshold": threshold})
        spec = ScenarioSpec(faults=(fault,), during=study.scenario.during)
        made.append(Scenario(f"both-threshold{threshold}", spec, {"threshold": threshold}))
    return tuple(made)


def make_setting(study: Study) -> Setting:
    """Return a setting that no model file is read for."""
    return Setting(model=study.model, task=study.task, model_fingerprint="synthetic")


@pytest.fixture(scope="session")
def ray_two() -> Iterator[None]:
    """Have Ray running with two CPUs for all tests that need it."""
    with ray_session(ComputeSpec(workers=2)):
        yield


def inline(
    work: Work, *, setting: Setting, engine: Engine, folder: StudyFolder, **rest: Any
) -> None:
    """Stand in for `aqn_tune.search.execute.execute`: one worker, in this process, without Ray."""
    shared = engine.load(setting, rest["split"], rest["max_length"])
    while (pack := work.next_pack()) is not None:
        training = engine.open_pack(pack, setting, shared)
        while work.arrived(pack, training.advance()):
            pass
        training.close()


def inline_packs(limit: int = 1000, breaks: str = "-") -> Callable[..., None]:
    """Return a stand-in for `execute` that runs so many packs; one named so breaks off."""

    def run(work: Work, *, setting: Setting, engine: Engine, **rest: Any) -> None:
        for _ in range(limit):
            pack = work.next_pack()
            if pack is None:
                return
            if pack.name.startswith(breaks):
                work.broke(pack, "its worker died")
                continue
            shared = engine.load(setting, rest["split"], rest["max_length"])
            training = engine.open_pack(pack, setting, shared)
            while work.arrived(pack, training.advance()):
                pass

    return run


def search_inline(
    study: Study,
    folder: StudyFolder,
    *,
    thresholds: tuple[float, ...] = (0.1, 0.3),
    behaviour: Behaviour = USUAL,
) -> Ledger:
    """Run the search of a study without Ray and return its ledger."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aqn_tune.search.runner.execute", inline)
        run_search(
            study,
            make_setting(study),
            make_scenarios(study, thresholds),
            folder,
            layer_count=LAYERS,
            engine=engine(behaviour),
        )
    return Ledger(folder.ledger)


def run_synthetic(
    study: Study,
    folder: StudyFolder,
    *,
    thresholds: tuple[float, ...] = (0.1, 0.3),
    behaviour: Behaviour = USUAL,
) -> None:
    """Run search and confirmation of a study on the synthetic objective, into `folder`."""
    scenarios, setting = make_scenarios(study, thresholds), make_setting(study)
    made = engine(behaviour)
    with ray_session(study.compute):
        run_search(study, setting, scenarios, folder, layer_count=LAYERS, engine=made)
        ledger = Ledger(folder.ledger)
        best: list[Finalist] = [f for s in scenarios for f in finalists(ledger, s, study)]
        run_confirm(study, setting, scenarios, folder, best, layer_count=LAYERS, engine=made)
