"""The equivalence margin in its four forms: what it comes to, when it is fixed, what is said of it."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import yaml
from fake_ledger import (
    BASE_LOSS,
    CONFIGS,
    DAMAGE,
    confirm_cells,
    confirm_rows,
    make_study,
    search_rows,
)
from pydantic import ValidationError
from scipy.stats import t as student
from synthetic import LAYERS, engine, inline, make_scenarios, make_setting, search_inline
from synthetic import make_study as synthetic_study

from aqn_tune.cli.app import main
from aqn_tune.confirm.lock import ConfirmLock, LockFile, hold_lock, make_lock, read_locks
from aqn_tune.confirm.margins import fixed_margins, margin_lines
from aqn_tune.confirm.measured import detectable_effects, search_gain
from aqn_tune.confirm.runner import run_confirm
from aqn_tune.errors import UserError
from aqn_tune.evidence.contrasts import paired_contrast
from aqn_tune.evidence.margins import ScenarioMargin, margin_words, scenario_margin
from aqn_tune.evidence.verdicts import Verdict, judge
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import CellRow, EvaluationRow, LedgerRow, TrainingRow
from aqn_tune.report.export import export_tables
from aqn_tune.report.forest import forest_svg
from aqn_tune.report.loading import load_results
from aqn_tune.report.page import context, render_html, render_markdown
from aqn_tune.report.results import Results
from aqn_tune.report.summary import summary_of
from aqn_tune.report.verdict_file import verdict_content
from aqn_tune.search.ranking import finalists
from aqn_tune.study.cells import Finalist
from aqn_tune.study.folder import StudyFolder, study_folder, study_hash
from aqn_tune.study.margin import (
    MARGINS,
    AbsoluteMargin,
    GainMargin,
    GapMargin,
    Margin,
    SdMargin,
)
from aqn_tune.study.plan import make_plan
from aqn_tune.study.schema import ConfirmSpec, Study
from aqn_tune.study.source import AS_MAPPING, parse_value
from aqn_tune.study.sweep import resolve_scenarios

MILD, HARSH = "both-threshold0.1", "both-threshold0.2"
PAIRS = (("global", "fault_only"), ("targeted", "fault_only"), ("targeted", "global"))
GAP = {"kind": "gap", "share": 0.1}
ABSOLUTE = {"kind": "absolute", "nats": 0.01}
SD = {"kind": "sd", "factor": 2.0}
Mend = Callable[[tuple[LedgerRow, ...]], Iterable[LedgerRow]]


class Made(NamedTuple):
    """A study on planted numbers, up to its lock or to its end."""

    study: Study
    folder: StudyFolder
    lock: ConfirmLock

    def rows(self) -> tuple[LedgerRow, ...]:
        """Return everything in its ledger."""
        return tuple(Ledger(self.folder.ledger).rows())

    def results(self) -> Results:
        """Return what a report makes of it."""
        return load_results(self.folder)


def declared_study(output: Path, margin: Any, *, searched: bool = True, **confirm: Any) -> Study:
    """Return a study of two thresholds with this margin."""
    changes: dict[str, Any] = {} if searched else {"search": None}
    return make_study(
        output,
        sweep={"faults.0.threshold": [0.1, 0.2]},
        confirm={"finalists": 1, "replicates": 8, "margin": margin, **confirm},
        **changes,
    )


def locked(output: Path, margin: Any, *, searched: bool = True, mend: Mend | None = None) -> Made:
    """Search on planted numbers and lock, as `run_confirm` does; `mend` gives rows that hold instead."""
    study = declared_study(output, margin, searched=searched)
    folder, scenarios = study_folder(study), resolve_scenarios(study)
    folder.root.mkdir(parents=True)
    folder.study.write_text(yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False))
    rows = tuple(search_rows(study, scenarios)) if searched else ()
    Ledger(folder.ledger).append([*rows, *(mend(rows) if mend else ())])
    chosen = [Finalist(s.name, 1, "c000", CONFIGS[0]) for s in scenarios] if searched else []
    ledger, cells = Ledger(folder.ledger), confirm_cells(study, scenarios)
    detectable = detectable_effects(ledger, study, scenarios, chosen, cells)
    lock = make_lock(
        study,
        chosen,
        cells,
        gain=search_gain(ledger, study, scenarios),
        detectable=detectable,
        margins=fixed_margins(ledger, study, scenarios, detectable),
    )
    hold_lock(folder.lock, lock)
    return Made(study, folder, lock)


def confirmed(
    output: Path,
    margin: Any,
    *,
    searched: bool = True,
    mend: Mend | None = None,
    jitter: float = 0.01,
) -> Made:
    """Lock, and confirm on planted numbers."""
    made = locked(output, margin, searched=searched, mend=mend)
    rows = confirm_rows(made.study, resolve_scenarios(made.study), jitter=jitter)
    Ledger(made.folder.ledger).append(list(rows))
    return made


def losses(
    rows: Iterable[LedgerRow], stage: str, scenario: str, arm: str, condition: str = "faulty"
) -> list[float]:
    """Return the final losses of an arm, seed by seed, read without any code of the evidence."""
    found = list(rows)
    keys = {
        row.replicate: row.training_key
        for row in found
        if isinstance(row, CellRow) and (row.stage, row.scenario, row.arm) == (stage, scenario, arm)
    }
    where = scenario if condition == "faulty" else ""
    split = "validation" if stage == "search" else "test"
    values = {
        row.training_key: row.loss
        for row in found
        if isinstance(row, EvaluationRow)
        and (row.final, row.condition, row.scenario, row.split) == (True, condition, where, split)
    }
    return [values[keys[replicate]] or math.nan for replicate in sorted(keys)]


def basis_of(kind: str, rows: tuple[LedgerRow, ...], stage: str, scenario: str) -> float:
    """Return gain, gap or sd of a scenario by hand."""
    clean = fmean(losses(rows, stage, scenario, "clean", "clean"))
    if kind == "gain":
        return BASE_LOSS - clean
    if kind == "gap":
        return fmean(losses(rows, stage, scenario, "fault_only")) - clean
    spreads = [
        stdev(
            b - a
            for a, b in zip(
                losses(rows, stage, scenario, arm),
                losses(rows, stage, scenario, other),
                strict=True,
            )
        )
        for arm, other in PAIRS
    ]
    return math.sqrt(fmean(sd * sd for sd in spreads))


# -- what a study may write --------------------------------------------------------------------------


PLAIN = {
    "study": "s",
    "scenario": {"faults": [{"kind": "dead_zone", "layers": [10], "threshold": 0.2}]},
}


@pytest.mark.parametrize(
    ("margins", "hashed"),
    [
        ((None, 0.05, {"kind": "gain"}, {"kind": "gain", "share": 0.05}), "da6ba30cd57d16f5"),
        ((0.1, {"kind": "gain", "share": 0.1}), "1e897814fc96bc5b"),
    ],
)
def test_a_share_of_the_gain_is_the_plain_number_that_it_always_was(
    margins: tuple[Any, ...], hashed: str
) -> None:
    """The hashes were computed before there were other kinds: such a study keeps its folder."""
    for margin in margins:
        confirm = {} if margin is None else {"margin": margin}
        study = Study.model_validate({**PLAIN, "confirm": confirm})
        assert study_hash(study) == hashed
        written = study.model_dump(mode="json")
        assert isinstance(written["confirm"]["margin"], float)
        assert Study.model_validate(written) == study


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (GAP, GapMargin(share=0.1)),
        (ABSOLUTE, AbsoluteMargin(nats=0.01)),
        (SD, SdMargin(factor=2.0)),
    ],
)
def test_every_other_kind_reads_back_and_is_another_study(
    written: dict[str, Any], read: Margin, tmp_path: Path
) -> None:
    study = declared_study(tmp_path, written)
    assert study.confirm.margin == read
    content = study.model_dump(mode="json")
    assert content["confirm"]["margin"] == written
    assert Study.model_validate(content) == study
    assert study_hash(study) != study_hash(declared_study(tmp_path, 0.05))


@pytest.mark.parametrize("kind", MARGINS)
def test_a_kind_alone_is_told_how_it_is_written(kind: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Study.model_validate({**PLAIN, "confirm": {"margin": kind}})
    (error,) = caught.value.errors()
    assert "did you mean" not in error["msg"]
    said = yaml.safe_load(error["msg"].partition("such as ")[2])
    assert ConfirmSpec.model_validate({"margin": said}).margin.kind == kind


def test_what_is_written_in_place_of_a_number_is_a_margin() -> None:
    for key, said in AS_MAPPING.items():
        study = parse_value(said, key)
        for part in reversed(key.split(".")):
            study = {part: study}
        assert Study.model_validate({**PLAIN, **study}).confirm.margin == GapMargin(share=0.1)


OLD_LOCK = (
    '{"format":2,"generations":[{"generation":0,"study":"0123456789abcdef","metric":"faulty test loss",'
    '"replicates":6,"seeds":[3,5,7,9,11,13],"finalists":[],"arms":[{"scenario":"both","arm":"clean",'
    '"training_keys":["a"]}],"missing":[],"contrasts":[["targeted","global"]],"alpha":0.05,"power":0.8,'
    '"margin_fraction":0.05,"gain":0.5,"margin":0.025,"detectable":[{"scenario":"both","contrasts":1,'
    '"sd":0.01,"effect":0.02}],"version":"0","code":"0000000000000000",'
    '"created":"2026-01-01T00:00:00+00:00"}],"identities":["f30f261c21feb4d9"]}'
)
"""A lock file as it was written before there were other kinds."""


def test_a_lock_from_before_is_read_and_keeps_its_identity(tmp_path: Path) -> None:
    path = tmp_path / "confirm.lock"
    path.write_text(OLD_LOCK)
    locks = read_locks(path)
    (lock,) = locks.generations
    assert lock.rule() == GainMargin(share=0.05)
    assert lock.identity() == "f30f261c21feb4d9"
    assert locks.model_dump_json() == OLD_LOCK


# -- what it comes to --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "searched", "measured", "planted"),
    [
        (0.05, True, "search", {MILD: 0.05, HARSH: 0.05}),
        (0.05, False, "confirmation", {MILD: 0.05, HARSH: 0.05}),
        (GAP, True, "search", {MILD: 0.03, HARSH: 0.06}),
        (GAP, False, "confirmation", {MILD: 0.03, HARSH: 0.06}),
        (ABSOLUTE, True, "declared", {MILD: 0.01, HARSH: 0.01}),
        (ABSOLUTE, False, "declared", {MILD: 0.01, HARSH: 0.01}),
        # Two jitters of sd 0.01 make a difference of sd 0.014; two pairs give a rough estimate of it.
        (SD, True, "search", {MILD: 0.028, HARSH: 0.028}),
    ],
)
def test_every_kind_in_nats(
    margin: Any, searched: bool, measured: str, planted: dict[str, float], tmp_path: Path
) -> None:
    """Each scenario by its own numbers, of the search wherever there is one."""
    made = confirmed(tmp_path, margin, searched=searched)
    rule = made.study.confirm.margin
    stage = "search" if searched else "confirm"
    results = made.results()
    assert results.makes_claims
    for one in results.evidence.scenarios:
        found = one.margin
        assert found.measured == measured
        assert found.reason == ""
        if isinstance(rule, AbsoluteMargin):
            assert found.basis is None
            wanted = rule.nats
        else:
            basis = basis_of(rule.kind, made.rows(), stage, one.scenario)
            assert found.basis == pytest.approx(basis, rel=1e-9)
            wanted = rule.in_nats(basis)
        assert found.nats == pytest.approx(wanted, rel=1e-9)
        rough = 0.03 if rule.kind == "sd" else 0.003
        assert found.nats == pytest.approx(planted[one.scenario], abs=rough)
        assert {judged.margin for judged in one.contrasts} == {found.nats}
    assert DAMAGE[0.1] * 2 == DAMAGE[0.2], "what makes the gap of one scenario twice the other's"


@pytest.mark.parametrize(
    ("margin", "searched", "fixed"),
    [
        (0.05, True, True),
        (0.05, False, False),
        (GAP, True, True),
        (GAP, False, False),
        (ABSOLUTE, False, True),
        (SD, True, True),
    ],
)
def test_the_lock_holds_the_nats_before_the_first_confirm_run(
    margin: Any, searched: bool, fixed: bool, tmp_path: Path
) -> None:
    made = locked(tmp_path, margin, searched=searched)
    lock = made.lock
    assert lock.rule() == made.study.confirm.margin
    if isinstance(margin, float):
        assert (lock.margin is not None) is fixed
        assert lock.margins == ()
        assert "margin_rule" not in lock.model_dump()
    else:
        assert [one.scenario for one in lock.margins] == ([MILD, HARSH] if fixed else [])
        assert all(one.nats for one in lock.margins)
        assert lock.margin is lock.margin_fraction is lock.gain is None
    text = "\n".join(margin_lines(lock))
    assert lock.rule().words() in text
    assert ("as the confirmation itself measures it" in text) is not fixed
    assert LockFile.model_validate_json(made.folder.lock.read_text()).generations == (lock,)


def test_an_sd_is_that_of_the_search_and_never_of_the_confirmed_pairs(tmp_path: Path) -> None:
    """The pairs would set the bar that they are held to: the noisier, the more is equivalent."""
    calm, wild = (confirmed(tmp_path / str(j), SD, jitter=j) for j in (0.01, 0.2))
    for ours, theirs in zip(
        calm.results().evidence.scenarios, wild.results().evidence.scenarios, strict=True
    ):
        spread = basis_of("sd", wild.rows(), "confirm", theirs.scenario)
        assert spread > 5 * basis_of("sd", wild.rows(), "search", theirs.scenario)
        assert theirs.margin.nats == ours.margin.nats
        assert {judged.margin for judged in theirs.contrasts} == {ours.margin.nats}


def test_an_sd_that_was_not_locked_is_not_made_up(tmp_path: Path) -> None:
    made = confirmed(tmp_path, SD)
    bare = made.lock.model_copy(update={"margins": ()})
    made.folder.lock.write_text(LockFile(generations=(bare,)).model_dump_json())
    for one in made.results().evidence.scenarios:
        assert one.margin.nats is None
        assert one.margin.reason == "the sd is not known (the search did not measure it)"


def healed(rows: tuple[LedgerRow, ...]) -> Iterable[LedgerRow]:
    """Plant a mild fault that does good in the search."""
    keys = {
        row.training_key
        for row in rows
        if isinstance(row, CellRow) and (row.scenario, row.arm) == (MILD, "fault_only")
    }
    for row in rows:
        if isinstance(row, EvaluationRow) and row.training_key in keys and row.scenario == MILD:
            yield row.model_copy(update={"loss": (row.loss or 0.0) - 0.5})


def lost(rows: tuple[LedgerRow, ...]) -> Iterable[LedgerRow]:
    """Plant a seed of fault_only that failed in the search."""
    key = next(
        row.training_key
        for row in rows
        if isinstance(row, CellRow)
        and (row.scenario, row.arm, row.replicate) == (MILD, "fault_only", 1)
    )
    last = [row for row in rows if isinstance(row, TrainingRow) and row.training_key == key][-1]
    yield last.model_copy(update={"status": "failed", "error": "loss is not finite at step 7"})


def lost_clean(rows: tuple[LedgerRow, ...]) -> Iterable[LedgerRow]:
    """Plant a seed of the clean arm, one run in both scenarios, that failed in the search."""
    keys = {
        row.training_key
        for row in rows
        if isinstance(row, CellRow) and (row.arm, row.replicate) == ("clean", 1)
    }
    last = {row.training_key: row for row in rows if isinstance(row, TrainingRow)}
    (key,) = keys
    yield last[key].model_copy(update={"status": "failed", "error": "loss is not finite at step 7"})


def test_a_clean_seed_that_failed_in_the_search(tmp_path: Path) -> None:
    """No G, so that nothing is confirmed; no gap in the scenarios that use it, and the study goes on."""
    with pytest.raises(UserError, match="seed 1 of the clean arm has no loss"):
        locked(tmp_path / "gain", 0.05, mend=lost_clean)
    made = locked(tmp_path / "gap", GAP, mend=lost_clean)
    _, *lines = margin_lines(made.lock)
    assert [line.partition(":")[0].strip() for line in lines] == [MILD, HARSH]
    for line in lines:
        assert (
            ": none, so that nothing can be called equivalent: the gap is not known (seed 1 of clean"
            in line
        )


@pytest.mark.parametrize(
    ("mend", "reason"),
    [
        (
            healed,
            r"the gap is not positive in the search \(-0\.\d+ nats/token: the fault costs nothing\)",
        ),
        (
            lost,
            r"the gap is not known \(seed 1 of fault_only has no loss in the search: loss is not finite",
        ),
    ],
)
def test_a_scenario_without_a_gap_has_no_margin_and_the_report_says_why(
    mend: Mend, reason: str, tmp_path: Path
) -> None:
    """The confirmation finds a gap there; it is too late for it to count."""
    made = confirmed(tmp_path, GAP, mend=mend)
    assert basis_of("gap", made.rows(), "confirm", MILD) > 0.2
    results = made.results()
    mild, harsh = results.evidence.scenarios
    assert mild.margin.nats is None
    assert re.fullmatch(rf"{reason}.*", mild.margin.reason)
    assert {one.margin for one in mild.contrasts} == {None}
    assert Verdict.EQUIVALENT not in {one.verdict for one in mild.contrasts}
    assert Verdict.BETTER in {one.verdict for one in mild.contrasts}
    assert harsh.margin.nats == pytest.approx(0.06, abs=0.02)
    markdown = render_markdown(context(results)).replace("\\", "")
    for page in (render_html(context(results)), markdown):
        assert re.search(
            f"no margin here, so that nothing can be called equivalent: {reason}", page
        )
        assert re.search(f"Margin of threshold 0.1: none, .*{reason}", page)
        assert "none in 1 of 2 scenarios" in page
    assert f"  {MILD}: none, so that nothing can be called equivalent: " in "\n".join(
        margin_lines(made.lock)
    )
    content = verdict_content(results)
    assert content["margin"] is None
    assert content["scenarios"][MILD]["margin"]["reason"] == mild.margin.reason
    (chart,) = charts(results)
    assert [text.split()[0] for text in chart if re.match("(no )?margin", text)] == ["no", "margin"]


def charts(results: Results) -> list[list[str]]:
    """Return the texts of each forest plot."""
    return [
        [node.text or "" for node in ElementTree.fromstring(svg).iter("text")]
        for during in results.during_values
        if (svg := forest_svg(results, during))
    ]


def useless(rows: tuple[LedgerRow, ...]) -> Iterable[LedgerRow]:
    """Plant a base that needs no training, on the validation split."""
    for row in rows:
        if isinstance(row, EvaluationRow) and (row.step, row.condition) == (0, "clean"):
            yield row.model_copy(update={"loss": 0.2})


def test_a_search_that_gained_nothing_leaves_no_margin(tmp_path: Path) -> None:
    """The bug: a lock with a negative margin, and then 5 % of the G that the confirmation found."""
    made = confirmed(tmp_path, 0.05, mend=useless)
    assert made.lock.margin is not None
    assert made.lock.margin < 0
    assert basis_of("gain", made.rows(), "confirm", MILD) > 0.9
    said = "the gain G is not positive in the search (-0.3"
    assert said in margin_lines(made.lock)[0]
    for one in made.results().evidence.scenarios:
        assert one.margin.nats is None
        assert said in one.margin.reason
        assert {judged.margin for judged in one.contrasts} == {None}


@pytest.mark.parametrize(
    ("rule", "basis", "nats", "said"),
    [
        (GainMargin(), 1.0, 0.05, "5 % of the gain G (gain G 1 nats/token in the search)"),
        (GainMargin(share=0.07), 2.0, 0.14, "7 % of the gain G (gain G 2 nats/token in the search)"),
        (GainMargin(), -0.1, None, "the gain G is not positive in the search (-0.1 nats/token: the clean"),
        (GapMargin(share=0.1), 0.3, 0.03, "10 % of the gap between fault_only and clean (gap 0.3"),
        (GapMargin(share=0.1), 0.0, None, "the gap is not positive in the search (0 nats/token: the fault"),
        (GapMargin(share=0.1), None, None, "the gap is not known (because)"),
        (AbsoluteMargin(nats=0.01), None, 0.01, "0.01 nats/token, as declared"),
        (SdMargin(factor=0.5), 0.02, 0.01, "0.5 sd of the paired difference (sd 0.02 nats/token in the"),
        (SdMargin(factor=0.5), None, None, "the sd is not known (because)"),
    ],
)  # fmt: skip
def test_a_rule_and_what_it_is_a_share_of(
    rule: Margin, basis: float | None, nats: float | None, said: str
) -> None:
    found = scenario_margin(rule, "s", basis, "search", missing="because")
    assert found.nats == (None if nats is None else pytest.approx(nats))
    words = margin_words(rule, found)
    assert said in words
    assert ("nothing can be called equivalent" in words) is (nats is None)
    assert rule.words() in words or isinstance(rule, AbsoluteMargin)


def test_an_sd_that_no_contrast_of_the_search_gives(tmp_path: Path) -> None:
    made = locked(tmp_path, SD)
    scenarios = resolve_scenarios(made.study)
    bare = [one.model_copy(update={"sd": None}) for one in made.lock.detectable]
    mild, _ = fixed_margins(Ledger(made.folder.ledger), made.study, scenarios, bare[:1])
    assert mild.nats is None
    assert mild.reason.startswith(
        "the sd is not known (no primary contrast has numbers of both arms"
    )


# -- held to -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (GAP, {"kind": "gap", "share": 0.2},
         ['margin_rule: locked {"kind": "gap", "share": 0.1}, now {"kind": "gap", "share": 0.2}']),
        (GAP, 0.05,
         ['margin_rule: locked {"kind": "gap", "share": 0.1}, now null',
          "margin_fraction: locked null, now 0.05"]),
        (0.05, ABSOLUTE,
         ['margin_rule: locked null, now {"kind": "absolute", "nats": 0.01}',
          "margin_fraction: locked 0.05, now null"]),
        (SD, {"kind": "sd", "factor": 3.0},
         ['margin_rule: locked {"kind": "sd", "factor": 2.0}, now {"kind": "sd", "factor": 3.0}']),
    ],
)  # fmt: skip
def test_another_margin_after_the_lock_is_refused_with_both(
    old: Any, new: Any, said: list[str], tmp_path: Path
) -> None:
    made = locked(tmp_path, old)
    before = made.folder.lock.read_bytes()
    other = declared_study(tmp_path, new)
    wanted = make_lock(
        other,
        made.lock.chosen(),
        confirm_cells(other, resolve_scenarios(other)),
        gain=made.lock.gain,
        detectable=made.lock.detectable,
        margins=made.lock.margins,
    )
    with pytest.raises(UserError, match=r"raise confirm\.generation to 1") as caught:
        hold_lock(made.folder.lock, wanted)
    for one in said:
        assert one in str(caught.value)
    assert made.folder.lock.read_bytes() == before


def test_a_margin_changed_in_the_folder_is_refused_by_the_report(tmp_path: Path) -> None:
    made = confirmed(tmp_path, GAP)
    content = yaml.safe_load(made.folder.study.read_text())
    content["confirm"]["margin"] = {"kind": "gap", "share": 0.5}
    made.folder.study.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as caught:
        made.results()
    locked_and_now = (
        "margin: locked 10 % of the gap between fault_only and clean, now 50 % of the gap between "
        "fault_only and clean"
    )
    assert locked_and_now in str(caught.value)


def test_an_edited_nat_of_a_lock_is_seen(tmp_path: Path) -> None:
    made = confirmed(tmp_path, GAP)
    content = json.loads(made.folder.lock.read_text())
    content["generations"][0]["margins"][0]["nats"] *= 2
    made.folder.lock.write_text(json.dumps(content))
    with pytest.raises(UserError, match="a locked value was edited"):
        made.results()


def test_a_confirmation_runs_under_the_margin_that_it_locked(tmp_path: Path) -> None:
    """The whole way: search, lock, announce, confirm; and again, with nothing left to do."""
    study = synthetic_study(tmp_path, search={"configs": 3}, confirm={"margin": GAP})
    folder, scenarios = study_folder(study), make_scenarios(study)
    search_inline(study, folder)
    ledger = Ledger(folder.ledger)
    best = [each for one in scenarios for each in finalists(ledger, one, study)]
    announced: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aqn_tune.confirm.runner.execute", inline)
        for _ in range(2):
            run_confirm(
                study, make_setting(study), scenarios, folder, best,
                layer_count=LAYERS, engine=engine(), announce=announced.append,
            )  # fmt: skip
    (lock,) = read_locks(folder.lock).generations
    assert [one.scenario for one in lock.margins] == [one.name for one in scenarios]
    rows = tuple(Ledger(folder.ledger).rows())
    for one in lock.margins:
        assert one.nats == pytest.approx(0.1 * basis_of("gap", rows, "search", one.scenario))
    assert announced.count("margin, 10 % of the gap between fault_only and clean:") == 1
    # What a later change of the search would come to is no matter any more.
    assert fixed_margins(Ledger(folder.ledger), study, scenarios, lock.detectable) == lock.margins


# -- what is said of it ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "searched", "fact", "note"),
    [
        (0.05, True, r"5 % of the gain G: 0\.0\d+ nats/token",
         r"Margin: 0\.0\d+ nats/token, 5 % of the gain G \(gain G [\d.]+ nats/token in the search\)\."),
        (0.05, False, r"5 % of the gain G: 0\.0\d+ nats/token",
         r"Margin: 0\.0\d+ nats/token, 5 % of the gain G \(gain G [\d.]+ nats/token in the confirmation\)\."),
        (GAP, True, r"10 % of the gap between fault_only and clean: 0\.0[23]\d* to 0\.0[56]\d* nats/token",
         r"Margin of threshold 0\.2: 0\.0\d+ nats/token, 10 % of the gap between fault_only and clean "
         r"\(gap 0\.[56]\d* nats/token in the search\)\."),
        (GAP, False, r"10 % of the gap between fault_only and clean: 0\.0[23]\d* to 0\.0[56]\d* nats/token",
         r"Margin of threshold 0\.1: 0\.0\d+ nats/token, 10 % of the gap between fault_only and clean "
         r"\(gap 0\.[23]\d* nats/token in the confirmation\)\."),
        (ABSOLUTE, True, r"0\.01 nats per token", r"Margin: 0\.01 nats/token, as declared\."),
        (SD, True, r"2 sd of the paired difference: 0\.0\d+ to 0\.0\d+ nats/token",
         r"Margin of threshold 0\.1: 0\.0\d+ nats/token, 2 sd of the paired difference "
         r"\(sd 0\.0\d+ nats/token in the search\)\."),
    ],
)  # fmt: skip
def test_reports_say_which_margin_and_where_it_comes_from(
    margin: Any, searched: bool, fact: str, note: str, tmp_path: Path
) -> None:
    made = confirmed(tmp_path, margin, searched=searched)
    results = made.results()
    values = context(results)
    assert re.fullmatch(fact, values["margin"])
    html, markdown = render_html(values), render_markdown(values).replace("\\", "")
    assert re.search(rf"<dd>{fact}</dd>", html)
    assert re.search(rf"margin {fact}\.", markdown)
    assert re.search(note, html)
    assert re.search(note, markdown)
    assert "no margin" not in html
    assert "margin" not in summary_of(results)

    content = verdict_content(results)
    rule = made.study.confirm.margin
    assert content["margin_rule"] == rule.model_dump()
    assert content["margin_share"] == (0.05 if isinstance(rule, GainMargin) else None)
    nats = [one["margin"]["nats"] for one in content["scenarios"].values()]
    alike = not isinstance(rule, GapMargin | SdMargin) and (searched or margin is ABSOLUTE)
    assert content["margin"] == (nats[0] if alike else None)
    assert [one.margin.nats for one in results.evidence.scenarios] == nats

    export_tables(made.folder, tmp_path / "out")
    with (tmp_path / "out" / "contrasts.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            own = content["scenarios"][line["scenario"]]["margin"]
            assert float(line["margin"]) == own["nats"]
            assert line["margin_kind"] == rule.kind
            assert line["margin_measured"] == own["measured"]
            assert line["margin_basis"] == ("" if own["basis"] is None else repr(own["basis"]))


def test_the_forest_plot_shades_each_scenario_by_its_own_margin(tmp_path: Path) -> None:
    widths: dict[str, list[float]] = {}
    for name, margin in (("gap", GAP), ("absolute", ABSOLUTE)):
        results = confirmed(tmp_path / name, margin).results()
        (svg,) = (forest_svg(results, during) for during in results.during_values)
        boxes = [
            node for node in ElementTree.fromstring(svg).iter() if node.get("class") == "margin"
        ]
        widths[name] = [float(box.attrib["width"]) for box in boxes]
        (texts,) = charts(results)
        which = "the smallest margin" if name == "gap" else "the margin"
        assert any(text.endswith(f"logarithmic beyond {which}") for text in texts)
        shown = [text for text in texts if re.fullmatch(r"margin [\d.]+", text)]
        nats = [one.margin.nats for one in results.evidence.scenarios]
        # One that holds for all is said once.
        assert shown == ([f"margin {value:.3g}" for value in nats] if name == "gap" else [])
        band = "shaded: within the margin" + ("" if name == "gap" else " of 0.01")
        assert band in texts
    mild, harsh = widths["gap"]
    assert harsh > 1.3 * mild
    assert len(set(widths["absolute"])) == 1


def test_a_page_before_the_lock_has_the_kind_alone(tmp_path: Path) -> None:
    made = locked(tmp_path, SD)
    made.folder.lock.unlink()
    page = render_html(context(made.results()))
    assert "<dd>2 sd of the paired difference</dd>" in page
    assert "equivalent" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S)


@pytest.mark.parametrize(
    ("margin", "searched", "measured", "reason"),
    [
        (0.05, True, "search", "the gain G is not known (it is not measured yet)"),
        (GAP, True, "search", "the gap is not known (it is not measured yet)"),
        (SD, True, "search", "the sd is not known (it is not measured yet)"),
        (GAP, False, "confirmation", "the gap is not known (no finite loss of: base, clean, fault_only)"),
        (ABSOLUTE, True, "declared", ""),
    ],
)  # fmt: skip
def test_before_the_lock_a_margin_is_one_that_is_not_measured_yet(
    margin: Any, searched: bool, measured: str, reason: str, tmp_path: Path
) -> None:
    """The bugs: an sd that the search is said to have missed, a gap that the confirmation would measure."""
    made = locked(tmp_path, margin, searched=searched)
    made.folder.lock.unlink()
    for scenario in verdict_content(made.results())["scenarios"].values():
        said = scenario["margin"]
        assert (said["measured"], said["reason"]) == (measured, reason)
        assert (said["nats"] is None) is bool(reason)


@pytest.mark.parametrize(
    ("margin", "searched", "said", "as_data"),
    [
        (0.05, True, "margin 5 % of the gain G, as the search measures it", 0.05),
        (0.05, False, "margin 5 % of the gain G, as the confirmation itself measures it", 0.05),
        (GAP, True, "margin 10 % of the gap between fault_only and clean, as the search measures it", GAP),
        (ABSOLUTE, False, "margin 0.01 nats per token", ABSOLUTE),
        (SD, True, "margin 2 sd of the paired difference, as the search measures it", SD),
    ],
)  # fmt: skip
def test_a_plan_says_which_margin_and_who_measures_it(
    margin: Any,
    searched: bool,
    said: str,
    as_data: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = declared_study(tmp_path, margin, searched=searched)
    file = tmp_path / "demo.yaml"
    file.write_text(yaml.safe_dump(study.model_dump(mode="json")))
    for json_too in ([], ["--json"]):
        with pytest.raises(SystemExit) as stopped:
            main(["plan", str(file), *json_too])
        assert not stopped.value.code
        shown = capsys.readouterr().out
        if json_too:
            assert json.loads(shown)["detectable"]["margin"] == as_data
        else:
            assert said in shown
            assert "caution   confirm.margin" not in shown


@pytest.mark.parametrize(("looks", "alpha"), [((), 0.05), ((6, 8), 0.025)])
@pytest.mark.parametrize(("factor", "warned"), [(0.999, True), (1.001, False)])
def test_an_sd_that_the_interval_does_not_fit_into_is_warned_of(
    factor: float, warned: bool, looks: tuple[int, ...], alpha: float, tmp_path: Path
) -> None:
    """Just above half the interval pairs without a difference are equivalent, just below they are not."""
    study = declared_study(tmp_path, SD, looks=looks)
    half = make_plan(study).detectable.half_interval
    family = 2 * len(study.primary_contrasts())
    assert half == pytest.approx(student.ppf(1 - alpha / family, 7) / math.sqrt(8), rel=1e-6)
    margin = {"kind": "sd", "factor": factor * half}
    cautions = make_plan(declared_study(tmp_path, margin, looks=looks)).cautions
    assert any(text.startswith("confirm.margin: ") for text in cautions) is warned
    pairs = [1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 0.1, -0.1]
    contrast = paired_contrast(pairs, [0.0] * 8)
    contrasts = {f"c{i}": contrast for i in range(family)}
    (judged, *_) = judge(contrasts, alpha=alpha, margin=factor * half * stdev(pairs))
    assert (judged.verdict is Verdict.EQUIVALENT) is not warned


def test_margins_of_a_lock_in_lines(tmp_path: Path) -> None:
    lock = locked(tmp_path, ABSOLUTE).lock
    assert margin_lines(lock) == (
        "margin, 0.01 nats per token:",
        f"  {MILD}: 0.01 nats/token, as declared",
        f"  {HARSH}: 0.01 nats/token, as declared",
    )
    old = LockFile.model_validate_json(OLD_LOCK).generations[0]
    assert margin_lines(old) == (
        "margin: 0.025 nats/token, 5 % of the gain G (gain G 0.5 nats/token in the search)",
    )
    assert ScenarioMargin.model_validate(lock.margins[0].model_dump()) == lock.margins[0]
