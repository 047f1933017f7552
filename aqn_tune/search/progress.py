"""What a stage shows of itself while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from aqn_tune.search.work import Best, Tally, Work
from aqn_tune.study.seeds import Stage


class Progress(NamedTuple):
    """A moment of a stage, counted in trials: packs of controls or confirm runs, and configs."""

    stage: Stage
    total: int
    finished: int
    running: int
    stopped: int
    failed: int
    best: tuple[Best, ...]
    """The best finished config of each scenario that has one."""
    seconds_left: float | None
    """Estimate from the trials of this run; None before the first has ended."""


ProgressSink = Callable[[Progress], None]
"""Shows a `Progress`. Called about once a second and at every event, from the driver's thread."""


class ProgressMeter:
    """Turns the tally of a stage into `Progress` and hands it to a sink, which decides how to show it."""

    def __init__(self, stage: Stage, work: Work, sink: ProgressSink | None) -> None:
        self._stage = stage
        self._work = work
        self._sink = sink
        self._started = self._shown = time.monotonic()
        self._steps_at_start = work.tally().steps_left

    def show(self, running: int, *, event: bool) -> None:
        """Tell the sink how things stand; without an event at most once a second."""
        now = time.monotonic()
        if self._sink is None or (not event and now - self._shown < 1.0):
            return
        self._shown = now
        tally = self._work.tally()
        self._sink(
            Progress(
                stage=self._stage,
                total=tally.total,
                finished=tally.finished,
                running=running,
                stopped=tally.stopped,
                failed=tally.failed,
                best=tally.best,
                seconds_left=self._seconds_left(tally, now),
            )
        )

    def _seconds_left(self, tally: Tally, now: float) -> float | None:
        done = self._steps_at_start - tally.steps_left
        if done <= 0:
            return None
        return (now - self._started) * tally.steps_left / done
