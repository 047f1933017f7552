"""The Optuna studies as an SQLite file, for optuna-dashboard and plots."""

from __future__ import annotations

import functools
import os
import sqlite3
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aqn_tune.errors import storage_error
from aqn_tune.ledger import Ledger
from aqn_tune.search.history import History
from aqn_tune.search.rungs import rung_steps
from aqn_tune.search.suggest import build_study
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study

if TYPE_CHECKING:
    from optuna import Study as OptunaStudy


OBJECTIVE = "faulty validation loss"
"""What the searches minimise, as a dashboard labels its axes."""


def export_optuna(path: Path, study: Study, scenarios: Sequence[Scenario], ledger: Ledger) -> None:
    """Write one Optuna study per scenario, named like it, to the SQLite file `path`.

    The file is made anew from the ledger and replaced as a whole. The search itself never reads it:
    a database that is ahead of the ledger after a crash would make it impossible to continue.

    Optuna wants a time of every trial, and a ledger has none: those in the file are of its making, and a
    user attribute of each study says so.

    Raises UserError where the storage does not take it; ValueError for a study without a search.
    """
    import optuna

    if study.search is None:
        raise ValueError("the study has no search")

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
                _describe(
                    build_study(
                        study.search.space, records, scenario=scenario.name, storage=storage
                    ),
                    rung_steps(study.search, study.training.steps),
                )
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


def _describe(written: OptunaStudy, steps: Sequence[int]) -> None:
    """Tell who opens the file what its numbers are."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        # So it is since version 3.2.
        warnings.simplefilter("ignore", ExperimentalWarning)
        written.set_metric_names([OBJECTIVE])
    rungs = ", ".join(f"{rung}: step {step}" for rung, step in enumerate(steps))
    written.set_user_attr("objective", f"mean {OBJECTIVE} over the search seeds, nats per token")
    written.set_user_attr("intermediate values", f"the objective at each rung ({rungs})")
    written.set_user_attr("times", "when this file was written; when a config ran is not recorded")


def _without_waiting(path: Path) -> sqlite3.Connection:
    """Return a connection that leaves it to the system when its rows are on disk."""
    # SQLAlchemy hands a connection from thread to thread, one at a time.
    connection = sqlite3.connect(path, check_same_thread=False)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA journal_mode = MEMORY")
    return connection
