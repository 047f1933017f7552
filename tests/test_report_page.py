"""What the report says about planted numbers, and what it must not say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from fake_ledger import DAMAGE, Fake, make_lock_file, write_fake

from aqn_tune.errors import UserError
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import EvaluationRow
from aqn_tune.report.curve import look_of
from aqn_tune.report.loading import load_results
from aqn_tune.report.page import context, render_html, render_markdown
from aqn_tune.report.parquet import run_lines
from aqn_tune.report.record_tables import SHOWN_FAILED, failed_table
from aqn_tune.report.results import FailedRun, Results
from aqn_tune.report.summary import summary_of, summary_text
from aqn_tune.report.text import MINUS
from aqn_tune.report.verdict_file import verdict_content
from aqn_tune.report.write import verdict_of, write_report
from aqn_tune.study.folder import StudyFolder

FAILED = ("both-threshold0.2", "targeted", 5)


TWO = {"sweep": {"faults.0.threshold": [0.1, 0.2]}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Fake:
    """A complete study: four thresholds, trained through and met at deployment."""
    return write_fake(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def results(whole: Fake) -> Results:
    return load_results(whole.folder)


@pytest.fixture(scope="module")
def markdown(results: Results) -> str:
    return render_markdown(context(results))


@pytest.fixture(scope="module")
def html(results: Results) -> str:
    return render_html(context(results))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """One seed of one arm failed; that arm would otherwise win."""
    return load_results(write_fake(tmp_path_factory.mktemp("broken"), fail=[FAILED], **TWO).folder)


def test_no_two_arms_look_alike() -> None:
    """Five markers and ten colours that wrap round together repeat after ten."""
    looks = [(look.shape % 5, look.css) for look in map(look_of, range(50))]
    assert len(set(looks)) == 50


def rows_of(markdown: str, heading: str) -> list[list[str]]:
    """Return the cells of the table below the heading that starts with `heading`."""
    below = re.split(rf"^#+ {re.escape(heading)}.*$", markdown, maxsplit=1, flags=re.M)[1]
    table = re.search(r"(?:^\|.*\n)+", below, flags=re.M)
    assert table is not None
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in table[0].strip().splitlines()[2:]
    ]


@pytest.mark.parametrize(
    ("during", "threshold", "regime", "say"),
    [
        ("both", "0.01", "harmless", "no benefit at this margin"),
        ("both", "0.1", "degrading", "noise helps, and targeting helps on top"),
        ("both", "0.5", "catastrophic", "noise helps, and targeting helps on top"),
        ("eval", "0.2", "degrading", "noise helps, and targeting helps on top"),
    ],
)
def test_each_scenario_has_its_regime_and_its_conclusion(
    results: Results, during: str, threshold: str, regime: str, say: str
) -> None:
    content = verdict_content(results)["scenarios"][f"{during}-threshold{threshold}"]
    assert (content["regime"], content["decision"]) == (regime, say)
    assert content["during"] == during
    assert content["values"]["threshold"] == float(threshold)
    lines = render_markdown(context(results)).splitlines()
    assert any(
        line.startswith(f"- **threshold {threshold}** ({regime},") and say in line for line in lines
    )


def test_training_through_a_fault_and_meeting_it_later_are_kept_apart(markdown: str) -> None:
    both, later = markdown.split("## Fault at deployment only")
    assert "## Fault in training and at deployment" in both
    for name in ("Primary contrasts", "Recovery"):
        assert f"### {name}: fault in training and at deployment" in both
        assert f"### {name}: fault at deployment only" in later
    assert "clean arm met by the fault" not in later.split("### Primary")[0]


def test_the_planted_recovery_is_printed(markdown: str) -> None:
    found = {row[0]: row[2] for row in rows_of(markdown, "Recovery: fault in training and")}
    share = {name: int(text.split("\u202f")[0]) for name, text in found.items()}
    assert share["targeted"] == pytest.approx(50, abs=5)
    assert share["global"] == pytest.approx(20, abs=5)
    assert share["finalist1"] == pytest.approx(60, abs=5)


def test_a_harmless_regime_has_no_recovery(markdown: str) -> None:
    assert {row[1] for row in rows_of(markdown, "Recovery: fault in training and")} == {"n/a"}


def test_the_luck_of_the_search_is_shown_beside_the_confirmation(markdown: str) -> None:
    rows = rows_of(markdown, "How much of the win was luck")
    assert len(rows) == 2 * len(DAMAGE)
    for row in rows:
        assert row[1:3] == ["finalist1", "c000"]
        search, confirm, shrank = (float(cell.replace(MINUS, "-")) for cell in row[6:9])
        assert shrank == pytest.approx(search - confirm, abs=2e-4)


def test_costs_add_up(results: Results, markdown: str) -> None:
    rows = {row[0]: row for row in rows_of(markdown, "Cost")}
    keys = {cell.training_key for cell in results.cells if cell.stage == "confirm"}
    cells = [cell for cell in results.cells if cell.stage == "confirm"]
    assert rows["confirm"][1:3] == [str(len(cells)), str(len(keys))]
    assert len(keys) < len(cells)


def test_the_statement_about_the_test_set_is_made(markdown: str, html: str) -> None:
    for page in (markdown, html):
        assert "Intervals hold over training seeds given this test set." in page


def test_a_failed_run_never_becomes_a_number(broken: Results) -> None:
    """Planted: seven good seeds of an arm whose eighth failed."""
    markdown = render_markdown(context(broken))
    arm = {row[0]: row for row in rows_of(markdown, "Arms: threshold 0.2")}["targeted"]
    assert arm[1:9] == ["n/a"] * 8
    assert arm[9] == "7 of 8, 1 failed"

    contrasts = [row for row in rows_of(markdown, "Primary contrasts") if row[0] == "threshold 0.2"]
    for row in contrasts:
        if "targeted" in row[1]:
            assert row[2] == "`?` inconclusive"
            assert row[3:6] == ["n/a"] * 3
        else:
            assert row[2] == "`>` better"
    assert "1 of 8 seeds failed in arm targeted" in markdown

    content = verdict_content(broken)["scenarios"]["both-threshold0.2"]["arms"]["targeted"]
    assert content["loss"] is None
    assert content["losses"][5] is None
    assert content["failed"] == 1

    lines = [
        line
        for line in run_lines(broken)
        if (line["scenario"], line["arm"], line["replicate"]) == FAILED
        and line["stage"] == "confirm"
    ]
    assert [line["status"] for line in lines] == ["failed", "failed"]
    assert all(line["loss"] is None and line["exact_match"] is None for line in lines)


def test_exploratory_numbers_are_shown_apart_and_have_no_verdict(
    results: Results, markdown: str, html: str
) -> None:
    heading = "Exploratory, makes no claims: fault in training and at deployment"
    assert heading in html
    assert "Exploratory, makes no claims: fault at deployment only" in markdown
    rows = [row for row in rows_of(markdown, heading) if row[0] == "threshold 0.1"]
    pairs = [tuple(row[1].replace("\\", "").split(" vs ")) for row in rows]
    noised = ("global", "targeted", "healthy", "random", "finalist1", "finalist1_global")
    wanted = {(arm, reference) for arm in noised for reference in ("fault_only", "global")}
    assert set(pairs) == wanted - {("global", "global")} - set(results.study.primary_contrasts())
    assert len(set(pairs)) == len(pairs)
    healthy = next(row for row in rows if row[1] == r"healthy vs fault\_only")
    assert float(healthy[2].replace(MINUS, "-")) == pytest.approx(0.0, abs=0.02)
    random = next(row for row in rows if row[1] == "random vs global")
    assert float(random[2].replace(MINUS, "-")) == pytest.approx(-0.03, abs=0.02)
    section = markdown.split(heading)[1].split("\n#")[0]
    assert not re.search(r"better|worse|equivalent|inconclusive", section)


def test_a_fault_that_only_one_scenario_does_not_survive_fails_that_cell_alone(
    tmp_path: Path,
) -> None:
    """Planted: a finished training whose loss is not finite under one scenario's faults."""
    fake = write_fake(tmp_path, sweep={"faults.0.threshold": [0.1, 0.2], "during": ["eval"]})
    lost = next(
        row
        for row in fake.rows
        if isinstance(row, EvaluationRow)
        and (row.split, row.scenario, row.final) == ("test", "eval-threshold0.2", True)
    )
    Ledger(fake.folder.ledger).append([lost.model_copy(update={"loss": None})])
    results = load_results(fake.folder)
    assert results.makes_claims
    (run,) = (run for run in results.failed if run.stage == "confirm")
    assert run.training_key == lost.training_key
    assert run.error == "faulty loss is not finite"
    assert run.cells
    assert all("/eval-threshold0.2/" in cell for cell in run.cells)
    assert set(run.cells) <= set(verdict_content(results)["failed"])
    rows = rows_of(render_markdown(context(results)), "Failed runs")
    assert [row[3] for row in rows if row[0] == "confirm"] == ["faulty loss is not finite"]
    arms = {
        row[0]: row for row in rows_of(render_markdown(context(results)), "Arms: threshold 0.2")
    }
    assert arms["clean"][1] == arms["clean"][4] == "n/a"
    assert arms["clean"][7] != "n/a"


def test_failed_runs_are_listed_with_their_reason(broken: Results) -> None:
    markdown = render_markdown(context(broken))
    rows = rows_of(markdown, "Failed runs")
    assert [row for row in rows if row[0] == "confirm"] == [
        ["confirm", "confirm/both-threshold0.2/targeted/5", "20", "loss is not finite at step 7"]
    ]
    assert "runs failed" in summary_of(broken)


@pytest.mark.parametrize(
    ("count", "note"), [(SHOWN_FAILED, None), (1000, "950 more are not shown")]
)
def test_a_thousand_failures_do_not_bury_the_page(
    results: Results, monkeypatch: pytest.MonkeyPatch, count: int, note: str | None
) -> None:
    """The failures of the confirmation come last in the ledger and first in the table."""
    failed = [
        FailedRun(
            "search",
            (f"search/a/config{n:04}/0",),
            f"k{n}",
            n,
            f"{'loss' if n % 2 else 'norm'} is nan at step {n}",
        )
        for n in range(count - 2)
    ]
    failed += [FailedRun("confirm", (f"confirm/a/global/{n}",), f"c{n}", 7, "end") for n in (0, 1)]
    # worked out once for each study, and kept
    monkeypatch.setitem(vars(results), "failed", tuple(failed))
    table = failed_table(results)
    assert table is not None
    assert len(table.rows) == SHOWN_FAILED
    assert [row[1] for row in table.rows[:3]] == [
        *(run.cells[0] for run in failed[-2:]),
        failed[0].cells[0],
    ]
    said = [one for one in table.notes if "not shown" in one]
    assert len(said) == (note is not None)
    if note is not None:
        assert said[0].startswith(f"{note}; runs.parquet has a line for each of their cells.")
        assert said[0].endswith("499 times: norm is nan; 499 times: loss is nan; 2 times: end.")


def test_inconclusive_is_never_printed_as_equivalent(tmp_path: Path) -> None:
    results = load_results(write_fake(tmp_path, jitter=1.0, **TWO).folder)
    markdown = render_markdown(context(results))
    rows = rows_of(markdown, "Primary contrasts")
    unsure = [row for row in rows if row[2] == "`?` inconclusive"]
    assert len(unsure) >= 4
    page = render_html(context(results))
    cards = page[page.index('<div class="cards">') : page.index("The four verdicts")]
    assert cards.count(">?</b>") == len(unsure)
    assert "~" not in cards
    assert f"{len(unsure)} inconclusive (?)" in page
    assert "about 0 further" not in page
    assert "further seed" in page or "no feasible number of seeds" in page


@pytest.mark.parametrize(
    ("changes", "gap"),
    [
        ({"confirm": False}, "The confirmation has not begun; only it makes claims."),
        ({"search": False, "confirm": False}, "The search has ended 0 of 6 configs"),
        ({"first": 3}, "The confirmation has no number yet for"),
        ({"first": 0}, "The confirmation has no number yet for"),
    ],
)
def test_a_partial_study_makes_no_claims(
    tmp_path: Path, changes: dict[str, object], gap: str
) -> None:
    fake = write_fake(tmp_path, **TWO, **changes)  # type: ignore[arg-type]
    paths = write_report(fake.folder)
    assert paths.verdict is None
    assert not fake.folder.verdict.exists()
    verdict = verdict_of(fake.folder)
    assert verdict["complete"] is False
    assert any(gap in sentence for sentence in verdict["missing"])
    assert all(not s["contrasts"] and s["decision"] is None for s in verdict["scenarios"].values())
    for page in (paths.markdown.read_text(), paths.html.read_text(), summary_text(fake.folder)):
        assert gap in page
        assert "Primary contrasts" not in page
        assert not re.search(r"better|worse|equivalent|inconclusive", _words(page))


def _words(page: str) -> str:
    """Return what a reader sees, less the two notes that explain losses and damage."""
    text = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    for note in ("a lower loss is better", "(worse than not training at all)"):
        text = text.replace(note, "")
    return text


def test_arms_that_cannot_exist_are_listed_with_the_reason(tmp_path: Path) -> None:
    everywhere = {"faults": [{"kind": "dead_zone", "layers": "all", "threshold": 0.1}]}
    results = load_results(write_fake(tmp_path, scenario=everywhere, **TWO).folder)
    rows = rows_of(render_markdown(context(results)), "Arms that are not available")
    assert {row[1] for row in rows} == {"healthy", "random"}
    assert all(row[2] for row in rows)
    assert results.makes_claims


def test_a_model_that_is_elsewhere_does_not_hold_up_a_partial_report(tmp_path: Path) -> None:
    model = {"path": str(tmp_path / "elsewhere")}
    results = load_results(write_fake(tmp_path, confirm=False, model=model, **TWO).folder)
    assert results.gaps[0].startswith("Which arms cannot exist is not known here:")
    assert "## Search" in render_markdown(context(results))


def test_a_place_that_no_finalist_fills_does_not_hold_up_the_claims(tmp_path: Path) -> None:
    """Planted: two finalists asked for, and one config that ended well."""
    confirm = {
        "finalists": 2,
        "replicates": 8,
        "contrasts": [["targeted", "fault_only"], ["targeted", "global"], ["finalist2", "global"]],
    }
    results = load_results(write_fake(tmp_path, confirm_spec=confirm, **TWO).folder)
    assert results.makes_claims
    assert len(results.evidence.declared.family) == 4
    rows = rows_of(render_markdown(context(results)), "Arms that are not available")
    assert {row[1] for row in rows} == {"finalist2", r"finalist2\_none", r"finalist2\_global"}


def test_arms_that_share_a_training_are_said_to(results: Results) -> None:
    markdown = render_markdown(context(results))
    rows = {row[0]: row for row in rows_of(markdown, "Arms: threshold 0.1, fault in training and")}
    assert rows[r"finalist1\_none"][-1] == r"fault\_only"
    assert rows["targeted"][-1] == ""
    deployed = {row[0]: row for row in rows_of(markdown, "Arms: threshold 0.1, fault at deploy")}
    assert deployed[r"fault\_only"][-1] == "clean"


def test_the_lock_holds_where_it_and_the_study_differ(tmp_path: Path) -> None:
    """Planted: alpha and margin loosened after the lock was written."""
    fake = write_fake(tmp_path, **TWO)
    before = load_results(fake.folder)
    text = make_lock_file(
        fake.study, before.scenarios, alpha=0.001, margin=5.0, gain=100.0, margin_fraction=0.02
    )
    fake.folder.lock.write_text(text)
    after = load_results(fake.folder)
    assert after.evidence.declared.alpha == 0.001
    judged = [one for each in after.evidence.scenarios for one in each.contrasts]
    assert {one.margin for one in judged} == {5.0}
    assert {one.verdict.word for one in judged} == {"equivalent"}
    assert after.lock_hash != before.lock_hash


def test_the_lock_hash_does_not_depend_on_the_clock(tmp_path: Path) -> None:
    fake = write_fake(tmp_path, **TWO)
    before = load_results(fake.folder)
    text = make_lock_file(fake.study, before.scenarios, created="2027-01-01T00:00:00+00:00")
    fake.folder.lock.write_text(text)
    assert load_results(fake.folder).lock_hash == before.lock_hash


def test_a_study_without_search_or_sweep_or_decisions_has_its_report(tmp_path: Path) -> None:
    results = load_results(write_fake(tmp_path, search=None, sweep={}, decisions=None).folder)
    assert results.makes_claims
    markdown = render_markdown(context(results))
    rows = rows_of(markdown, "Primary contrasts")
    pairs = results.study.primary_contrasts()
    assert [row[:2] for row in rows] == [
        ["both", f"{arm} vs {reference}".replace("_", r"\_")] for arm, reference in pairs
    ]
    assert "## Search" not in markdown
    assert "<svg" in render_html(context(results))


class _Balance(HTMLParser):
    VOID = frozenset({"meta", "br", "hr", "line", "rect", "circle", "polyline", "polygon"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_stands_alone(html: str) -> None:
    parser = _Balance()
    parser.feed(html)
    assert parser.open == []
    assert not re.search(r"<script|https?://|\bsrc=|@import|url\(", html)
    charts = re.findall(r"<svg.*?</svg>", html, flags=re.S)
    assert len(charts) == 6 + 2 * len(DAMAGE), "two kinds of charts, and a search map per scenario"
    for chart in charts:
        ElementTree.fromstring(chart)


@pytest.mark.parametrize("word", ["nan", "None", "inf", "Undefined"])
def test_no_placeholder_of_the_language_reaches_a_reader(
    html: str, markdown: str, broken: Results, word: str
) -> None:
    for page in (html, markdown, render_html(context(broken))):
        assert not re.search(rf"[>|\s(\[]{word}[<|\s)\],]", page)


def test_what_a_user_wrote_is_printed_and_not_run(tmp_path: Path) -> None:
    text = "<script>alert(1)</script> & *bold*"
    results = load_results(write_fake(tmp_path, description=text, **TWO).folder)
    assert "<script>" not in render_html(context(results))
    assert "&lt;script&gt;" in render_html(context(results))
    assert r"\<script>alert(1)\</script> & \*bold\*" in render_markdown(context(results))


def test_the_curve_shows_every_arm_with_its_seeds(html: str, results: Results) -> None:
    chart = ElementTree.fromstring(re.findall(r"<svg.*?</svg>", html, flags=re.S)[0])
    assert chart.attrib["aria-label"].startswith("faulty loss")
    dots = [node for node in chart.iter("circle") if node.attrib["class"].startswith("seed")]
    arms = 7
    assert len(dots) == arms * len(DAMAGE) * results.study.confirm.replicates
    lines = list(chart.iter("polyline"))
    assert len(lines) == arms


def test_scenarios_that_are_no_levels_of_a_number_are_not_joined(tmp_path: Path) -> None:
    """A line from one number format to the next would say that there is something between them."""
    sweep = {"faults.0.threshold": [0.1, 0.2], "deploy": ["unmerged", "merged"]}
    results = load_results(write_fake(tmp_path, sweep=sweep).folder)
    page = render_html(context(results))
    chart = ElementTree.fromstring(re.findall(r"<svg.*?</svg>", page, flags=re.S)[0])
    assert not list(chart.iter("polyline"))
    means = {
        node.attrib["class"] for node in chart.iter() if "mean" in node.attrib.get("class", "")
    }
    assert len(means) == 7
    left = [
        float(n.attrib["cx"]) for n in chart.iter("circle") if n.attrib["class"].startswith("seed")
    ]
    assert len(set(left)) == 7 * 4, "each arm has a place of its own in each scenario"


def test_the_same_ledger_gives_the_same_verdict_file(tmp_path: Path) -> None:
    first = write_fake(tmp_path / "a", **TWO)
    write_report(first.folder)
    one = json.loads(first.folder.verdict.read_text())
    write_report(first.folder, tensorboard=False)
    again = first.folder.verdict.read_text()
    assert json.loads(again) == one
    assert verdict_of(first.folder) == one
    assert again == json.dumps(one, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    second = write_fake(tmp_path / "b", **TWO)
    write_report(second.folder, tensorboard=False)
    other = json.loads(second.folder.verdict.read_text())
    del one["times"], other["times"]
    assert other == one
    assert len(one["seeds"]) == 8
    assert one["margin_share"] == 0.05


def test_the_parquet_file_holds_every_cell_twice(whole: Fake, results: Results) -> None:
    import pyarrow.parquet as pq

    write_report(whole.folder, tensorboard=False)
    table = pq.read_table(whole.folder.runs)
    assert table.num_rows == 2 * len(results.cells)
    lines = table.to_pylist()
    stopped = [line for line in lines if line["arm"] == "c002"]
    assert stopped
    assert all(line["loss"] is None for line in stopped)
    done = [line for line in lines if line["stage"] == "confirm"]
    assert all(line["loss"] is not None and line["status"] == "finished" for line in done)
    assert {line["sweep_threshold"] for line in lines} == set(DAMAGE)
    assert [path.name for path in whole.folder.root.glob("*.tmp")] == []


def test_a_folder_without_a_study_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no study\.yaml here"):
        write_report(StudyFolder(tmp_path))
    (tmp_path / "study.yaml").write_text("study: x\nscenarios: []\n")
    with pytest.raises(UserError, match="not a study of this version"):
        summary_text(StudyFolder(tmp_path))


def test_the_summary_colours_only_when_asked(results: Results) -> None:
    plain = summary_of(results)
    assert "> targeted vs global better" in plain
    assert "[green]" not in plain
    painted = summary_of(results, markup=True)
    assert "[green]>[/green] targeted vs global better" in painted

    from rich.text import Text

    assert Text.from_markup(painted).plain == plain


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        (
            "aqn_tune.report.write",
            ("torch", "ray", "scipy", "pandas", "numpy", "pyarrow", "jinja2", "optuna"),
        ),
        ("aqn_tune.report.summary", ("torch", "ray", "scipy", "pandas", "numpy", "tensorboard")),
        ("aqn_tune.report.tensorboard", ("torch", "ray", "scipy", "pandas", "tensorboard")),
        ("aqn_tune.report.manifest", ("torch", "ray", "scipy", "pandas", "numpy")),
    ],
)
def test_importing_a_report_loads_nothing_heavy(module: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_writing_a_report_needs_neither_torch_nor_ray(whole: Fake) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from aqn_tune.report.write import verdict_of, write_report\n"
        "from aqn_tune.study.folder import StudyFolder\n"
        f"write_report(StudyFolder(Path({str(whole.folder.root)!r})))\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'optuna') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
