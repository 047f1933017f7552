"""The steps at which a search evaluates its trainings, and the budgets that ASHA sees."""

from __future__ import annotations

from aqn_tune.study.schema import SearchSpec


def rung_steps(search: SearchSpec, steps: int) -> tuple[int, ...]:
    """Return the optimiser steps of the rungs: increasing, the last one is `steps`.

    Shares that round to the same step give one rung, so a short training may have fewer rungs than
    the study declares shares.
    """
    rounded = {max(1, round(share * steps)) for share in search.rungs}
    return tuple(sorted(rounded))


def rung_budget(reduction_factor: float, rung: int) -> float:
    """Return the resource that ASHA is told at rung `rung`: reduction_factor ** rung.

    ASHA's own milestones are these numbers, so that every rung of the study is one of ASHA's
    whatever its share of the steps.
    """
    return float(reduction_factor**rung)
