"""What a trial costs beside its training: a thousand trials that train nothing.

    python benchmarks/overhead.py [--trials 1000] [--rounds 3]

Three rungs, half of the trials stopped at each, two workers that are reused, one parameter on a log scale
and one choice, in three ways in turn, each in a process of its own:

Ray Tune       alone: random search, no logger, no snapshot; its ASHA.
Ray + Optuna   as one would write it: OptunaSearch (TPE), ASHA, its own loggers and snapshots.
aqn-tune       a search of the package: Optuna and ASHA asked by its driver, every report and decision in the
               ledger before the next, TensorBoard, three replicates per trial (so three runs' rows, clean and
               faulty evaluations, a state file at each rung), and an engine that makes up losses at once.

The clock of a way runs from its first trial that has ended to its last, so that imports and the start of
Ray are outside. Printed are milliseconds per trial, and how they and the memory of the driver grow from the
first eighth of the trials to the last: TPE, Ray's own list of trials and the rung tables all look at every
trial before. A trial that trains for a minute does not notice any of this.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _common import Curve, Spread, add_out, curves, load, machine, memory, spread, write
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
BARE, USUAL, PACKAGE = "Ray Tune", "Ray + Optuna", "aqn-tune"
WAYS = (BARE, USUAL, PACKAGE)
RUNGS = 3
PARTS = 8
"""Parts of a sweep whose times and memory are told apart."""
WANTED = 1.3


class Mark(NamedTuple):
    """The moment at which a trial had ended."""

    seconds: float
    megabytes: float
    """Resident memory of the driver."""


class Measured(NamedTuple):
    """One sweep."""

    marks: tuple[Mark, ...]
    """One per trial, in the order in which they ended."""
    reports: int
    """Rungs that were reported."""
    load: float

    @property
    def per_trial(self) -> float:
        """Milliseconds per trial."""
        return 1e3 * (self.marks[-1].seconds - self.marks[0].seconds) / (len(self.marks) - 1)

    def parts(self) -> list[tuple[int, float, float]]:
        """Return (trials ended, milliseconds per trial, MB at its end) of each part."""
        count = len(self.marks) - 1
        ends = [round(count * part / PARTS) for part in range(PARTS + 1)]
        return [
            (
                last,
                1e3 * (self.marks[last].seconds - self.marks[first].seconds) / (last - first),
                self.marks[last].megabytes,
            )
            for first, last in itertools.pairwise(ends)
        ]


class Recording:
    """Marks the trials of a sweep as they end."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []
        self.reports = 0

    def ended(self, count: int) -> None:
        """Take in that `count` trials have ended by now."""
        while len(self.marks) < count:
            self.marks.append(Mark(time.perf_counter(), memory(peak=False)))


# -- the ways ---------------------------------------------------------------------------------------


def by_ray(trials: int, folder: Path, recording: Recording, *, usual: bool) -> None:
    """Run a sweep with Ray Tune alone."""
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    if not usual:
        os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_GLOBAL_CHECKPOINT_S": "1e9"}
    import ray
    from ray import tune
    from ray.tune.schedulers import AsyncHyperBandScheduler
    from ray.tune.search.optuna import OptunaSearch

    class Trivial(tune.Trainable):  # type: ignore[misc]
        def setup(self, config: dict[str, Any]) -> None:
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.sigma, self.rung = new_config["sigma"], 0
            return True

        def step(self) -> dict[str, Any]:
            self.rung += 1
            return {"value": made_up(self.sigma, self.rung), "done": self.rung == RUNGS}

    class Ends(tune.Callback):  # type: ignore[misc]
        count = 0

        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any
        ) -> None:
            recording.reports += 1

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            self.count += 1
            recording.ended(self.count)

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="CRITICAL")
    tuner = tune.Tuner(
        tune.with_resources(Trivial, {"cpu": 1}),
        param_space={
            "sigma": tune.loguniform(0.005, 0.2),
            "targeting": tune.choice(["global", "targeted"]),
        },
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(metric="value", mode="min", seed=0) if usual else None,
            scheduler=AsyncHyperBandScheduler(
                time_attr="training_iteration", metric="value", mode="min", grace_period=1,
                max_t=RUNGS, reduction_factor=2, brackets=1,
            ),
            num_samples=trials,
            max_concurrent_trials=2,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=str(folder),
            verbose=0,
            callbacks=[Ends()],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )  # fmt: skip
    tuner.fit()
    ray.shutdown()


def by_package(trials: int, folder: Path, recording: Recording) -> None:
    """Run the search of a study on an engine that trains nothing."""
    from aqn_tune.report.tensorboard import TensorBoardWriter
    from aqn_tune.search.cluster import ray_session
    from aqn_tune.search.progress import Progress
    from aqn_tune.search.runner import run_search
    from aqn_tune.study.folder import study_folder
    from aqn_tune.study.runs import Setting
    from aqn_tune.study.schema import Study
    from aqn_tune.study.sweep import resolve_scenarios

    study = Study.model_validate(study_of(trials, folder))
    setting = Setting(model=study.model, task=study.task, model_fingerprint="made up")
    place = study_folder(study)
    place.root.mkdir(parents=True)
    board = TensorBoardWriter(place, study)
    controls: list[int] = []

    def show(progress: Progress) -> None:
        ended = progress.finished + progress.stopped + progress.failed
        others = progress.total - trials
        controls.append(others)
        recording.ended(ended - others)

    def count(rows: Sequence[Any]) -> None:
        recording.reports += sum(row.kind == "search" and row.event == "rung" for row in rows)

    with ray_session(study.compute):
        run_search(
            study, setting, resolve_scenarios(study), place, layer_count=28,
            engine=trivial_engine(), listeners=(board.write, count), progress=show,
        )  # fmt: skip
    board.close()


def study_of(trials: int, folder: Path) -> dict[str, Any]:
    """Return the search as a study."""
    dimensions = {
        "sigma_start": {"kind": "float", "low": 0.005, "high": 0.2, "log": True},
        "targeting": {"kind": "choice", "values": ["global", "targeted"]},
    }
    return {
        "study": "overhead",
        "scenario": {"faults": [{"kind": "dead_zone", "threshold": 0.1, "layers": [10]}]},
        "training": {"steps": 12, "warmup_steps": 2},
        "search": {"space": {"dimensions": dimensions}, "configs": trials, "replicates": 3},
        "compute": {"workers": 2},
        "output": str(folder / "runs"),
    }


def made_up(sigma: float, rung: int) -> float:
    """Return a loss that has a best sigma and falls from rung to rung."""
    import math

    return abs(math.log(sigma / 0.03)) + 1.0 / rung


def trivial_engine() -> Any:
    """Return an engine whose packs are at the next rung as soon as they are asked."""
    import numpy as np
    import ray.cloudpickle

    from aqn_tune.study.engine import Engine, SplitArrays

    # Workers do not have this folder on their path.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def splits(setting: Any, names: Sequence[str], max_length: int) -> Any:
        row = np.arange(max_length)[np.newaxis]
        return {name: SplitArrays(row, row > 8, row >= 0, 8, max_length) for name in names}

    return Engine(
        load_base=lambda setting: {"weight": np.zeros(64, np.float32)},
        load_splits=splits,
        open_pack=Trivial,
        rounds_alike=lambda setting, training, most: True,
    )


class Trivial:
    """A pack that trains nothing and reports what a real one would."""

    def __init__(self, pack: Any, setting: Any, shared: Any) -> None:
        self.pack = pack
        self.keys = [run.training_key(setting) for run in pack.runs]
        self.rung = 0

    def advance(self) -> Any:
        """Return the report of the next rung."""
        from aqn_tune.ledger.rows import Audit, EvaluationRow, FaultMeasure, TrainingRow
        from aqn_tune.study.engine import RungReport

        step, last = self.pack.rungs[self.rung], self.pack.rungs[-1]
        self.rung += 1
        evaluations, trainings = [], []
        for run, key in zip(self.pack.runs, self.keys, strict=True):
            sigma = max(run.noise.sigma) if run.noise else 0.01
            evaluations += [
                EvaluationRow(
                    training_key=key, step=step, final=step == last > 0, condition=to.name,
                    scenario=to.scenario, split=self.pack.split, rows=256,
                    loss=made_up(sigma, self.rung), exact_match=0.5, draws=1,
                    faults=tuple(
                        FaultMeasure(
                            kind="dead_zone", calls=1, sites=1, affected_fraction=0.5, relative_error=0.1
                        )
                        for _ in to.device.faults
                    ),
                )
                for to in run.conditions
            ]  # fmt: skip
            trainings.append(
                TrainingRow(
                    training_key=key, stage=self.pack.stage, seed=run.seed, steps=run.training.steps,
                    step_reached=step, status="finished" if step == last else "unfinished",
                    seconds=0.001, pack=self.pack.name, pack_size=len(self.pack.runs),
                    lockstep=len(self.pack.runs), train_losses=(1.0,) * 4, audit=Audit(),
                )
            )  # fmt: skip
        return RungReport(step, tuple(evaluations), tuple(trainings))

    def state(self) -> bytes:
        """Return which rung comes next."""
        return bytes([self.rung])

    def restore(self, state: bytes) -> None:
        """Go on from a state."""
        self.rung = state[0]

    def close(self) -> None:
        """There is nothing to give back."""


# -- rounds and report ------------------------------------------------------------------------------


def measure(way: str, trials: int) -> Measured:
    """Run a way in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "marks.json"
        command = [sys.executable, str(HERE / "overhead.py"), "--way", way, "--trials", str(trials)]
        done = subprocess.run(
            [*command, "--marks", str(out)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{way}: ended with {done.returncode}\n{done.stderr[-3000:]}")
        said = json.loads(out.read_text())
    marks = tuple(Mark(*mark) for mark in said["marks"])
    if len(marks) != trials:
        raise RuntimeError(f"{way}: {len(marks)} of {trials} trials ended")
    return Measured(marks, said["reports"], load()[0])


def run_way(way: str, trials: int, out: Path) -> None:
    """Run a way in this process and write its marks."""
    recording = Recording()
    with tempfile.TemporaryDirectory() as name:
        ways: dict[str, Callable[[], None]] = {
            BARE: lambda: by_ray(trials, Path(name), recording, usual=False),
            USUAL: lambda: by_ray(trials, Path(name), recording, usual=True),
            PACKAGE: lambda: by_package(trials, Path(name), recording),
        }
        ways[way]()
    out.write_text(json.dumps({"marks": recording.marks, "reports": recording.reports}))


def ratios(measured: Mapping[str, Sequence[Measured]], way: str) -> Spread:
    """Return the time per trial of the package over that of `way`, round by round."""
    pairs = zip(measured[PACKAGE], measured[way], strict=True)
    return spread([ours.per_trial / theirs.per_trial for ours, theirs in pairs])


def growth(rounds: Sequence[Measured]) -> Spread:
    """Return the time per trial in the last part over that in the first."""
    return spread([one.parts()[-1][1] / one.parts()[0][1] for one in rounds])


def memory_growth(rounds: Sequence[Measured]) -> tuple[Spread, Spread]:
    """Return MB per hundred trials, in the first half and in the second."""

    def slope(one: Measured, first: int, last: int) -> float:
        marks = one.marks
        return 100 * (marks[last].megabytes - marks[first].megabytes) / (last - first)

    end = len(rounds[0].marks) - 1
    return (
        spread([slope(one, end // PARTS, end // 2) for one in rounds]),
        spread([slope(one, end // 2, end) for one in rounds]),
    )


def print_table(console: Console, measured: Mapping[str, Sequence[Measured]], trials: int) -> None:
    """Print a line per way."""
    table = Table(title=f"{trials} trials that train nothing, two workers")
    for heading in (
        "", "ms / trial", "reports", "ms / report", "ours / it", "last eighth / first",
        "MB / 100 trials, first half", "second half",
    ):  # fmt: skip
        table.add_column(heading, justify="right" if heading else "left")
    for way, rounds in measured.items():
        first, second = memory_growth(rounds)
        per_report = [one.per_trial * len(one.marks) / one.reports for one in rounds]
        table.add_row(
            way,
            spread([one.per_trial for one in rounds]).text(),
            str(round(spread([one.reports for one in rounds]).median)),
            spread(per_report).text(),
            ratios(measured, way).text(2),
            growth(rounds).text(2),
            first.text(),
            second.text(),
        )
    console.print(table)


def picture(measured: Mapping[str, Sequence[Measured]], trials: int) -> str:
    """Return time per trial and memory against the trials that have ended, medians of the rounds."""

    def median_of(rounds: Sequence[Measured], part: int, which: int) -> float:
        return spread([one.parts()[part][which] for one in rounds]).median

    def lines(which: int) -> list[Curve]:
        return [
            Curve(
                way,
                [
                    (float(rounds[0].parts()[part][0]), median_of(rounds, part, which))
                    for part in range(PARTS)
                ],
            )
            for way, rounds in measured.items()
        ]

    return curves(
        f"{trials} trials that train nothing",
        "medians of the rounds; both axes in powers of two",
        [
            ("milliseconds per trial", "trials that have ended", lines(1)),
            ("memory of the driver, MB", "trials that have ended", lines(2)),
        ],
    )


def record(measured: Mapping[str, Sequence[Measured]], trials: int) -> dict[str, Any]:
    """Return everything as plain data."""
    return {
        "machine": machine(),
        "settings": {"trials": trials, "rungs": RUNGS, "workers": 2},
        "ways": {
            way: {
                "ms_per_trial": spread([one.per_trial for one in rounds])._asdict(),
                "ours_over_it": ratios(measured, way)._asdict(),
                "last_part_over_first": growth(rounds)._asdict(),
                "mb_per_100_trials": [part._asdict() for part in memory_growth(rounds)],
                "rounds": [
                    {"reports": one.reports, "load": one.load, "parts": one.parts()}
                    for one in rounds
                ],
            }
            for way, rounds in measured.items()
        },
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Time trials that train nothing.")
    parser.add_argument("--trials", type=int, default=1000, help="trials of each sweep")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each way once in each")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--marks", type=Path, help=argparse.SUPPRESS)
    add_out(parser, "overhead")
    options = parser.parse_args()
    if options.trials < 2 * PARTS or options.rounds < 1:
        parser.error(f"--trials is at least {2 * PARTS}, --rounds at least 1")
    if options.way:
        run_way(options.way, options.trials, options.marks)
        return
    console = Console(width=140)
    measured: dict[str, list[Measured]] = {way: [] for way in WAYS}
    for number in range(options.rounds):
        for way in WAYS if number % 2 == 0 else reversed(WAYS):
            measured[way].append(measure(way, options.trials))
            console.print(
                f"round {number + 1}, {way}: {measured[way][-1].per_trial:.1f} ms per trial"
            )
    print_table(console, measured, options.trials)
    console.print(
        f"wanted: at most {WANTED} times {BARE}; last eighth / first: a trial's time at the end of the "
        "sweep over that at its beginning"
    )
    write(
        options.out, "overhead", record(measured, options.trials), picture(measured, options.trials)
    )


if __name__ == "__main__":
    main()
