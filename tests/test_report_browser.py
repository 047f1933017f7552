"""The report page in a real browser: on a desk and on a phone, light and dark, and what axe-core says of it.

Left out where there is no Chromium; nothing of the package needs one.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from fake_ledger import write_fake
from test_report_search import by_log_sigma, searched

from aqn_tune.report.search_importance import FEWEST
from aqn_tune.report.write import write_report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine"),
]

PROBE = """
<script>%s</script>
<script>
// A folded part is a part of the page: nothing is looked at inside one that is closed.
document.querySelectorAll("details").forEach((one) => { one.open = true; });
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
axe.run(document, {resultTypes: ["violations"]}).then((found) => {
  const pictures = [...document.querySelectorAll("svg, img")];
  const answer = document.createElement("script");
  answer.id = "answer";
  answer.type = "application/json";
  answer.textContent = JSON.stringify({
    errors,
    width: innerWidth,
    wide: document.documentElement.scrollWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    background: getComputedStyle(document.body).backgroundColor,
    pictures: pictures.length,
    silent: pictures.filter((one) => !(one.getAttribute("aria-label") || one.querySelector("title")
      || one.getAttribute("alt") || one.getAttribute("aria-hidden") === "true")).length,
    asked: performance.getEntriesByType("resource").map((one) => one.name),
    text: document.body.innerText,
    violations: found.violations.map((one) => ({
      id: one.id, impact: one.impact, nodes: one.nodes.map((node) => node.html.slice(0, 160)),
    })),
  });
  parent.document.body.append(answer);
});
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fake = write_fake(tmp_path_factory.mktemp("page"), fail=[("both-threshold0.5", "targeted", 3)])
    return write_report(fake.folder).html


@pytest.fixture(scope="module")
def searched_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a search that has enough configs to say which parameters mattered."""
    results = searched(tmp_path_factory.mktemp("searched"), 2 * FEWEST, by_log_sigma)
    return write_report(results.folder).html


def look(page: Path, tmp_path: Path, width: int, *, dark: bool) -> dict[str, Any]:
    """Return what a probe at the end of the page finds in a window of this width."""
    axe = (files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")
    inner = page.read_text().replace("</body>", (PROBE % axe) + "</body>")
    probed = tmp_path / "probed.html"
    # A window is at least 500 pixels wide; a frame is a viewport of its own.
    probed.write_text(
        f'<!doctype html><body style="margin: 0"><iframe style="width: {width}px; height: 1000px; '
        f'border: 0" srcdoc="{escape(inner)}"></iframe></body>'
    )
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1600,1000", "--virtual-time-budget=60000", "--dump-dom",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []), probed.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    found = re.search(
        r'<script id="answer" type="application/json">(.*?)</script>', done.stdout, re.DOTALL
    )
    assert found, done.stderr[-2000:]
    return dict(json.loads(found[1]))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("name", "width", "heading"),
    [
        ("page", 1440, "Verdicts"),
        ("page", 390, "The same as a table"),
        ("searched_page", 390, "What mattered in the search (exploratory)"),
    ],
)
def test_the_page(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    name: str,
    width: int,
    heading: str,
    *,
    dark: bool,
) -> None:
    seen = look(request.getfixturevalue(name), tmp_path, width, dark=dark)
    assert heading in seen["text"]
    assert (seen["width"], seen["dark"]) == (width, dark)
    assert seen["errors"] == []
    assert seen["wide"] <= width, "no horizontal scroll"
    assert seen["asked"] == [], "nothing is loaded from elsewhere"
    assert seen["pictures"] > 0
    assert seen["silent"] == 0, "every picture has a text"
    assert seen["violations"] == []
    levels = [int(part) for part in re.findall(r"\d+", seen["background"])[:3]]
    assert (sum(levels) < 3 * 128) is dark


def test_every_verdict_can_be_read_aloud(page: Path, tmp_path: Path) -> None:
    """A symbol alone says nothing to who does not see it: each has its word beside it."""
    seen = look(page, tmp_path, 1440, dark=False)
    verdicts = json.loads((page.parent / "verdict.json").read_text())
    words = [
        contrast["word"]
        for scenario in verdicts["scenarios"].values()
        for contrast in scenario["contrasts"].values()
    ]
    assert words
    for word in set(words):
        assert len(re.findall(rf"\b{word}\b", seen["text"])) >= words.count(word)


def test_a_defect_is_found(page: Path, tmp_path: Path) -> None:
    """Planted: a picture without a text, a line that is too wide, and text that is hard to see."""
    spoiled = tmp_path / "spoiled.html"
    added = (
        '<svg width="9" height="9"></svg><div style="width: 3000px">wide</div>'
        '<p style="color: #ddd; background: #fff">faint</p>'
    )
    spoiled.write_text(page.read_text().replace("</main>", f"{added}</main>"))
    seen = look(spoiled, tmp_path, 390, dark=False)
    assert seen["silent"] == 1
    assert seen["wide"] >= 3000
    assert "color-contrast" in {one["id"] for one in seen["violations"]}
