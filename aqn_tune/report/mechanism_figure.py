"""The section "Where the gradient goes": its figure, and what the pages print of a scene."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from aqn_tune.report import drawing as draw
from aqn_tune.report.axes import Scale, bent_ticks, linear, linear_ticks, tick_label
from aqn_tune.report.curve import look_of
from aqn_tune.report.mechanism import LOST, LayerMean, Scene, activation_table, scenes
from aqn_tune.report.results import Results
from aqn_tune.report.table import Table

WIDTH = 900.0
LEFT, RIGHT, GAP = 58.0, 12.0, 16.0
HEAD, ROW, BETWEEN, BOTTOM = 24.0, 150.0, 22.0, 46.0
LARGEST_LINEAR = 4.0
"""Largest ratio that is drawn on a linear scale; beyond it the scale turns logarithmic above 1."""

DEFINITION = (
    "The clean gradient is the gradient at the same weights and the same batch with no fault, no "
    "quantizer and no noise. What is left is what the device and the noise do to the gradient in that "
    "very step, not where the training has gone before. Cosine and norm are those of all trained "
    "tensors of a layer, before clipping; a cosine of 0 with a norm of 0 is a layer that no gradient "
    "reaches. Means over seeds; no claim rests on them."
)

CAPTION = (
    "Above: norm of a layer's gradient over that of its clean gradient (dashed: equal). Below: cosine "
    f"between the two (dashed: {LOST:g}). Squares mark the layers in which a fault acts on activations. "
    "Markers of arms with equal numbers cover one another."
)


class Section(NamedTuple):
    """What the pages print of one scene."""

    title: str
    reading: str
    figure: str
    activations: Table | None


def mechanism_sections(results: Results) -> tuple[Section, ...]:
    """Return one section per scene; none when nothing was observed."""
    return tuple(
        Section(
            f"{scene.title} ({scene.stage} seeds)",
            scene.reading(),
            mechanism_svg(scene),
            activation_table(scene),
        )
        for scene in scenes(results)
    )


class _Panel(NamedTuple):
    """One step's place in the figure."""

    x: Scale
    ratio: Scale
    cosine: Scale


def mechanism_svg(scene: Scene) -> str:
    """Return the figure: layers to the right, a column per step, norm ratio above and cosine below.

    Markers are means over seeds; a line is broken where a layer has no number. Squares on the axis
    are layers in which a fault acts on activations.
    """
    profiles = {(arm, step): scene.profile(arm, step) for arm in scene.arms for step in scene.steps}
    legend, top = _legend(scene.arms)
    ratio_top, cosine_top = top + HEAD, top + HEAD + ROW + BETWEEN
    floor = cosine_top + ROW
    means = [mean for profile in profiles.values() for mean in profile.values()]
    ratio = _ratio_scale(means, ratio_top + ROW, ratio_top)
    lowest = min((m.cosine for m in means if m.cosine is not None), default=0.0)
    cosine = linear(min(0.0, lowest - 0.05 * (lowest < 0)), 1.05, floor, cosine_top)
    width = (WIDTH - LEFT - RIGHT - GAP * (len(scene.steps) - 1)) / len(scene.steps)
    parts = [
        *legend,
        draw.upright(14, ratio_top + ROW / 2, "norm / clean norm", "label"),
        draw.upright(14, cosine_top + ROW / 2, "cosine to clean", "label"),
    ]
    last = scene.layer_count() - 1
    for number, step in enumerate(scene.steps):
        start = LEFT + number * (width + GAP)
        panel = _Panel(linear(-0.5, last + 0.5, start, start + width), ratio, cosine)
        parts.append(draw.text(start + width / 2, top + 14, f"step {step}", "group", "middle"))
        parts += _frame(panel, last, labelled=number == 0)
        parts += [
            draw.marker(panel.x(layer), floor, 3, 1, "place")
            for layer in sorted(scene.fault_layers())
        ]
        for arm, style in reversed(
            tuple(scene.arms.items())
        ):  # the first of the legend lies on top
            parts += _draw(profiles[arm, step], panel, style)
    parts.append(
        draw.text(
            (LEFT + WIDTH - RIGHT) / 2, floor + BOTTOM - 8, "decoder layer", "label", "middle"
        )
    )
    title = f"Gradient of each layer beside its clean gradient, {scene.title}. {scene.reading()}"
    return draw.picture(WIDTH, floor + BOTTOM, title, parts)


def _ratio_scale(means: list[LayerMean], floor: float, top: float) -> Scale:
    largest = max((m.ratio for m in means if m.ratio is not None), default=1.0)
    if largest <= LARGEST_LINEAR:
        return linear(0.0, max(largest, 1.0) * 1.08, floor, top)
    return Scale(0.0, largest * 1.15, floor, top, math.asinh)


def _frame(panel: _Panel, last: int, *, labelled: bool) -> list[str]:
    left, right = panel.x.start, panel.x.end
    bend = panel.ratio.bend is math.asinh
    ratios = (
        [tick for tick in bent_ticks(panel.ratio.high, 1.0) if tick >= 0]
        if bend
        else linear_ticks(0.0, panel.ratio.high, 4)
    )
    cosines = linear_ticks(panel.cosine.low, 1.0, 4)
    parts = []
    for scale, ticks in ((panel.ratio, ratios), (panel.cosine, cosines)):
        for tick in ticks:
            parts.append(draw.line(left, scale(tick), right, scale(tick), "grid"))
            if labelled:
                at = scale(tick) + 4
                parts.append(draw.text(LEFT - 7, at, tick_label(tick), "small", "end"))
        parts.append(draw.line(left, scale(scale.low), right, scale(scale.low), "axis"))
    parts.append(draw.line(left, panel.ratio(1.0), right, panel.ratio(1.0), "reference"))
    parts.append(draw.line(left, panel.cosine(LOST), right, panel.cosine(LOST), "reference r0"))
    floor = panel.cosine(panel.cosine.low)
    ticks = [tick for tick in linear_ticks(0, last, 7) if tick == int(tick)]
    for tick in ticks:
        parts.append(draw.line(panel.x(tick), floor, panel.x(tick), floor + 5, "axis"))
        parts.append(draw.text(panel.x(tick), floor + 18, f"{tick:.0f}", "small", "middle"))
    return parts


def _draw(profile: Mapping[int, LayerMean], panel: _Panel, style: int) -> list[str]:
    shape, css = look_of(style)
    size = 3.2 if panel.x(1) - panel.x(0) > 12 else 2.4
    parts = []
    for which, scale in ((0, panel.ratio), (1, panel.cosine)):
        pieces: list[list[tuple[float, float]]] = [[]]
        before = None
        for layer, mean in profile.items():
            value = mean[which]
            if value is None or (before is not None and layer != before + 1):
                pieces.append([])
            if value is not None:
                pieces[-1].append((panel.x(layer), scale(value)))
            before = layer
        parts += [draw.path(piece, f"curve {css}") for piece in pieces if len(piece) > 1]
        points = [point for piece in pieces for point in piece]
        parts += [draw.marker(x, y, size, shape, f"mean {css}") for x, y in points]
    return parts


def _legend(arms: Mapping[str, int]) -> tuple[list[str], float]:
    """Return the legend and the height that it takes."""
    parts = []
    x, row = LEFT, 16.0
    for name, style in arms.items():
        width = 30 + 6.6 * len(name)
        if x + width > WIDTH - RIGHT:
            x, row = LEFT, row + 18
        shape, css = look_of(style)
        parts.append(draw.marker(x + 6, row - 4, 4.5, shape, f"mean {css}"))
        parts.append(draw.text(x + 15, row, name, "small"))
        x += width
    return parts, row + 8
