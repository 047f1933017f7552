"""Asynchronous successive halving: one rung table per scenario."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from aqn_tune.search.rungs import rung_budget


class _Entry(NamedTuple):
    """What Ray's scheduler reads of a trial."""

    trial_id: str


class ScenarioASHA:
    """Decides which configs go on, each scenario for itself (ASHA, arXiv 1810.05934).

    Losses under different fault levels are not comparable: in one table the mildest scenario would
    stop all others. The decisions are those of `ray.tune.schedulers.AsyncHyperBandScheduler` with a
    single bracket, driven through its public methods, so that reporting the rungs of the ledger
    again in their order restores the tables exactly.
    """

    def __init__(
        self, scenarios: Iterable[str], *, rung_count: int, reduction_factor: float
    ) -> None:
        from ray.tune.schedulers import AsyncHyperBandScheduler

        self._factor = reduction_factor
        self._last = rung_count - 1
        self._tables: dict[str, Any] = {
            name: AsyncHyperBandScheduler(
                time_attr="rung_budget",
                metric="value",
                mode="min",
                grace_period=1,
                # Half a rung above the last one: the number of milestones is a rounded-down ratio
                # of logarithms, which would lose a rung where the ratio comes out as 4.999...
                max_t=reduction_factor ** (rung_count - 0.5),
                reduction_factor=reduction_factor,
                brackets=1,
            )
            for name in scenarios
        }
        self._running: set[tuple[str, str]] = set()

    def report(self, scenario: str, config: str, rung: int, value: float | None) -> bool:
        """Record the value of a config at a rung and return whether the config goes on.

        The answer is False below the cutoff of the rung, at the last rung, and for a value that is
        not finite. The first config at a rung always goes on.
        """
        table, entry = self._tables[scenario], _Entry(config)
        if (scenario, config) not in self._running:
            self._running.add((scenario, config))
            table.on_trial_add(None, entry)
        finite = value is not None and math.isfinite(value)
        # What is not finite counts as the worst of its rung. Any made-up larger number would leak
        # into the rung's quantile, which Ray interpolates, and let bad configs pass.
        judged = value if finite else self._worst(scenario, rung)
        decision = table.CONTINUE
        if judged is not None:
            budget = rung_budget(self._factor, rung)
            decision = table.on_trial_result(None, entry, {"rung_budget": budget, "value": judged})
        goes_on = finite and rung < self._last and decision == table.CONTINUE
        if not goes_on:
            self._running.discard((scenario, config))
            table.on_trial_remove(None, entry)
        return goes_on

    def _worst(self, scenario: str, rung: int) -> float | None:
        """Return the worst value recorded at a rung so far, None while there is none."""
        recorded = self.tables()[scenario][rung][1]
        return max(recorded.values(), default=None)

    def tables(self) -> dict[str, list[tuple[float, dict[str, float]]]]:
        """Return, per scenario, (budget, {config: loss}) of each rung from the first to the last."""
        return {
            name: [
                (float(budget), {config: -reward for config, reward in recorded.items()})
                for budget, recorded in reversed(table._brackets[0]._rungs)
            ]
            for name, table in self._tables.items()
        }
