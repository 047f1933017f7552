"""Noise over layers and steps in a terminal: a row per layer, a character per step or few."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from aqn_tune.report.axes import linear_ticks

if TYPE_CHECKING:
    from rich.text import Text

    from aqn_tune.report.sigma_picture import SigmaMap

BLOCKS = "▁▂▃▄▅▆▇█"
"""From the least noise to the most: the height tells it without colour."""
COLOURS = ("#4575b4", "#5a94c2", "#7fb0a8", "#a9b66b", "#d4b13f", "#e88f35", "#e0602f", "#c2352b")
NOTHING = "·"
MOST_ROWS = 48
"""Layers drawn on rows of their own; more than that share rows."""
WIDEST_STEP = 4
"""Characters that one step takes at most."""


def heat_map(sigma_map: SigmaMap, width: int) -> Iterator[Text]:
    """Yield the lines of the picture, none wider than `width` columns (at least 40).

    Where steps outnumber the columns, equally many share each character, which shows the largest of
    them; likewise layers and rows. The legend says how many.
    """
    from rich.text import Text

    layers = math.ceil(len(sigma_map.levels) / MOST_ROWS)
    labels = [
        _label(sigma_map, first, min(first + layers, len(sigma_map.levels)))
        for first in range(0, len(sigma_map.levels), layers)
    ]
    margin = max(len(label) for label in [*labels, "layer"]) + 1
    room = width - margin
    steps = math.ceil(sigma_map.steps / room)
    wide = max(1, min(room // sigma_map.steps, WIDEST_STEP)) if steps == 1 else 1
    for label, row in zip(labels, sigma_map.binned(layers, steps), strict=True):
        line = Text(f"{label:>{margin - 1}} ", no_wrap=True)
        for value in row:
            shade = _shade(sigma_map, value)
            line.append(
                (BLOCKS[shade] if value else NOTHING) * wide, COLOURS[shade] if value else "dim"
            )
        yield line
    columns = math.ceil(sigma_map.steps / steps) * wide
    yield Text(
        f"{'step':>{margin - 1}} {_ticks(sigma_map.steps, steps, wide, columns)}", no_wrap=True
    )
    yield from _legend(sigma_map, layers, steps, width)


def _shade(sigma_map: SigmaMap, value: float) -> int:
    if not value:
        return 0
    return round(sigma_map.place(value) * (len(BLOCKS) - 1))


def _label(sigma_map: SigmaMap, first: int, end: int) -> str:
    name = str(first) if end - first == 1 else f"{first}-{end - 1}"
    return f"{'x ' if any(n in sigma_map.faulty for n in range(first, end)) else ''}{name}"


def _ticks(total: int, steps: int, wide: int, columns: int) -> str:
    """Return the step numbers, each beginning below its own step."""
    line = ""
    for tick in linear_ticks(0, total - 1, max(2, columns // 9)):
        at = int(tick) // steps * wide
        if (
            tick == int(tick)
            and (not line or at > len(line))
            and at + len(str(int(tick))) <= columns
        ):
            line = line.ljust(at) + str(int(tick))
    return line


def _legend(sigma_map: SigmaMap, layers: int, steps: int, width: int) -> Iterator[Text]:
    from rich.text import Text

    scale = Text(f"{NOTHING} none   ")
    if sigma_map.low == sigma_map.high:
        scale.append(BLOCKS[-1], COLOURS[-1]).append(f" {sigma_map.high:.3g}")
    else:
        scale.append(f"{sigma_map.low:.3g} ")
        for block, colour in zip(BLOCKS, COLOURS, strict=True):
            scale.append(block, colour)
        scale.append(f" {sigma_map.high:.3g} ({'log' if sigma_map.is_log else 'linear'} scale)")
    notes = [scale]
    if steps > 1:
        notes.append(Text(f"each column {steps} steps, their largest"))
    if layers > 1:
        notes.append(Text(f"each row {layers} layers, their largest"))
    if sigma_map.faulty:
        notes.append(Text("x holds a fault"))
    line = Text()
    for note in notes:
        if line and len(line) + 3 + len(note) > width:
            yield line
            line = Text()
        line.append("   " if line else "").append_text(note)
    yield line
