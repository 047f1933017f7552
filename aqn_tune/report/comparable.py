"""Whether the losses of two arms are losses of the same thing."""

from __future__ import annotations

from collections.abc import Sequence

from aqn_tune.errors import UserError
from aqn_tune.evidence.tables import CellResult
from aqn_tune.report.side import CONTENTS, Side
from aqn_tune.study.difference import differing
from aqn_tune.study.runs import Split

SHOWN_DIGITS = 12
"""Digits of a content hash that a message shows."""


def check_judged(one: Side, other: Side) -> None:
    """Raise UserError, with the first keys, where two sides are not judged alike."""
    incomparable = differing(other.judged, one.judged)
    if incomparable:
        shown = "; ".join(f"{d.key}: {d.old} and {d.new}" for d in incomparable[:4])
        raise UserError(
            f"{one.name} and {other.name} are not comparable: their losses are not losses of the same thing, "
            f"or not after as many steps ({shown}). Compare arms with the same model, task, steps and "
            "evaluation"
        )


def check_contents(one: Side, other: Side) -> tuple[str, ...]:
    """Return a note where the folders cannot tell whether what they name has changed.

    Raises UserError where it has.
    """
    ours, theirs = one.results.folder.root, other.results.folder.root
    if ours == theirs:
        return ()
    notes = []
    for key, what in CONTENTS.items():
        lacks = [s.results.folder.root for s in (one, other) if key not in s.contents]
        if lacks:
            where = " and ".join(str(root / "manifest.json") for root in lacks)
            notes.append(
                f"Not checked: whether both had the same {what}, of which {where} has no content hash."
            )
            continue
        new, old = one.contents[key], other.contents[key]
        if new != old:
            raise UserError(
                f"{one.name} and {other.name} are not comparable: between the two studies the {what} have "
                f"changed under the same name ({key}: content hash {old[:SHOWN_DIGITS]} in {theirs} and "
                f"{new[:SHOWN_DIGITS]} in {ours}). Run one of the two again (--fresh) with the {what} of the "
                "other"
            )
    return tuple(notes)


def check_rows(one: Side, other: Side, cells: Sequence[tuple[CellResult, CellResult]]) -> None:
    """Raise UserError where losses are over different numbers of rows."""
    for ours, theirs in cells:
        new, old = _rows(one, ours), _rows(other, theirs)
        if None not in (new, old) and new != old:
            raise UserError(
                f"{one.name} and {other.name} are not comparable: with seed {ours.seed} they were evaluated "
                f"on {new} and on {old} rows. Compare arms that were evaluated on the same rows"
            )


def _rows(side: Side, cell: CellResult) -> int | None:
    """Return how many rows the loss of a cell is over; None where it has none."""
    if cell.step is None:
        return None
    split: Split = "validation" if side.stage == "search" else "test"
    scenario = side.scenario.name
    row = side.results.evaluation(cell.training_key, cell.step, "faulty", scenario, split)
    return None if row is None else row.rows
