"""One paired contrast: an arm against its reference on the same seeds.

Sign convention, used in every room that reads these numbers: losses go in, and
`improvement = reference - arm` comes out. **Positive means that the arm is better.**
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from aqn_tune.errors import UserError

if TYPE_CHECKING:
    import numpy as np

EXACT_FLIPS_UP_TO = 16
"""Up to this many pairs all 2^n sign flips are counted; above it they are drawn."""

MONTE_CARLO_DRAWS = 20_000


class Degenerate(StrEnum):
    """Why a contrast has no t-test. Each of them ends in the verdict `?`, never in a number."""

    TOO_FEW = "too_few"
    """Fewer than two pairs: no spread can be estimated."""
    IDENTICAL = "identical"
    """Both arms gave the same numbers on every seed: most likely they are one configuration."""
    CONSTANT = "constant"
    """The same non-zero difference on every seed: most likely the seed changes nothing."""


DEGENERATE_NOTES = {
    Degenerate.TOO_FEW: "fewer than two pairs: no spread, no test",
    Degenerate.IDENTICAL: (
        "identical numbers on every seed: the two arms are probably one configuration"
    ),
    Degenerate.CONSTANT: (
        "the same difference on every seed: the seed probably changes nothing, no test is possible"
    ),
}


@dataclass(frozen=True)
class PairedContrast:
    """Descriptive numbers of one contrast; the verdict is `verdicts.judge`'s, over a family.

    Losses are in the unit of the metric (nats for cross-entropy). A field is `None` where the
    number does not exist (see `degenerate`); it is never NaN.
    """

    n: int
    """Pairs (seeds)."""
    improvement: float
    """Mean of reference - arm; positive: the arm is better."""
    sd: float | None
    """Standard deviation (n - 1) of the paired differences; exactly 0.0 when degenerate."""
    se: float | None
    """sd / sqrt(n)."""
    alpha: float
    """The interval below holds at 1 - alpha, for this contrast alone (no correction)."""
    low: float | None
    """Lower end of the paired t interval of the improvement."""
    high: float | None
    """Upper end of the paired t interval of the improvement."""
    t_p: float | None
    """Two-sided p-value of the paired t-test, uncorrected."""
    sign_flip_p: float
    """Two-sided sign-flip p-value of the mean (exact up to 16 pairs, seeded Monte Carlo above)."""
    sign_flip_floor: float
    """The smallest p-value the sign-flip test can give here (n = 5: 0.0625, n = 8: 0.0078)."""
    wins: int
    """Seeds on which the arm has the smaller loss."""
    ties: int
    """Seeds on which both losses are exactly equal."""
    losses: int
    """Seeds on which the arm has the larger loss."""
    pairing_gain: float | None
    """sd^2 / (sd_arm^2 + sd_reference^2): at 0.1 pairing saves nine seeds in ten, at 1 none."""
    skewness: float | None
    """Adjusted Fisher-Pearson skewness of the differences (n >= 3)."""
    degenerate: Degenerate | None
    """Why there is no t-test, or `None` when there is one."""
    notes: tuple[str, ...]
    """Sentences that belong beside the numbers wherever they are printed."""

    def interval(self, level: float) -> tuple[float, float] | None:
        """Return the paired t interval of the improvement at another level (0 < level < 1).

        `None` where the contrast is degenerate.
        """
        if self.degenerate is not None or self.se is None:
            return None
        half = t_quantile(self.n - 1, 0.5 + level / 2) * self.se
        return self.improvement - half, self.improvement + half


@lru_cache(maxsize=4096)
def t_quantile(df: int, q: float) -> float:
    """Return the q-quantile of Student's t with `df` degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(df, q))


@lru_cache(maxsize=EXACT_FLIPS_UP_TO)
def _half_of_all_flips(n: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    # A flip and its opposite give the same |sum|, so the first sign is held at +1.
    import numpy as np

    bits = np.arange(2 ** (n - 1))[:, None] >> np.arange(n - 1)[None, :]
    signs = np.ones((2 ** (n - 1), n))
    signs[:, 1:] -= 2.0 * (bits & 1)
    signs.setflags(write=False)
    return signs


def sign_flip_floor(n: int, *, draws: int = MONTE_CARLO_DRAWS) -> float:
    """Return the smallest two-sided p-value that the sign-flip test of `n` pairs can give.

    Exact test: 2^(1-n) (5 pairs 0.0625, 6 0.031, 8 0.0078). Monte Carlo: 1 / (draws + 1).
    """
    exact = 2.0 ** (1 - n)
    return exact if n <= EXACT_FLIPS_UP_TO else max(exact, 1 / (draws + 1))


def sign_flip_p(
    differences: Sequence[float], *, seed: int = 0, draws: int = MONTE_CARLO_DRAWS
) -> float:
    """Return the two-sided sign-flip p-value of the mean of `differences` against zero.

    All 2^n flips are counted up to 16 pairs. Above that `draws` flips are drawn from a generator of
    `seed` and the observed one is counted among them, so the p-value is valid and never zero. The
    test assumes differences that are symmetric about zero under the null, not normal ones.
    """
    import numpy as np

    d = np.asarray(differences, dtype=np.float64)
    n = d.size
    # Sums that are equal on paper differ by rounding; without slack an exact test loses its ties.
    threshold = abs(d.sum()) - 1e-12 * np.abs(d).sum()
    if n <= EXACT_FLIPS_UP_TO:
        return float(np.mean(np.abs(_half_of_all_flips(n) @ d) >= threshold))
    rng = np.random.default_rng(seed)
    signs = 2 * rng.integers(0, 2, size=(draws, n), dtype=np.int8) - 1
    hits = int(np.count_nonzero(np.abs(signs @ d) >= threshold))
    return (hits + 1) / (draws + 1)


def _skewness(d: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
    n = d.size
    if n < 3:
        return None
    centred = d - d.mean()
    m2 = float((centred**2).mean())
    m3 = float((centred**3).mean())
    return math.sqrt(n * (n - 1)) / (n - 2) * m3 / math.sqrt(m2**3)


def _skew_note(n: int, skewness: float | None) -> list[str]:
    if skewness is None:
        return []
    standard_error = math.sqrt(6 * n * (n - 1) / ((n - 2) * (n + 1) * (n + 3)))
    if abs(skewness) <= 2 * standard_error:
        return []
    return [
        f"skewed differences (skewness {skewness:+.1f}): with strong skew neither the t nor the "
        "sign-flip test keeps its error rate"
    ]


def paired_contrast(
    arm: Sequence[float], reference: Sequence[float], *, alpha: float = 0.05, seed: int = 0
) -> PairedContrast:
    """Compare the losses of an arm with those of its reference, seed by seed.

    Use it for every difference that is printed: two arms share their seeds, so the difference
    within a seed is far steadier than either loss.

    Args:
        arm: losses `[n]`, smaller is better; entry i is the run of seed i.
        reference: losses `[n]` of the reference on the same seeds in the same order.
        alpha: the t interval has level 1 - alpha (this contrast alone, no correction).
        seed: of the drawn sign flips, used above 16 pairs only.

    Raises:
        UserError: alpha outside (0, 0.5).
        ValueError: no pairs, unequal lengths, or a value that is not finite. A failed run has no
            loss: leave the contrast undetermined (`verdicts.Undetermined`) instead of dropping the
            seed, for dropping the seeds on which an arm diverged would flatter that arm.

    Limits: the t interval assumes roughly normal differences. One seed, or differences without any
    spread, give no test at all; `degenerate` says which. Spread below the rounding error of the
    losses counts as none. Source: DESIGN section 10; Student's paired t; Fisher's sign-flip test.
    """
    import numpy as np

    check_alpha(alpha)
    a = np.asarray(arm, dtype=np.float64)
    r = np.asarray(reference, dtype=np.float64)
    if a.ndim != 1 or a.shape != r.shape or a.size == 0:
        raise ValueError(f"arm and reference must be lists of one length: {a.shape}, {r.shape}")
    if not (np.isfinite(a).all() and np.isfinite(r).all()):
        raise ValueError("a contrast needs finite losses; leave it undetermined when a run failed")

    d = r - a
    n = int(d.size)
    mean = float(d.mean())
    rounding = 8 * np.finfo(np.float64).eps * float(max(np.abs(a).max(), np.abs(r).max()))
    sd: float | None = float(d.std(ddof=1)) if n > 1 else None
    degenerate: Degenerate | None = None
    if sd is None:
        degenerate = Degenerate.TOO_FEW
    elif sd <= rounding:
        sd = 0.0
        degenerate = Degenerate.IDENTICAL if abs(mean) <= rounding else Degenerate.CONSTANT

    se = low = high = t_p = gain = skewness = None
    notes: list[str] = []
    if sd is not None:
        se = sd / math.sqrt(n)
        unpaired = float(a.var(ddof=1) + r.var(ddof=1))
        gain = sd**2 / unpaired if unpaired > rounding**2 else None
    if degenerate is not None:
        notes.append(DEGENERATE_NOTES[degenerate])
    elif se is not None:
        from scipy.special import stdtr

        t_p = min(1.0, 2 * float(stdtr(n - 1, -abs(mean) / se)))
        half = t_quantile(n - 1, 1 - alpha / 2) * se
        low, high = mean - half, mean + half
        skewness = _skewness(d)
        notes += _skew_note(n, skewness)

    return PairedContrast(
        n=n,
        improvement=mean,
        sd=sd,
        se=se,
        alpha=alpha,
        low=low,
        high=high,
        t_p=t_p,
        sign_flip_p=sign_flip_p(d.tolist(), seed=seed),
        sign_flip_floor=sign_flip_floor(n),
        wins=int(np.count_nonzero(d > 0)),
        ties=int(np.count_nonzero(d == 0)),
        losses=int(np.count_nonzero(d < 0)),
        pairing_gain=gain,
        skewness=skewness,
        degenerate=degenerate,
        notes=tuple(notes),
    )


def check_alpha(alpha: float) -> None:
    """Raise `UserError` unless 0 < alpha < 0.5."""
    if not 0 < alpha < 0.5:
        raise UserError(f"alpha: got {alpha}, must be above 0 and below 0.5 (usual: 0.05)")
