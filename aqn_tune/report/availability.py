"""Which arms cannot exist in a scenario, and why."""

from __future__ import annotations

from collections.abc import Sequence

from aqn_tune.confirm.lock import ConfirmLock
from aqn_tune.errors import UserError
from aqn_tune.study.cells import NotAvailable, named_arms, resolve_run
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study

NO_FINALIST = "no further config of the search reached the last rung with a finite loss"


def missing_by_study(study: Study, scenarios: Sequence[Scenario]) -> tuple[NotAvailable, ...]:
    """Return the arms that the study alone rules out, for the time before the lock.

    Raises UserError when the number of layers of the model cannot be read.
    """
    from aqn_tune.study.loading import layer_count

    layers = layer_count(study.model)
    found = []
    for scenario in scenarios:
        for name, arm in named_arms(study).items():
            try:
                resolve_run(study, scenario, arm, seed=0, layer_count=layers)
            except UserError as error:
                found.append(NotAvailable(scenario.name, name, str(error)))
    return tuple(found)


def missing_by_lock(
    study: Study, scenarios: Sequence[Scenario], lock: ConfirmLock
) -> tuple[NotAvailable, ...]:
    """Return the arms that were ruled out when the confirmation was locked.

    A search in which too few configs ended well leaves places for finalists empty; those are known
    before any result of the confirmation is.
    """
    listed = tuple(NotAvailable(one.scenario, one.arm, one.reason) for one in lock.missing)
    known = {(one.scenario, one.arm) for one in lock.arms}
    known |= {(one.scenario, one.arm) for one in lock.missing}
    empty = tuple(
        NotAvailable(scenario.name, name, NO_FINALIST)
        for scenario in scenarios
        for name in study.arm_names()
        if (scenario.name, name) not in known
    )
    return (*listed, *empty)
