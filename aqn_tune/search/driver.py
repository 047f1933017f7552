"""The side of a stage that Ray Tune talks to: searcher, scheduler, callback and stopper.

All four only pass on what happens to one `Driver`; it alone knows the work.
"""

from __future__ import annotations

import pickle
import re
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from aqn_tune.errors import UserError
from aqn_tune.search.progress import ProgressMeter
from aqn_tune.search.trainable import report_of
from aqn_tune.search.work import Work
from aqn_tune.study.runs import Pack

_COLOUR = re.compile(r"\x1b\[\d*m")


class Driver:
    """Hands packs to Ray and reports to the work, and remembers why a stage has to end early."""

    def __init__(self, work: Work, meter: ProgressMeter | None = None) -> None:
        self.work = work
        self.running: dict[str, Pack] = {}
        self.fatal: Exception | None = None
        """What went wrong on the driver. Ray would turn it into a text inside a TuneError."""
        self.stop_asked = False
        """Set by a signal: hand out nothing more and end."""
        self._meter = meter

    def __getstate__(self) -> dict[str, Any]:
        """Leave the progress display behind: Ray pickles its searcher, a terminal is not picklable."""
        return {**self.__dict__, "_meter": None}

    @property
    def ending(self) -> bool:
        """Whether the stage has to end before its work is done."""
        return self.stop_asked or self.fatal is not None

    def next_pack(self) -> Pack | None:
        """Return the next pack to run, None when there is none or the stage is ending."""
        if self.ending:
            return None
        try:
            pack = self.work.next_pack()
        except Exception as error:
            self.fatal = error
            return None
        if pack is not None:
            self.running[pack.name] = pack
        self.show(event=True)
        return pack

    def result(self, result: dict[str, Any]) -> bool:
        """Take in what a worker reported; return whether it goes on to the next rung."""
        if self.ending:
            return False
        pack = self.running[result["pack"]]
        try:
            goes_on = self._take(pack, result)
        except Exception as error:
            self.fatal = error
            return False
        if not goes_on:
            del self.running[pack.name]
        self.show(event=True)
        return goes_on

    def _take(self, pack: Pack, result: dict[str, Any]) -> bool:
        if result.get("user_error"):
            raise UserError(result["user_error"])
        if "error" in result:
            self.work.broke(pack, result["error"])
            return False
        return self.work.arrived(pack, report_of(result))

    def lost(self, name: str, error: str) -> None:
        """Take in that the worker of a pack died more often than it is retried."""
        pack = self.running.pop(name, None)
        if pack is None or self.ending:
            return
        try:
            self.work.broke(pack, error)
        except Exception as failure:
            self.fatal = failure
        self.show(event=True)

    def show(self, *, event: bool) -> None:
        """Show how things stand."""
        if self._meter is not None:
            self._meter.show(len(self.running), event=event)


class StudySearcher(Searcher):  # type: ignore[misc]
    """Gives Ray the next pack as a trial's config. It learns nothing: the scheduler hears results."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return the config of the next trial, FINISHED when there is none."""
        pack = self.driver.next_pack()
        if pack is None:
            return str(Searcher.FINISHED)
        return {"name": pack.name, "pack": pack.model_dump_json()}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: what ended a trial is in the ledger already."""

    def save(self, checkpoint_path: str) -> None:
        """Write a pickle, for Ray's own snapshot; a study continues from its ledger instead."""
        with open(checkpoint_path, "wb") as file:
            pickle.dump(self, file)

    def restore(self, checkpoint_path: str) -> None:
        """Refuse: a snapshot of Ray may be older than the ledger."""
        raise UserError("a search continues from its ledger; run the study again")


class LedgerScheduler(FIFOScheduler):  # type: ignore[misc]
    """Asks the driver at every result whether the trial goes on.

    Trials never report `done`: the last rung, too, comes by here, so every result takes one way.
    """

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return CONTINUE or STOP."""
        goes_on = self.driver.result(result)
        return str(self.CONTINUE if goes_on else self.STOP)


class DriverCallback(Callback):  # type: ignore[misc]
    """Tells the driver about lost workers and passing time."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Drop the report from the result, which Ray would keep for every trial."""
        result.pop("report", None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Report a trial that Ray gave up."""
        cause = _cause(trial)
        if "creation task" in cause:
            # No pack was reached: every other trial would end in the same way.
            self.driver.fatal = RuntimeError(f"a worker cannot start: {cause}")
        times = trial.run_metadata.num_failures
        self.driver.lost(trial.config["name"], f"its worker died {times} times, last: {cause}")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Let the display count."""
        self.driver.show(event=False)


class DriverStopper(Stopper):  # type: ignore[misc]
    """Ends all trials when the stage has to end."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: single trials are stopped by the scheduler."""
        return False

    def stop_all(self) -> bool:
        """Return whether the stage is ending."""
        return self.driver.ending


def _cause(trial: Any) -> str:
    """Return what Ray recorded last for a trial, on one line."""
    with open(trial.error_file, encoding="utf-8") as file:
        text = file.read().split("Failure # ")[-1]
    lines = [_COLOUR.sub("", line).strip() for line in text.splitlines()[1:] if line.strip()]
    if not lines:
        return "unknown"
    return lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
