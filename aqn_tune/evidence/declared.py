"""What a study commits itself to before its first confirm run, in the terms of evidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from aqn_tune.errors import UserError, nearest
from aqn_tune.evidence.decisions import DecisionMatrix, contrast_name, matrix_of
from aqn_tune.evidence.margins import ScenarioMargin
from aqn_tune.study.base import Spec
from aqn_tune.study.margin import Margin

if TYPE_CHECKING:
    from aqn_tune.study.cells import NotAvailable
    from aqn_tune.study.scenario import Scenario
    from aqn_tune.study.schema import Study


class Declared(Spec):
    """What was fixed before the first confirm run; evidence judges this and nothing else.

    Never stored: it is made from the study, and where the study is locked the values of its lock
    (`aqn_tune.confirm.lock.ConfirmLock`) take the place of the study's.
    """

    family: tuple[tuple[str, str, str], ...] = Field(
        description="(scenario, arm, reference) of every primary contrast."
    )
    scenarios: tuple[str, ...] = Field(description="Every scenario, in the order of the report.")
    replicates: int = Field(ge=2, description="Confirm seeds n.")
    looks: tuple[int, ...] = Field(
        (),
        description="Numbers of seeds at which it is judged, each at an equal share of alpha, the last "
        "`replicates`; empty: once, at the end.",
    )
    generation: int = Field(ge=0, description="Generation of the confirm seeds.")
    alpha: float = Field(gt=0, lt=0.5, description="Familywise error rate of the whole study.")
    margin: float | None = Field(
        gt=0,
        description="Margin in nats where it was fixed for every scenario alike; null: see `margins`.",
    )
    margin_rule: Margin = Field(description="What the margin is: its kind and its size.")
    margins: tuple[ScenarioMargin, ...] = Field(
        (),
        description="Margins that were fixed before the first confirm run; a scenario without one takes "
        "its gain or gap from what the confirm stage finds.",
    )
    power: float = Field(ge=0.5, lt=1, description="Power at which detectable effects are stated.")
    seed: int = Field(ge=0, description="Seed of the bootstrap and of drawn sign flips.")
    decisions: DecisionMatrix | None = Field(
        description="The decision matrix, applied in every scenario; null when there is none."
    )


def declare(
    study: Study,
    scenarios: Sequence[Scenario],
    missing: Sequence[NotAvailable],
    *,
    margin: float | None,
) -> Declared:
    """Return what a study commits itself to, by the study alone.

    The family is every primary contrast of every scenario less those with an arm that cannot exist
    there (`missing`, known before any result of the confirmation is).

    Args:
        study: the resolved study.
        scenarios: its scenarios.
        missing: arms that cannot exist.
        margin: in the unit of the metric when G was known before the confirmation, else `None`.

    Raises:
        UserError: a decision matrix that cannot be trusted, or one over a contrast that is not
            primary: it would stay undecided for ever.
    """
    absent = {(item.scenario, item.arm) for item in missing}
    family = tuple(
        (scenario.name, arm, reference)
        for scenario in scenarios
        for arm, reference in study.primary_contrasts()
        if not absent & {(scenario.name, arm), (scenario.name, reference)}
    )
    if study.decisions is not None:
        _check_primary(study.decisions.contrasts, study.confirm.contrasts)
    return Declared(
        family=family,
        scenarios=tuple(scenario.name for scenario in scenarios),
        replicates=study.confirm.replicates,
        looks=study.confirm.looks,
        generation=study.confirm.generation,
        alpha=study.confirm.alpha,
        margin=margin,
        margin_rule=study.confirm.margin,
        power=study.confirm.power,
        seed=study.seed,
        decisions=None if study.decisions is None else matrix_of(study.decisions),
    )


def _check_primary(decided: Sequence[tuple[str, str]], primary: Sequence[tuple[str, str]]) -> None:
    allowed = [contrast_name(*pair) for pair in primary]
    for pair in decided:
        name = contrast_name(*pair)
        if name not in allowed:
            raise UserError(
                f"decisions.contrasts: {name} is no primary contrast{nearest(name, allowed)}; "
                f"confirm.contrasts has {', '.join(allowed)}"
            )
