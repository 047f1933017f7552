"""Where the gradient goes: at declared steps, each layer's gradient beside its clean counterfactual.

The clean gradient of a step is the gradient at the same weights and the same batch with no fault, no
quantizer and no noise: one further forward and backward pass. A comparison with the clean arm would
mix what the device does to the gradient with where that arm's training has gone; at equal weights
only the former is left. Layers that an arm leaves out are left out of both: they are its model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from aqn_tune.injection.address import AddressBook
from aqn_tune.injection.fold import Entry
from aqn_tune.injection.injection import Injection
from aqn_tune.injection.observe import ActivationWatch, compact
from aqn_tune.ledger.rows import LayerMechanism, Observation, SiteActivation
from aqn_tune.study.runs import Run
from aqn_tune.training.arena import Arena


class Mechanism:
    """Looks at a pack of K runs, each at the steps that it declares.

    Nothing that the training reads is changed, and no value depends on the other replicas of the pack.
    A step that is looked at costs twice the time of another, and twice the memory of the gradients.

    Args:
        book: Addresses of the model.
        arena: Holds the gradients.
        runs: The runs in the order of the replicas.
    """

    def __init__(self, book: AddressBook, arena: Arena, runs: Sequence[Run]) -> None:
        self._book = book
        self._arena = arena
        self._runs = runs
        self._sites: dict[int, list[SiteActivation]] = {}
        self.healthy = Injection(book, [Entry(skip=run.skip) for run in runs], seed_of=_no_draw)
        """What the counterfactual is computed under: nothing but the layers that are left out."""

    def due(self, step: int, failures: Collection[int]) -> tuple[int, ...]:
        """Return the replicas that are looked at in a step; those that failed before it are not."""
        return tuple(
            replica
            for replica, run in enumerate(self._runs)
            if step in run.observed_steps and replica not in failures
        )

    def watch(
        self, injection: Injection, valid: Tensor, step: int, failures: Collection[int]
    ) -> AbstractContextManager[object]:
        """Return the context of the forward pass whose activations are recorded.

        Args:
            injection: Injects into the pass; its context is entered already.
            valid: Boolean [K, N], False at padding.
            step: The step.
            failures: Replicas that have failed.
        """
        skipped = {replica: self._runs[replica].skip for replica in self.due(step, failures)}
        if not skipped:
            return nullcontext()
        watch = ActivationWatch(injection, self._book, valid, skipped)
        self._sites = watch.sites
        return watch

    def observations(self, clean: Tensor, step: int) -> dict[int, Observation]:
        """Return what was seen, by replica that was watched; `clean` [K, P] are the clean gradients."""
        sites, self._sites = self._sites, {}
        return {
            replica: Observation(
                step=step, layers=self._layers(replica, clean), sites=tuple(sites[replica])
            )
            for replica in sites
        }

    def _layers(self, replica: int, clean: Tensor) -> tuple[LayerMechanism, ...]:
        found = []
        for layer in range(self._book.layer_count):
            names = self._trained(replica, layer)
            if names:
                found.append(self._compared(replica, layer, names, clean))
        return tuple(found)

    def _trained(self, replica: int, layer: int) -> list[str]:
        """Return the tensors of a layer that a run trains; none of a layer that it leaves out."""
        if layer in self._runs[replica].skip:
            return []
        prefix = f"{self._book.layer_output(layer).name}."
        return [
            name
            for name in self._arena.names()
            if name.startswith(prefix) and self._arena.is_trained(replica, name)
        ]

    def _compared(
        self, replica: int, layer: int, names: Sequence[str], clean: Tensor
    ) -> LayerMechanism:
        own, other, product = [], [], []
        for name in names:
            a = self._arena.own(self._arena.gradients, name, replica).double()
            b = self._arena.own(clean, name, replica).double()
            own.append(float((a * a).sum()))
            other.append(float((b * b).sum()))
            product.append(float((a * b).sum()))
        norm, clean_norm = math.sqrt(_sum(own)), math.sqrt(_sum(other))
        ratio = norm / clean_norm if clean_norm else math.nan
        cosine = ratio * 0.0 if norm == 0 else _sum(product) / norm / (clean_norm or math.nan)
        return LayerMechanism(
            layer=layer,
            gradient_norm=compact(norm),
            norm_ratio=compact(ratio),
            cosine=compact(max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else cosine),
        )


def _sum(values: Sequence[float]) -> float:
    """Return the exact sum, NaN when a value is not finite."""
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


def _no_draw(replica: int, path: tuple[str | int, ...]) -> int:
    raise AssertionError(f"a healthy device drew random numbers: {path}")
