"""Verdicts over a declared family of contrasts: better, worse, equivalent or inconclusive."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from aqn_tune.errors import UserError
from aqn_tune.evidence.contrasts import DEGENERATE_NOTES, PairedContrast, check_alpha
from aqn_tune.evidence.correction import holm
from aqn_tune.evidence.power import seeds_needed

FEWEST_SEEDS = 6
"""No generation is smaller: below it the exact paired test cannot reach p = 0.05."""


class Verdict(StrEnum):
    """The four outcomes of a contrast. The value is the symbol that is printed everywhere."""

    BETTER = ">"
    WORSE = "<"
    EQUIVALENT = "~"
    INCONCLUSIVE = "?"

    @property
    def word(self) -> str:
        """The term of the reports: better, worse, equivalent, inconclusive."""
        return self.name.lower()


@dataclass(frozen=True)
class Undetermined:
    """A contrast of the declared family that could not be computed.

    It keeps its place in the family (Holm counts it as p = 1) and its verdict is `?`.
    """

    reason: str
    """What is missing, with counts: "2 of 8 seeds failed in arm global"."""


@dataclass(frozen=True)
class Judged:
    """One contrast with its verdict. Numbers that do not exist are `None`."""

    name: str
    """Name of the contrast within the family."""
    verdict: Verdict
    """The outcome; the arm is better or worse than its reference."""
    contrast: PairedContrast | None
    """The descriptive numbers; `None` for an undetermined contrast."""
    margin: float | None
    """Smallest difference worth acting on, in the unit of the metric; `None`: none was declared."""
    family_size: int
    """Contrasts in the declared family, undetermined ones included."""
    holm_p: float | None
    """Holm-adjusted p-value of the paired t-test."""
    low: float | None
    """Lower end of the 1 - 2 alpha / m interval of the improvement, which the margin is held to."""
    high: float | None
    """Upper end of that interval."""
    real_but_below_margin: bool
    """Equivalent within the margin and yet significantly different from zero."""
    seeds_needed: int | None
    """For `?`: size of the next confirm generation, `power.seeds_needed` but more than it had."""
    reason: str
    """For `?` without a test: why there is none. Otherwise empty."""

    @property
    def further_seeds(self) -> int | None:
        """For `?`: seeds beyond as many as it had, at least one; `None` where unknown."""
        if self.seeds_needed is None or self.contrast is None:
            return None
        return self.seeds_needed - self.contrast.n

    @property
    def words(self) -> str:
        """The verdict in words, fit to be printed behind its symbol."""
        if self.verdict is Verdict.EQUIVALENT and self.real_but_below_margin:
            return "equivalent (real but below the margin)"
        if self.verdict is not Verdict.INCONCLUSIVE:
            return self.verdict.word
        if self.reason:
            return f"inconclusive: {self.reason}"
        if self.margin is None:
            return "inconclusive: no margin is known, so no number of seeds either"
        if self.seeds_needed is None or self.further_seeds is None:
            return "inconclusive: no feasible number of seeds decides at this margin"
        seeds = "seed" if self.further_seeds == 1 else "seeds"
        return (
            f"inconclusive: about {self.further_seeds} further {seeds} (a new generation of "
            f"{self.seeds_needed}; an effect between zero and the margin may take more)"
        )


def judge(
    contrasts: Mapping[str, PairedContrast | Undetermined],
    *,
    alpha: float = 0.05,
    margin: float | Mapping[str, float | None] | None,
    power: float = 0.8,
) -> list[Judged]:
    """Give every contrast of the declared family its verdict.

    Call it once with *every* primary contrast of every scenario of the study: m, the size of the
    family, sets both the Holm correction and the intervals. Positive improvement = arm better.

    | verdict | rule, with the 1 - 2 alpha / m interval of the improvement |
    |---|---|
    | `>` | Holm p < alpha, improvement above zero, interval not inside +-margin |
    | `<` | the mirror image |
    | `~` | interval inside +-margin; `real_but_below_margin` if Holm p < alpha as well |
    | `?` | anything else, with the size of the next generation: more seeds than it had, 6 or more |

    Args:
        contrasts: name -> contrast, or `Undetermined` where runs are missing or failed.
        alpha: chance of any false `>` or `<` in the whole family.
        margin: smallest difference worth acting on, one for all or one per name. `None` where none
            could be fixed (no gain to take 5 % of): then `~` is out of reach.
        power: used for the seeds that a `?` is told to need.

    Returns:
        One `Judged` per contrast, in the order given.

    Raises:
        UserError: alpha or power out of range, or a margin that is not positive and finite.
        KeyError: a contrast without an entry in a mapping of margins.

    Limits: a contrast without a test (one seed, identical arms, a constant difference) is `?`, also
    when its differences are all far from zero: no spread means a defect, not certainty. The Holm
    decision and the interval are not duals; with m > 1 a `>` may have an interval that holds zero.
    """
    check_alpha(alpha)
    if not 0.5 <= power < 1:
        raise UserError(f"power: got {power}, must be at least 0.5 and below 1 (usual: 0.8)")
    margins = {
        name: _checked_margin(name, margin[name] if isinstance(margin, Mapping) else margin)
        for name in contrasts
    }
    m = len(contrasts)
    # A contrast without a test still belongs to the family, or the others would get easier.
    adjusted = holm([_p_value(c) for c in contrasts.values()])
    return [
        _judge_one(name, contrast, holm_p, margins[name], m=m, alpha=alpha, power=power)
        for (name, contrast), holm_p in zip(contrasts.items(), adjusted, strict=True)
    ]


def _p_value(contrast: PairedContrast | Undetermined) -> float:
    if isinstance(contrast, Undetermined) or contrast.t_p is None:
        return 1.0
    return contrast.t_p


def _checked_margin(name: str, margin: float | None) -> float | None:
    if margin is not None and not (math.isfinite(margin) and margin > 0):
        raise UserError(f"margin of contrast '{name}': got {margin}, must be finite and positive")
    return margin


def _judge_one(
    name: str,
    contrast: PairedContrast | Undetermined,
    holm_p: float,
    margin: float | None,
    *,
    m: int,
    alpha: float,
    power: float,
) -> Judged:
    described = None if isinstance(contrast, Undetermined) else contrast
    interval = None if described is None else described.interval(1 - 2 * alpha / m)
    if described is None or interval is None or described.sd is None:
        return Judged(
            name=name,
            verdict=Verdict.INCONCLUSIVE,
            contrast=described,
            margin=margin,
            family_size=m,
            holm_p=None,
            low=None,
            high=None,
            real_but_below_margin=False,
            seeds_needed=None,
            reason=_why_no_test(contrast),
        )

    low, high = interval
    significant = holm_p < alpha
    inside = margin is not None and -margin < low and high < margin
    if inside:
        verdict = Verdict.EQUIVALENT
    elif significant:
        verdict = Verdict.BETTER if described.improvement > 0 else Verdict.WORSE
    else:
        verdict = Verdict.INCONCLUSIVE
    needed = None
    if verdict is Verdict.INCONCLUSIVE and margin is not None:
        needed = seeds_needed(described.sd, margin=margin, alpha_over_m=alpha / m, power=power)
        if needed is not None:
            # The power calculation may ask for fewer seeds than have just failed to decide.
            needed = max(needed, described.n + 1, FEWEST_SEEDS)
    return Judged(
        name=name,
        verdict=verdict,
        contrast=described,
        margin=margin,
        family_size=m,
        holm_p=holm_p,
        low=low,
        high=high,
        real_but_below_margin=inside and significant,
        seeds_needed=needed,
        reason="",
    )


def _why_no_test(contrast: PairedContrast | Undetermined) -> str:
    if isinstance(contrast, Undetermined):
        return contrast.reason
    return DEGENERATE_NOTES[contrast.degenerate] if contrast.degenerate else "no test"
