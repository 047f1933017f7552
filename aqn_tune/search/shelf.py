"""The shelf: trainings of other studies, looked up before a search run is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import RecordedRow, reused_from
from aqn_tune.search.donors import Donor, find_donors
from aqn_tune.study.effort import split_rows
from aqn_tune.study.folder import StudyFolder
from aqn_tune.study.runs import Run
from aqn_tune.study.schema import Study


class Shelf:
    """Trainings of other studies, for the search stage alone.

    Confirm runs are never taken: a generation of confirm seeds is trained by the study that makes
    claims with it. Donors are read when the first training is asked for. Without any it is empty.
    """

    def __init__(
        self,
        find: Callable[[], Iterable[Donor]] = tuple,
        *,
        eval_batch_size: int = 0,
        rows: Callable[[], int] = int,
    ) -> None:
        self._find = find
        self._donors: tuple[Donor, ...] | None = None
        self._eval_batch_size = eval_batch_size
        self._count_rows = rows
        self._rows = 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave the donors behind: Ray pickles the work that holds a shelf, and no copy is asked."""
        return Shelf().__dict__

    def find(
        self, training_key: str, run: Run, rungs: Sequence[int]
    ) -> tuple[RecordedRow, ...] | None:
        """Return the rows that training `run` through `rungs` would give, None to train it."""
        if self._donors is None:
            self._donors = tuple(self._find())
            self._rows = self._count_rows() if self._donors else 0
        if not self._donors:
            return None
        if not _alike_in_every_pack(run, self._eval_batch_size, self._rows):
            return None
        for donor in self._donors:
            found = donor.rows(training_key, run, rungs, split_rows=self._rows)
            if found is not None:
                return found
        return None


def open_shelf(
    study: Study,
    folder: StudyFolder,
    *,
    layer_count: int,
    rounds_alike: Callable[[], bool],
    announce: Callable[[str], None] | None,
) -> Shelf:
    """Return what the search of `study` may take from the studies beside it; nothing without reuse.

    Nothing either where a training depends on its pack, if only in its last bits: `rounds_alike` is
    asked once there is a donor.
    """
    if not study.compute.reuse:
        return Shelf()

    def donors() -> tuple[Donor, ...]:
        say = announce or (lambda _: None)
        found = tuple(find_donors(study, folder, layer_count=layer_count, announce=say))
        return found if found and rounds_alike() else ()

    return Shelf(
        donors,
        eval_batch_size=study.eval_batch_size,
        rows=lambda: split_rows(study, "search"),
    )


def announce_taken(
    ledger: Ledger, before: Mapping[str, int], announce: Callable[[str], None] | None
) -> dict[str, int]:
    """Announce how many trainings were taken from which study since `before`; return how many ever."""
    found = reused_from(ledger.trainings.values())
    for folder, total in found.items():
        number = total - before.get(folder, 0)
        if announce is not None and number:
            announce(f"{number} training{'' if number == 1 else 's'} reused from {folder}")
    return found


def _alike_in_every_pack(run: Run, eval_batch_size: int, rows: int) -> bool:
    """Return whether the numbers of a run are the same to the last bit whatever it shares a pack with.

    Products of a pack equal those of a run alone while their shapes are multiples of 16: with rows of
    a multiple of 8 tokens, in batches of an even number of rows. Else another study, whose packs are
    others, may differ by rounding. Compiled layers promise nothing of the kind.
    """
    training = run.training
    if training.compile:
        return False
    micro = -(-training.batch_size // training.gradient_accumulation_steps)
    batches = (micro, training.batch_size % micro, eval_batch_size, rows % eval_batch_size)
    return training.max_length % 8 == 0 and not any(size % 2 for size in batches)
