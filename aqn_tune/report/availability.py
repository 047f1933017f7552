"""Which arms cannot exist in a scenario, and why, before the lock tells."""

from __future__ import annotations

from collections.abc import Sequence

from aqn_tune.errors import UserError
from aqn_tune.study.cells import NotAvailable, named_arms, resolve_run
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study


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
