"""Which configs go to the confirmation."""

from __future__ import annotations

from aqn_tune.ledger import Ledger
from aqn_tune.search.history import ConfigRecord, History
from aqn_tune.study.cells import Finalist
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study


def finalists(ledger: Ledger, scenario: Scenario, study: Study) -> tuple[Finalist, ...]:
    """Return the best configs of a scenario's search, at most `study.finalist_count()`.

    They are ranked by the mean faulty validation loss at the last rung, over the same seeds; ties go
    to the config asked first. A config that was stopped or failed is never among them, however low
    its value at an earlier rung. Of configs that come to the same trainings only the first counts.
    """
    history = History([scenario.name])
    for row in ledger.search:
        if row.scenario == scenario.name:
            history.apply(row)
    ranked = sorted(
        (r for r in history.records(scenario.name) if r.status == "finished"),
        key=lambda record: (_value(record), record.number),
    )
    chosen: dict[tuple[str, ...], ConfigRecord] = {}
    for record in ranked:
        chosen.setdefault(_training_keys(ledger, scenario, record), record)
    best = list(chosen.values())[: study.finalist_count()]
    return tuple(
        Finalist(scenario.name, rank, record.config, record.params)
        for rank, record in enumerate(best, 1)
    )


def _value(record: ConfigRecord) -> float:
    value = record.values[-1]
    if value is None:
        raise ValueError(f"config {record.config} finished without a value")
    return value


def _training_keys(ledger: Ledger, scenario: Scenario, record: ConfigRecord) -> tuple[str, ...]:
    return tuple(
        row.training_key
        for row in ledger.cells.values()
        if row.stage == "search" and (row.scenario, row.config) == (scenario.name, record.config)
    )
