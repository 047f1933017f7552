"""Kill the driver of a study at random moments, continue it, and hold its end against that of a quiet one.

    python tests/chaos.py [--kills 20] [--workers 1 2] [--seed 0]

Each round starts a study in a process of its own, kills that process with SIGKILL after a random part of
the time that the quiet study took (start, search, lock, confirmation and report all come by), runs the study
again to its end and compares. With one worker everything has to be identical: the search rows in their
order, configs as Optuna has them, rung tables, every number and verdict.json. With two, which of them
is first is left to chance, so that other configs may be proposed: then no row may be lost, nothing that the
ledger holds may be trained again, every control has to be there, and each training has the numbers that its
key has in the quiet study.

A driver that comes to its end before it is killed is compared as well and counts as no kill: the rounds go on
until so many were killed, or twice as many have been tried. One that ends in any other way is a defect. A
control drops what the scheduler knew before the study goes on, and has to be found out.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from synthetic import LAYERS, make_setting, make_study

from aqn_tune.errors import UserError
from aqn_tune.ledger import Ledger
from aqn_tune.search.record import Recorder
from aqn_tune.search.runner import control_packs
from aqn_tune.search.search_work import SearchWork
from aqn_tune.search.suggest import build_study
from aqn_tune.search.work import FixedPacks
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.schema import Study
from aqn_tune.study.sweep import resolve_scenarios

DRIVER = """
import sys
sys.path.insert(0, {tests!r})
from synthetic import *
from aqn_tune.cli import run
from aqn_tune.cli.output import ProgressLine
import chaos
run.make_setting = make_setting
if {forget}:
    chaos.forget_the_scheduler()
behaviour = Behaviour(sleep={sleep}, log={log!r}, late=2.0)
run.run_study(chaos.study_in({out!r}, {workers}), engine=engine(behaviour), progress=ProgressLine(quiet=True))
"""
SLEEP = 0.05
"""Seconds of a rung: long enough that a kill meets trainings under way."""
TIMES = {"seconds", "eval_seconds", "generate_seconds"}
ELSEWHERE = {"lock_hash", "times"}
"""Of verdict.json: the lock holds the time at which it was made."""
LIMIT = 300.0
"""Seconds after which a driver that has not ended hangs."""
KILLED = -signal.SIGKILL
"""What a driver returns that was killed."""
Stage = Literal["start", "controls", "search", "confirm", "report"]


class Ended(NamedTuple):
    """A study that has come to its end, and what its workers have trained."""

    study: Study
    folder: StudyFolder
    log: Path
    seconds: float


class Moment(NamedTuple):
    """When a driver is killed: whichever comes first."""

    seconds: float = LIMIT
    """After the start of its process."""
    rows: int = 1 << 30
    """In its ledger."""


class Round(NamedTuple):
    """What one kill did."""

    code: int
    """What the driver returned: KILLED, or 0 where it had come to its end before."""
    stage: Stage
    """What the study was at when the driver ended."""
    rungs: int
    """Rungs of trainings in the ledger at that moment."""
    seconds: float
    """How long the driver ran."""
    defects: tuple[str, ...]


def study_in(out: Path | str, workers: int) -> Study:
    """Return the study: two dead zones, controls and six configs in each, confirmed on six seeds."""
    return make_study(
        out,
        sweep={"faults.0.threshold": [0.1, 0.3]},
        search={"configs": 6},
        compute={"workers": workers, "pack_replicas": 4},
    )


def forget_the_scheduler() -> None:
    """Let a search that goes on begin with empty rung tables, as a restored Ray Tune does."""
    from aqn_tune.search import search_work

    replay = SearchWork._replay

    def forgetful(self: SearchWork) -> None:
        replay(self)
        self.asha = search_work.ScenarioASHA(
            self._scenarios,
            rung_count=len(self.rungs),
            reduction_factor=self._spec.reduction_factor,
        )

    SearchWork._replay = forgetful  # type: ignore[method-assign]


def start(root: Path, workers: int, *, forget: bool = False) -> subprocess.Popen[str]:
    """Start or continue the study below `root` in a process of its own."""
    code = DRIVER.format(
        tests=str(Path(__file__).parent), out=str(root / "runs"), log=str(root / "log"),
        sleep=SLEEP, workers=workers, forget=forget,
    )  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def output(driver: subprocess.Popen[str], limit: float = LIMIT) -> tuple[str, str]:
    """Wait for a driver and return what it printed; TimeoutExpired, and no driver left, where it hangs."""
    try:
        return driver.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        driver.kill()
        driver.communicate()
        raise


def finish(root: Path, workers: int, *, forget: bool = False) -> Ended:
    """Run the study below `root` to its end; RuntimeError with its output where it does not get there."""
    began = time.monotonic()
    driver = start(root, workers, forget=forget)
    out, err = output(driver)
    if driver.returncode:
        raise RuntimeError(f"the driver ended with {driver.returncode}:\n{out}\n{err}")
    study = study_in(root / "runs", workers)
    return Ended(study, study_folder(study), root / "log", time.monotonic() - began)


def killed(root: Path, quiet: Ended, moment: Moment, *, forget: bool = False) -> Round:
    """Kill a study at a moment, run it again to its end and compare it with `quiet`.

    A driver that has ended by then is not killed; what it left is run again and compared all the same.
    """
    workers = int(quiet.study.compute.workers)
    folder = study_folder(study_in(root / "runs", workers))
    driver = start(root, workers)
    began = time.monotonic()
    try:
        while driver.poll() is None and time.monotonic() - began < moment.seconds:
            if folder.ledger.exists() and folder.ledger.read_bytes().count(b"\n") >= moment.rows:
                break
            time.sleep(0.01)
        ran = time.monotonic() - began
        hung = ran >= LIMIT
    finally:
        driver.kill()
        _, err = driver.communicate()
    before = folder.ledger.read_bytes() if folder.ledger.exists() else b""
    held = Ledger(folder.ledger)
    recorded = {(row.pack, row.step_reached) for row in held.rungs.values()}
    seen = len(_lines(root / "log"))
    ended = finish(root, workers, forget=forget)
    defects = ["the driver hung"] if hung else _crashed(driver.returncode, err)
    defects += _lost(before, ended)
    defects += _again(recorded, _lines(ended.log)[seen:])
    defects += _differences(quiet, ended) if workers == 1 else _other_numbers(quiet, ended)
    return Round(driver.returncode, stage_of(held), len(held.rungs), ran, tuple(defects))


def stage_of(ledger: Ledger) -> Stage:
    """Return what a study is at whose ledger is this one."""
    confirmed = [cell.training_key for cell in ledger.cells.values() if cell.stage == "confirm"]
    if confirmed:
        rows = [ledger.trainings.get(key) for key in confirmed]
        left = any(row is None or row.status == "unfinished" for row in rows)
        return "confirm" if left else "report"
    if ledger.search:
        return "search"
    return "controls" if ledger.rungs else "start"


def _crashed(code: int, err: str) -> list[str]:
    """Return whether a driver that was to be killed had ended otherwise than by coming to its end."""
    last = (err.strip().splitlines() or ["nothing"])[-1]
    return [] if code in (0, KILLED) else [f"the driver ended with {code} by itself: {last}"]


def _lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def _lost(before: bytes, ended: Ended) -> list[str]:
    """Return whether a row that was on disk is not there any more."""
    whole = before[: before.rfind(b"\n") + 1]
    kept = ended.folder.ledger.read_bytes().startswith(whole)
    return [] if kept else ["the ledger does not begin with what was on disk"]


def _again(recorded: set[tuple[str, int]], lines: list[str]) -> list[str]:
    """Return what was trained again though the ledger held it."""
    trained = {(pack, int(step)) for pack, step, _ in (line.split() for line in lines)}
    return [f"{pack} was trained to step {step} again" for pack, step in sorted(recorded & trained)]


def picture(ended: Ended) -> dict[str, Any]:
    """Return everything about a study that must not depend on interruptions."""
    study, folder = ended.study, ended.folder
    ledger, scenarios, setting = (
        Ledger(folder.ledger),
        resolve_scenarios(study),
        make_setting(study),
    )
    recorder = Recorder(ledger, folder.root)
    packs = control_packs(study, setting, scenarios, recorder, layer_count=LAYERS)
    work = SearchWork(
        study, setting, scenarios, layer_count=LAYERS, recorder=recorder, state=folder.state,
        controls=FixedPacks(packs, setting=setting, recorder=recorder, state=folder.state),
    )  # fmt: skip
    verdict = json.loads(folder.verdict.read_text())
    assert study.search is not None
    space = study.search.space
    return {
        "search rows": [row.model_dump() for row in ledger.search],
        "rung tables": work.asha.tables(),
        "optuna": {
            scenario.name: [
                (
                    trial.number,
                    trial.state.name,
                    trial.params,
                    trial.values,
                    trial.intermediate_values,
                )
                for trial in build_study(
                    space, work.history.records(scenario.name), scenario=scenario.name
                ).trials
            ]
            for scenario in scenarios
        },
        "cells": {key: row.model_dump() for key, row in ledger.cells.items()},
        **numbers(ended),
        "verdict": {k: v for k, v in verdict.items() if k not in ELSEWHERE},
    }


def numbers(ended: Ended) -> dict[str, dict[Any, Any]]:
    """Return every rung of every training and every evaluation, by training key and what else identifies it.

    A training that has gone further than another has the other's rungs, and the same numbers there.
    """
    ledger = Ledger(ended.folder.ledger)
    return {
        "rungs": {key: row.model_dump(exclude=TIMES) for key, row in ledger.rungs.items()},
        "evaluations": {key: row.model_dump() for key, row in ledger.evaluations.items()},
    }


def _differences(quiet: Ended, ended: Ended) -> list[str]:
    try:
        expected, found = picture(quiet), picture(ended)
    except UserError as error:
        return [f"the ledger contradicts itself: {error}"]
    return [f"{name} differ" for name in expected if expected[name] != found[name]]


def _other_numbers(quiet: Ended, ended: Ended) -> list[str]:
    """Compare what both studies have trained: all controls and arms, and configs that both have proposed."""
    defects = []
    fixed, there = _fixed(quiet), _fixed(ended)
    if fixed != there:
        defects.append("the controls are not the same trainings")
    certain = {*fixed.values(), *there.values()}
    expected, found = numbers(quiet), numbers(ended)
    apart = {"pack", "pack_size", "lockstep"}
    for kind, rows in expected.items():
        alone = [key for key in rows.keys() ^ found[kind].keys() if key[0] in certain]
        if alone:
            defects.append(f"{len(alone)} {kind} of controls are in one of the studies alone")
        shared = rows.keys() & found[kind].keys()
        other = [
            key
            for key in shared
            if {k: v for k, v in rows[key].items() if k not in apart}
            != {k: v for k, v in found[kind][key].items() if k not in apart}
        ]
        if other:
            defects.append(f"{len(other)} of {len(shared)} {kind} have other numbers")
    return defects


def _fixed(ended: Ended) -> dict[Any, str]:
    """Return the training of every cell that does not hang on what the search proposes."""
    cells = Ledger(ended.folder.ledger).cells
    return {cell: row.training_key for cell, row in cells.items() if not row.config}


def search_half(quiet: Ended) -> Moment:
    """Return the moment at which half of the search's decisions are in the ledger."""
    rows = list(Ledger(quiet.folder.ledger).recorded())
    decisions = [number for number, row in enumerate(rows, 1) if row.kind == "search"]
    return Moment(rows=decisions[len(decisions) // 2])


def _met(done: Round) -> str:
    return f"killed in {done.stage}" if done.code == KILLED else f"ended with {done.code}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rounds; return 1 where one or the control did not end as it has to, or too few were killed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=20, help="drivers killed for each number of workers"
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2], help="workers of the study"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args(arguments)
    moments = random.Random(options.seed)
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        for workers in options.workers:
            quiet = finish(Path(name) / f"quiet{workers}", workers)
            print(f"{workers} worker(s), undisturbed: {quiet.seconds:.0f} s", flush=True)
            rounds: list[Round] = []
            # The quiet study may have had a slower machine than the rounds.
            whole = quiet.seconds
            for number in range(2 * options.kills):
                if sum(one.code == KILLED for one in rounds) == options.kills:
                    break
                after = moments.uniform(0.05, 1.0) * whole
                done = killed(Path(name) / f"{workers}-{number}", quiet, Moment(seconds=after))
                rounds.append(done)
                whole = whole if done.code == KILLED else min(whole, done.seconds)
                said = "; ".join(done.defects) or "as undisturbed"
                print(
                    f"  {number + 1:2d}: after {after:4.1f} s {_met(done)}, {done.rungs:3d} rungs: {said}",
                    flush=True,
                )
            kills = [one for one in rounds if one.code == KILLED]
            stages = Counter(one.stage for one in kills)
            print(
                f"{workers} worker(s): {len(kills)} drivers killed in {len(rounds)} rounds "
                f"({', '.join(f'{count} in {stage}' for stage, count in stages.items())}), "
                f"{sum(not one.defects for one in kills)} of {len(kills)} as undisturbed",
                flush=True,
            )
            bad += sum(bool(one.defects) for one in rounds) + (len(kills) < options.kills)
        quiet = finish(Path(name) / "control-quiet", 1)
        control = killed(Path(name) / "control", quiet, search_half(quiet), forget=True)
        found = "found out: " + "; ".join(control.defects) if control.defects else "NOT FOUND OUT"
        print(f"control, scheduler forgotten, {_met(control)}: {found}", flush=True)
        bad += control.code != KILLED or not control.defects
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
