"""Two zones of the model, of which the middle one may change its noise on the way."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from aqn_tune.errors import UserError
from aqn_tune.noise.targeting.base import Phase, TargetingSpec
from aqn_tune.study.layers import Layers, resolve_layers


class Zone(TargetingSpec):
    """Layers at the edges of the model and layers in its middle, each zone with a multiplier of its own.

    From the share `boundary` of the steps on, the middle has `middle_multiplier_after`. Edges 0-5
    and 23-27 of 28 layers, both multipliers 1, boundary 0.5 and 0.5 after it is the E14a policy of
    the work that AQN's layer multipliers come from. Where both zones are named, a layer in neither
    gets no noise.
    """

    kind: Literal["zone"] = "zone"
    middle: Layers | None = Field(
        None, description="Layers of the middle; by default all that are not `edge`."
    )
    edge: Layers | None = Field(
        None, description="Layers of the edges; by default all that are not `middle`."
    )
    edge_multiplier: float = Field(
        1.0, ge=0.0, allow_inf_nan=False, description="Multiplier of the edges."
    )
    middle_multiplier: float = Field(
        1.0, ge=0.0, allow_inf_nan=False, description="Multiplier of the middle, up to `boundary`."
    )
    boundary: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        allow_inf_nan=False,
        description="Share of the steps after which the middle changes; 1 is never.",
    )
    middle_multiplier_after: float | None = Field(
        None,
        ge=0.0,
        allow_inf_nan=False,
        description="Multiplier of the middle from `boundary` on; needed with a boundary below 1.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Zone:
        if self.middle is None and self.edge is None:
            raise ValueError("got neither zone; name `middle`, `edge` or both")
        if self.boundary < 1 and self.middle_multiplier_after is None:
            raise ValueError(
                f"boundary {self.boundary} has no effect without middle_multiplier_after"
            )
        if self.boundary == 1 and self.middle_multiplier_after is not None:
            raise ValueError(
                "middle_multiplier_after has no effect with boundary 1, which no step reaches; "
                "set boundary below 1"
            )
        return self

    def multipliers(self, layer_count: int, fault_layers: tuple[int, ...]) -> tuple[float, ...]:
        """Return the multipliers before the boundary; see `TargetingSpec.multipliers`."""
        return self._with_middle(self.middle_multiplier, layer_count)

    def phases(self, layer_count: int, fault_layers: tuple[int, ...]) -> tuple[Phase, ...]:
        """Return the phases before and after the boundary; see `TargetingSpec.phases`."""
        first = Phase(0.0, self.multipliers(layer_count, fault_layers))
        if self.middle_multiplier_after is None:
            return (first,)
        after = self._with_middle(self.middle_multiplier_after, layer_count)
        return (first, Phase(self.boundary, after))

    def _with_middle(self, middle_multiplier: float, layer_count: int) -> tuple[float, ...]:
        everything = set(range(layer_count))
        middle = None if self.middle is None else set(resolve_layers(self.middle, layer_count))
        edge = None if self.edge is None else set(resolve_layers(self.edge, layer_count))
        if middle is not None and edge is not None and middle & edge:
            shared = ", ".join(str(layer) for layer in sorted(middle & edge))
            raise UserError(f"targeting zone: layers {shared} are in `middle` and in `edge`")
        inside = everything - (edge or set()) if middle is None else middle
        outside = everything - (middle or set()) if edge is None else edge
        for name, zone in (("middle", inside), ("edge", outside)):
            if not zone:
                raise UserError(
                    f"targeting zone: no layer of {layer_count} is left for `{name}`; "
                    "use targeting global for one zone"
                )
        level = dict.fromkeys(outside, self.edge_multiplier) | dict.fromkeys(
            inside, middle_multiplier
        )
        return tuple(level.get(layer, 0.0) for layer in range(layer_count))
