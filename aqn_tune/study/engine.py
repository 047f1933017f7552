"""What the search asks of a training engine: to advance a pack from rung to rung.

The search knows engines by this protocol alone, so that it needs no torch, and so that a study can
run on a synthetic objective in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from aqn_tune.ledger.rows import EvaluationRow, TrainingRow
from aqn_tune.study.runs import Pack, Setting, Split
from aqn_tune.study.training import TrainingSpec
from aqn_tune.tasks.splitting import SplitName

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BaseArrays = Mapping[str, "np.ndarray[Any, Any]"]
"""Weights of the base model as read-only numpy arrays, shared between workers."""


class SplitArrays(NamedTuple):
    """A split of the task as tokens, in read-only numpy arrays, shared between workers."""

    tokens: NDArray[np.int64]
    """Token ids [n, T], right-padded."""
    answer: NDArray[np.bool_]
    """[n, T]: the token at this position is an answer token."""
    valid: NDArray[np.bool_]
    """[n, T]: False at padding."""
    first: int
    """First position whose prediction can be an answer token, rounded down."""
    max_length: int
    """Tokens that a row might have taken; T is less where no row did."""


SplitsByName = Mapping[SplitName, SplitArrays]


class Shared(NamedTuple):
    """What all packs of a stage start from, and none of them changes.

    Arrays and numbers alone, so that Ray's object store hands it to every worker of a machine
    read-only and without a copy.
    """

    base: BaseArrays
    splits: SplitsByName
    """The rows to train on, and those that the stage evaluates."""


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
        """Continue from a `state` of the same pack, bit for bit on a CPU of the same kind."""

    def close(self) -> None:
        """Give the memory back. What packs share is as it was."""


class Engine(NamedTuple):
    """A way to train packs: module-level functions, so that a worker can import them.

    Whoever starts the workers loads, once; a worker opens packs on what was loaded, and reads neither
    weights nor rows by itself. Without workers it is the same: load, then open.
    """

    load_base: Callable[[Setting], BaseArrays]
    """Read the base model."""
    load_splits: Callable[[Setting, Sequence[SplitName], int], SplitsByName]
    """Turn the named splits into tokens, rows of at most so many. Raises UserError where the rows cannot
    be had, are not those of the setting, or do not fit."""
    open_pack: Callable[[Pack, Setting, Shared], PackTraining]
    """Build a pack on a worker. Raises ValueError where its rows were not loaded at its length."""
    rounds_alike: Callable[[Setting, TrainingSpec, int], bool]
    """Whether, on this machine, a training gives the same bits alone and in any pack of up to so many runs;
    else to rounding. A run alone may still be evaluated under several conditions in one pass."""

    def load(self, setting: Setting, split: Split, max_length: int) -> Shared:
        """Return what packs of rows of at most `max_length` tokens need that are evaluated on `split`.

        Raises UserError where the model or the rows cannot be had.
        """
        splits = self.load_splits(setting, ("train", split), max_length)
        return Shared(dict(self.load_base(setting)), dict(splits))
