"""Telling a training that broke off from one that failed on its own account."""

from __future__ import annotations

from aqn_tune.ledger.rows import TrainingRow

BROKE_OFF = "broke off: "
"""Begins the error of a training that its worker did not bring to an end (killed, out of memory):
it says nothing about the training, so that controls and confirm runs are tried again next time."""


def broke_off(row: TrainingRow) -> bool:
    """Return whether a training failed for a reason outside of it."""
    return row.status == "failed" and row.error.startswith(BROKE_OFF)
