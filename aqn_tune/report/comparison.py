"""Two arms, of one study or of two, side by side: in what they differ, and by how much.

Nothing here was declared before the runs, so nothing here is a verdict.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from aqn_tune.errors import UserError
from aqn_tune.evidence.assemble import contrast_of
from aqn_tune.evidence.contrasts import PairedContrast
from aqn_tune.evidence.correction import benjamini_hochberg
from aqn_tune.evidence.decisions import contrast_name
from aqn_tune.evidence.tables import CellResult
from aqn_tune.evidence.verdicts import Judged, Undetermined
from aqn_tune.report.comparable import check_contents, check_judged, check_rows
from aqn_tune.report.loading import load_results
from aqn_tune.report.results import Results
from aqn_tune.report.side import Named, Side, cells_of, sides_of
from aqn_tune.report.text import Spread, spread
from aqn_tune.study.difference import Difference, differing, together
from aqn_tune.study.folder import StudyFolder


class Comparison(NamedTuple):
    """A pair of arms. Positive improvement: the first has the smaller loss."""

    arm: Side
    reference: Side
    differs: tuple[Difference, ...]
    """Every key in which they differ, old: the reference, new: the arm."""
    n: int
    """Seeds that both have."""
    arm_loss: Spread
    reference_loss: Spread
    contrast: PairedContrast | Undetermined
    verdict: Judged | None
    """Where the pair is a primary contrast of its study, whose confirmation is complete: what was found."""
    q: float | None = None
    """p adjusted by Benjamini-Hochberg over all pairs that are compared at a time."""
    notes: tuple[str, ...] = ()
    """What could not be checked, one sentence each."""


def compare(arm: Named, reference: Named, *, confounded: bool = False) -> tuple[Comparison, ...]:
    """Return the contrast of two arms, or of every pair that two names have in common.

    Arms are paired by their seeds: those of two studies are the same where the studies have the same `seed`
    and the same generation. A name without a scenario stands for every one, one without an arm for every arm,
    and each is compared with its namesake on the other side.

    Args:
        arm: The side whose smaller loss counts as an improvement.
        reference: The other side.
        confounded: Compare arms that differ in more than one key all the same.

    Raises:
        UserError: a name that is none; nothing in common; no common seed; another number of steps, another
            model, task or way to evaluate, be it under the same name; several keys that differ, unless
            `confounded`.
    """
    if arm.stage != reference.stage:
        raise UserError(
            f"stage: got {arm.stage} and {reference.stage}; a search is judged on the validation split, a "
            "confirmation on the test split, and their losses are not comparable"
        )
    loaded = {
        path: load_results(StudyFolder(path.resolve())) for path in {arm.folder, reference.folder}
    }
    ours, theirs = loaded[arm.folder], loaded[reference.folder]
    pairs = list(_pairs(ours, arm, theirs, reference))
    if not pairs:
        raise UserError(
            f"{arm.folder} and {reference.folder} have no scenario and arm of the same name that both have "
            "run; name them: FOLDER:SCENARIO/ARM"
        )
    found = [_compare(one, other, arm, reference) for one, other in pairs]
    if not confounded:
        _refuse_confounded(found)
    tests = [None if isinstance(one.contrast, Undetermined) else one.contrast.t_p for one in found]
    adjusted = benjamini_hochberg([1.0 if p is None else p for p in tests])
    return tuple(
        one._replace(q=None if p is None else q)
        for one, p, q in zip(found, tests, adjusted, strict=True)
    )


def _pairs(
    ours: Results, arm: Named, theirs: Results, reference: Named
) -> Iterator[tuple[Side, Side]]:
    left = sides_of(ours, arm)
    right = {(side.scenario.name, side.arm): side for side in sides_of(theirs, reference)}
    for one in left:
        # A name that both sides leave out is the same on both.
        scenario = reference.scenario or one.scenario.name
        other = right.get((scenario, reference.arm or one.arm))
        if other is not None and (other.results is not one.results or other.name != one.name):
            yield one, other


def _compare(one: Side, other: Side, arm: Named, reference: Named) -> Comparison:
    check_judged(one, other)
    notes = check_contents(one, other)
    cells = _paired(one, other, arm, reference)
    check_rows(one, other, cells)
    ours, theirs = [ours for ours, _ in cells], [theirs for _, theirs in cells]
    return Comparison(
        arm=one,
        reference=other,
        differs=_differs(one, other),
        n=len(cells),
        arm_loss=spread([cell.loss for cell in ours]),
        reference_loss=spread([cell.loss for cell in theirs]),
        contrast=contrast_of(one.arm, ours, other.arm, theirs, one.results.evidence.declared),
        verdict=_declared(one, other),
        notes=notes,
    )


def _differs(one: Side, other: Side) -> tuple[Difference, ...]:
    """Return the keys in which two sides differ, each choice with all that comes with it as one key."""
    ours, theirs = one.declared, other.declared
    if ours["arm"]["device"] == theirs["arm"]["device"] == "healthy":
        # Neither has met the scenario in training.
        ours, theirs = ({**side, "scenario": {}} for side in (ours, theirs))
    return together(differing(theirs, ours))


def _paired(
    one: Side, other: Side, arm: Named, reference: Named
) -> list[tuple[CellResult, CellResult]]:
    """Return the cells of both sides seed by seed, of the seeds that both have."""
    ours, theirs = cells_of(one, arm.replicate), cells_of(other, reference.replicate)
    by_seed = {cell.seed: cell for cell in theirs}
    pairs = [(cell, by_seed[cell.seed]) for cell in ours if cell.seed in by_seed]
    if not pairs:
        seeds = (one.results.study, other.results.study)
        raise UserError(
            f"{one.name} and {other.name} have no seed in common (study seeds "
            f"{' and '.join(str(study.seed) for study in seeds)}, generations "
            f"{' and '.join(str(study.confirm.generation) for study in seeds)}): runs of different seeds are "
            "no pairs. Run one study with the seed and the generation of the other"
        )
    return pairs


def _declared(one: Side, other: Side) -> Judged | None:
    results = one.results
    if other.results is not results or not results.makes_claims or one.stage != "confirm":
        return None
    if one.scenario.name != other.scenario.name:
        return None
    name = f"{one.scenario.name}/{contrast_name(one.arm, other.arm)}"
    judged = (j for scenario in results.evidence.scenarios for j in scenario.contrasts)
    return next((j for j in judged if j.name == name), None)


def _refuse_confounded(found: Sequence[Comparison]) -> None:
    for one in found:
        if len(one.differs) > 1:
            shown = "\n".join(f"  {d.key}: {d.old} -> {d.new}" for d in one.differs)
            raise UserError(
                f"{one.arm.name} and {one.reference.name} differ in {len(one.differs)} keys, so that a "
                f"difference between them has no single cause:\n{shown}\n"
                "To see it all the same: --confounded"
            )
