"""The pictures and the text of the report as TensorBoard shows them, on its pages Images and Text."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from html import unescape
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple

from aqn_tune.errors import UserError
from aqn_tune.report.custom_scalars import folder_of
from aqn_tune.report.events import EVENT_FILE, write_events

RUN: Final = "_report"
"""The run in TensorBoard, among those of the arms; no arm has such a name."""
_DRAWN: Final = re.compile(r"svg [^{]|\.s\d|\.(better|equivalent|harmless|catastrophic) ")
"""Begins a line of the page's style sheet that concerns what is inside a picture."""
_GLYPHS: Final[dict[str, str | int | None]] = {
    "\N{MINUS SIGN}": "-",
    "\N{LEFTWARDS ARROW}": "&lt;",
    "\N{RIGHTWARDS ARROW}": "&gt;",
}
"""Characters that the font has not, and what is drawn in their place."""
_ESCAPES: Final = {r"\<": "&lt;", r"\~": "~", r"\|": "&#124;"}
"""What GitHub's Markdown escapes and TensorBoard's would print with its backslash."""


class Picture(NamedTuple):
    """A picture of the page."""

    tag: str
    """What it is called in TensorBoard: the part before the first slash groups."""
    svg: str

    @property
    def words(self) -> str:
        """What it shows, in words: its text alternative."""
        found = re.search(r"<title>(.*?)</title>", self.svg, re.DOTALL)
        return unescape(found.group(1)) if found else ""


def write_pictures(folder: Path, values: Mapping[str, Any], markdown: str) -> None:
    """Write the report to the logs in `folder`: every picture as an image, and its Markdown as text.

    Args:
        folder: root of the study's logs.
        values: see `aqn_tune.report.page.context`.
        markdown: the report as Markdown.

    Raises UserError where a picture cannot be drawn here: resvg-py is missing, or Pillow has no FreeType.
    """
    summaries = [(0, _text(markdown))]
    try:
        with tempfile.TemporaryDirectory() as name:
            font = _font(Path(name))
            sheet = _style_sheet()
            for one in pictures(values):
                summaries.append((0, _image(one, _png(one.svg, sheet, font))))
    except ImportError as error:
        raise UserError(
            f"TensorBoard gets no pictures of the report, which is written: {error}; install what is "
            "missing (pip install resvg-py pillow) and run aqn-tune report again"
        ) from error
    write_events(events_file(folder), summaries, anew=True)


def events_file(folder: Path) -> Path:
    """Return the event file of the report, given the root of a study's logs.

    It lies beside the arms: of a folder with more than forty runs TensorBoard shows none unasked.
    """
    return folder / folder_of("confirm") / RUN / EVENT_FILE


def pictures(values: Mapping[str, Any]) -> Iterator[Picture]:
    """Yield the pictures of a page in their order; `values` as `aqn_tune.report.page.context` has them."""
    for part in values["parts"]:
        for number, curve in enumerate(part.curves, start=1):
            yield Picture(f"threshold curves/{part.title} {number}", curve)
        if part.forest:
            yield Picture(f"contrasts/{part.title}", part.forest)
    for heading, sections in (("gradients", values["mechanism"]), ("search", values["search"])):
        for section in sections:
            if section.figure:
                yield Picture(f"{heading}/{section.title}", section.figure)


def _style_sheet() -> str:
    """Return the light colours of the page, without the variables that only a browser knows."""
    text = (resources.files("aqn_tune.report") / "templates" / "style.css").read_text("utf-8")
    light = dict(re.findall(r"(--\w+):\s*([^;]+);", text.partition("@media")[0]))
    rules = "\n".join(line for line in text.splitlines() if _DRAWN.match(line))
    return re.sub(r"var\((--\w+)\)", lambda found: light[found.group(1)], rules)


def _font(folder: Path) -> Path:
    """Write the font that Pillow brings: pictures then look alike everywhere, also where there is none."""
    from PIL import ImageFont

    # Of a size it is a FreeType font, or an ImportError where Pillow was built without.
    font = ImageFont.load_default(13)
    assert isinstance(font, ImageFont.FreeTypeFont)
    path = folder / "font.ttf"
    path.write_bytes(font.font_bytes)
    return path


def _png(svg: str, sheet: str, font: Path) -> bytes:
    from resvg_py import svg_to_bytes

    named = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return svg_to_bytes(
        svg_string=named.translate(str.maketrans(_GLYPHS)),
        style_sheet=sheet,
        background="#ffffff",
        skip_system_fonts=True,
        font_files=[str(font)],
        font_family="Aileron",
    )


def _image(picture: Picture, png: bytes) -> Any:
    from tensorboard.compat.proto import summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
    from tensorboard.plugins.image import metadata

    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    size = tensor_shape_pb2.TensorShapeProto.Dim
    tensor = tensor_pb2.TensorProto(
        dtype=types_pb2.DT_STRING,
        tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=[size(size=3)]),
        string_val=[str(width).encode(), str(height).encode(), png],
    )
    described = metadata.create_summary_metadata(display_name=None, description=picture.words)
    value = summary_pb2.Summary.Value(tag=picture.tag, tensor=tensor, metadata=described)
    return summary_pb2.Summary(value=[value])


def _text(markdown: str) -> Any:
    from tensorboard.compat.proto import summary_pb2, tensor_pb2, types_pb2
    from tensorboard.plugins.text import metadata

    for escaped, entity in _ESCAPES.items():
        markdown = markdown.replace(escaped, entity)
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[markdown.encode()])
    described = metadata.create_summary_metadata(display_name=None, description="")
    value = summary_pb2.Summary.Value(tag="report", tensor=tensor, metadata=described)
    return summary_pb2.Summary(value=[value])
