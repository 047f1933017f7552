"""Which arms have no runs in a scenario, and why."""

from __future__ import annotations

from collections.abc import Sequence

from aqn_tune.errors import UserError
from aqn_tune.ledger.rows import CellRow, LedgerRow
from aqn_tune.study.cells import NotAvailable, named_arms, resolve_run
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study

NO_FINALIST = "no further config of the search reached the last rung with a finite loss"
NO_TWIN = "the finalist trains without noise, so there is none to target"


def not_available(
    study: Study, scenarios: Sequence[Scenario], rows: Sequence[LedgerRow]
) -> tuple[NotAvailable, ...]:
    """Return the arms without cells in a scenario, each with its reason.

    Before the confirmation has cells, only arms that the study alone decides on are returned.
    """
    from aqn_tune.study.loading import layer_count

    have = {
        (row.scenario, row.arm)
        for row in rows
        if isinstance(row, CellRow) and row.stage == "confirm"
    }
    named = named_arms(study)
    names = study.arm_names() if have else tuple(named)
    wanted = [(s, name) for s in scenarios for name in names if (s.name, name) not in have]
    if not wanted:
        return ()
    try:
        layers = layer_count(study.model)
    except UserError as error:
        reason = f"it has no runs; why cannot be told, because {error}"
        return tuple(NotAvailable(s.name, name, reason) for s, name in wanted if have)
    found = []
    for scenario, name in wanted:
        arm = named.get(name)
        if arm is None:
            parent = name.removesuffix("_none").removesuffix("_global")
            confirmed = parent != name and (scenario.name, parent) in have
            found.append(NotAvailable(scenario.name, name, NO_TWIN if confirmed else NO_FINALIST))
            continue
        try:
            resolve_run(study, scenario, arm, seed=0, layer_count=layers)
        except UserError as error:
            found.append(NotAvailable(scenario.name, name, str(error)))
    return tuple(found)
