"""Looks: the numbers of seeds at which a confirmation is judged, and what of alpha each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Final

from pydantic import AfterValidator, ValidationInfo

FEWEST_AT_A_LOOK: Final = 6
"""As few as a confirmation may have: `aqn_tune.evidence.verdicts.FEWEST_SEEDS`."""


def alpha_at_look(alpha: float, looks: Sequence[int]) -> float:
    """Return the level at which each of `looks` is judged: an equal share of alpha, all of it without looks.

    By the union bound the shares add up to alpha whatever the looks have in common and whatever decides
    between them, for claims (`>`, `<`) and for equivalence alike. Pocock's boundary is a little larger, but
    holds for normal data, equal steps and one test.
    """
    return alpha / max(1, len(looks))


def _checked(looks: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
    """Return `looks`; raise ValueError when they are no looks of a confirmation of so many seeds."""
    if not looks:
        return looks
    got = f"got {list(looks)}"
    if len(looks) < 2:
        raise ValueError(
            f"{got}; allowed: at least two numbers of seeds (a study without looks is judged once, at its "
            "end), or [] for no looks"
        )
    if any(later <= earlier for earlier, later in pairwise(looks)):
        raise ValueError(f"{got}; looks rise: each has more seeds than the one before")
    if looks[0] < FEWEST_AT_A_LOOK:
        raise ValueError(
            f"{got}; allowed: looks at {FEWEST_AT_A_LOOK} seeds or more, as below that the exact paired test "
            "cannot reach p = 0.05"
        )
    replicates = info.data.get("replicates")
    if replicates is not None and looks[-1] != replicates:
        raise ValueError(
            f"{got}, and confirm.replicates is {replicates}; the last look is the end of the confirmation: "
            f"end the looks with {replicates}, or set confirm.replicates to {looks[-1]}"
        )
    return looks


Looks = Annotated[tuple[int, ...], AfterValidator(_checked)]
"""Numbers of seeds: at least two, rising, from `FEWEST_AT_A_LOOK` to `confirm.replicates`; empty for none."""
