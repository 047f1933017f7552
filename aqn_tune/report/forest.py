"""The forest plot: every primary contrast with its intervals, its margin and its verdict."""

from __future__ import annotations

from aqn_tune.evidence.verdicts import Judged
from aqn_tune.report import drawing as draw
from aqn_tune.report.axes import Scale, bent, bent_ticks, tick_label
from aqn_tune.report.results import Results
from aqn_tune.report.scenario_tables import DURING, NATS, sweep_label
from aqn_tune.report.verdict_tables import contrast_label
from aqn_tune.study.scenario import During

WIDTH, LEFT, RIGHT = 900.0, 236.0, 190.0
ROW, HEAD, TOP, BOTTOM = 22.0, 26.0, 30.0, 52.0


def forest_svg(results: Results, during: During) -> str:
    """Return the plot of the contrasts in which the fault acts `during`, empty without numbers.

    A thick line is the plain interval of the contrast, a thin one that of the whole family, which
    the margin of its scenario (the shaded band) is held to. To the right of zero the arm is better.
    """
    groups = [
        (sweep_label(scenario), str(evidence.regime.regime), evidence.contrasts)
        for scenario, evidence in results.evidence_of(during)
        if evidence.contrasts
    ]
    judged = [one for _, _, contrasts in groups for one in contrasts]
    ends = [abs(end) for one in judged for end in _ends(one)]
    if not ends:
        return ""
    margins = [one.margin for one in judged if one.margin]
    of_group = [
        next((one.margin for one in contrasts if one.margin), None) for _, _, contrasts in groups
    ]
    alike = len(set(of_group)) == 1
    knee = min(margins) if margins else max(ends) / 4 or 1.0
    bound = max([*ends, *margins]) * 1.08 or 1.0
    height = TOP + BOTTOM + HEAD * len(groups) + ROW * len(judged)
    x = bent(bound, knee, LEFT, WIDTH - RIGHT)
    floor = height - BOTTOM
    parts = _frame(x, bound, knee, floor, several=len(set(margins)) > 1)
    parts.append(_shaded(of_group[0] if alike else None))
    top = TOP
    for (label, regime, contrasts), margin in zip(groups, of_group, strict=True):
        bottom = top + HEAD + ROW * len(contrasts)
        if margin:
            left, right = x(-margin), x(margin)
            parts.append(draw.box(left, top, right - left, bottom - top, "margin"))
        parts.append(draw.text(8, top + 18, label, "group"))
        parts.append(draw.text(LEFT - 10, top + 18, regime, f"small {regime}", "end"))
        if not (alike and margin):
            shown = f"margin {margin:.3g}" if margin else "no margin"
            parts.append(draw.text(WIDTH - RIGHT + 16, top + 18, shown, "small faint"))
        for position, one in enumerate(contrasts):
            parts += _row(one, x, top + HEAD + ROW * (position + 0.5))
        parts.append(draw.line(8, bottom, WIDTH - 8, bottom, "grid"))
        top = bottom
    parts.append(draw.line(x(0), TOP, x(0), floor, "zero"))
    title = f"Primary contrasts with intervals and margin, {DURING[during]}"
    return draw.picture(WIDTH, height, title, parts)


def _ends(judged: Judged) -> list[float]:
    one = judged.contrast
    if one is None:
        return []
    found = (one.improvement, one.low, one.high, judged.low, judged.high)
    return [value for value in found if value is not None]


def _frame(x: Scale, bound: float, knee: float, floor: float, *, several: bool) -> list[str]:
    parts = []
    for tick in bent_ticks(bound, knee):
        parts.append(draw.line(x(tick), TOP, x(tick), floor, "grid"))
        parts.append(draw.text(x(tick), floor + 16, tick_label(tick), "small", "middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    which = "the smallest margin" if several else "the margin"
    label = f"improvement ({NATS}); straight near zero, logarithmic beyond {which}"
    parts.append(draw.text(middle, floor + 36, label, "label", "middle"))
    parts.append(draw.text(LEFT, 18, "\N{LEFTWARDS ARROW} arm worse", "small faint"))
    parts.append(
        draw.text(WIDTH - RIGHT, 18, "arm better \N{RIGHTWARDS ARROW}", "small faint", "end")
    )
    return parts


def _shaded(margin: float | None) -> str:
    """Return what the band is, with its number where all scenarios have the same."""
    words = "shaded: within the margin" + ("" if margin is None else f" of {margin:.3g}")
    return draw.text((LEFT + WIDTH - RIGHT) / 2, 18, words, "small faint", "middle")


def _row(judged: Judged, x: Scale, y: float) -> list[str]:
    css = judged.verdict.word
    parts = [draw.text(18, y + 4, contrast_label(judged), "small")]
    one = judged.contrast
    if one is None:
        parts.append(draw.text(x(0) + 8, y + 4, "no test", "small faint"))
    else:
        if judged.low is not None and judged.high is not None:
            parts.append(draw.line(x(judged.low), y, x(judged.high), y, f"family {css}"))
        if one.low is not None and one.high is not None:
            parts.append(draw.line(x(one.low), y, x(one.high), y, f"interval {css}"))
        parts.append(draw.marker(x(one.improvement), y, 4, 3, f"mean {css}"))
    symbol_at = WIDTH - RIGHT + 16
    parts.append(draw.text(symbol_at, y + 5, judged.verdict.value, f"symbol {css}", "middle"))
    words = judged.verdict.word
    if judged.real_but_below_margin:
        words = "equivalent (real, below margin)"
    parts.append(draw.text(symbol_at + 14, y + 4, words, f"small {css}"))
    return parts
