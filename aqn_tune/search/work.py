"""What a stage has to do, as Ray sees it: packs to hand out, reports to take in."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

from aqn_tune.ledger import Ledger
from aqn_tune.ledger.broken import broke_off
from aqn_tune.search.record import Recorder
from aqn_tune.search.state import drop_state, read_state, state_path
from aqn_tune.study.engine import RungReport
from aqn_tune.study.runs import Pack, Run, Setting


class Best(NamedTuple):
    """The best finished config so far."""

    scenario: str
    config: str
    value: float
    """Mean faulty validation loss at the last rung."""


class Tally(NamedTuple):
    """How far a stage has come, counted in trials (packs and configs)."""

    total: int
    finished: int
    stopped: int
    failed: int
    best: tuple[Best, ...]
    """Per scenario that has one."""
    steps_left: float
    """Estimated replica-steps still to train."""

    @property
    def left(self) -> int:
        """Trials that have not ended."""
        return self.total - self.finished - self.stopped - self.failed


class Work(Protocol):
    """The trials of a stage. Called by one thread, in the order in which things happen."""

    def next_pack(self) -> Pack | None:
        """Return the next pack to run, None when all have been handed out."""

    def arrived(self, pack: Pack, report: RungReport) -> bool:
        """Record what `pack` reported at a rung; return whether it goes on to the next one."""

    def broke(self, pack: Pack, error: str) -> None:
        """Record that `pack` will report no more: its worker died too often, or raised."""

    def tally(self) -> Tally:
        """Return how far the stage has come."""


class FixedPacks:
    """A list of packs known beforehand, run in order and never stopped: controls, confirm runs.

    A pack that breaks off is tried again when the study is run the next time.
    """

    def __init__(
        self, packs: Iterable[Pack], *, setting: Setting, recorder: Recorder, state: Path
    ) -> None:
        self._recorder = recorder
        self._state = state
        self._keys: dict[str, tuple[str, ...]] = {}
        self._failed: set[str] = set()
        self.broken: dict[str, str] = {}
        """Why each pack broke off that did, by name. For the untrained base also why it failed: it has no row
        to say it in."""
        self._running: dict[str, Pack] = {}
        self._done = 0
        self._queue: deque[Pack] = deque()
        self._total = 0
        for pack in packs:
            self._total += 1
            left = unfinished_pack(pack, recorder.ledger, setting, state)
            if left is None:
                self._done += 1
                continue
            self._keys[left.name] = tuple(run.training_key(setting) for run in left.runs)
            self._queue.append(left)

    @property
    def queued(self) -> tuple[Pack, ...]:
        """The packs that have not been handed out."""
        return tuple(self._queue)

    def owns(self, pack: Pack) -> bool:
        """Return whether `pack` was handed out here."""
        return pack.name in self._running

    def next_pack(self) -> Pack | None:
        """See `Work.next_pack`."""
        if not self._queue:
            return None
        pack = self._queue.popleft()
        self._running[pack.name] = pack
        return pack

    def arrived(self, pack: Pack, report: RungReport) -> bool:
        """See `Work.arrived`: goes on until the last rung, or until every run has failed."""
        self._recorder.report(pack, (*report.evaluations, *report.trainings))
        failed = [row for row in report.trainings if row.status == "failed"]
        if failed and pack.rungs == (0,):
            self.broken[pack.name] = failed[0].error
        if report.step < pack.rungs[-1] and len(failed) < len(pack.runs):
            return True
        self._end(pack, failed=bool(failed))
        return False

    def broke(self, pack: Pack, error: str) -> None:
        """See `Work.broke`."""
        if pack.rungs != (0,):
            self._recorder.broke(pack, self._keys[pack.name], error)
        self.broken[pack.name] = error
        self._end(pack, failed=True)

    def _end(self, pack: Pack, *, failed: bool) -> None:
        del self._running[pack.name]
        drop_state(state_path(self._state, pack))
        self._done += not failed
        if failed:
            self._failed.add(pack.name)

    def tally(self) -> Tally:
        """See `Work.tally`."""
        waiting = (*self._queue, *self._running.values())
        left = float(sum(pack.rungs[-1] * len(pack.runs) for pack in waiting))
        return Tally(self._total, self._done, 0, len(self._failed), (), left)


def unfinished_pack(pack: Pack, ledger: Ledger, setting: Setting, state: Path) -> Pack | None:
    """Return what is left to run of `pack`: itself, some of its runs, or None.

    A run is done when it failed on its own account, or is finished and evaluated at every rung under
    every condition; one that serves a cell alone, when that cell has trained it. A pack with a state
    file is continued whole.
    """
    keys = [run.training_key(setting) for run in pack.runs]
    left = {
        key: run
        for key, run in zip(keys, pack.runs, strict=True)
        if not _done(pack, run, key, ledger)
    }
    if not left:
        return None
    if len(left) == len(pack.runs) or read_state(state_path(state, pack), pack) is not None:
        return pack
    return pack.only(left)


def _done(pack: Pack, run: Run, key: str, ledger: Ledger) -> bool:
    if key in pack.own:
        own = ledger.own_trainings.get((key, pack.own[key]))
        return own is not None and own.status != "unfinished"
    if pack.rungs != (0,):
        training = ledger.trainings.get(key)
        if training is None or training.status == "unfinished" or broke_off(training):
            return False
        if training.status == "failed":
            return True
    return all(
        ledger.evaluation(key, step, condition.name, condition.scenario, pack.split) is not None
        for step in pack.rungs
        for condition in run.conditions
    )
