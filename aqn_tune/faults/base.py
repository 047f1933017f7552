"""What a hardware fault is: an address in the model and a rule for the values there."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import Field

from aqn_tune.study.base import Spec
from aqn_tune.study.layers import Layers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

Site = Literal["input", "output"]


class Faulted(NamedTuple):
    """What a fault did to the values of one call."""

    values: Tensor
    """The values that the faulty unit hands on, shape [K, N, D]."""
    affected: Tensor
    """Boolean [K, N, D]: where the unit acted, padding excluded."""


class FaultSpec(Spec):
    """A fault of one unit of the accelerator: where it sits and what it does.

    One subclass per kind, in a file of its own; the file imports torch only inside `apply`.
    """

    kind: str = Field(description="Kind of the fault.")
    modules: tuple[str, ...] = Field(
        (".",),
        description="Globs over module names, inside a decoder layer ('.' is the layer itself) or whole.",
    )
    layers: Layers = Field(description="Decoder layers that hold the faulty unit.")
    site: Site = Field(
        "output", description="Whether the fault acts on a module's input or output."
    )
    exclude: tuple[str, ...] = Field(
        (), description="Globs of modules to leave out, beside lm_head, embeddings and adapters."
    )

    per_replica: ClassVar[dict[str, float]] = {}
    """The numeric fields that may differ between replicates of one pack, each with the value at
    which the fault is exactly the identity (bit for bit)."""

    @abstractmethod
    def apply(
        self,
        x: Tensor,
        params: Mapping[str, Tensor],
        valid: Tensor,
        normal: Callable[[], Tensor],
    ) -> Faulted:
        """Return `x` as the faulty unit computes it.

        Args:
            x: Values [K, N, D]: K replicates, N tokens, D features.
            params: Each field of `per_replica` as a float64 tensor [K, 1, 1].
            valid: Boolean [K, N, 1], False at padding, which enters no reference and is not counted.
            normal: Draws standard normal values of x's shape and type, keyed by replicate, step and site.

        Every reduction stays inside a replicate and a `per_replica` field at its off value changes
        no bit of that replicate's values.
        """

    def static(self) -> dict[str, object]:
        """Return what must be equal for two faults to share one pass of a pack."""
        return self.model_dump(mode="json", exclude=set(self.per_replica))
