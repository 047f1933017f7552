"""Numbers as the reports print them: fixed digits, a sign where it matters, `n/a` for no number."""

from __future__ import annotations

import math
from typing import NamedTuple

NONE = "n/a"
"""What is printed where a number does not exist; a failed run never becomes a number."""

MINUS = "\N{MINUS SIGN}"
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
THIN = "\N{NARROW NO-BREAK SPACE}"


class Spread(NamedTuple):
    """A mean over seeds and its standard deviation (n - 1)."""

    mean: float | None
    """`None` unless every seed has its number."""
    sd: float | None
    """`None` with fewer than two seeds, or without a mean."""


def spread(values: list[float | None] | tuple[float | None, ...]) -> Spread:
    """Return mean and sd over seeds; no mean at all when one seed lacks its number.

    A mean over the survivors would flatter an arm that fails often.
    """
    present = [value for value in values if value is not None]
    if not present or len(present) != len(values):
        return Spread(None, None)
    mean = math.fsum(present) / len(present)
    if len(present) < 2:
        return Spread(mean, None)
    return Spread(mean, math.sqrt(math.fsum((x - mean) ** 2 for x in present) / (len(present) - 1)))


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with `digits` decimals, `n/a` for None."""
    if value is None:
        return NONE
    return _sign(f"{value:.{digits}f}")


def signed(value: float | None, digits: int = 4) -> str:
    """Return a number with its sign always shown."""
    if value is None:
        return NONE
    return _sign(f"{value:+.{digits}f}")


def _sign(text: str) -> str:
    # -0.0000 is a rounded-away difference, not a negative one.
    if text.lstrip("+-").strip("0.") == "":
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share (0.123) as a percentage (12.3 %)."""
    if share is None:
        return NONE
    return _sign(f"{100 * share:.{digits}f}") + f"{THIN}%"


def confidence(alpha: float) -> str:
    """Return the level 1 - alpha of an interval with as many decimals as it has, at most two: `98.33 %`."""
    level = 100 * (1 - alpha)
    digits = next((d for d in (0, 1) if math.isclose(round(level, d), level, rel_tol=1e-12)), 2)
    return percent(1 - alpha, digits)


def with_sd(value: Spread, digits: int = 4) -> str:
    """Return `mean ± sd`, the mean alone for one seed, `n/a` without a mean."""
    if value.mean is None:
        return NONE
    if value.sd is None:
        return number(value.mean, digits)
    return f"{number(value.mean, digits)} {PLUS_MINUS} {value.sd:.{digits}f}"


def percent_with_sd(value: Spread, digits: int = 1) -> str:
    """Return `mean ± sd %` of a share."""
    if value.mean is None:
        return NONE
    if value.sd is None:
        return percent(value.mean, digits)
    return f"{100 * value.mean:.{digits}f} {PLUS_MINUS} {100 * value.sd:.{digits}f}{THIN}%"


def interval(low: float | None, high: float | None, digits: int = 4) -> str:
    """Return `[low, high]` with signs, `n/a` when an end is missing."""
    if low is None or high is None:
        return NONE
    return f"[{signed(low, digits)}, {signed(high, digits)}]"


def p_value(p: float | None) -> str:
    """Return a p-value with three decimals, `< 0.001` below that, never a zero."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float) -> str:
    """Return seconds as `42 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}{THIN}s" if seconds < 10 else f"{whole}{THIN}s"
    if whole < 3600:
        return f"{whole // 60}{THIN}min {whole % 60:02d}{THIN}s"
    return f"{whole // 3600}{THIN}h {whole % 3600 // 60:02d}{THIN}min"


def count(value: int, singular: str, plural: str = "") -> str:
    """Return `1 seed`, `3 seeds`."""
    return f"{value:,} {singular if value == 1 else plural or singular + 's'}".replace(",", THIN)


def plain(value: object) -> str:
    """Return a parameter value as text: floats with up to four significant digits."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
