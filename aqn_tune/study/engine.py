"""What the search asks of a training engine: to advance a pack from rung to rung.

The search knows engines by this protocol alone, so that it needs no torch, and so that a study can
run on a synthetic objective in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from aqn_tune.ledger.rows import EvaluationRow, TrainingRow
from aqn_tune.study.runs import Pack, Setting

if TYPE_CHECKING:
    import numpy as np

BaseArrays = Mapping[str, "np.ndarray[Any, Any]"]
"""Weights of the base model as read-only numpy arrays, shared between workers."""


class RungReport(NamedTuple):
    """What a pack reports when it has reached a rung."""

    step: int
    """Optimiser steps taken: the rung."""
    evaluations: tuple[EvaluationRow, ...]
    """Every run that has not failed, under each of its conditions."""
    trainings: tuple[TrainingRow, ...]
    """One row per run: unfinished, finished at the last rung, or failed."""


class PackTraining(Protocol):
    """A pack of runs in training. Not thread-safe; holds the memory of the model until closed."""

    def advance(self) -> RungReport:
        """Train to the next rung, evaluate there, and export at the last one.

        A run whose loss is not finite, or whose audit does not hold, is reported `failed` and gives
        no evaluation from then on; the others are not disturbed.
        """

    def state(self) -> bytes:
        """Return everything needed to continue after the last rung reached."""

    def restore(self, state: bytes) -> None:
        """Continue from a `state` of the same pack; what follows is bit-identical on the same machine."""

    def close(self) -> None:
        """Give the memory back. The base arrays are as they were."""


class Engine(NamedTuple):
    """A way to train packs: two module-level functions, so that a worker can import them."""

    load_base: Callable[[Setting], BaseArrays]
    """Read the base model once, on the driver; Ray shares the arrays between workers."""
    open_pack: Callable[[Pack, Setting, BaseArrays], PackTraining]
    """Build a pack on a worker."""
