"""A driver that is killed, three times at fixed places; `python tests/chaos.py` does it at random ones."""

from __future__ import annotations

from pathlib import Path

import chaos
import pytest

from aqn_tune.ledger import Ledger

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> chaos.Ended:
    """A study with one worker that nobody disturbs."""
    return chaos.finish(tmp_path_factory.mktemp("quiet"), 1)


def confirm_half(quiet: chaos.Ended) -> chaos.Moment:
    rows = list(Ledger(quiet.folder.ledger).recorded())
    confirmed = [
        number
        for number, row in enumerate(rows, 1)
        if row.kind == "training" and row.stage == "confirm"
    ]
    return chaos.Moment(rows=confirmed[len(confirmed) // 2])


@pytest.mark.parametrize("stage", ["controls", "search", "confirm"])
def test_a_killed_study_comes_to_the_same_end(
    quiet: chaos.Ended, tmp_path: Path, stage: str
) -> None:
    """Search rows, rung tables, Optuna's trials, every number and verdict.json are identical."""
    moments = {
        "controls": chaos.Moment(rows=40),
        "search": chaos.search_half(quiet),
        "confirm": confirm_half(quiet),
    }
    done = chaos.killed(tmp_path, quiet, moments[stage])
    assert done.rungs > 0
    assert done.defects == ()


def test_a_scheduler_that_forgets_is_found_out(quiet: chaos.Ended, tmp_path: Path) -> None:
    done = chaos.killed(tmp_path, quiet, chaos.search_half(quiet), forget=True)
    assert done.defects
