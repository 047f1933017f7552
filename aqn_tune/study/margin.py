"""The equivalence margin as a study declares it: a share of the gain or of the gap, nats, or sd."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from aqn_tune.errors import nearest
from aqn_tune.study.base import Spec


class GainMargin(Spec):
    """A share of the gain G, what training brings without a fault: the same in every scenario.

    A plain number in a study is this one, and it is written back as a plain number.
    """

    kind: Literal["gain"] = "gain"
    share: float = Field(
        0.05, gt=0, allow_inf_nan=False, description="Margin as a share of the gain G."
    )

    def words(self) -> str:
        """Return the rule as reports print it."""
        return f"{100 * self.share:g} % of the gain G"

    def in_nats(self, basis: float) -> float:
        """Return the margin, given G in nats per token."""
        return self.share * basis


class GapMargin(Spec):
    """A share of the clean-to-fault gap, the loss that the fault costs: each scenario has its own.

    The gap is the faulty loss of fault_only less the clean loss of the clean arm, so that the margin
    is one of recovery: a share of 0.1 stands for 10 points of it. A fault that costs nothing has none.
    """

    kind: Literal["gap"] = "gap"
    share: float = Field(gt=0, le=1, description="Margin as a share of the gap.")

    def words(self) -> str:
        """Return the rule as reports print it."""
        return f"{100 * self.share:g} % of the gap between fault_only and clean"

    def in_nats(self, basis: float) -> float:
        """Return the margin, given the gap of the scenario in nats per token."""
        return self.share * basis


class AbsoluteMargin(Spec):
    """A loss in nats per token, the same in every scenario and known before anything is run."""

    kind: Literal["absolute"] = "absolute"
    nats: float = Field(gt=0, allow_inf_nan=False, description="Margin in nats per answer token.")

    def words(self) -> str:
        """Return the rule as reports print it."""
        return f"{self.nats:g} nats per token"


class SdMargin(Spec):
    """A multiple of the standard deviation of a paired difference, as the search measured it.

    The sd of each scenario is pooled over its primary contrasts in the search, so that the margin is
    fixed in nats before the first confirm run. An sd of the confirmed pairs would be no fixed margin:
    the pairs would set the bar that they are held to. A study without a search has none.
    """

    kind: Literal["sd"] = "sd"
    factor: float = Field(
        gt=0, allow_inf_nan=False, description="Margin in sd of the paired difference."
    )

    def words(self) -> str:
        """Return the rule as reports print it."""
        return f"{self.factor:g} sd of the paired difference"

    def in_nats(self, basis: float) -> float:
        """Return the margin, given the sd of the scenario in nats per token."""
        return self.factor * basis


MARGINS: Final[dict[str, type[Spec]]] = {
    "gain": GainMargin,
    "gap": GapMargin,
    "absolute": AbsoluteMargin,
    "sd": SdMargin,
}

EXAMPLES: Final = {
    "gain": "{kind: gain, share: 0.05}",
    "gap": "{kind: gap, share: 0.1}",
    "absolute": "{kind: absolute, nats: 0.01}",
    "sd": "{kind: sd, factor: 1.5}",
}
"""How each kind is written in a study."""

Margin = Annotated[GainMargin | GapMargin | AbsoluteMargin | SdMargin, Field(discriminator="kind")]
"""The `confirm.margin` of a study."""


def read_margin(value: Any) -> Any:
    """Return what a study wrote as the schema reads it: a plain number is a share of the gain G.

    Raises ValueError for a word that is no number.
    """
    if isinstance(value, dict | Spec):
        return value
    if isinstance(value, str) and value in EXAMPLES:
        raise ValueError(
            f"got {value!r}, a kind of margin without its size; write it as a mapping, such as "
            f"{EXAMPLES[value]}"
        )
    if isinstance(value, str) and not _is_number(value):
        raise ValueError(
            f"got {value!r}; allowed: a number (share of the gain G), or a mapping with `kind`: "
            f"{', '.join(MARGINS)}, such as {EXAMPLES['gap']}{nearest(value, MARGINS)}"
        )
    return {"kind": "gain", "share": value}


def written_margin(margin: Margin) -> float | dict[str, Any]:
    """Return a margin as studies hold it: a share of G as the plain number that it always was.

    Both ways to write it come to the same study then, and studies from before the other kinds existed
    keep their hash and their folder.
    """
    return margin.share if isinstance(margin, GainMargin) else margin.model_dump(mode="json")


def origin_words(margin: Margin, *, searched: bool) -> str:
    """Return a margin with where its number in nats comes from, for the time before a run."""
    if isinstance(margin, AbsoluteMargin):
        return margin.words()
    stage = "the search" if searched else "the confirmation itself"
    return f"{margin.words()}, as {stage} measures it"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
