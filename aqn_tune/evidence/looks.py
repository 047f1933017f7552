"""The stopping rule: at which of the declared looks a confirmation stands, and whether it ends there.

It is a function of the ledger and of what was declared, and nothing of it is written down: whoever asks, in a
run that is continued, in a report or beside a driver, is told the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aqn_tune.evidence.verdicts import Judged, Verdict
from aqn_tune.study.looks import alpha_at_look

if TYPE_CHECKING:
    from aqn_tune.evidence.assemble import Evidence
    from aqn_tune.evidence.declared import Declared


@dataclass(frozen=True)
class Look:
    """One of the declared looks at the results of a confirmation."""

    number: int
    """1 for the first."""
    planned: tuple[int, ...]
    """Seeds of every declared look."""
    whole_alpha: float
    """Familywise error rate of all looks together."""
    complete: bool
    """Whether all of its runs have ended; only the first is ever met without."""
    over: bool
    """Whether the confirmation ends here, at its last look or because nothing is left to decide."""

    @property
    def of(self) -> int:
        """Number of declared looks."""
        return len(self.planned)

    @property
    def seeds(self) -> int:
        """Seeds that it looks at."""
        return self.planned[self.number - 1]

    @property
    def alpha(self) -> float:
        """The level at which its family of contrasts is judged."""
        return alpha_at_look(self.whole_alpha, self.planned)

    @property
    def early(self) -> bool:
        """Whether the confirmation ended before its last look."""
        return self.over and self.number < self.of

    @property
    def goes_on(self) -> bool:
        """Whether it was judged and left something to the next look."""
        return self.complete and not self.over

    @property
    def seeds_to_run(self) -> int:
        """Seeds up to which the confirmation is run as things stand; none beyond them is."""
        return self.planned[self.number] if self.goes_on else self.seeds

    @property
    def words(self) -> str:
        """Where the confirmation stands, in a phrase."""
        name = f"look {self.number} of {self.of}"
        at = f"({self.seeds} seeds, judged at alpha {self.alpha:.3g})"
        if not self.complete:
            return f"{name} {at} is under way"
        if self.goes_on:
            return f"{name} {at} left contrasts open; look {self.number + 1} follows, at {self.seeds_to_run}"
        if self.early:
            return f"{name} {at} was the last, as more seeds could decide nothing further"
        return f"{name} {at} was the last"


def settled(judged: Judged) -> bool:
    """Return whether no more seeds are spent on a contrast: it is decided, or not waited for.

    One with a failed seed (it is part of every later look) is never decided, nor one of two arms that are
    one and the same training. One without any spread could be: a constant difference may spread at the next
    seed. It is not waited for, which costs a claim and makes none.
    """
    if judged.verdict is not Verdict.INCONCLUSIVE:
        return True
    return judged.contrast is None or judged.contrast.degenerate is not None


def at_look(declared: Declared, number: int) -> Declared:
    """Return what is judged at look `number` (from 1): its seeds alone, at its share of alpha."""
    share = alpha_at_look(declared.alpha, declared.looks)
    seeds = declared.looks[number - 1]
    return declared.model_copy(update={"replicates": seeds, "alpha": share, "looks": ()})


def look_reached(declared: Declared, judge_at: Callable[[Declared], Evidence]) -> Evidence:
    """Return the evidence of the look at which a confirmation stands.

    The looks are taken in order, as far as all of their runs have ended, up to the first at which every
    contrast of the family is settled. Before the end of the first one it is that one's, incomplete.

    Args:
        declared: with looks.
        judge_at: gives the evidence on what `at_look` declares.
    """
    reached: Evidence | None = None
    for number in range(1, len(declared.looks) + 1):
        found = judge_at(at_look(declared, number))
        complete = _all_ended(found)
        if reached is not None and not complete:
            break
        over = complete and (number == len(declared.looks) or _all_settled(found))
        look = Look(number, declared.looks, declared.alpha, complete, over)
        reached = replace(found, look=look)
        if over or not complete:
            break
    if reached is None:
        raise ValueError("no looks are declared")
    return reached


def _all_ended(evidence: Evidence) -> bool:
    # Without the base there may be no margin, and a contrast could still become equivalent.
    return evidence.base_clean_loss is not None and all(
        cell.ended for scenario in evidence.scenarios for arm in scenario.arms for cell in arm.seeds
    )


def _all_settled(evidence: Evidence) -> bool:
    family = [one for scenario in evidence.scenarios for one in scenario.contrasts]
    # Without a contrast nothing says that fewer seeds than were asked for are enough.
    return bool(family) and all(settled(one) for one in family)
