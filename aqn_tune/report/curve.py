"""The threshold curve: faulty loss, or exact match, of each arm against the fault level."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from aqn_tune.evidence.arms import ArmEvidence
from aqn_tune.evidence.assemble import ScenarioEvidence
from aqn_tune.evidence.tables import CellResult
from aqn_tune.report import drawing as draw
from aqn_tune.report.axes import (
    Scale,
    is_wide,
    linear,
    linear_ticks,
    log_ticks,
    logarithmic,
    tick_label,
)
from aqn_tune.report.dose import levels_of
from aqn_tune.report.results import Results
from aqn_tune.report.scenario_tables import (
    DURING,
    arm_of,
    clean_loss,
    fault_text,
    sweep_label,
)
from aqn_tune.report.text import NONE, plain, spread
from aqn_tune.study.scenario import During, Scenario

WIDTH, HEIGHT = 620.0, 400.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 14.0, 50.0, 72.0
LABEL = 170.0
"""Width of the label of a reference, with some air."""
STYLES = {"fault_only": 0, "clean": 1, "global": 2, "targeted": 3, "healthy": 4, "random": 5}
"""Colour and marker of the controls, the same in every chart; further arms take the next ones."""


class Look(NamedTuple):
    """How a series is told apart."""

    shape: int
    css: str


def look_of(style: int) -> Look:
    """Return marker and colour of a style: the first ten colours each with a marker of its own, the
    next ten with another, so that no two of fifty look alike."""
    return Look(style + style // 10, f"s{style % 10}")


class Quantity(NamedTuple):
    """What is drawn upwards."""

    label: str
    of_cell: Callable[[CellResult], float | None]
    references: Callable[[Results, ScenarioEvidence], list[tuple[str, float | None]]]
    factor: float
    may_be_log: bool


def _loss(cell: CellResult) -> float | None:
    return cell.loss


def _match(cell: CellResult) -> float | None:
    return cell.exact_match


def _loss_references(
    results: Results, evidence: ScenarioEvidence
) -> list[tuple[str, float | None]]:
    base = results.base("clean", "")
    return [
        ("untrained base, no fault", base.loss if base else None),
        ("clean arm, no fault", clean_loss(arm_of(evidence, "clean")).mean),
    ]


def _match_references(
    results: Results, evidence: ScenarioEvidence
) -> list[tuple[str, float | None]]:
    base, clean = results.base("clean", ""), arm_of(evidence, "clean")
    return [
        ("untrained base, no fault", base.exact_match if base else None),
        ("clean arm, no fault", results.clean_exact_match(clean).mean if clean else None),
    ]


LOSS = Quantity("faulty loss (nats/token)", _loss, _loss_references, 1.0, True)
EXACT_MATCH = Quantity("faulty exact match (%)", _match, _match_references, 100.0, False)


def curve_svg(results: Results, during: During, quantity: Quantity) -> str:
    """Return the chart of the scenarios in which the fault acts `during`, empty without numbers.

    Markers are means over seeds with whiskers of one sd, small dots are the seeds. Lines join an arm's
    means where the scenarios are levels of one number; number formats, say, have no between.
    """
    pairs = results.evidence_of(during)
    arms = drawn_arms([evidence for _, evidence in pairs])
    series = {name: _series(pairs, name, quantity) for name in arms}
    values = [v for points in series.values() for seeds in points for v in seeds]
    if not values:
        return ""
    references = [
        (label, value * quantity.factor)
        for label, value in quantity.references(results, pairs[0][1])
        if value is not None
    ]
    y = _upward(values + [value for _, value in references], quantity)
    scenarios = [scenario for scenario, _ in pairs]
    places, is_level = _places(scenarios), levels_of(scenarios) is not None
    apart = 3.2 if is_level else min(14.0, (WIDTH - LEFT - RIGHT) / len(pairs) / (len(arms) + 1))
    parts = [*_frame(y, quantity), *_below(pairs, places)]
    for number, (label, value) in enumerate(references):
        parts.append(draw.line(LEFT, y(value), WIDTH - RIGHT, y(value), f"reference r{number}"))
        if _room(series, places, y, value, LEFT) >= _room(series, places, y, value, WIDTH - RIGHT):
            parts.append(draw.text(LEFT + 6, y(value) - 4, label, "small faint"))
        else:
            parts.append(draw.text(WIDTH - RIGHT - 4, y(value) - 4, label, "small faint", "end"))
    for position, (name, style) in enumerate(arms.items()):
        shift = (position - (len(arms) - 1) / 2) * apart
        parts += _draw_series(series[name], [x + shift for x in places], y, style, is_level)
    parts += _legend(arms)
    title = f"{quantity.label} against the fault level, {DURING[during]}"
    return draw.picture(WIDTH, HEIGHT, title, parts)


def _room(
    series: Mapping[str, Sequence[Sequence[float]]],
    places: Sequence[float],
    y: Scale,
    value: float,
    end: float,
) -> float:
    """Return how far from a reference the marks stay along a label that is written from one end."""
    near = [at for at, x in enumerate(places) if abs(x - end) <= LABEL]
    marks = (v for points in series.values() for at in near for v in points[at])
    return min((abs(y(v) - y(value)) for v in marks), default=math.inf)


def drawn_arms(scenarios: Sequence[ScenarioEvidence]) -> dict[str, int]:
    """Return the arms that charts show, each with the number of its style; twins stay in tables."""
    names = dict.fromkeys(
        arm.arm
        for evidence in scenarios
        for arm in evidence.arms
        if not (arm.arm.startswith("finalist") and arm.arm.endswith(("_none", "_global")))
    )
    others = [name for name in names if name not in STYLES]
    known = {**STYLES, **{name: len(STYLES) + i for i, name in enumerate(others)}}
    return {name: known[name] for name in sorted(names, key=known.__getitem__)}


def _series(
    pairs: Sequence[tuple[Scenario, ScenarioEvidence]], name: str, quantity: Quantity
) -> list[list[float]]:
    found = []
    for _, evidence in pairs:
        arm: ArmEvidence | None = arm_of(evidence, name)
        numbers = [quantity.of_cell(cell) for cell in arm.seeds] if arm else []
        # An arm that lacks a seed has no mean, so it has no place in the curve either.
        whole = [v * quantity.factor for v in numbers if v is not None]
        found.append(whole if len(whole) == len(numbers) else [])
    return found


def _upward(values: list[float], quantity: Quantity) -> Scale:
    low, high = min(values), max(values)
    if quantity.may_be_log and is_wide(values, 6):
        return logarithmic(low / 1.12, high * 1.12, HEIGHT - BOTTOM, TOP)
    pad = (high - low) * 0.07 or 0.5
    low = max(0.0, low - pad) if low >= 0 else low - pad
    return linear(low, high + pad, HEIGHT - BOTTOM, TOP)


def _places(scenarios: Sequence[Scenario]) -> list[float]:
    """Return the pixel of each scenario: on a number line if the sweep is one number."""
    left, right = LEFT + 46, WIDTH - RIGHT - 46
    level = levels_of(scenarios)
    if level is None:
        gap = (right - left) / max(1, len(scenarios) - 1)
        middle = (left + right) / 2
        return [left + i * gap if len(scenarios) > 1 else middle for i in range(len(scenarios))]
    make = logarithmic if is_wide(level, 5) else linear
    scale = make(min(level), max(level), left, right)
    return [scale(value) for value in level]


def _frame(y: Scale, quantity: Quantity) -> list[str]:
    is_log = y.bend is math.log
    ticks = log_ticks(y.low, y.high) if is_log else linear_ticks(y.low, y.high)
    parts = []
    for tick in ticks:
        parts.append(draw.line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid"))
        parts.append(draw.text(LEFT - 7, y(tick) + 4, tick_label(tick), "small", "end"))
    label = quantity.label + (", log scale" if is_log else "")
    parts.append(draw.upright(15, (TOP + HEIGHT - BOTTOM) / 2, label, "label"))
    parts.append(draw.line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"))
    return parts


def _below(
    pairs: Sequence[tuple[Scenario, ScenarioEvidence]], places: Sequence[float]
) -> list[str]:
    floor = HEIGHT - BOTTOM
    parts = []
    keys = {key for scenario, _ in pairs for key in scenario.values if key != "during"}
    numeric = levels_of([scenario for scenario, _ in pairs]) is not None
    taken = -math.inf
    for (scenario, evidence), x in sorted(
        zip(pairs, places, strict=True), key=lambda item: item[1]
    ):
        swept = [plain(v) for k, v in scenario.values.items() if k != "during"]
        tick = swept[0] if numeric else sweep_label(scenario)
        parts.append(draw.line(x, floor, x, floor + 5, "axis"))
        parts.append(draw.text(x, floor + 18, tick, "small", "middle"))
        regime = str(evidence.regime.regime)
        parts.append(draw.dot(x, floor, 4, f"regime {regime}"))
        if x - taken >= 68:
            share = fault_text(evidence, "affected_fraction")
            at = floor + 32
            if share != NONE:
                parts.append(draw.text(x, at, share, "small faint", "middle"))
                at += 13
            parts.append(draw.text(x, at, regime, f"small {regime}", "middle"))
            taken = x
    axis = f"{keys.pop()} (below: values affected, regime)" if numeric else "scenario"
    parts.append(draw.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, axis, "label", "middle"))
    return parts


def _draw_series(
    points: Sequence[Sequence[float]],
    places: Sequence[float],
    y: Scale,
    style: int,
    is_joined: bool,
) -> list[str]:
    shape, css = look_of(style)
    parts = []
    means: list[tuple[float, float]] = []
    for seeds, x in zip(points, places, strict=True):
        mean, sd = spread(list(seeds))
        if mean is None:
            continue
        parts += [draw.dot(x, y(value), 1.6, f"seed {css}") for value in seeds]
        if sd:
            low, high = max(mean - sd, y.low), min(mean + sd, y.high)
            parts.append(draw.line(x, y(low), x, y(high), f"whisker {css}"))
        means.append((x, y(mean)))
    if is_joined and len(means) > 1:
        parts.insert(0, draw.path(sorted(means), f"curve {css}"))
    parts += [draw.marker(x, at, 4, shape, f"mean {css}") for x, at in means]
    return parts


def _legend(arms: dict[str, int]) -> list[str]:
    parts = []
    x, row = LEFT, 16.0
    for name, style in arms.items():
        label = "clean (met by the fault)" if name == "clean" else name
        width = 24 + 6.6 * len(label)
        if x + width > WIDTH - RIGHT:
            x, row = LEFT, row + 18
        shape, css = look_of(style)
        parts.append(draw.marker(x + 6, row - 4, 4.5, shape, f"mean {css}"))
        parts.append(draw.text(x + 15, row, label, "small"))
        x += width + 8
    return parts
