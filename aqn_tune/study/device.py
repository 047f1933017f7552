"""A device as a training or an evaluation meets it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aqn_tune.faults import Fault
from aqn_tune.faults.base import GRADIENT_SITES
from aqn_tune.quantization import Quantizer
from aqn_tune.study.base import Spec
from aqn_tune.study.layers import resolve_layers

AdapterPath = Literal["exact", "faulty"]
Deploy = Literal["unmerged", "merged"]
WEIGHT_SITES = ("weight", "grad_weight")


class Device(Spec):
    """The faults and number formats that act on a model, and which parts of it run on the faulty unit.

    A device without faults and quantizers is healthy; all healthy devices are equal.
    """

    faults: tuple[Fault, ...] = Field((), description="Faults, in the order in which they act.")
    quantization: tuple[Quantizer, ...] = Field((), description="Quantizers of the unit.")
    adapter_path: AdapterPath = Field(
        "exact", description="Whether the LoRA branches run on the faulty unit too."
    )
    deploy: Deploy = Field(
        "unmerged", description="Whether adapters are merged into the weights before the unit runs."
    )
    seed: int = Field(0, description="Seed of everything permanent: which places are faulty.")

    def is_healthy(self) -> bool:
        """Return whether nothing acts."""
        return not self.faults and not self.quantization

    def resolved(self, layer_count: int, *, weights_trained: bool) -> Device:
        """Return the device in canonical form: devices that act alike are equal, and so are their hashes.

        Layer numbers are written out, so that [-1] and [27] are one device, and every companion fault
        stands in the list. What nothing reads is at its default: `when` (only parts that act are here),
        the seed where no fault has drawn places of its own, and the adapter path where no part could
        tell the difference, as in full fine-tuning (`weights_trained`), which has no adapters.
        """
        faults = tuple(
            part.model_copy(
                update={"layers": resolve_layers(part.layers, layer_count), "when": "both"}
            )
            for fault in self.faults
            for part in (fault, *fault.companions(weights_trained=weights_trained))
        )
        quantization = tuple(
            quantizer.model_copy(
                update={"layers": resolve_layers(quantizer.layers, layer_count), "when": "both"}
            )
            for quantizer in self.quantization
        )
        path_matters = self.reads_adapter_path() and not weights_trained
        return self.model_copy(
            update={
                "faults": faults,
                "quantization": quantization,
                "adapter_path": self.adapter_path if path_matters else "exact",
                "seed": self.seed if self.reads_seed() else 0,
            }
        )

    def forward_only(self) -> Device:
        """Return the device where nothing is differentiated: without its faults of gradients."""
        faults = tuple(fault for fault in self.faults if fault.site not in GRADIENT_SITES)
        return self.model_copy(update={"faults": faults})

    def reads_seed(self) -> bool:
        """Return whether devices of this make differ in what their seed draws."""
        return any(fault.uses_device_seed() for fault in self.faults)

    def reads_adapter_path(self) -> bool:
        """Return whether some part may act on values that pass a LoRA branch.

        A decoder layer as a whole has no adapter, and a weight is the same with or without one beside it.
        """
        return any(
            fault.modules != (".",) and fault.site not in WEIGHT_SITES for fault in self.faults
        ) or any(quantizer.operands != "weight" for quantizer in self.quantization)


HEALTHY = Device()
