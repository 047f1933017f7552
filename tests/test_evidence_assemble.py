"""From ledger rows to evidence: pairing, failures, the declared family, search beside confirm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest

from aqn_tune.errors import UserError
from aqn_tune.evidence import Regime, Verdict, parse_decisions
from aqn_tune.evidence.assemble import Evidence, assemble
from aqn_tune.evidence.decisions import matrix_of
from aqn_tune.evidence.declared import Declared, declare
from aqn_tune.evidence.tables import Tables
from aqn_tune.ledger.rows import CellRow, EvaluationRow, FaultMeasure, LedgerRow, TrainingRow
from aqn_tune.study.cells import NotAvailable
from aqn_tune.study.margin import GainMargin
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import DecisionSpec, Study
from aqn_tune.study.seeds import Stage

SCENARIO = "both-threshold0.2"
STEPS = 100
WOBBLE = [0.010, -0.020, 0.004, 0.015, -0.011, 0.002]
"""Seed part of the loss, shared by all arms."""
OWN = {
    "clean": [0.001, -0.002, 0.000, 0.002, -0.001, 0.000],
    "fault_only": [0.002, 0.001, -0.002, 0.000, -0.001, 0.000],
    "global": [-0.001, 0.002, 0.001, -0.002, 0.000, 0.001],
    "targeted": [0.000, -0.001, 0.002, 0.001, -0.002, 0.000],
    "finalist1": [0.002, 0.000, -0.001, -0.002, 0.001, 0.000],
}
MEANS = {"clean": 1.0, "fault_only": 1.5, "global": 1.4, "targeted": 1.2, "finalist1": 1.3}


def training(key: str, *, stage: Stage = "confirm", **changes: Any) -> TrainingRow:
    row: dict[str, Any] = {
        "training_key": key,
        "stage": stage,
        "seed": 1,
        "steps": STEPS,
        "step_reached": STEPS,
        "status": "finished",
        "seconds": 2.0,
        "pack": "p000",
        "pack_size": 1,
    }
    return TrainingRow(**{**row, **changes})


def evaluation(
    key: str, condition: Literal["clean", "faulty"], loss: float | None, **changes: Any
) -> EvaluationRow:
    row: dict[str, Any] = {
        "training_key": key,
        "step": STEPS,
        "final": True,
        "condition": condition,
        "scenario": SCENARIO if condition == "faulty" else "",
        "split": "test",
        "rows": 64,
        "loss": loss,
        "exact_match": 0.5,
    }
    if condition == "faulty":
        measure = {"kind": "dead_zone", "calls": 4, "sites": 1, "relative_error": 0.3}
        row["faults"] = (FaultMeasure(**measure, affected_fraction=0.8),)
    return EvaluationRow(**{**row, **changes})


def cell(arm: str, replicate: int, *, stage: Stage = "confirm", **changes: Any) -> CellRow:
    pool = {"search": 1000, "confirm": 2001}[stage]
    row: dict[str, Any] = {
        "stage": stage,
        "scenario": SCENARIO,
        "arm": arm,
        "config": "c003" if arm in ("finalist1", "c003") else "",
        "replicate": replicate,
        "seed": pool + 2 * replicate,
        "training_key": f"{stage}-{arm}-{replicate}",
    }
    return CellRow(**{**row, **changes})


def base_rows(loss: float = 2.0) -> list[LedgerRow]:
    """Return the untrained base, recorded as the executor does: under the key of a run to come."""
    key = "confirm-clean-0"
    return [
        evaluation(key, "clean", loss, step=0),
        evaluation(key, "faulty", loss + 3, step=0),
        training(key, step_reached=0),
    ]


def arm_rows(arm: str, losses: Sequence[float], *, stage: Stage = "confirm") -> list[LedgerRow]:
    split = "test" if stage == "confirm" else "validation"
    rows: list[LedgerRow] = []
    for replicate, loss in enumerate(losses):
        one = cell(arm, replicate, stage=stage)
        key = one.training_key
        clean_loss = loss if arm == "clean" else loss - 0.1
        rows += [
            one,
            evaluation(key, "clean", 9.0, split=split, step=50, final=False),
            evaluation(key, "faulty", 9.0, split=split, step=50, final=False),
            evaluation(key, "clean", clean_loss, split=split),
            evaluation(key, "faulty", loss + 0.7 * (arm == "clean"), split=split),
            training(key, stage=stage),
        ]
    return rows


def losses_of(arm: str) -> list[float]:
    return [MEANS[arm] + w + o for w, o in zip(WOBBLE, OWN[arm], strict=True)]


def ledger() -> list[LedgerRow]:
    return [*base_rows(), *(row for arm in MEANS for row in arm_rows(arm, losses_of(arm)))]


DECLARED = Declared(
    family=((SCENARIO, "targeted", "fault_only"), (SCENARIO, "targeted", "global")),
    scenarios=(SCENARIO,),
    replicates=6,
    generation=0,
    alpha=0.05,
    margin=None,
    margin_rule=GainMargin(share=0.05),
    power=0.8,
    seed=0,
    decisions=parse_decisions(
        [
            {"when": {"targeted-vs-fault_only": ">", "targeted-vs-global": ">"}, "say": "target"},
            {"when": {"targeted-vs-fault_only": [">", "<", "~"]}, "say": "do not"},
        ]
    ),
)


def verdicts(evidence: Evidence) -> Mapping[str, Verdict]:
    return {one.name: one.verdict for s in evidence.scenarios for one in s.contrasts}


def test_a_planted_study() -> None:
    evidence = assemble(ledger(), DECLARED)
    (scenario,) = evidence.scenarios
    assert scenario.regime.regime is Regime.DEGRADING
    assert scenario.regime.gain == pytest.approx(1.0)
    assert scenario.regime.damage == pytest.approx(0.5)
    assert [one.name for one in scenario.contrasts] == [
        f"{SCENARIO}/targeted-vs-fault_only",
        f"{SCENARIO}/targeted-vs-global",
    ]
    assert [one.verdict for one in scenario.contrasts] == [Verdict.BETTER, Verdict.BETTER]
    first = scenario.contrasts[0]
    assert first.margin == pytest.approx(0.05)
    assert first.contrast is not None
    assert first.contrast.improvement == pytest.approx(0.3)
    assert scenario.decision is not None
    assert scenario.decision.say == "target"
    assert scenario.faults[0].affected_fraction == pytest.approx(0.8)

    arms = {arm.arm: arm for arm in scenario.arms}
    assert list(arms) == list(MEANS)
    assert arms["targeted"].mean_loss == pytest.approx(1.2)
    assert arms["targeted"].mean_clean_loss == pytest.approx(1.1)
    assert arms["clean"].mean_loss == pytest.approx(1.7)
    assert arms["targeted"].recovery.value == pytest.approx(0.6)
    assert arms["fault_only"].recovery.value == pytest.approx(0.0)
    assert arms["clean"].recovery.reason == "n/a: clean arm"
    assert arms["global"].shrinkage is None


def test_rows_of_the_untrained_base_are_not_a_result() -> None:
    """The base shares its key with a run; its `finished` at step 0 must not finish that run."""
    tables = Tables([*base_rows(), cell("clean", 0)])
    assert tables.base_clean_loss("test") == 2.0
    assert tables.base_clean_loss("validation") is None
    (result,) = tables.cells("confirm", SCENARIO, "clean", replicates=1)
    assert (result.loss, result.problem) == (None, "not finished")


Change = Callable[[list[LedgerRow]], list[LedgerRow]]


def without_training(key: str) -> Change:
    return lambda rows: [
        r for r in rows if not (isinstance(r, TrainingRow) and r.training_key == key)
    ]


def without_cell(arm: str, replicate: int) -> Change:
    return lambda rows: [
        r for r in rows if not (isinstance(r, CellRow) and (r.arm, r.replicate) == (arm, replicate))
    ]


def plus(*more: LedgerRow) -> Change:
    return lambda rows: [*rows, *more]


LAST = "confirm-targeted-5"


@pytest.mark.parametrize(
    ("change", "failed", "said"),
    [
        (
            plus(training(LAST, status="failed", error="loss is NaN at step 31")),
            1,
            "1 of 6 seeds failed in arm targeted (loss is NaN at step 31)",
        ),
        (
            plus(evaluation(LAST, "faulty", None)),
            1,
            "1 of 6 seeds failed in arm targeted (faulty loss is not finite)",
        ),
        (
            plus(training(LAST, status="unfinished", step_reached=50)),
            0,
            "1 of 6 seeds missing in arm targeted (unfinished at step 50)",
        ),
        (without_training(LAST), 0, "1 of 6 seeds missing in arm targeted (not finished)"),
        (without_cell("targeted", 5), 0, "1 of 6 seeds missing in arm targeted (no run)"),
        (
            lambda rows: [r for r in rows if getattr(r, "split", "") != "test" or r.step == 0],
            0,
            "6 of 6 seeds missing in arm targeted (not evaluated on the test split)",
        ),
    ],
)
def test_a_failed_run_is_never_a_number(change: Change, failed: int, said: str) -> None:
    """Dropping the seed and judging the other five would flatter an arm that diverges."""
    evidence = assemble(change(ledger()), DECLARED)
    (scenario,) = evidence.scenarios
    for judged in scenario.contrasts:
        assert judged.verdict is Verdict.INCONCLUSIVE
        assert judged.contrast is None
        assert judged.words == f"inconclusive: {said}"
    arm = next(arm for arm in scenario.arms if arm.arm == "targeted")
    assert (arm.mean_loss, arm.sd_loss, arm.recovery.value) == (None, None, None)
    assert arm.failed == failed
    assert len(arm.seeds) == 6
    assert scenario.decision is not None
    assert scenario.decision.say == "not decided"


def test_the_later_row_holds() -> None:
    """A study that was continued records a run again; a success after a failure counts."""
    failed = [training("confirm-targeted-5", status="failed", error="worker died")]
    assert verdicts(assemble([*failed, *ledger()], DECLARED)) == verdicts(
        assemble(ledger(), DECLARED)
    )


def test_a_failed_control_leaves_the_regime_open() -> None:
    rows = [*ledger(), training("confirm-fault_only-0", status="failed", error="x")]
    (scenario,) = assemble(rows, DECLARED).scenarios
    assert scenario.regime.regime is Regime.UNDETERMINED
    assert all(arm.recovery.value is None for arm in scenario.arms)


def test_an_unfinished_family_member_keeps_its_place() -> None:
    """Judging only what is there would make the remaining contrasts easier to pass."""
    family = (*DECLARED.family, *((SCENARIO, f"arm{i}", "global") for i in range(10)))
    judged = (
        assemble(ledger(), DECLARED.model_copy(update={"family": family})).scenarios[0].contrasts
    )
    alone = assemble(ledger(), DECLARED).scenarios[0].contrasts
    assert judged[0].family_size == 12
    assert judged[-1].words == "inconclusive: 6 of 6 seeds missing in arm arm9 (no run)"
    tested = [one for one in judged if one.contrast is not None and one.holm_p is not None]
    smallest = min(one.contrast.t_p or 1.0 for one in tested if one.contrast is not None)
    assert min(one.holm_p for one in tested if one.holm_p is not None) == pytest.approx(
        12 * smallest
    )
    assert judged[0].low is not None
    assert alone[0].low is not None
    assert judged[0].low < alone[0].low


def test_arms_that_share_their_trainings_are_not_compared() -> None:
    """A finalist that samples `global` equals its own twin: no test, and no `equivalent` either."""
    rows = [
        r.model_copy(update={"training_key": r.training_key.replace("targeted", "global")})
        if isinstance(r, CellRow)
        else r
        for r in ledger()
    ]
    judged = assemble(rows, DECLARED).scenarios[0].contrasts
    assert judged[1].verdict is Verdict.INCONCLUSIVE
    assert "targeted and global are one and the same training here" in judged[1].words
    assert judged[0].verdict is Verdict.BETTER


def test_runs_of_different_length_are_never_compared() -> None:
    """Step 20 of 29 was once reported beside final numbers."""
    rows = [
        r.model_copy(update={"step": 80})
        if isinstance(r, EvaluationRow) and r.final and "global" in r.training_key
        else r
        for r in ledger()
    ]
    judged = assemble(rows, DECLARED).scenarios[0].contrasts
    assert judged[0].verdict is Verdict.BETTER
    assert judged[1].words == (
        "inconclusive: runs of different length are never compared (steps 80, 100)"
    )


def test_only_the_last_step_counts() -> None:
    """Every run has a non-final row of 9.0; a planted one after the final row changes nothing."""
    late = evaluation(LAST, "faulty", 9.0, step=50, final=False)
    assert assemble([*ledger(), late], DECLARED) == assemble(ledger(), DECLARED)


def test_seeds_must_pair() -> None:
    rows = [*ledger(), cell("targeted", 5, seed=77)]
    with pytest.raises(ValueError, match="the arms are not paired"):
        assemble(rows, DECLARED)


def test_search_seeds_among_the_confirm_seeds_are_refused() -> None:
    """A validation that re-used the seeds of the search once passed for a confirmation."""
    reused = cell("clean", 0, stage="search", seed=2001)
    with pytest.raises(ValueError, match="search seeds among the confirm seeds"):
        assemble([*ledger(), reused], DECLARED)


def test_another_generation_is_another_study() -> None:
    (scenario,) = assemble(ledger(), DECLARED.model_copy(update={"generation": 1})).scenarios
    assert {judged.verdict for judged in scenario.contrasts} == {Verdict.INCONCLUSIVE}


def test_search_beside_confirm() -> None:
    search = [
        *arm_rows("fault_only", [1.5, 1.6], stage="search"),
        *arm_rows("c003", [1.1, 1.2], stage="search"),
    ]
    (scenario,) = assemble([*ledger(), *search], DECLARED).scenarios
    finalist = next(arm for arm in scenario.arms if arm.arm == "finalist1")
    assert finalist.shrinkage is not None
    assert finalist.shrinkage.config == "c003"
    assert finalist.shrinkage.search_improvement == pytest.approx(0.4)
    assert finalist.shrinkage.confirm_improvement == pytest.approx(0.2)


def test_costs_count_trainings_once() -> None:
    rows = [
        *ledger(),
        training("confirm-targeted-0", seconds=1.0),
        training("confirm-global-0", status="failed", error="x", step_reached=30),
        *arm_rows("c003", [1.0], stage="search"),
    ]
    search, confirm = assemble(rows, DECLARED).costs
    assert (search.stage, search.trainings, search.steps, search.seconds) == ("search", 1, 100, 2.0)
    assert (confirm.stage, confirm.trainings, confirm.failed) == ("confirm", 30, 1)
    assert confirm.steps == 29 * STEPS + 30
    assert confirm.seconds == pytest.approx(2.0 * 31 + 1.0 + 2.0)


@pytest.mark.parametrize(
    ("locked", "base", "margin"), [(0.2, 2.0, 0.2), (None, 3.0, 0.1), (None, 0.9, None)]
)
def test_margin(locked: float | None, base: float, margin: float | None) -> None:
    """Locked in the unit of the loss, or 5 % of G; without any gain there is none."""
    rows = [*ledger(), evaluation("confirm-clean-0", "clean", base, step=0)]
    judged = (
        assemble(rows, DECLARED.model_copy(update={"margin": locked})).scenarios[0].contrasts[0]
    )
    assert judged.margin == (None if margin is None else pytest.approx(margin))


def test_an_empty_ledger_decides_nothing() -> None:
    evidence = assemble([], DECLARED)
    assert set(verdicts(evidence).values()) == {Verdict.INCONCLUSIVE}
    assert evidence.base_clean_loss is None
    assert evidence.scenarios[0].regime.regime is Regime.UNDETERMINED
    assert evidence.scenarios[0].faults == ()


def study(**changes: Any) -> Study:
    content: dict[str, Any] = {
        "study": "small",
        "scenario": {"faults": [{"kind": "dead_zone", "threshold": 0.2, "layers": [10]}]},
        "confirm": {"contrasts": [("targeted", "global"), ("healthy", "global")]},
    }
    return Study.model_validate({**content, **changes})


def test_the_family_is_every_primary_contrast_of_every_scenario() -> None:
    one = study()
    scenarios = [Scenario(name, one.scenario, {}) for name in ("a", "b")]
    missing = [NotAvailable("b", "healthy", "every layer is faulty")]
    declared = declare(one, scenarios, missing, margin=0.1)
    assert declared.family == (
        ("a", "targeted", "global"),
        ("a", "healthy", "global"),
        ("b", "targeted", "global"),
    )
    assert (declared.replicates, declared.margin, declared.decisions) == (8, 0.1, None)


def test_what_was_declared_survives_the_lock_file() -> None:
    assert Declared.model_validate_json(DECLARED.model_dump_json()) == DECLARED


def test_decisions_of_a_study_go_by_position() -> None:
    content: dict[str, Any] = {
        "contrasts": [("targeted", "global"), ("healthy", "global")],
        "rows": [
            {"when": [">", "any"], "say": "target"},
            {"when": [["~", "<"], "any"], "say": "do not"},
        ],
    }
    declared = declare(study(decisions=content), [], [], margin=None)
    assert declared.decisions is not None
    assert declared.decisions.contrasts == ("targeted-vs-global", "healthy-vs-global")
    with pytest.raises(UserError, match="targeted-vs-clean is no primary contrast; did you mean"):
        declare(
            study(
                decisions={**content, "contrasts": [("targeted", "clean"), ("healthy", "global")]}
            ),
            [],
            [],
            margin=None,
        )
    content["rows"][0]["when"] = [">"]
    with pytest.raises(UserError, match=r"row 1: got 1 verdict\(s\) for 2 contrast\(s\)"):
        matrix_of(DecisionSpec.model_validate(content))


def test_a_twin_does_not_take_over_the_search_numbers_of_its_finalist() -> None:
    """Planted: a twin is recorded with its finalist's config, whose search it was no part of."""
    twin = [
        row.model_copy(update={"arm": "finalist1_none", "config": "c003"})
        if isinstance(row, CellRow)
        else row
        for row in arm_rows("global", losses_of("global"))
    ]
    (scenario,) = assemble([*ledger(), *twin], DECLARED).scenarios
    found = {arm.arm: arm.shrinkage for arm in scenario.arms}
    assert found["finalist1"] is not None
    assert found["finalist1_none"] is None


def test_a_loss_that_is_not_finite_takes_its_exact_match_along() -> None:
    (scenario,) = assemble([*ledger(), evaluation(LAST, "faulty", None)], DECLARED).scenarios
    arm = next(arm for arm in scenario.arms if arm.arm == "targeted")
    assert arm.mean_exact_match is None
    assert arm.mean_clean_loss is not None
