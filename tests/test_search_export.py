"""The Optuna studies as a file: what becomes of a disk that does not take it."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from synthetic import make_scenarios, make_study, search_inline

from aqn_tune.errors import UserError
from aqn_tune.search.export import export_optuna
from aqn_tune.study.folder import study_folder


def test_a_disk_that_is_full_is_said_in_a_line_and_the_file_before_stays(tmp_path: Path) -> None:
    """SQLAlchemy and Optuna wrap what SQLite says: it ended in a traceback."""
    study = make_study(tmp_path, search={"configs": 3})
    folder = study_folder(study)
    ledger = search_inline(study, folder)
    before = folder.optuna.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40 << 10, limits[1]))
    try:
        with pytest.raises(UserError, match=r"optuna\.sqlite\.tmp: .*mend the storage"):
            export_optuna(folder.optuna, study, make_scenarios(study), ledger)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert folder.optuna.read_bytes() == before
