"""What a training has taken is the sum over its rungs, whoever reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import TrainingRow


def rung(
    key: str, step: int, seconds: float, evaluating: float, writing: float, compiling: float = 0.0
) -> TrainingRow:
    return TrainingRow(
        training_key=key, stage="confirm", seed=1, steps=20, step_reached=step,
        status="finished" if step == 20 else "unfinished", seconds=seconds, eval_seconds=evaluating,
        generate_seconds=writing, compile_seconds=compiling, pack="p", pack_size=2,
    )  # fmt: skip


ROWS = [
    rung("one", 5, 8.0, 2.0, 0.0, 0.5),
    rung("other", 5, 4.0, 1.0, 0.5),
    rung("one", 10, 16.0, 4.0, 1.0, 0.25),
    rung("one", 20, 32.0, 8.0, 2.0),
]
SPENT = {"one": (56.0, 14.0, 3.0, 0.75), "other": (4.0, 1.0, 0.5, 0.0)}
"""Seconds, of them evaluating, of them writing answers, of them compiling."""


def spent(ledger: Ledger) -> dict[str, tuple[float, ...]]:
    times = (ledger.seconds, ledger.eval_seconds, ledger.generate_seconds, ledger.compile_seconds)
    return {key: tuple(time[key] for time in times) for key in ledger.trainings}


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_times_are_summed_over_the_rungs(tmp_path: Path, at_once: int) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for first in range(0, len(ROWS), at_once):
        ledger.append(ROWS[first : first + at_once])
    assert spent(ledger) == SPENT
    assert spent(Ledger(ledger.path)) == SPENT
