"""What a hardware fault is: an address in the model, when it is there, and a rule for the values it meets."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import Field, model_validator

from aqn_tune.study.base import Spec
from aqn_tune.study.layers import Layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

Site = Literal["input", "output", "weight", "grad_input", "grad_output", "grad_weight"]
GRADIENT_SITES: tuple[Site, ...] = ("grad_input", "grad_output", "grad_weight")
When = Literal["both", "train", "eval"]
Axis = Literal["element", "channel", "token"]
Persistence = Literal["permanent", "transient", "intermittent"]


class Draws(Protocol):
    """The random numbers of one call of a fault: keyed, never from global state."""

    def normal(self) -> Tensor:
        """Return standard normal values of x's type, [K, N, D], fresh at every step; not to be written to."""

    def generators(self, stream: str, *, fresh: bool) -> Sequence[torch.Generator]:
        """Return one CPU generator per replicate, each at the start of its stream.

        Args:
            stream: What is drawn. Within one call every draw has a name of its own: the same name
                twice gives the same numbers twice.
            fresh: False: the generators of the device, keyed by its seed, `mask_seed`, the site and
                the fault: the same in every call of the site, whatever the replicate and the step.
                True: keyed by replicate seed, step, site and fault.
        """


class FaultSpec(Spec):
    """A fault of one unit of the accelerator: where it sits, when it is there, what it does.

    One subclass per kind, in a file of its own; the file imports torch only inside `apply`.
    """

    kind: str = Field(description="Kind of the fault.")
    modules: tuple[str, ...] = Field(
        (".",),
        description="Globs over module names, inside a decoder layer ('.' is the layer itself) or whole; "
        "'linear' is every linear layer.",
    )
    layers: Layers = Field(description="Decoder layers that hold the faulty unit.")
    site: Site = Field(
        "output",
        description="What it acts on: a module's input, output or weight, or the gradient of one of them.",
    )
    exclude: tuple[str, ...] = Field(
        (), description="Globs of modules to leave out, beside lm_head, embeddings and adapters."
    )
    when: When = Field(
        "both", description="Whether it acts in training, in faulty evaluations, or in both."
    )
    density: float = Field(
        1.0, gt=0, le=1, description="Share of the places (see `axis`) that are faulty."
    )
    axis: Axis = Field(
        "element",
        description="What a place is: an element, a channel (last dimension), a token (of a weight: a row).",
    )
    persistence: Persistence = Field(
        "permanent",
        description="permanent: the same places in every call; transient: chosen anew in every call; "
        "intermittent: permanent places, faulty in some calls only.",
    )
    activation_rate: float | None = Field(
        None, gt=0, le=1, description="Share of the calls in which an intermittent fault acts."
    )
    mask_seed: int = Field(
        0, ge=0, description="Seed of the faulty places, beside the device's own seed."
    )

    per_replica: ClassVar[tuple[str, ...]] = ()
    """The numeric fields that may differ between replicates of one pack."""

    @model_validator(mode="after")
    def _persistence_is_complete(self) -> FaultSpec:
        if (self.persistence == "intermittent") != (self.activation_rate is not None):
            raise ValueError(
                f"persistence {self.persistence} with activation_rate {self.activation_rate}: "
                "an intermittent fault has an activation_rate, and no other has one"
            )
        return self

    @abstractmethod
    def apply(self, x: Tensor, params: Mapping[str, Tensor], valid: Tensor, draws: Draws) -> Tensor:
        """Return `x` as the faulty unit computes it, [K, N, D], of the same type.

        Args:
            x: Values [K, N, D]: K replicates, N tokens, D features. A weight comes as [K, out, in].
            params: Each field of `per_replica` as a float64 tensor [K, 1, 1].
            valid: Boolean [K, N, 1], False at padding, which enters no reference and is not counted.
            draws: Random numbers of this call.

        Every reduction stays inside a replicate. The gradient is that of the returned expression:
        references and masks are computed without gradient, an additive error lets it through.
        `density`, `axis` and intermittence are not the kernel's business, nor is `ste`. A kind that
        hits single values by itself chooses them with `aqn_tune.faults.places.hit_values`.
        """

    def is_stochastic(self) -> bool:
        """Return whether the fault differs from one call or replicate to the next."""
        is_drawn = self.persistence == "transient" and self.density < 1
        return is_drawn or self.persistence == "intermittent"

    def uses_device_seed(self) -> bool:
        """Return whether the faulty places are drawn, so that devices differ in them."""
        return self.density < 1 and self.persistence != "transient"

    def may_rest(self) -> bool:
        """Return whether a whole evaluation may pass in which it changes no value."""
        return self.persistence == "intermittent"

    def is_off(self) -> bool:
        """Return whether the declared level is one at which the fault is the identity."""
        return False

    def companions(self, *, weights_trained: bool) -> tuple[FaultSpec, ...]:
        """Return further faults that this one stands for, such as an error of the backward products.

        A frozen weight has no gradient, so `weights_trained` says whether there is one to err.
        """
        return ()

    def static(self) -> dict[str, object]:
        """Return what must be equal for two faults to share one pass of a pack."""
        return self.model_dump(mode="json", exclude=set(self.per_replica))


class TrueGradientFault(FaultSpec):
    """A fault with a derivative of its own (a dead value passes no gradient), which `ste` replaces."""

    ste: bool = Field(
        False,
        description="Straight-through: pass the gradient as if the fault were not there.",
    )

    @model_validator(mode="after")
    def _ste_has_a_gradient(self) -> TrueGradientFault:
        if self.ste and self.site in GRADIENT_SITES:
            raise ValueError(
                f"ste with site {self.site}: a fault of a gradient has no gradient of its own; "
                "leave ste out"
            )
        return self
