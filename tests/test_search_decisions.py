"""What the search decides, without Ray: rungs, proposals, halving, ranking."""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from synthetic import (
    LAYERS,
    SPACE,
    Behaviour,
    make_scenarios,
    make_setting,
    make_study,
    search_inline,
)

from aqn_tune.errors import UserError
from aqn_tune.ledger.rows import SearchRow
from aqn_tune.search.asha import ScenarioASHA
from aqn_tune.search.history import ConfigRecord, History
from aqn_tune.search.ranking import finalists
from aqn_tune.search.rungs import rung_steps
from aqn_tune.search.suggest import Proposer, build_study
from aqn_tune.study.cells import stage_cells
from aqn_tune.study.folder import study_folder
from aqn_tune.study.schema import SearchSpec
from aqn_tune.study.seeds import replicate_seed
from aqn_tune.study.space import SpaceSpec, arm_of

SPACE_SPEC = SpaceSpec.model_validate(SPACE)


@pytest.mark.parametrize(
    ("shares", "steps", "expected"),
    [
        ((0.25, 0.5, 1.0), 100, (25, 50, 100)),
        ((0.25, 0.5, 1.0), 30, (8, 15, 30)),
        ((0.1, 0.2, 1.0), 4, (1, 4)),
        ((0.001, 1.0), 10, (1, 10)),
        ((1.0,), 7, (7,)),
        ((0.5, 1.0), 1, (1,)),
    ],
)
def test_rungs_are_increasing_steps_that_end_at_the_last(
    shares: tuple[float, ...], steps: int, expected: tuple[int, ...]
) -> None:
    search = SearchSpec(space=SPACE_SPEC, rungs=shares)
    assert rung_steps(search, steps) == expected


def _proposer(scenario: str = "s", seed: int = 1) -> Proposer:
    return Proposer(SPACE_SPEC, study_seed=seed, scenario=scenario, startup_configs=3)


def _ask(history: list[ConfigRecord], scenario: str = "s", seed: int = 1) -> dict[str, object]:
    return dict(_proposer(scenario, seed).propose(history))


def _history(count: int) -> list[ConfigRecord]:
    records: list[ConfigRecord] = []
    for number in range(count):
        params = _proposer().propose(records)
        value = float(params["sigma_start"])
        records.append(ConfigRecord(f"c{number:03d}", number, params, [value, value], "finished"))
    return records


def test_a_proposal_depends_on_history_and_number_alone() -> None:
    history = _history(8)
    random.seed(1)
    before = random.getstate()
    first = _ask(history)
    assert random.getstate() == before
    random.seed(2)
    np.random.seed(3)  # noqa: NPY002
    _ask(history[:5])
    assert _ask(history) == first
    assert _ask(history, seed=2) != first
    assert _ask(history, scenario="other") != first
    reversed_values = [
        ConfigRecord(r.config, r.number, r.params, [1.0 - (v or 0) for v in r.values], r.status)
        for r in history
    ]
    assert _ask(reversed_values) != first


def _told(proposer: Proposer) -> list[tuple[object, ...]]:
    return [
        (t.state, t.value, t.params, t.distributions, t.intermediate_values)
        for t in proposer._study.trials
    ]


@pytest.mark.parametrize("seed", range(6))
def test_a_study_kept_between_proposals_proposes_as_one_built_anew(seed: int) -> None:
    """Configs in parallel that reach rungs, stop, fail and finish in any order."""
    chance = random.Random(seed)
    kept = _proposer()
    history: list[ConfigRecord] = []
    for number in range(40):
        if chance.random() < 0.1:
            kept = _proposer()  # a restart
        anew, study = _proposer(), kept._study
        params = kept.propose(history)
        assert kept._study is study, "nothing was built again"
        assert params == anew.propose(history)
        assert _told(kept) == _told(anew)
        if chance.random() < 0.1:
            assert kept.propose(history) == params, "a proposal that was not taken up"
            assert kept._study is not study
        history.append(ConfigRecord(f"c{number:03d}", number, params))
        running = [record for record in history if record.status == "running"]
        for record in chance.sample(running, chance.randint(0, len(running))):
            record.values.append(None if chance.random() < 0.1 else chance.random())
            if record.values[-1] is None:
                record.status = "failed"
            elif len(record.values) == 3:
                record.status = "finished"
            elif chance.random() < 0.3:
                record.status = "stopped"
    assert {record.status for record in history} >= {"finished", "stopped", "failed", "running"}


def test_another_history_is_followed_from_its_start() -> None:
    history = _history(8)
    kept = _proposer()
    kept.propose(history)
    for changed in (
        history[:5],
        [replace(r, values=[1.0 - (v or 0) for v in r.values]) for r in history],
        [replace(r, status="stopped") for r in history],
        [replace(r, params=history[0].params) for r in history],
        history,
    ):
        assert kept.propose(changed) == _proposer().propose(changed)


def test_proposals_are_valid_points_and_raise_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = _history(20)
    kinds = set()
    for record in history:
        kinds.add(record.params["targeting"])
        arm_of(record.params)
        assert ("window_centre" in record.params) == (record.params["targeting"] == "window")
    assert len(kinds) >= 3


def test_tpe_learns_from_the_history() -> None:
    """With the sampler's seed rebuilt at every ask it could have been random for ever."""
    history = _history(25)
    late = [float(r.params["sigma_start"]) for r in history[15:]]
    assert np.median(late) < 0.5 * math.sqrt(0.005 * 0.2)


def test_optuna_is_told_complete_pruned_fail() -> None:
    params = {"sigma_start": 0.05, "sigma_ratio": 0.1, "targeting": "global"}
    history = [
        ConfigRecord("c000", 0, params, [0.2, 0.9], "finished"),
        ConfigRecord("c001", 1, params, [0.1], "stopped"),
        ConfigRecord("c002", 2, params, [None], "failed"),
        ConfigRecord("c003", 3, params, [0.3], "running"),
    ]
    study = build_study(SPACE_SPEC, history, scenario="s")
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert study.trials[1].intermediate_values == {0: 0.1}
    assert study.best_trial.number == 0  # c001 was lower, at a lower rung
    assert study.best_trial.last_step == 1
    assert isinstance(study._storage, optuna.storages.InMemoryStorage)


@pytest.mark.parametrize("factor", [1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 10.0])
@pytest.mark.parametrize("rungs", [1, 2, 3, 5, 6])
def test_every_rung_of_the_study_is_one_rung_of_asha(factor: float, rungs: int) -> None:
    asha = ScenarioASHA(["s"], rung_count=rungs, reduction_factor=factor)
    for rung in range(rungs):
        assert asha.report("s", "c000", rung, 1.0) == (rung < rungs - 1)
    table = asha.tables()["s"]
    assert [recorded for _, recorded in table] == [{"c000": 1.0}] * rungs


def test_asha_stops_the_worse_half() -> None:
    asha = ScenarioASHA(["s"], rung_count=2, reduction_factor=2.0)
    values = [5.0, 4.0, 6.0, 3.0, 4.8, 4.2]
    assert [asha.report("s", f"c{i}", 0, v) for i, v in enumerate(values)] == [
        True, True, False, True, False, True,
    ]  # fmt: skip


def test_faults_are_not_compared_across_scenarios() -> None:
    """An offset of 100 in one scenario must not stop all of its configs."""
    one, two = (ScenarioASHA(["a", "b"], rung_count=2, reduction_factor=2.0) for _ in range(2))
    survivors = {"a": 0, "b": 0}
    shared = {"a": 0, "b": 0}
    for number in range(8):
        for scenario, offset in (("a", 0.0), ("b", 100.0)):
            value = offset + abs(number - 5)
            survivors[scenario] += one.report(scenario, f"c{number}", 0, value)
            shared[scenario] += two.report("a", f"{scenario}{number}", 0, value)
    assert survivors["a"] == survivors["b"] > 1
    assert shared["b"] == 0  # what the guard prevents


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_value_that_is_not_finite_stops_and_counts_as_the_worst(value: float | None) -> None:
    asha = ScenarioASHA(["s"], rung_count=3, reduction_factor=2.0)
    assert not asha.report("s", "c000", 0, value)
    assert asha.report("s", "c001", 0, 0.5)
    assert not asha.report("s", "c002", 0, value)
    # A made-up huge value in the table would let this one pass: the quantile is interpolated.
    assert not asha.report("s", "c003", 0, 100.0)
    assert asha.tables()["s"][0][1] == {"c001": 0.5, "c002": 0.5, "c003": 100.0}


def _row(event: str, config: str = "c000", number: int = 0, **more: object) -> SearchRow:
    return SearchRow.model_validate(
        {"scenario": "s", "event": event, "config": config, "number": number, **more}
    )


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([_row("rung", rung=0, value=1.0)], "does not follow"),
        ([_row("asked"), _row("asked")], "does not follow"),
        ([_row("asked", number=1)], "does not follow"),
        ([_row("asked"), _row("rung", rung=1, value=1.0)], "does not follow"),
        ([_row("asked"), _row("stopped"), _row("rung", rung=0, value=1.0)], "does not follow"),
        ([_row("asked").model_copy(update={"scenario": "t"})], "unknown scenario 't'"),
    ],
)
def test_search_rows_out_of_order_are_refused(rows: list[SearchRow], what: str) -> None:
    history = History(["s"])
    with pytest.raises(UserError, match=what):
        for row in rows:
            history.apply(row)


def test_no_config_below_the_last_rung_is_a_finalist(tmp_path: Path) -> None:
    """With a loss that rises, every stopped config has a lower value than the finished ones."""
    study = make_study(tmp_path, confirm={"finalists": 3, "replicates": 6})
    ledger = search_inline(study, study_folder(study), behaviour=Behaviour(late=9.0))
    rungs = len(rung_steps(study.search, study.training.steps))  # type: ignore[arg-type]
    lowest = {}
    for scenario in make_scenarios(study):
        rows = [r for r in ledger.search if r.scenario == scenario.name]
        finished = {r.config: r for r in rows if r.event == "finished"}
        last = {r.config: r.value for r in rows if r.event == "rung" and r.rung == rungs - 1}
        lowest[scenario.name] = min(r.value or math.inf for r in rows if r.event == "rung")
        chosen = finalists(ledger, scenario, study)
        assert [f.config for f in chosen] == sorted(finished, key=lambda c: last[c] or 0)[:3]
        assert lowest[scenario.name] < (last[chosen[0].config] or 0)


def test_finalists_with_the_same_trainings_are_one(tmp_path: Path) -> None:
    space = {"dimensions": {"targeting": {"kind": "choice", "values": ["none", "targeted"]}}}
    study = make_study(
        tmp_path,
        search={"space": space, "rungs": (1.0,)},
        confirm={"finalists": 4, "replicates": 6},
    )
    ledger = search_inline(study, study_folder(study))
    for scenario in make_scenarios(study):
        chosen = finalists(ledger, scenario, study)
        assert [f.rank for f in chosen] == [1, 2]
        assert {f.params["targeting"] for f in chosen} == {"none", "targeted"}


def test_search_and_confirm_seeds_are_disjoint(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    seeds = {
        stage: {
            cell.run.seed
            for cell in stage_cells(
                study, make_setting(study), make_scenarios(study), stage=stage, layer_count=LAYERS
            ).cells
        }
        for stage in ("search", "confirm")
    }
    assert len(seeds["search"]) == 2
    assert len(seeds["confirm"]) == 6
    assert not seeds["search"] & seeds["confirm"]
    pools = [
        {
            replicate_seed(s, stage, i, generation=g)
            for s in range(40)
            for i in range(20)
            for g in (0, 1)
        }
        for stage in ("search", "confirm")
    ]
    assert not pools[0] & pools[1]
