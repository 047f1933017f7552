"""What the hardware does: declared and swept, never optimised."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field

from aqn_tune.faults import Fault
from aqn_tune.study.base import Spec
from aqn_tune.study.layers import resolve_layers

During = Literal["both", "train", "eval"]


class ScenarioSpec(Spec):
    """A faulty device: its faults, and when they act.

    A search that could choose its own fault level would pick the mildest, so a scenario is an input
    of the study: one search and one family of verdicts per scenario.
    """

    faults: tuple[Fault, ...] = Field(
        min_length=1,
        description="Faults of the device, applied in this order where they share a site.",
    )
    during: During = Field(
        "both",
        description="both: train and deploy on the faulty device; eval: train on a healthy one; "
        "train: the reverse.",
    )

    def trained(self) -> tuple[Fault, ...]:
        """Return the faults that training sees."""
        return () if self.during == "eval" else self.faults

    def deployed(self) -> tuple[Fault, ...]:
        """Return the faults of a `faulty` evaluation."""
        return () if self.during == "train" else self.faults

    def fault_layers(self, layer_count: int) -> tuple[int, ...]:
        """Return every layer that holds a fault, sorted."""
        layers = {n for fault in self.faults for n in resolve_layers(fault.layers, layer_count)}
        return tuple(sorted(layers))


class Scenario(NamedTuple):
    """One point of the sweep."""

    name: str
    """Unique in the study, for example `both-threshold0.2`."""
    spec: ScenarioSpec
    values: dict[str, str | int | float]
    """What the sweep set, by short key: {"threshold": 0.2, "during": "both"}."""
