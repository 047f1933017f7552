"""Contrasts beyond the declared family: which there are, and what they may not become."""

from __future__ import annotations

import pytest
from scipy import stats
from test_evidence_assemble import DECLARED, LAST, SCENARIO, ledger, training

from aqn_tune.evidence import PairedContrast, Undetermined
from aqn_tune.evidence.assemble import assemble
from aqn_tune.evidence.exploratory import Exploratory, explore
from aqn_tune.ledger.rows import CellRow, LedgerRow

NOISED = {SCENARIO: ("global", "targeted", "finalist1")}
FAMILY = ((SCENARIO, "targeted", "fault_only"),)


def explored(rows: list[LedgerRow]) -> dict[str, Exploratory]:
    evidence = assemble(rows, DECLARED.model_copy(update={"family": FAMILY, "decisions": None}))
    return {f"{one.arm} {one.reference}": one for one in explore(evidence, NOISED)}


def test_every_noised_arm_that_is_not_primary_is_compared_once() -> None:
    found = explored(ledger())
    assert list(found) == [
        "global fault_only", "targeted global", "finalist1 fault_only", "finalist1 global",
    ]  # fmt: skip
    one = found["finalist1 global"].contrast
    assert isinstance(one, PairedContrast)
    assert one.improvement == pytest.approx(0.1, abs=1e-3)
    tests = [
        each.contrast.t_p for each in found.values() if isinstance(each.contrast, PairedContrast)
    ]
    assert [each.q for each in found.values()] == pytest.approx(
        stats.false_discovery_control(tests)
    )


def test_a_failed_arm_has_no_number_and_makes_no_other_easier() -> None:
    whole = explored(ledger())
    found = explored([*ledger(), training(LAST, status="failed", error="worker died")])
    failed = found["targeted global"]
    assert isinstance(failed.contrast, Undetermined)
    assert "worker died" in failed.contrast.reason
    assert failed.q is None
    for name, one in found.items():
        if one is not failed:
            assert one.q is not None
            assert one.q >= (whole[name].q or 1.0)


def test_an_arm_that_is_the_same_training_is_not_compared() -> None:
    rows = [
        row.model_copy(update={"training_key": row.training_key.replace("targeted", "global")})
        if isinstance(row, CellRow)
        else row
        for row in ledger()
    ]
    assert "targeted global" not in explored(rows)
