"""The Optuna studies as an SQLite file, for optuna-dashboard and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aqn_tune.errors import storage_error
from aqn_tune.ledger import Ledger
from aqn_tune.search.history import History
from aqn_tune.search.suggest import build_study
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.space import SpaceSpec


def export_optuna(
    path: Path, space: SpaceSpec, scenarios: Sequence[Scenario], ledger: Ledger
) -> None:
    """Write one Optuna study per scenario, named like it, to the SQLite file `path`.

    The file is made anew from the ledger and replaced as a whole. The search itself never reads it:
    a database that is ahead of the ledger after a crash would make it impossible to continue.

    Raises UserError where the storage does not take it.
    """
    import optuna

    history = History(scenario.name for scenario in scenarios)
    for row in ledger.search:
        history.apply(row)
    new = path.with_name(path.name + ".tmp")
    new.unlink(missing_ok=True)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{new}")
        try:
            for scenario in scenarios:
                records = history.records(scenario.name)
                build_study(space, records, scenario=scenario.name, storage=storage)
        finally:
            storage.remove_session()
            storage.engine.dispose()
        new.replace(path)
    except Exception as error:
        # Optuna and SQLAlchemy wrap what SQLite says of a full disk.
        mendable = storage_error(error, new)
        if mendable is None:
            raise
        raise mendable from error
