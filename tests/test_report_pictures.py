"""TensorBoard shows the pictures of the page as images that a browser draws, and its text."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_ledger import Fake, write_fake
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import img_mime_type_detector

from aqn_tune.errors import UserError
from aqn_tune.report import pictures as drawn
from aqn_tune.report.loading import load_results
from aqn_tune.report.page import context
from aqn_tune.report.pictures import events_file, pictures
from aqn_tune.report.tensorboard import rebuild
from aqn_tune.report.write import write_report

TWO = {"sweep": {"faults.0.threshold": [0.1, 0.2]}}


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Fake:
    made = write_fake(tmp_path_factory.mktemp("fake"), **TWO)
    write_report(made.folder)
    return made


@pytest.fixture(scope="module")
def values(fake: Fake) -> dict[str, Any]:
    return context(load_results(fake.folder))


def logged(fake: Fake) -> dict[str, Any]:
    """Return tag -> value of the report's own event file."""
    path = events_file(fake.folder.tensorboard)
    events = EventFileLoader(str(path)).Load()
    return {value.tag: value for event in events for value in event.summary.value}


def opened(value: Any) -> Image.Image:
    return Image.open(io.BytesIO(value.tensor.string_val[2])).convert("RGB")


def test_every_picture_of_the_page_is_there_and_says_what_it_shows(
    fake: Fake, values: dict[str, Any]
) -> None:
    page = fake.folder.report.read_text(encoding="utf-8")
    found = list(pictures(values))
    assert len(found) == page.count("<svg ")
    assert len({one.tag for one in found}) == len(found)
    written = logged(fake)
    for one in found:
        value = written[one.tag]
        assert one.words
        assert value.metadata.summary_description == one.words
        width, height, png = value.tensor.string_val
        # As anything else TensorBoard serves it as a file to be saved.
        assert img_mime_type_detector.from_bytes(png) == "image/png"
        assert opened(value).size == (int(width), int(height))


def test_no_style_of_a_picture_is_lost_on_the_way(fake: Fake, values: dict[str, Any]) -> None:
    page = fake.folder.report.read_text(encoding="utf-8")
    styles = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert styles is not None
    sheet = drawn._style_sheet()
    assert "var(" not in sheet
    used = {
        name
        for one in pictures(values)
        for names in re.findall(r'class="([^"]*)"', one.svg)
        for name in names.split()
    }
    for name in used:
        rule = rf"\.{name}[ ,{{.]"
        assert bool(re.search(rule, sheet)) == bool(re.search(rule, styles.group(1))), name


def test_what_is_drawn_has_the_colours_of_the_page(fake: Fake, values: dict[str, Any]) -> None:
    """Without its style sheet a picture is black, and so are its areas."""
    curve = next(pictures(values))
    image = opened(logged(fake)[curve.tag])
    colours = {colour for _, colour in image.getcolors(1 << 24)}
    assert {(255, 255, 255), (0xD5, 0x5E, 0x00)} <= colours


@pytest.mark.parametrize(
    "character", ["\N{MINUS SIGN}", "\N{LEFTWARDS ARROW}", "\N{PLUS-MINUS SIGN}"]
)
def test_a_character_that_the_font_has_not_is_drawn_as_another(
    character: str, tmp_path: Path
) -> None:
    """The font draws a box for it: `[]0.5` for `-0.5`."""
    font, sheet = drawn._font(tmp_path), drawn._style_sheet()

    def png(text: str) -> bytes:
        svg = f'<svg viewBox="0 0 40 20"><text x="5" y="15">{text}</text></svg>'
        return drawn._png(svg, sheet, font)

    assert png(character) != png("\N{CJK UNIFIED IDEOGRAPH-4E00}")


def test_every_character_of_the_pictures_is_drawn(values: dict[str, Any], tmp_path: Path) -> None:
    font, sheet = drawn._font(tmp_path), drawn._style_sheet()

    def png(text: str) -> bytes:
        svg = f'<svg viewBox="0 0 40 20"><text x="5" y="15">{text}</text></svg>'
        return drawn._png(svg, sheet, font)

    box = png("\N{CJK UNIFIED IDEOGRAPH-4E00}")
    texts = "".join(re.sub("<[^>]+>", "", one.svg) for one in pictures(values))
    other = {character for character in texts if ord(character) > 126}
    assert "\N{MINUS SIGN}" in other
    assert [hex(ord(one)) for one in sorted(other) if png(one) == box] == []


def test_the_text_is_the_report(fake: Fake) -> None:
    """TensorBoard's Markdown knows no backslash before `<`, `~` and `|`, and printed it."""
    markdown = fake.folder.report_markdown.read_text(encoding="utf-8")
    (text,) = logged(fake)["report"].tensor.string_val
    shown = text.decode()
    assert r"\<" in markdown
    assert not re.search(r"\\[<~|]", shown)
    assert len(shown.splitlines()) == len(markdown.splitlines())
    assert "Holm p &lt; alpha" in shown


@pytest.mark.parametrize("missing", ["resvg_py", "PIL"])
def test_a_machine_that_cannot_draw_has_all_else(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended a finished study in a traceback, before verdict.json was written."""
    fake = write_fake(tmp_path, **TWO)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        UserError, match=r"no pictures of the report, which is written: .*pip install"
    ):
        write_report(fake.folder)
    for path in (fake.folder.report, fake.folder.runs, fake.folder.verdict):
        assert path.exists()


def test_logs_that_are_made_anew_keep_no_pictures_of_before(tmp_path: Path) -> None:
    """A study that goes on has no report yet; its old one would stand beside new curves."""
    fake = write_fake(tmp_path, **TWO)
    write_report(fake.folder)
    rebuild(fake.folder, fake.study)
    assert not (events_file(fake.folder.tensorboard)).exists()
    write_report(fake.folder, tensorboard=False)
    assert (events_file(fake.folder.tensorboard)).exists()
