"""The Optuna studies as an SQLite file, for optuna-dashboard and plots."""

from __future__ import annotations

import functools
import os
import sqlite3
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
        # Waiting for the disk after each row takes longer than all else, and half a file is never seen.
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{new}", engine_kwargs={"creator": functools.partial(_without_waiting, new)}
        )
        try:
            for scenario in scenarios:
                records = history.records(scenario.name)
                build_study(space, records, scenario=scenario.name, storage=storage)
        finally:
            storage.remove_session()
            storage.engine.dispose()
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
    except Exception as error:
        # Optuna and SQLAlchemy wrap what SQLite says of a full disk.
        mendable = storage_error(error, new)
        if mendable is None:
            raise
        raise mendable from error


def _without_waiting(path: Path) -> sqlite3.Connection:
    """Return a connection that leaves it to the system when its rows are on disk."""
    # SQLAlchemy hands a connection from thread to thread, one at a time.
    connection = sqlite3.connect(path, check_same_thread=False)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA journal_mode = MEMORY")
    return connection
