"""A confirmation in looks, from its first run to its report: it stops where it may, and nowhere else."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from synthetic import LAYERS, Behaviour, inline_packs, make_setting, make_study, ray_two
from synthetic import engine as synthetic_engine
from test_evidence_looks import EQUAL, Planted, found
from test_report_mechanism import planted

from aqn_tune.cli.app import main
from aqn_tune.cli.run import write_study
from aqn_tune.cli.status import study_status
from aqn_tune.confirm.lock import read_locks
from aqn_tune.confirm.measured import detectable_lines
from aqn_tune.confirm.runner import run_confirm
from aqn_tune.confirm.standing import standing
from aqn_tune.errors import Interrupted, UserError
from aqn_tune.evidence.looks import Look
from aqn_tune.evidence.margins import ScenarioMargin
from aqn_tune.evidence.power import mde_sd_units
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import MechanismRow
from aqn_tune.report.comparison import compare
from aqn_tune.report.export import export_tables
from aqn_tune.report.loading import load_results
from aqn_tune.report.mechanism import scenes
from aqn_tune.report.page import context, render_html, render_markdown
from aqn_tune.report.parquet import run_lines
from aqn_tune.report.side import Named
from aqn_tune.report.summary import summary_of
from aqn_tune.report.tensorboard import TensorBoardWriter, rebuild
from aqn_tune.report.verdict_file import verdict_content
from aqn_tune.report.write import write_report
from aqn_tune.search.work import Work
from aqn_tune.study.engine import Engine
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.keys import content_hash
from aqn_tune.study.margin import GapMargin
from aqn_tune.study.runs import Setting
from aqn_tune.study.schema import Study
from aqn_tune.study.sweep import resolve_scenarios

__all__ = ["ray_two"]

LOOKS = (6, 8, 10)
ARMS = 3
CLEAR, NOISY, HOPELESS = 0.01, 0.16, 3.0
"""Spread of what arms do not share, at which the study is decided at its first look, at its second, never."""
STOPS_AT = {CLEAR: 1, NOISY: 2, HOPELESS: 3}

Execute = Callable[..., None]


def looked(tmp_path: Path, **confirm: Any) -> Study:
    """Return a study of three arms and one contrast, without a search."""
    study = make_study(
        tmp_path,
        search=None,
        controls={"include": ["clean", "fault_only", "targeted"]},
        confirm={
            "replicates": LOOKS[-1],
            "looks": LOOKS,
            "contrasts": [["targeted", "fault_only"]],
            **confirm,
        },
        compute={"pack_replicas": 4},
    )
    write_study(study, study_folder(study))
    return study


def cut_after(packs: int) -> Execute:
    """Return a stand-in for `execute` that is interrupted when it has run so many packs, in all its calls."""
    left = [packs]

    def run(work: Work, *, setting: Setting, engine: Engine, **rest: Any) -> None:
        shared = engine.load(setting, rest["split"], rest["max_length"])
        while (pack := work.next_pack()) is not None:
            if not left[0]:
                raise Interrupted("cut")
            left[0] -= 1
            training = engine.open_pack(pack, setting, shared)
            while work.arrived(pack, training.advance()):
                pass

    return run


def confirm(
    study: Study,
    noise: float,
    how: Execute | None = None,
    said: list[str] | None = None,
    **more: Any,
) -> Ledger:
    """Run the confirmation of a study without Ray, or go on with it."""
    folder = study_folder(study)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aqn_tune.confirm.runner.execute", how or cut_after(1000))
        run_confirm(
            study, make_setting(study), resolve_scenarios(study), folder, layer_count=LAYERS,
            engine=synthetic_engine(Behaviour(noise_sd=noise)),
            announce=None if said is None else said.append, **more,
        )  # fmt: skip
    return Ledger(folder.ledger)


def seeds_run(ledger: Ledger) -> set[int]:
    """Return the replicates of which anything was trained."""
    return {
        cell.replicate for cell in ledger.cells.values() if cell.training_key in ledger.trainings
    }


def look_of(folder: StudyFolder) -> Look:
    look = load_results(folder).evidence.look
    assert look is not None
    return look


def contrast_lines(folder: StudyFolder, target: Path) -> list[dict[str, str]]:
    """Return the lines of `contrasts.csv`."""
    export_tables(folder, target)
    with (target / "contrasts.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("noise", STOPS_AT)
def test_it_stops_at_the_first_look_that_leaves_nothing_to_decide(
    tmp_path: Path, noise: float
) -> None:
    study, folder = looked(tmp_path), study_folder(looked(tmp_path))
    said: list[str] = []
    ledger = confirm(study, noise, said=said)
    stop = STOPS_AT[noise]
    seeds = LOOKS[stop - 1]
    assert seeds_run(ledger) == set(range(seeds))
    assert {cell.replicate for cell in ledger.cells.values()} == set(range(seeds))
    (held,) = read_locks(folder.lock).generations
    assert (held.looks, len(held.seeds)) == (LOOKS, 10), "all seeds are locked"
    assert [line for line in said if line.startswith("confirmation: ")] == [
        *(
            f"confirmation: look {i} of 3 ({LOOKS[i - 1]} seeds, judged at alpha 0.0167) left contrasts "
            f"open; look {i + 1} follows, at {LOOKS[i]}"
            for i in range(1, stop)
        ),
        f"confirmation: look {stop} of 3 ({seeds} seeds, judged at alpha 0.0167) was the last"
        + (", as more seeds could decide nothing further" if stop < 3 else ""),
    ]

    results = load_results(folder)
    assert results.gaps == ()
    assert results.makes_claims
    content = verdict_content(results)
    assert content["look"] == {
        "number": stop,
        "planned": list(LOOKS),
        "n": seeds,
        "alpha": pytest.approx(0.05 / 3),
        "complete": True,
        "over": True,
        "stopped_early": stop < 3,
    }
    assert (content["n"], content["alpha"], len(content["seeds"])) == (seeds, 0.05, seeds)
    (scenario,) = content["scenarios"].values()
    verdict = scenario["contrasts"]["targeted-vs-fault_only"]["verdict"]
    assert verdict == ("?" if noise == HOPELESS else ">")
    assert {len(arm["losses"]) for arm in scenario["arms"].values()} == {seeds}
    assert len(run_lines(results)) == 2 * ARMS * seeds, "only what exists"
    cost = results.evidence.costs[1]
    assert cost.trainings == ARMS * seeds

    for page in (render_markdown(context(results)), render_html(context(results))):
        text = " ".join(page.split())
        assert f"{seeds} fresh seeds, look {stop} of 3" in text
        assert f"Look {stop} of 3 ({seeds} seeds, judged at alpha 0.0167) was the last" in text
        assert "98.33 % interval" in text
        assert "0.05 (0.0167 at each of 3 looks)" in text
        assert ("lean away from zero" in text) is (stop < 3), "said where it ended early"
        assert "more seeds are needed, in a new generation" in text
    assert f"look {stop} of 3" in summary_of(results)
    assert study_status(study, folder)["look"]["words"] == look_of(folder).words
    assert not standing(
        study, make_setting(study), resolve_scenarios(study), folder, layer_count=LAYERS
    ).left


@pytest.mark.parametrize("noise", [CLEAR, NOISY])
def test_cut_anywhere_it_comes_to_the_same(tmp_path: Path, noise: float) -> None:
    """After each pack: the report, the status and the next run agree, and the end is that of an uncut run."""
    whole = looked(tmp_path / "whole")
    said: list[str] = []
    confirm(whole, noise, said=said)
    expected = verdict_content(load_results(study_folder(whole)))
    packs = len({row.pack for row in Ledger(study_folder(whole).ledger).trainings.values()}) + 1
    assert packs >= 5
    interim = 0
    for cut in range(packs + 1):
        study = looked(tmp_path / str(cut))
        folder = study_folder(study)
        try:
            confirm(study, noise, cut_after(cut))
        except Interrupted:
            results = load_results(folder)
            assert not results.makes_claims
            look = look_of(folder)
            assert study_status(study, folder)["look"]["words"] == look.words
            assert max(seeds_run(Ledger(folder.ledger)), default=0) < look.seeds_to_run
            assert write_report(folder).verdict is None
            content = verdict_content(results)
            (scenario,) = content["scenarios"].values()
            assert bool(scenario["contrasts"]) is look.goes_on
            assert {len(arm["losses"]) for arm in scenario["arms"].values()} == {look.seeds}
            assert len(content["seeds"]) == content["n"] == look.seeds
            interim += look.goes_on
            confirm(study, noise)
        assert verdict_content(load_results(folder)) == expected
    assert (interim > 0) is (noise == NOISY)


def test_between_looks_the_report_shows_the_look_before(tmp_path: Path) -> None:
    study = looked(tmp_path)
    folder = study_folder(study)
    # the base, five packs of the first look, and one of the second
    with pytest.raises(Interrupted):
        confirm(study, NOISY, cut_after(7))
    results = load_results(folder)
    assert max(seeds_run(Ledger(folder.ledger))) >= 6, "the second look has begun"
    assert results.gaps == (
        "The confirmation goes on: look 1 of 3 (6 seeds, judged at alpha 0.0167) left contrasts open; look 2 "
        "follows, at 8.",
    )
    page = render_markdown(context(results))
    assert "## Not complete yet" in page
    assert "## Verdicts" in page
    assert "inconclusive so far" in page
    assert "is judged again at the next look" in page
    assert "more seeds are needed" not in page
    assert "a new generation of" not in page
    assert "<h2>Not complete yet</h2>" in render_html(context(results))
    summary = summary_of(results)
    assert "Not complete yet:" in summary
    assert "1 primary contrast: " in summary
    (line,) = contrast_lines(folder, tmp_path / "out")
    assert (line["look"], line["looks"], line["complete"]) == ("1", "3", "False")
    assert (float(line["alpha"]), line["seeds_needed"]) == (pytest.approx(0.05 / 3), "")
    (scenario,) = verdict_content(results)["scenarios"].values()
    assert scenario["contrasts"]["targeted-vs-fault_only"]["seeds_needed"] is None, "as on the page"
    arms = (Named(folder.root, arm=arm) for arm in ("targeted", "fault_only"))
    (pair,) = compare(*arms, confounded=True)
    assert (pair.n, pair.verdict) == (6, None), "nothing of the look that is under way"


def test_gradients_are_shown_of_the_seeds_of_the_look_before(tmp_path: Path) -> None:
    """Planted: observations of the seventh seed, which two arms have and one has not."""
    study = looked(tmp_path)
    folder = study_folder(study)
    with pytest.raises(Interrupted):
        confirm(study, NOISY, cut_after(7))
    ledger = Ledger(folder.ledger)
    ran = [
        cell
        for cell in ledger.cells.values()
        if cell.training_key in ledger.trainings and (cell.arm, cell.replicate) != ("targeted", 6)
    ]
    seen = Counter(cell.arm for cell in ran)
    assert seen == {"clean": 7, "fault_only": 7, "targeted": 6}
    ledger.append(
        [
            MechanismRow(training_key=cell.training_key, **planted(cell.arm, 0, cell.replicate))
            for cell in ran
        ]
    )
    (scene,) = scenes(load_results(folder))
    assert {key: len(rows) for key, rows in scene.rows.items()} == {(arm, 0): 6 for arm in seen}
    assert scene.stage == "confirm"


@pytest.mark.parametrize(
    ("noise", "looks", "expected"),
    [
        (CLEAR, LOOKS, ("1", "3", 0.05 / 3, "")),
        (0.6, LOOKS, ("3", "3", 0.05 / 3, "seeds")),
        (0.6, (), ("", "", 0.05, "seeds")),
    ],
)
def test_the_table_of_contrasts_says_at_which_level_they_were_judged(
    tmp_path: Path, noise: float, looks: tuple[int, ...], expected: tuple[Any, ...]
) -> None:
    study = looked(tmp_path, looks=looks)
    folder = study_folder(study)
    confirm(study, noise)
    (line,) = contrast_lines(folder, tmp_path / "out")
    look, of, alpha, needed = expected
    assert (line["look"], line["looks"], line["complete"]) == (look, of, "True")
    assert float(line["alpha"]) == pytest.approx(alpha)
    assert bool(line["seeds_needed"]) is bool(needed)
    assert (float(line["holm_p"]) < float(line["alpha"])) is (line["verdict"] == ">")


@pytest.mark.parametrize(
    ("nats", "reason", "number", "shown"),
    [(0.05, "", 1, "~"), (None, "the fault costs nothing", 3, "?")],
)
def test_without_a_margin_in_the_lock_equal_arms_run_to_the_last_look(
    nats: float | None, reason: str, number: int, shown: str
) -> None:
    """`~` is out of reach then, and every look leaves the contrast open."""
    margin = ScenarioMargin(scenario="both", nats=nats, measured="search", reason=reason)
    held = {"margin": None, "margin_rule": GapMargin(share=0.1), "margins": (margin,)}
    for reached, seeds in enumerate((6, 9, 12)[:number], start=1):
        evidence = found(Planted({"a": EQUAL}, seeds), **held)
        assert evidence.look is not None
        assert (evidence.look.number, evidence.look.over) == (reached, reached == number)
        ((judged,),) = (one.contrasts for one in evidence.scenarios)
        assert (judged.verdict.value, judged.margin) == (shown, nats)


@pytest.mark.parametrize("kind", ["gap", "absolute"])
def test_between_looks_a_margin_is_that_of_the_look(tmp_path: Path, kind: str) -> None:
    """A gap without a search is measured on the seeds that are judged, and the page says where."""
    rule = {"kind": "gap", "share": 0.1} if kind == "gap" else {"kind": "absolute", "nats": 0.02}
    study = looked(tmp_path, margin=rule)
    folder = study_folder(study)
    with pytest.raises(Interrupted):
        confirm(study, NOISY, cut_after(7))
    results = load_results(folder)
    assert max(seeds_run(Ledger(folder.ledger))) >= 6, "the second look has begun"
    (scenario,) = verdict_content(results)["scenarios"].values()
    margin = scenario["margin"]
    arms = scenario["arms"]
    gap = fmean(arms["fault_only"]["losses"]) - arms["clean"]["clean_loss"]
    assert len(arms["fault_only"]["losses"]) == 6
    assert margin["nats"] == pytest.approx(0.1 * gap if kind == "gap" else 0.02)
    assert margin["basis"] == (pytest.approx(gap) if kind == "gap" else None)
    page = render_markdown(context(results)).replace("\\", "")
    assert "inconclusive so far" in page
    said = "nats/token in the confirmation)." if kind == "gap" else "nats/token, as declared."
    assert said in page
    (line,) = contrast_lines(folder, tmp_path / "out")
    assert float(line["margin"]) == margin["nats"]


def test_a_broken_run_of_a_look_holds_up_the_next_one(tmp_path: Path) -> None:
    study = looked(tmp_path)
    folder = study_folder(study)
    said: list[str] = []
    confirm(study, NOISY, inline_packs(breaks="g0-look1-001"), said)
    assert sum("broke off" in line for line in said) == 1, "it waits for the next call"
    assert seeds_run(Ledger(folder.ledger)) == set(range(6))
    look = look_of(folder)
    assert (look.number, look.complete) == (1, False)
    assert any("broke off and will be tried again" in gap for gap in load_results(folder).gaps)
    confirm(study, NOISY)
    assert look_of(folder).over


def test_a_generation_that_stopped_is_spent(tmp_path: Path) -> None:
    study = looked(tmp_path)
    folder = study_folder(study)
    confirm(study, CLEAR)
    before = folder.ledger.read_bytes()
    confirm(study, CLEAR)
    assert folder.ledger.read_bytes() == before
    assert write_report(folder).verdict == folder.verdict
    confirm(study, CLEAR)
    assert folder.ledger.read_bytes() == before
    again = looked(tmp_path, generation=1, looks=(6, 7, 9), replicates=9)
    assert study_folder(again) == folder
    ledger = confirm(again, CLEAR)
    assert {cell.generation for cell in ledger.cells.values()} == {0, 1}
    first, second = read_locks(folder.lock).generations
    assert (first.looks, second.looks) == (LOOKS, (6, 7, 9))


def test_a_ledger_that_lost_its_stop_is_not_run_on(tmp_path: Path) -> None:
    """Planted: losses that are no longer decided, behind verdicts that were written."""
    study = looked(tmp_path)
    folder = study_folder(study)
    ledger = confirm(study, CLEAR)
    write_report(folder)
    for replicate in range(0, 6, 2):
        key = ledger.cells["confirm", 0, "both", "targeted", replicate].training_key
        row = ledger.evaluation(key, 20, "faulty", "both", "test")
        assert row is not None
        assert row.loss is not None
        ledger.append([row.model_copy(update={"loss": row.loss + 2.0})])
    with pytest.raises(UserError, match="A generation is not run again once its verdicts"):
        confirm(study, CLEAR)


@pytest.mark.parametrize("noise", [CLEAR, NOISY])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"looks": (6, 10)}, r"looks: locked \[6, 8, 10\], now \[6, 10\]"),
        ({"looks": ()}, r"looks: locked \[6, 8, 10\], now null"),
        ({"looks": (6, 8, 10, 20), "replicates": 20}, r"now \[6, 8, 10, 20\]"),
    ],
)
def test_looks_that_were_locked_are_not_changed(
    tmp_path: Path, noise: float, changes: dict[str, Any], said: str
) -> None:
    """Neither where the confirmation has stopped nor between two looks."""
    study = looked(tmp_path)
    folder = study_folder(study)
    if noise == CLEAR:
        confirm(study, noise)
    else:
        with pytest.raises(Interrupted):
            confirm(study, noise, cut_after(7))
    before = folder.lock.read_bytes(), folder.ledger.read_bytes()
    other = looked(tmp_path, **changes)
    assert study_folder(other) == folder
    with pytest.raises(UserError, match=said) as caught:
        confirm(other, noise)
    assert "A locked confirmation is not changed or extended" in str(caught.value)
    assert (folder.lock.read_bytes(), folder.ledger.read_bytes()) == before


def test_looks_are_not_declared_after_the_lock(tmp_path: Path) -> None:
    study = looked(tmp_path, looks=())
    confirm(study, NOISY)
    with pytest.raises(UserError, match=r"looks: locked null, now \[6, 8, 10\]"):
        confirm(looked(tmp_path), NOISY)


def test_edited_looks_of_a_lock_are_seen(tmp_path: Path) -> None:
    study = looked(tmp_path)
    folder = study_folder(study)
    confirm(study, CLEAR)
    content = json.loads(folder.lock.read_text())
    content["generations"][0]["looks"] = [6, 10]
    folder.lock.write_text(json.dumps(content))
    with pytest.raises(UserError, match="a locked value was edited"):
        load_results(folder)


def edited(content: dict[str, Any]) -> None:
    content["generations"][0]["looks"] = [6, 10]


def of_format_1(content: dict[str, Any]) -> None:
    content["format"] = 1


@pytest.mark.parametrize(
    ("change", "said"),
    [(edited, "a locked value was edited"), (of_format_1, "not a lock file (format: ")],
)
def test_status_says_what_is_wrong_with_a_lock(
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is the command that one asks; the bug was that it refused."""
    study = looked(tmp_path)
    folder = study_folder(study)
    confirm(study, CLEAR)
    assert study_status(study, folder)["lock_error"] is None

    def shown(*options: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["status", str(folder.root), *options])
        assert not stopped.value.code
        return capsys.readouterr().out

    content = json.loads(folder.lock.read_text())
    change(content)
    folder.lock.write_text(json.dumps(content))
    state = json.loads(shown("--json"))
    assert said in state["lock_error"]
    assert state["look"] is None
    lines = shown().splitlines()
    assert [line for line in lines if line.startswith("lock  ")] == [
        f"lock    {state['lock_error']}"
    ]
    assert not any(line.startswith("looks") for line in lines)
    assert any(line.startswith("written confirm.lock") for line in lines)


def test_without_looks_nothing_is_another(tmp_path: Path) -> None:
    """Its study, its lock and its packs are what they were before looks existed."""
    study = looked(tmp_path, looks=())
    folder = study_folder(study)
    assert study_folder(looked(tmp_path)) == folder, "looks are a matter of the generation"
    assert "looks" not in study.model_dump(mode="json")["confirm"]
    study = looked(tmp_path, looks=())
    ledger = confirm(study, CLEAR)
    assert {row.pack[:4] for row in ledger.trainings.values() if row.step_reached} == {"g0-0"}
    assert seeds_run(ledger) == set(range(10))
    (held,) = read_locks(folder.lock).generations
    assert "looks" not in json.loads(folder.lock.read_text())["generations"][0]
    old = {name: value for name, value in held.model_dump(mode="json").items() if name != "created"}
    assert "looks" not in old
    assert held.identity() == content_hash(old)
    content = verdict_content(load_results(folder))
    assert (content["look"], content["n"], content["alpha"]) == (None, 10, 0.05)
    page = render_markdown(context(load_results(folder)))
    assert " look " not in page
    assert "95\N{NARROW NO-BREAK SPACE}% interval" in page
    assert study_status(study, folder)["look"] is None


def test_what_can_be_detected_is_said_for_the_last_look(tmp_path: Path) -> None:
    study = make_study(
        tmp_path, search={"configs": 3}, confirm={"replicates": 12, "looks": [6, 12], "alpha": 0.04}
    )
    from synthetic import make_scenarios, search_inline

    folder = study_folder(study)
    search_inline(study, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aqn_tune.confirm.runner.execute", lambda work, **_: None)
        run_confirm(
            study, make_setting(study), make_scenarios(study), folder, layer_count=LAYERS,
            engine=synthetic_engine(),
        )  # fmt: skip
    (held,) = read_locks(folder.lock).generations
    one = held.detectable[0]
    family = len(make_scenarios(study)) * len(study.primary_contrasts())
    assert one.sd is not None
    assert one.effect == pytest.approx(one.sd * mde_sd_units(12, 0.02 / family, 0.8))
    first = detectable_lines(held)[0]
    assert (
        "at most 12 seeds, judged at 6, 12 (each at alpha 0.02); effects found at the last" in first
    )


def test_the_live_logs_are_those_of_the_ledger(tmp_path: Path) -> None:
    """Planted: the mean over the seeds of the first look, beside that of the second at the same step."""
    from test_report_tensorboard import read_curves

    study = looked(tmp_path)
    folder = study_folder(study)
    board = TensorBoardWriter(folder, study)
    confirm(study, NOISY, listeners=(board.write,))
    live = read_curves(folder.tensorboard)
    rebuild(folder, study)
    assert read_curves(folder.tensorboard) == live
    ends = [live[f"confirm/both/targeted/s{seed}"]["loss/faulty"][-1][1] for seed in range(8)]
    ((step, mean),) = live["confirm/both/targeted/mean"]["loss/faulty"]
    assert (step, mean) == (20, pytest.approx(sum(ends) / 8, rel=1e-6))
    assert live["confirm/both/targeted"]["final/loss_faulty"] == [(step, mean)]


def test_cells_that_train_for_themselves_come_to_the_same_look(tmp_path: Path) -> None:
    """`--no-reuse`, begun between two looks: what is there is repeated, and nothing goes beyond the stop."""
    study = looked(tmp_path)
    folder = study_folder(study)
    with pytest.raises(Interrupted):
        confirm(study, NOISY, cut_after(7))
    own = study.model_copy(update={"compute": study.compute.model_copy(update={"reuse": False})})
    ledger = confirm(own, NOISY)
    assert look_of(folder).number == STOPS_AT[NOISY]
    assert seeds_run(ledger) == set(range(8))
    assert len(ledger.own_trainings) == ARMS * 8
    size = folder.ledger.stat().st_size
    confirm(own, NOISY)
    assert folder.ledger.stat().st_size == size


@pytest.mark.slow
def test_with_ray_it_comes_to_the_same(tmp_path: Path, ray_two: None) -> None:
    """One Ray after another look, in one session, with two workers."""
    inline, study = looked(tmp_path / "inline"), looked(tmp_path / "ray")
    confirm(inline, NOISY)
    run_confirm(
        study, make_setting(study), resolve_scenarios(study), study_folder(study),
        layer_count=LAYERS, engine=synthetic_engine(Behaviour(noise_sd=NOISY)),
    )  # fmt: skip
    assert look_of(study_folder(study)).number == STOPS_AT[NOISY]
    found, expected = (verdict_content(load_results(study_folder(one))) for one in (study, inline))
    assert found == expected
