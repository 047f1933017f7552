"""Noise over layers and steps as a picture: the scale that every rendering shares, and the SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape

from aqn_tune.report import drawing as draw
from aqn_tune.report.axes import is_wide, linear_ticks
from aqn_tune.study.plan import ranges

WIDTH = 760.0
LEFT, RIGHT, TOP = 64.0, 20.0, 58.0
BELOW = 104.0
"""Room below the map: step axis, scale and notes."""
MAP_HEIGHT = 400.0
"""Height of the map at most; few layers take less."""
_STOPS = ((0xFB, 0xE0, 0xA9), (0xE8, 0x7A, 0x3C), (0x6B, 0x14, 0x2A))
"""Colours from the least noise to the most; each darker than the one before, so that grey print works."""
_STYLE = (
    "rect{shape-rendering:crispEdges}text{font:12px system-ui,sans-serif;fill:#1c1c1c}"
    ".small{font-size:11px}.faint{fill:#5a5a5a}.title{font-weight:600}.axis{stroke:#1c1c1c;stroke-width:1}"
    ".frame{fill:none;stroke:#1c1c1c;stroke-width:1}.none{fill:#fff;stroke:#9a9a9a}"
    ".page{fill:#fff}.fault{fill:#1c1c1c}"
)


@dataclass(frozen=True)
class SigmaMap:
    """Standard deviation of the noise of each decoder layer at each training step."""

    levels: tuple[tuple[float, ...], ...]
    """By layer, then step: sigma * multiplier, 0 without noise."""
    faulty: frozenset[int] = frozenset()
    """Layers that hold a fault, marked beside the map."""

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.levels[0])

    @cached_property
    def low(self) -> float:
        """The smallest noise there is, 0 when there is none."""
        return min((v for row in self.levels for v in row if v > 0), default=0.0)

    @cached_property
    def high(self) -> float:
        """The largest noise, 0 when there is none."""
        return max((v for row in self.levels for v in row), default=0.0)

    @cached_property
    def is_log(self) -> bool:
        """Whether the scale is logarithmic: the levels span more than a factor of five."""
        return is_wide([self.low, self.high], 5)

    def place(self, value: float) -> float:
        """Return where a noise above 0 lies between the smallest (0) and the largest (1)."""
        if self.low == self.high:
            return 1.0
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def binned(self, layers: int, steps: int) -> tuple[tuple[float, ...], ...]:
        """Return the largest noise of each block of `layers` layers by `steps` steps.

        Blocks start at layer and step 0; the last ones may be smaller. The largest, so that no noise is
        ever hidden by its neighbours.
        """
        rows = [self.levels[first : first + layers] for first in range(0, len(self.levels), layers)]
        return tuple(
            tuple(
                max(max(row[first : first + steps]) for row in block)
                for first in range(0, self.steps, steps)
            )
            for block in rows
        )

    def summary(self) -> str:
        """Return what the picture shows, in words."""
        shape = f"{len(self.levels)} decoder layers by {self.steps} training steps"
        if not self.high:
            return f"{shape}; no layer has noise at any step."
        noised = [layer for layer, row in enumerate(self.levels) if any(row)]
        quiet = [t for t, column in enumerate(zip(*self.levels, strict=True)) if not any(column)]
        parts = [
            f"{shape}; noise in {_named('layer', noised)}, standard deviation "
            f"{self.low:.3g} to {self.high:.3g}"
        ]
        if quiet:
            parts.append(f"none at {_named('step', quiet)}")
        if self.faulty:
            parts.append(f"a fault in {_named('layer', sorted(self.faulty))}")
        return "; ".join(parts) + "."


def _named(what: str, numbers: Sequence[int]) -> str:
    return f"{what}{'' if len(numbers) == 1 else 's'} {ranges(numbers)}"


def sigma_svg(sigma_map: SigmaMap, title: str, note: str = "") -> str:
    """Return the map as an SVG file of its own: white page, dark text, nothing outside the file.

    Equal neighbours along a row are one rectangle, so the file stays small. `note` is a line below the
    title; `SigmaMap.summary` is the text alternative.
    """
    layers, steps = len(sigma_map.levels), sigma_map.steps
    pitch = min(16.0, MAP_HEIGHT / layers)
    bottom = TOP + pitch * layers
    height = bottom + BELOW
    across = (WIDTH - LEFT - RIGHT) / steps
    parts = [
        f"<style>{_STYLE}</style>",
        draw.box(0, 0, WIDTH, height, "page"),
        _heading(24, title, 15, "title"),
        _heading(42, note, 11, "faint"),
        *_cells(sigma_map, across, pitch),
        draw.box(LEFT, TOP, WIDTH - LEFT - RIGHT, bottom - TOP, "frame"),
        *_layer_axis(sigma_map, pitch),
        *_step_axis(steps, across, bottom),
        *_legend(sigma_map, bottom + 62),
    ]
    text = escape(sigma_map.summary())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" '
        f'width="{WIDTH:.0f}" height="{height:.0f}" role="img" aria-labelledby="title text">\n'
        f'<title id="title">{escape(title)}</title>\n<desc id="text">{text}</desc>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _heading(y: float, content: str, size: float, css: str) -> str:
    """Return a line of text that is set smaller where it would leave the page."""
    fitting = (WIDTH - LEFT - RIGHT) / (0.6 * max(len(content), 1))
    return (
        f'<text x="{LEFT:.1f}" y="{y:.1f}" text-anchor="start" class="{css}" '
        f'style="font-size:{min(size, fitting):.1f}px">{escape(content)}</text>'
    )


def _cells(sigma_map: SigmaMap, across: float, pitch: float) -> list[str]:
    gap = 1.0 if pitch > 5 else 0.0
    parts = []
    for layer, row in enumerate(sigma_map.levels):
        step = 0
        for value, group in itertools.groupby(row):
            length = len(list(group))
            if value:
                parts.append(
                    _filled(
                        LEFT + step * across,
                        TOP + layer * pitch + gap / 2,
                        length * across,
                        pitch - gap,
                        sigma_map.place(value),
                    )
                )
            step += length
    return parts


def _filled(x: float, y: float, width: float, height: float, place: float) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" '
        f'fill="{_colour(place)}"/>'
    )


def _colour(place: float) -> str:
    """Return the colour at `place` from 0 to 1 between the stops."""
    first = min(int(place * (len(_STOPS) - 1)), len(_STOPS) - 2)
    share = place * (len(_STOPS) - 1) - first
    pairs = zip(_STOPS[first], _STOPS[first + 1], strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def _layer_axis(sigma_map: SigmaMap, pitch: float) -> list[str]:
    layers = len(sigma_map.levels)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * pitch >= 13)
    parts = [draw.upright(16, TOP + pitch * layers / 2, "decoder layer")]
    for layer in range(layers):
        y = TOP + (layer + 0.5) * pitch
        if layer % every == 0:
            parts.append(draw.text(LEFT - 16, y + 4, str(layer), "small", "end"))
        if layer in sigma_map.faulty:
            parts.append(draw.marker(LEFT - 8, y, min(3.5, pitch / 2), 1, "fault"))
    return parts


def _step_axis(steps: int, across: float, bottom: float) -> list[str]:
    parts = []
    ticks = [tick for tick in linear_ticks(0, steps - 1, 8) if tick == int(tick)]
    for tick in ticks:
        x = LEFT + (tick + 0.5) * across
        parts.append(draw.line(x, bottom, x, bottom + 5, "axis"))
        parts.append(draw.text(x, bottom + 18, f"{tick:.0f}", "small", "middle"))
    parts.append(draw.text((LEFT + WIDTH - RIGHT) / 2, bottom + 36, "training step", "", "middle"))
    return parts


def _legend(sigma_map: SigmaMap, y: float) -> list[str]:
    parts = [draw.box(LEFT, y, 16, 12, "none"), draw.text(LEFT + 22, y + 10, "no noise", "small")]
    x = LEFT + 96
    if sigma_map.high:
        low, high = f"{sigma_map.low:.3g}", f"{sigma_map.high:.3g}"
        kind = "log scale" if sigma_map.is_log else "linear scale"
        if sigma_map.low == sigma_map.high:
            parts.append(_filled(x, y, 16, 12, 1.0))
            parts.append(draw.text(x + 22, y + 10, f"standard deviation {high}", "small"))
        else:
            parts.append(draw.text(x, y + 10, "standard deviation", "small"))
            start = x + 124 + 7 * len(low)
            parts.append(draw.text(start - 6, y + 10, low, "small", "end"))
            for i in range(40):
                parts.append(_filled(start + i * 4, y, 4, 12, i / 39))
            parts.append(draw.text(start + 166, y + 10, f"{high} ({kind})", "small"))
    if sigma_map.faulty:
        parts.append(draw.marker(LEFT + 8, y + 25, 3.5, 1, "fault"))
        parts.append(draw.text(LEFT + 22, y + 29, "layer that holds a fault", "small"))
    return parts
