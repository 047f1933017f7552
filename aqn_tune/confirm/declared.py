"""What a lock declares, in the terms of evidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aqn_tune.confirm.lock import ConfirmLock
from aqn_tune.confirm.margins import locked_margins
from aqn_tune.evidence.declared import Declared, declare
from aqn_tune.study.cells import NotAvailable
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study

NO_FINALIST: Final = "no further config of the search reached the last rung with a finite loss"


def locked_declaration(
    study: Study,
    scenarios: Sequence[Scenario],
    lock: ConfirmLock,
    missing: Sequence[NotAvailable],
) -> Declared:
    """Return what was declared; where the lock and the study differ, the lock holds.

    Args:
        study: the resolved study.
        scenarios: its scenarios.
        lock: of the generation.
        missing: see `missing_by_lock`.
    """
    # A search whose clean arm gained nothing has no G to take a margin from.
    margin = lock.margin if lock.margin is not None and lock.margin > 0 else None
    declared = declare(study, scenarios, missing, margin=margin)
    absent = {(one.scenario, one.arm) for one in missing}
    family = tuple(
        (scenario.name, arm, reference)
        for scenario in scenarios
        for arm, reference in lock.contrasts
        if not absent & {(scenario.name, arm), (scenario.name, reference)}
    )
    return declared.model_copy(
        update={
            "family": family,
            "replicates": lock.replicates,
            "looks": lock.looks,
            "generation": lock.generation,
            "alpha": lock.alpha,
            "power": lock.power,
            "margin_rule": lock.rule(),
            "margins": locked_margins(lock, [one.name for one in scenarios]),
        }
    )


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
