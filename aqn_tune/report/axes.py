"""Scales and ticks of the charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A monotone map from values to pixels: `bend`, then a straight line."""

    low: float
    high: float
    start: float
    """Pixel of `low`."""
    end: float
    """Pixel of `high`."""
    bend: Callable[[float], float]

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self.bend(self.low), self.bend(self.high)
        return self.start + (self.bend(value) - low) / (high - low) * (self.end - self.start)


def _straight(value: float) -> float:
    return value


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """Return a linear scale; equal bounds are widened."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    return Scale(low, high, start, end, _straight)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """Return a logarithmic scale; both bounds must be positive."""
    if low == high:
        low, high = low / 2, high * 2
    return Scale(low, high, start, end, math.log)


def bent(bound: float, knee: float, start: float, end: float) -> Scale:
    """Return a scale from -bound to bound: straight up to about `knee`, logarithmic beyond it.

    For differences of which some are many times the margin: all of them stay on the page and the
    neighbourhood of zero, where verdicts are decided, stays readable.
    """
    return Scale(-bound, bound, start, end, lambda value: math.asinh(value / knee))


def is_wide(values: Iterable[float], ratio: float) -> bool:
    """Return whether positive values span more than `ratio`, so that a logarithmic scale helps."""
    found = list(values)
    return bool(found) and min(found) > 0 and max(found) / min(found) > ratio


def linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return round values inside the bounds, about `wanted` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten inside the bounds."""
    found = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for factor in (1, 2, 5):
            value = round(factor * 10.0**power, 12)
            if low * 0.999 <= value <= high * 1.001:
                found.append(value)
    return found or [low, high]


def bent_ticks(bound: float, knee: float) -> list[float]:
    """Return zero and, on both sides, round values that lie well apart on a bent scale."""
    ticks: list[float] = []
    last = 0.0
    for value in log_ticks(knee / 2, bound):
        place = math.asinh(value / knee)
        if place - last >= 0.75:
            ticks.append(value)
            last = place
    return [*(-value for value in reversed(ticks)), 0.0, *ticks]


def tick_label(value: float) -> str:
    """Return a tick value without superfluous digits."""
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")
