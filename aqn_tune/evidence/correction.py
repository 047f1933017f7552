"""Corrections for testing several contrasts at once."""

from __future__ import annotations

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p-values, in the order given.

    Use it for every claim: rejecting where the adjusted value is below alpha keeps the chance of
    any false claim in the whole family at alpha, under any dependence between the contrasts. The
    family must be declared before the results are seen, and a contrast of it that could not be
    tested stays in as 1.0 (leaving it out would make the others easier).

    Raises:
        ValueError: a value outside [0, 1] or NaN.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    p = _checked(p_values)
    m = len(p)
    adjusted = [0.0] * m
    running = 0.0
    for rank, index in enumerate(sorted(range(m), key=p.__getitem__)):
        running = max(running, min(1.0, (m - rank) * p[index]))
        adjusted[index] = running
    return adjusted


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Return Benjamini-Hochberg adjusted p-values (false discovery rate), in the order given.

    Use it for exploratory tables only (thresholds x configs), printed under that name: about alpha
    of what it lets through is false, so it supports no claim.

    Raises:
        ValueError: a value outside [0, 1] or NaN.

    Limits: valid for independent or positively dependent tests. Source: Benjamini, Hochberg, 1995.
    """
    p = _checked(p_values)
    m = len(p)
    adjusted = [0.0] * m
    running = 1.0
    for rank, index in enumerate(sorted(range(m), key=p.__getitem__, reverse=True)):
        running = min(running, p[index] * m / (m - rank))
        adjusted[index] = running
    return adjusted


def _checked(p_values: Sequence[float]) -> list[float]:
    p = [float(value) for value in p_values]
    for position, value in enumerate(p):
        if not 0 <= value <= 1:
            raise ValueError(f"p-value {position} is {value}, must lie in [0, 1]")
    return p
