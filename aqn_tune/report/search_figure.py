"""The search map: a row per config, a cell per decoder layer, and the loss that the config came to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from aqn_tune.report import drawing as draw
from aqn_tune.report.axes import Scale, linear, linear_ticks, tick_label
from aqn_tune.report.scenario_tables import NATS
from aqn_tune.report.search_map import MapRow, ScenarioMap, loss_text, state_text
from aqn_tune.report.sigma_picture import SigmaMap

WIDTH = 900.0
LEFT, MIDDLE = 352.0, 582.0
"""Where the layers begin and end."""
AXIS, RIGHT = 598.0, 772.0
"""Where the axis of the loss begins and ends."""
TOP, ROW, GAP, BOTTOM = 26.0, 18.0, 12.0, 84.0
FAINTEST = 0.2
"""Opacity of the least noise; its outline is drawn in full."""
LONGEST_NAME = 17
APART = 34.0
"""Pixels that two ticks of the loss keep between them."""
REACH = 6.0
"""Distances between the best and the middle of the finished rows that the axis of the loss is long at most: a
config that went wrong must not press all others into one place."""
SHADES = 240.0
"""Where the scale in the legend begins."""
STRIPES = 24
"""Steps of the scale in the legend."""


class _Place(NamedTuple):
    """What all rows of a picture share."""

    layers: Scale
    loss: Scale | None
    shades: SigmaMap
    carriers: bool
    rungs: int


def shades_of(maps: Sequence[ScenarioMap]) -> SigmaMap:
    """Return the scale of the noise that all pictures of a page share: equal shades are equal sigmas."""
    return SigmaMap(
        tuple(row.levels for one in maps for row in (*one.rows, *one.controls) if row.levels)
    )


def search_svg(one: ScenarioMap, shades: SigmaMap, title: str) -> str:
    """Return the picture, empty where the number of layers is not known.

    Configs stand above the controls. Finished rows have a marker with its standard error; what was
    stopped, failed or is under way has words there, as a loss after fewer steps is not comparable.
    `title` is read to the blind and must say what the picture shows.
    """
    if one.layers is None:
        return ""
    rows = (*one.rows, *one.controls)
    gap = GAP if one.controls else 0.0
    floor = TOP + ROW * len(rows) + gap
    place = _Place(
        layers=linear(0, one.layers, LEFT, MIDDLE),
        loss=_loss_scale(rows),
        shades=shades,
        carriers=len({row.carrier for row in rows if row.carrier}) > 1,
        rungs=one.rungs,
    )
    parts = [
        draw.text(22, 16, "config", "label"),
        draw.text(LEFT - 10, 16, "largest sigma", "label", "end"),
        draw.text((LEFT + MIDDLE) / 2, 16, "noise of each decoder layer", "label", "middle"),
        draw.box(LEFT, TOP, MIDDLE - LEFT, floor - TOP, "panel"),
        *_loss_axis(place.loss, rows, floor),
        *_layer_axis(one.layers, one.fault_layers, place.layers, floor),
    ]
    fault_only = next((row.loss for row in one.controls if row.name == "fault_only"), None)
    if place.loss is None or fault_only is None or fault_only > place.loss.high:
        fault_only = None
    else:
        x = place.loss(fault_only)
        parts.append(draw.line(x, TOP, x, floor, "reference"))
    for number, row in enumerate(rows):
        below = gap if number >= len(one.rows) else 0.0
        parts += _row(row, TOP + ROW * (number + 0.5) + below, place)
    if one.controls:
        y = TOP + ROW * len(one.rows) + gap / 2
        parts.append(draw.line(8, y, WIDTH - 8, y, "grid"))
    parts += _scale_legend(shades, floor + 58)
    x = AXIS + 4
    if fault_only is not None:
        parts.append(draw.line(x, floor + 64, x + 24, floor + 64, "reference"))
        parts.append(draw.text(x + 32, floor + 69, "fault_only", "small"))
        x += 120
    if any(row.finalist for row in rows):
        parts.append(draw.marker(x, floor + 64, 4.5, 3, "place"))
        parts.append(draw.text(x + 12, floor + 69, "went to the confirmation", "small"))
    return draw.picture(WIDTH, floor + BOTTOM, title, parts)


def _loss_scale(rows: Sequence[MapRow]) -> Scale | None:
    """Return the axis of the loss: of all finished rows but those far behind the better half."""
    finished = [(row.loss, row.error or 0.0) for row in rows if row.loss is not None]
    if not finished:
        return None
    best, middle = (pick(loss for loss, _ in finished) for pick in (min, median))
    limit = best + REACH * (middle - best) if middle > best else math.inf
    ends = [loss + side * error for loss, error in finished if loss <= limit for side in (-1, 1)]
    low, high = min(ends), max(ends)
    pad = (high - low) * 0.06 or 0.5
    return linear(low - pad, high + pad, AXIS, RIGHT)


def _loss_axis(loss: Scale | None, rows: Sequence[MapRow], floor: float) -> list[str]:
    middle = (AXIS + RIGHT) / 2
    parts = [draw.text(middle, 16, f"faulty validation loss ({NATS})", "label", "middle")]
    if loss is None:
        return parts
    taken = -math.inf
    for tick in linear_ticks(loss.low, loss.high, 4):
        x = loss(tick)
        if x - taken < APART:
            continue
        parts.append(draw.line(x, TOP, x, floor, "grid"))
        parts.append(draw.text(x, floor + 16, tick_label(tick), "small", "middle"))
        taken = x
    parts.append(draw.line(AXIS, floor, RIGHT, floor, "axis"))
    words = "mean \N{PLUS-MINUS SIGN} standard error"
    if any(_goes_on(row, loss) for row in rows):
        words += " (>: beyond)"
    parts.append(draw.text(middle, floor + 34, words, "label", "middle"))
    return parts


def _is_beyond(row: MapRow, loss: Scale) -> bool:
    return row.loss is not None and row.loss > loss.high


def _goes_on(row: MapRow, loss: Scale) -> bool:
    """Return whether a row, or its standard error, reaches past the right end of the axis."""
    return row.loss is not None and row.loss + (row.error or 0.0) > loss.high


def _layer_axis(count: int, fault_layers: Sequence[int], layers: Scale, floor: float) -> list[str]:
    width = layers(1) - layers(0)
    parts = [
        draw.marker(layers(layer) + width / 2, floor + 5, min(3.0, width / 2), 1, "place")
        for layer in fault_layers
    ]
    for tick in linear_ticks(0, count - 1, 7):
        if tick == int(tick):
            x = layers(tick) + width / 2
            parts.append(draw.text(x, floor + 21, f"{tick:.0f}", "small", "middle"))
    words = "decoder layer" + (" (square: fault)" if fault_layers else "")
    parts.append(draw.text((LEFT + MIDDLE) / 2, floor + 38, words, "label", "middle"))
    return parts


def _row(row: MapRow, y: float, place: _Place) -> list[str]:
    name = row.name
    if len(name) > LONGEST_NAME:
        name = name[: LONGEST_NAME - 1] + "\N{HORIZONTAL ELLIPSIS}"
    if row.finalist:
        name = f"{name} {row.finalist}"
    parts = [draw.text(22, y + 4, name, "small group" if row.finalist else "small")]
    if row.finalist:
        parts.insert(0, draw.marker(12, y, 4, 3, "place"))
    if place.carriers and row.carrier:
        parts.append(draw.text(130, y + 4, row.carrier, "small soft"))
    parts += _cells(row, y, place)
    return parts + _outcome(row, y, place)


def _cells(row: MapRow, y: float, place: _Place) -> list[str]:
    middle = (LEFT + MIDDLE) / 2
    if row.levels is None:
        never = row.state == "failed" and row.rung < 0
        words = "cannot exist here" if never else "not known here"
        return [draw.text(middle, y + 4, words, "small soft", "middle")]
    if not row.largest:
        return [draw.text(middle, y + 4, "no noise", "small soft", "middle")]
    parts = [draw.text(LEFT - 10, y + 4, f"{row.largest:.3g}", "small", "end")]
    layer = 0
    for level, group in itertools.groupby(row.levels):
        end = layer + len(list(group))
        if level:
            x, right = place.layers(layer), place.layers(end)
            opacity = FAINTEST + (1 - FAINTEST) * place.shades.place(level)
            parts.append(draw.box(x, y - 7, right - x, 14, "noise", opacity))
        layer = end
    return parts


def _outcome(row: MapRow, y: float, place: _Place) -> list[str]:
    loss = row.loss
    if loss is None or place.loss is None:
        css = "small halo failed" if row.state == "failed" else "small halo soft"
        return [draw.text(AXIS + 4, y + 4, state_text(row, place.rungs), css)]
    parts = [draw.text(WIDTH - 8, y + 4, loss_text(row), "small", "end")]
    if _goes_on(row, place.loss):
        parts.append(draw.path([(RIGHT - 6, y - 4), (RIGHT, y), (RIGHT - 6, y + 4)], "curve"))
    if _is_beyond(row, place.loss):
        return parts
    if row.error:
        # The axis is not made for the rows far behind: their errors may be longer than it.
        ends = max(loss - row.error, place.loss.low), min(loss + row.error, place.loss.high)
        parts.append(draw.line(place.loss(ends[0]), y, place.loss(ends[1]), y, "whisker"))
    shape, size = (3, 4.5) if row.finalist else (0, 3.6)
    parts.append(draw.marker(place.loss(loss), y, size, shape, "mean"))
    return parts


def _scale_legend(shades: SigmaMap, y: float) -> list[str]:
    parts = [draw.text(22, y + 11, "largest sigma of the noise", "label")]
    x = SHADES
    if shades.low == shades.high:
        words = f"{shades.high:.3g}" if shades.high else "no noise anywhere"
        if shades.high:
            parts.append(draw.box(x, y, 18, 13, "noise"))
            x += 26
        parts.append(draw.text(x, y + 11, words, "small"))
    else:
        low, high = f"{shades.low:.3g}", f"{shades.high:.3g}"
        parts.append(draw.text(x, y + 11, low, "small"))
        x += 10 + 7 * len(low)
        for stripe in range(STRIPES):
            opacity = FAINTEST + (1 - FAINTEST) * stripe / (STRIPES - 1)
            parts.append(draw.box(x + stripe * 5, y, 5, 13, "noise flat", opacity))
        kind = "log scale" if shades.is_log else "linear scale"
        parts.append(draw.text(x + STRIPES * 5 + 8, y + 11, f"{high} ({kind})", "small"))
    return parts
