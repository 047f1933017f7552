"""The stopping rule of sequential looks: which look a ledger has come to, and whether it ends there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from error_rates import early_ends
from pydantic import ValidationError

from aqn_tune.evidence import Verdict
from aqn_tune.evidence.assemble import Evidence, assemble
from aqn_tune.evidence.declared import Declared
from aqn_tune.evidence.looks import Look
from aqn_tune.evidence.power import mde_sd_units
from aqn_tune.evidence.verdicts import FEWEST_SEEDS
from aqn_tune.ledger.broken import BROKE_OFF
from aqn_tune.ledger.rows import CellRow, EvaluationRow, LedgerRow, TrainingRow
from aqn_tune.study.looks import FEWEST_AT_A_LOOK, alpha_at_look
from aqn_tune.study.margin import GainMargin
from aqn_tune.study.schema import ConfirmSpec

SCENARIO, STEPS = "both", 20
LOOKS = (6, 9, 12)

Gains = Sequence[float]
"""Loss of fault_only less that of an arm, by seed; G is 1 nat and the margin 0.05."""
BETTER: Gains = [0.3, 0.31, 0.29, 0.3, 0.32, 0.28] * 2
WORSE: Gains = [-gain for gain in BETTER]
EQUAL: Gains = [0.001, -0.001, 0.002, -0.002, 0.001, 0.0] * 2
OPEN: Gains = [0.2, -0.2, 0.15, -0.15, 0.1, -0.1] * 2
CONSTANT: Gains = [0.25] * 12
LATER: Gains = [0.0, 0.2, 0.0, 0.2, 0.0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]
"""Open at six seeds, decided at nine."""
BACK: Gains = [*BETTER[:6], -0.3, -0.3, -0.3, -0.3, -0.3, -0.3]
"""Better at six seeds, open at nine."""


class Planted(NamedTuple):
    """What a ledger holds."""

    arms: Mapping[str, Gains]
    seeds: int = 12
    """Seeds of which every arm has its run."""
    failed: Mapping[tuple[str, int], str] = {}
    """Why a run failed, by arm and seed."""
    lacking: tuple[tuple[str, int], ...] = ()
    """Runs that have not ended."""
    base: bool = True
    """Whether the untrained base was evaluated."""
    same: tuple[str, ...] = ()
    """Arms that are one training with fault_only."""


def rows_of(planted: Planted) -> list[LedgerRow]:
    """Return the rows of a confirmation."""
    rows: list[LedgerRow] = []
    for seed in range(planted.seeds):
        reference = 1.5 + 0.02 * (-1) ** seed * (seed % 3)
        losses = {"clean": 1.0, "fault_only": reference}
        losses |= {arm: reference - gains[seed] for arm, gains in planted.arms.items()}
        for arm, loss in losses.items():
            key = f"{'fault_only' if arm in planted.same else arm}-{seed}"
            rows.append(
                CellRow(stage="confirm", scenario=SCENARIO, arm=arm, replicate=seed, config="",
                        seed=2 * seed + 1, training_key=key)
            )  # fmt: skip
            if (arm, seed) not in planted.lacking:
                rows += _run(key, loss, planted.failed.get((arm, seed), ""))
    if planted.base:
        rows.append(_evaluation("clean-0", "clean", 2.0, step=0, final=False))
    return rows


def _run(key: str, loss: float, error: str) -> list[LedgerRow]:
    training = TrainingRow(
        training_key=key, stage="confirm", seed=1, steps=STEPS, step_reached=STEPS, error=error,
        status="failed" if error else "finished", seconds=1.0, pack="p", pack_size=1,
    )  # fmt: skip
    if error:
        return [training]
    return [_evaluation(key, "clean", 1.0), _evaluation(key, "faulty", loss), training]


def _evaluation(key: str, condition: Any, loss: float, **changes: Any) -> EvaluationRow:
    row: dict[str, Any] = {
        "training_key": key, "step": STEPS, "final": True, "condition": condition, "split": "test",
        "scenario": SCENARIO if condition == "faulty" else "", "rows": 8, "loss": loss,
        "exact_match": 0.5,
    }  # fmt: skip
    return EvaluationRow.model_validate({**row, **changes})


def declared(arms: Sequence[str], looks: tuple[int, ...] = LOOKS, **changes: Any) -> Declared:
    content: dict[str, Any] = {
        "family": tuple((SCENARIO, arm, "fault_only") for arm in arms),
        "scenarios": (SCENARIO,),
        "replicates": 12,
        "looks": looks,
        "generation": 0,
        "alpha": 0.06,
        "margin": 0.05,
        "margin_rule": GainMargin(),
        "power": 0.8,
        "seed": 0,
        "decisions": None,
    }
    return Declared.model_validate({**content, **changes})


def found(planted: Planted, **changes: Any) -> Evidence:
    arms = [arm for arm in planted.arms if arm != "beside"]
    return assemble(rows_of(planted), declared(arms, **changes))


def look_of(evidence: Evidence) -> Look:
    assert evidence.look is not None
    return evidence.look


def verdicts(evidence: Evidence) -> str:
    return "".join(one.verdict.value for s in evidence.scenarios for one in s.contrasts)


DIED = BROKE_OFF + "its worker died"
# what the ledger holds, look reached, complete, over, verdicts shown
TABLE: dict[str, tuple[Planted, int, bool, bool, str]] = {
    "nothing yet": (Planted({"a": BETTER}, seeds=0), 1, False, False, "?"),
    "a part of the first look": (Planted({"a": BETTER}, seeds=5), 1, False, False, "?"),
    "all decided": (Planted({"a": BETTER, "b": WORSE, "c": EQUAL}, 6), 1, True, True, "><~"),
    "one is open": (Planted({"a": BETTER, "b": OPEN}, 6), 1, True, False, ">?"),
    "a part of the second look": (Planted({"a": LATER}, 8), 1, True, False, "?"),
    "decided at the second look": (Planted({"a": LATER}, 9), 2, True, True, ">"),
    "open at the last look": (Planted({"a": BETTER, "b": OPEN}, 12), 3, True, True, ">?"),
    "a verdict may go again": (Planted({"a": BACK, "b": OPEN}, 9), 2, True, False, "??"),
    "more than the end": (Planted({"a": BETTER}, 12), 1, True, True, ">"),
    "a seed failed, never decided": (
        Planted({"a": BETTER, "b": OPEN}, 6, failed={("b", 2): "loss is NaN"}), 1, True, True, ">?",
    ),
    "a seed failed, another is open": (
        Planted({"a": OPEN, "b": OPEN}, 6, failed={("b", 2): "loss is NaN"}), 1, True, False, "??",
    ),
    "a run broke off": (Planted({"a": BETTER}, 6, failed={("a", 2): DIED}), 1, False, False, "?"),
    "a run of the second look broke off": (
        Planted({"a": OPEN}, 9, failed={("a", 7): DIED}), 1, True, False, "?",
    ),
    "one and the same training": (Planted({"a": CONSTANT}, 6, same=("a",)), 1, True, True, "?"),
    "no spread": (Planted({"a": BETTER, "b": CONSTANT}, 6), 1, True, True, ">?"),
    "an arm of no contrast": (
        Planted({"a": BETTER, "beside": OPEN}, 6, lacking=(("beside", 5),)), 1, False, False, ">",
    ),
    "no base": (Planted({"a": BETTER}, 6, base=False), 1, False, False, ">"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_the_stopping_rule(case: str) -> None:
    planted, number, complete, over, shown = TABLE[case]
    evidence = found(planted)
    look = look_of(evidence)
    assert (look.number, look.complete, look.over) == (number, complete, over)
    assert verdicts(evidence) == shown
    assert look.early is (over and number < 3)
    assert look.seeds_to_run == (LOOKS[number] if complete and not over else LOOKS[number - 1])
    again = assemble(rows_of(planted), declared([a for a in planted.arms if a != "beside"]))
    assert again == evidence, "a pure function of the ledger and of what was declared"


def test_a_look_is_judged_as_if_nothing_came_after_it_and_at_its_share_of_alpha() -> None:
    """No number of a look that is under way is shown; all levels are those of the look."""
    arms = {"a": LATER, "b": BETTER}
    at_six, within = found(Planted(arms, 6)), found(Planted(arms, 8))
    assert within.scenarios == at_six.scenarios
    alone = found(Planted(arms, 6), looks=(), replicates=6, alpha=0.02)
    assert at_six.scenarios == alone.scenarios
    assert at_six.declared.alpha == 0.02
    assert at_six.mde_in_sd == alone.mde_in_sd == mde_sd_units(6, 0.02 / 2)
    (scenario,) = at_six.scenarios
    assert {len(arm.seeds) for arm in scenario.arms} == {6}
    assert {one.contrast.alpha for one in scenario.contrasts if one.contrast} == {0.02}
    look = look_of(at_six)
    assert (look.alpha, look.whole_alpha) == (0.02, 0.06)


def test_the_share_of_alpha_decides() -> None:
    """Planted: p = 0.027 at the first look, which all of alpha would let through and a third does not."""
    gains = [0.3, 0.0, 0.25, 0.05, 0.1, 0.2, *[0.3] * 6]
    whole = found(Planted({"a": gains}, 6), looks=(), replicates=6)
    (judged,) = whole.scenarios[0].contrasts
    assert judged.contrast is not None
    assert judged.contrast.t_p == pytest.approx(0.027, abs=0.001)
    assert judged.verdict is Verdict.BETTER
    evidence = found(Planted({"a": gains}, 6))
    assert verdicts(evidence) == "?"
    assert look_of(evidence).goes_on


def test_a_study_none_of_whose_contrasts_can_exist_gets_all_of_its_seeds() -> None:
    """Its arms are known to be missing only after the search; `all` of nothing ended it at the first look."""
    assert look_of(found(Planted({"a": BETTER}, 6), family=())).goes_on
    assert look_of(found(Planted({"a": BETTER}, 12), family=())).number == 3


def test_without_looks_there_is_none() -> None:
    evidence = found(Planted({"a": BETTER, "b": OPEN}), looks=())
    assert evidence.look is None
    assert (evidence.declared.replicates, evidence.declared.alpha) == (12, 0.06)


@pytest.mark.parametrize(
    ("look", "words"),
    [
        (Look(1, LOOKS, 0.05, False, False), "look 1 of 3 (6 seeds, judged at alpha 0.0167) is under way"),
        (
            Look(1, LOOKS, 0.05, True, False),
            "look 1 of 3 (6 seeds, judged at alpha 0.0167) left contrasts open; look 2 follows, at 9",
        ),
        (
            Look(2, LOOKS, 0.05, True, True),
            "look 2 of 3 (9 seeds, judged at alpha 0.0167) was the last, as more seeds could decide nothing "
            "further",
        ),
        (Look(3, LOOKS, 0.05, True, True), "look 3 of 3 (12 seeds, judged at alpha 0.0167) was the last"),
    ],
)  # fmt: skip
def test_where_it_stands_in_words(look: Look, words: str) -> None:
    assert look.words == words


@pytest.mark.parametrize("looks", [(), (6, 12), LOOKS, tuple(range(6, 16))])
def test_the_shares_add_up_to_alpha(looks: tuple[int, ...]) -> None:
    assert alpha_at_look(0.05, looks) * max(1, len(looks)) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("looks", "replicates", "said"),
    [
        ([8], 8, r"got \[8\]; allowed: at least two numbers of seeds"),
        ([6, 6, 8], 8, r"got \[6, 6, 8\]; looks rise"),
        ([9, 6, 12], 12, "looks rise"),
        ([4, 8], 8, "looks at 6 seeds or more"),
        ([6, 9], 12, "confirm.replicates is 12; the last look is the end.*end the looks with 12"),
        ([6, 9, 12], 8, "set confirm.replicates to 12"),
        (["six", 8], 8, "valid integer"),
        (8, 8, "valid tuple"),
    ],
)
def test_looks_that_are_none_are_refused(looks: Any, replicates: int, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ConfirmSpec.model_validate({"replicates": replicates, "looks": looks})


def test_looks_that_are_some() -> None:
    spec = ConfirmSpec.model_validate({"replicates": 12, "looks": [6, 9, 12]})
    assert spec.looks == LOOKS
    assert ConfirmSpec(looks=()).looks == ()
    assert FEWEST_AT_A_LOOK == FEWEST_SEEDS


@pytest.mark.parametrize("effect", ["0.5", "1", "2"])
def test_what_ends_early_leans_away_from_zero_as_the_documentation_says(effect: str) -> None:
    """Within three standard errors of the table, which 10,000 studies gave."""
    docs = (Path(__file__).parents[1] / "docs" / "evidence.md").read_text(encoding="utf-8")
    (line,) = (line for line in docs.splitlines() if line.startswith(f"| {effect} sd | 0."))
    ended, shown, held, of_all, held_of_all = (
        cell.replace(" sd", "").strip() for cell in line.strip("|").split("|")[1:]
    )
    improvement, sd = map(float, shown.split(","))
    truth = float(effect)
    counted = early_ends(truth, 2000, seed=6)
    assert counted.ended.value == pytest.approx(float(ended), abs=3 * counted.ended.error + 0.005)
    assert counted.improvement == pytest.approx(improvement, abs=0.1)
    assert counted.sd == pytest.approx(sd, abs=0.06)
    assert counted.held.value == pytest.approx(float(held), abs=3 * counted.held.error)
    assert counted.improvement_of_all == pytest.approx(float(of_all), abs=0.03)
    assert counted.held_of_all.value == pytest.approx(float(held_of_all), abs=0.01)
    assert counted.improvement > truth
    assert counted.held_of_all.value > 1 - 0.05 / 3 - 0.01
