"""SVG by hand: a handful of shapes, with classes that the style sheet of the page colours."""

from __future__ import annotations

from html import escape
from typing import Literal

Anchor = Literal["start", "middle", "end"]


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """Return a straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def path(points: list[tuple[float, float]], css: str) -> str:
    """Return a line through points."""
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{text}" class="{css}"/>'


def box(
    x: float, y: float, width: float, height: float, css: str, opacity: float | None = None
) -> str:
    """Return a filled rectangle; `opacity` is that of its fill alone, not of its outline."""
    fill = "" if opacity is None else f' fill-opacity="{opacity:.2f}"'
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" '
        f'class="{css}"{fill}/>'
    )


def text(x: float, y: float, content: str, css: str = "", anchor: Anchor = "start") -> str:
    """Return a line of text; its content is escaped."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">'
        f"{escape(content)}</text>"
    )


def upright(x: float, y: float, content: str, css: str = "") -> str:
    """Return text that reads from bottom to top, centred at a point."""
    return (
        f'<text transform="translate({x:.1f} {y:.1f}) rotate(-90)" text-anchor="middle" '
        f'class="{css}">{escape(content)}</text>'
    )


def dot(x: float, y: float, radius: float, css: str) -> str:
    """Return a filled circle."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{css}"/>'


_SHAPES: tuple[tuple[tuple[float, float], ...], ...] = (
    (),
    ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    ((0, -1.25), (1.2, 0.95), (-1.2, 0.95)),
    ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
    ((0, 1.25), (1.2, -0.95), (-1.2, -0.95)),
)


def marker(x: float, y: float, size: float, shape: int, css: str) -> str:
    """Return one of five markers, told apart without colour as well."""
    corners = _SHAPES[shape % len(_SHAPES)]
    if not corners:
        return dot(x, y, size * 1.05, css)
    points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" class="{css}"/>'


def picture(width: float, height: float, title: str, parts: list[str]) -> str:
    """Return the SVG element, scaled to the width it gets; the title is read to the blind."""
    name = escape(title, quote=True)
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{name}" '
        f'style="max-width:{width:.0f}px"><title>{name}</title>{"".join(parts)}</svg>'
    )
