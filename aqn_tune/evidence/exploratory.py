"""Contrasts beyond the declared family: looked at, never claimed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from aqn_tune.evidence.arms import ArmEvidence
from aqn_tune.evidence.assemble import Evidence, contrast_of
from aqn_tune.evidence.contrasts import PairedContrast
from aqn_tune.evidence.correction import benjamini_hochberg
from aqn_tune.evidence.verdicts import Undetermined

REFERENCES = ("fault_only", "global")
"""What every noised arm is compared with."""


class Exploratory(NamedTuple):
    """A contrast that was not declared. It has no verdict."""

    scenario: str
    arm: str
    reference: str
    contrast: PairedContrast | Undetermined
    q: float | None
    """Benjamini-Hochberg adjusted p-value of the paired t-test; None without a test."""


def explore(evidence: Evidence, noised: Mapping[str, Sequence[str]]) -> tuple[Exploratory, ...]:
    """Return every noised arm against fault_only and global, less the primary contrasts.

    Use it for the exploratory table of a report. Arms that are one and the same training as their
    reference are left out: there is nothing to compare.

    Args:
        evidence: of a study whose confirmation is complete.
        noised: scenario -> its arms that train with noise.

    Returns:
        The contrasts, scenario by scenario. q is adjusted over all of them, those without a test
        counted as p = 1.

    Limits: about alpha of what q < alpha lets through is false, and the arms share their
    references, so the tests are not independent.
    """
    found: list[tuple[str, str, str, PairedContrast | Undetermined]] = []
    primary = set(evidence.declared.family)
    for scenario in evidence.scenarios:
        arms = {arm.arm: arm for arm in scenario.arms}
        for name in noised.get(scenario.scenario, ()):
            for reference in REFERENCES:
                if (scenario.scenario, name, reference) in primary or reference not in arms:
                    continue
                one, other = arms[name], arms[reference]
                if _same_training(one, other):
                    continue
                contrast = contrast_of(name, one.seeds, reference, other.seeds, evidence.declared)
                found.append((scenario.scenario, name, reference, contrast))
    tests = [_p_value(contrast) for *_, contrast in found]
    adjusted = benjamini_hochberg([1.0 if p is None else p for p in tests])
    return tuple(
        Exploratory(*one, None if p is None else q)
        for one, p, q in zip(found, tests, adjusted, strict=True)
    )


def _p_value(contrast: PairedContrast | Undetermined) -> float | None:
    return None if isinstance(contrast, Undetermined) else contrast.t_p


def _same_training(one: ArmEvidence, other: ArmEvidence) -> bool:
    keys = [cell.training_key for cell in one.seeds]
    return all(keys) and keys == [cell.training_key for cell in other.seeds]
