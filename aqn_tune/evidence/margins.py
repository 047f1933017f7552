"""The margin of a scenario in nats, and where that number comes from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aqn_tune.study.base import Spec
from aqn_tune.study.margin import AbsoluteMargin, Margin

Measured = Literal["declared", "search", "confirmation"]

_BASIS = {"gain": "gain G", "gap": "gap", "sd": "sd"}
_NOT_POSITIVE = {
    "gain": "the clean arm is no better than the untrained base",
    "gap": "the fault costs nothing",
    "sd": "the pairs do not differ from seed to seed",
}


class ScenarioMargin(Spec):
    """The margin of one scenario, or why there is none: without one `~` is out of reach there."""

    scenario: str = Field(description="The scenario.")
    nats: float | None = Field(
        gt=0, allow_inf_nan=False, description="The margin in nats per token; null for none."
    )
    basis: float | None = Field(
        None,
        description="What it is a share or multiple of (gain, gap or sd), in nats per token; null for an "
        "absolute margin, and where it is not known.",
    )
    measured: Measured = Field(
        description="Where the basis was measured; declared: nothing had to be."
    )
    reason: str = Field("", description="Why there is no margin; empty when there is one.")


def scenario_margin(
    rule: Margin, scenario: str, basis: float | None, measured: Measured, *, missing: str = ""
) -> ScenarioMargin:
    """Return the margin that a rule comes to in one scenario.

    Args:
        rule: what the study declares.
        scenario: name of the scenario.
        basis: its gain, gap or sd in nats per token, as the rule asks; `None` where it is not known. An
            absolute margin reads none.
        measured: where the basis was measured.
        missing: why the basis is not known.

    A basis that is not positive gives no margin: a share of a loss that the fault did not cause would be
    no size to hold a difference to.
    """
    if isinstance(rule, AbsoluteMargin):
        return ScenarioMargin(scenario=scenario, nats=rule.nats, measured="declared")
    name = _BASIS[rule.kind]
    reason = ""
    if basis is None:
        reason = f"the {name} is not known" + (f" ({missing})" if missing else "")
    elif basis <= 0:
        reason = (
            f"the {name} is not positive in the {measured} ({basis:.3g} nats/token: "
            f"{_NOT_POSITIVE[rule.kind]})"
        )
    return ScenarioMargin(
        scenario=scenario,
        nats=None if basis is None or reason else rule.in_nats(basis),
        basis=basis,
        measured=measured,
        reason=reason,
    )


def margin_words(rule: Margin, margin: ScenarioMargin) -> str:
    """Return the margin of a scenario in words: its kind, its nats, and where they come from."""
    if margin.nats is None:
        return (
            f"none, so that nothing can be called equivalent: {margin.reason}; declared was "
            f"{rule.words()}"
        )
    if isinstance(rule, AbsoluteMargin):
        return f"{margin.nats:.3g} nats/token, as declared"
    known = "" if margin.basis is None else f"{_BASIS[rule.kind]} {margin.basis:.3g} nats/token "
    return f"{margin.nats:.3g} nats/token, {rule.words()} ({known}in the {margin.measured})"
