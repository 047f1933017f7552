"""Where a study stands before it is run: what of it is locked, and whether anything is left to do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from aqn_tune.confirm.declared import locked_declaration, missing_by_lock
from aqn_tune.confirm.lock import ConfirmLock, check_code, check_lock, make_lock, read_locks
from aqn_tune.errors import UserError
from aqn_tune.evidence.assemble import assemble
from aqn_tune.evidence.looks import Look
from aqn_tune.ledger import Ledger
from aqn_tune.search.record import Recorder
from aqn_tune.search.work import FixedPacks
from aqn_tune.study.cells import Cell, Finalist, stage_cells
from aqn_tune.study.folder import StudyFolder
from aqn_tune.study.packing import Job, base_pack, jobs_of, make_packs, pack_size
from aqn_tune.study.runs import Pack, Setting
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study


class Standing(NamedTuple):
    """Where a study stands."""

    lock: ConfirmLock | None
    """The lock of its confirm generation; with one the search is over, whatever became of it."""
    left: bool
    """Whether something is left to run. Seeds beyond the look at which the confirmation stands are not."""


def standing(
    study: Study,
    setting: Setting,
    scenarios: Sequence[Scenario],
    folder: StudyFolder,
    *,
    layer_count: int,
) -> Standing:
    """Return where a study stands; reads its folder and writes nothing.

    Call it before a run writes anything, so that a refused run leaves the folder as it was.

    Raises UserError when the folder was locked to, or holds trainings of, another study; when what
    is left would be run with other code than the lock was written with; when a generation that has
    its verdicts lacks runs.
    """
    held = read_locks(folder.lock).generation(study.confirm.generation)
    if held is None:
        cells = stage_cells(study, setting, scenarios, stage="search", layer_count=layer_count)
        check_recorded(Recorder(Ledger(folder.ledger), folder.root), cells.cells)
        return Standing(None, left=True)
    work, _ = locked_work(study, setting, scenarios, folder, held, layer_count=layer_count)
    return Standing(held, left=bool(work.queued))


def locked_work(
    study: Study,
    setting: Setting,
    scenarios: Sequence[Scenario],
    folder: StudyFolder,
    held: ConfirmLock,
    *,
    layer_count: int,
    finalists: Sequence[Finalist] | None = None,
    recorder: Recorder | None = None,
) -> tuple[FixedPacks, tuple[Cell, ...]]:
    """Return what is left of a locked generation, and the cells to be recorded; writes nothing.

    The finalists, the gain and the margin are those of the lock: whatever happens to the search
    afterwards, what is confirmed does not move. `finalists` that are given have to be the same. Where looks
    are declared, the cells go as far as the look that is under way, or at which the confirmation ended.

    Raises UserError as `standing` does.
    """
    chosen = held.chosen() if finalists is None else finalists
    cells = stage_cells(
        study, setting, scenarios, stage="confirm", layer_count=layer_count, finalists=chosen
    )
    wanted = make_lock(
        study, chosen, cells, gain=held.gain, detectable=held.detectable, margins=held.margins
    )
    check_lock(folder.lock, held, wanted)
    recorder = recorder or Recorder(Ledger(folder.ledger), folder.root)
    check_recorded(recorder, cells.cells, generation=held.generation)
    look = look_of(study, scenarios, recorder.ledger, held)
    seeds = held.replicates if look is None else look.seeds_to_run
    asked = tuple(cell for cell in cells.cells if cell.replicate < seeds)
    # Nothing of a generation is run once its verdicts are written, not for a comparison either.
    reuse = study.compute.reuse or verdict_written(folder, held)
    packs = confirm_packs(study, scenarios, asked, folder, layer_count=layer_count, reuse=reuse)
    work = FixedPacks(packs, setting=setting, recorder=recorder, state=folder.state)
    if work.queued:
        if verdict_written(folder, held):
            raise UserError(
                f"{folder.verdict}: holds the verdicts of generation {held.generation}, and yet "
                f"{folder.ledger} lacks runs of it (packs {', '.join(p.name for p in work.queued)}): "
                "the ledger was changed. A generation is not run again once its verdicts were "
                "written; put the ledger back, or raise confirm.generation"
            )
        check_code(folder.lock, held)
    return work, asked


def look_of(
    study: Study, scenarios: Sequence[Scenario], ledger: Ledger, held: ConfirmLock
) -> Look | None:
    """Return the look at which a locked generation stands; None where it has no looks."""
    if not held.looks:
        return None
    missing = missing_by_lock(study, scenarios, held)
    return assemble(ledger.rows(), locked_declaration(study, scenarios, held, missing)).look


def verdict_written(folder: StudyFolder, held: ConfirmLock) -> bool:
    """Return whether `verdict.json` holds the verdicts of exactly this lock.

    It may be another generation's: there is one file, of the generation reported last.
    """
    if not folder.verdict.exists():
        return False
    try:
        content = json.loads(folder.verdict.read_text(encoding="utf-8"))
        shown = (content["generation"], content["lock_hash"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder.verdict}: cannot be read ({error!r}), so that it is not known whether the "
            "verdicts of the generation were written; put the file back, or start anew (--fresh)"
        ) from None
    return shown == (held.generation, held.identity())


def check_recorded(recorder: Recorder, cells: Iterable[Cell], *, generation: int = 0) -> None:
    """Raise UserError when the ledger holds one of `cells` with another training."""
    # Given cells that it knows alone, the recorder compares and has nothing to write.
    recorder.cells(
        [
            cell
            for cell in cells
            if (cell.stage, generation, cell.scenario, cell.arm, cell.replicate)
            in recorder.ledger.cells
        ],
        generation=generation,
    )


def confirm_packs(
    study: Study,
    scenarios: Sequence[Scenario],
    cells: Sequence[Cell],
    folder: StudyFolder,
    *,
    layer_count: int,
    reuse: bool = True,
) -> tuple[Pack, ...]:
    """Return the packs of the confirmation, the untrained base first.

    With `reuse` cells that train alike share a run; without it each cell trains its own. The seeds that a
    look adds are packed by themselves: those before them keep their packs.
    """
    clean = next(cell.run for cell in cells if cell.arm == "clean")
    packs = [base_pack(clean, scenarios, layer_count=layer_count, stage="confirm", split="test")]
    confirm = study.confirm
    for number, block in enumerate(_blocks(cells, confirm.looks), start=1):
        look = f"look{number}-" if confirm.looks else ""
        packs += make_packs(
            _exporting(study, block, folder, jobs_of(block, reuse=reuse)),
            stage="confirm",
            prefix=f"g{confirm.generation}-{look}" + ("" if reuse else "own-"),
            size=pack_size(study),
            rungs=(study.training.steps,),
            split="test",
            generate=confirm.generate,
        )
    return tuple(packs)


def _blocks(cells: Sequence[Cell], looks: Sequence[int]) -> Iterator[Sequence[Cell]]:
    """Yield the cells that each look adds to those before it; all of them at once without looks."""
    if not looks:
        yield cells
        return
    for first, end in pairwise((0, *looks)):
        block = [cell for cell in cells if first <= cell.replicate < end]
        if block:
            yield block


def _exporting(
    study: Study, cells: Sequence[Cell], folder: StudyFolder, jobs: Iterable[Job]
) -> Iterator[Job]:
    """Yield `jobs` with the folders of their adapters.

    Cells that train for themselves export for themselves: whichever of a training is recorded first
    then has the adapter that its row names.
    """
    shared = export_folders(study, cells, folder)
    places = {cell.name: _adapter_folder(study, cell, folder) for cell in cells}
    for job in jobs:
        wanted = shared.get(job.training_key, "")
        yield job._replace(export=places.get(job.cell, wanted) if wanted else "")


def export_folders(study: Study, cells: Sequence[Cell], folder: StudyFolder) -> dict[str, str]:
    """Return the adapter folder of each training to export, by training key.

    Arms that share a training share the adapter, under the name of the first of them.
    """
    wanted = study.confirm.export
    folders: dict[str, str] = {}
    for cell in cells:
        finalist = bool(cell.config) and not cell.arm.endswith(("_none", "_global"))
        if wanted == "all" or (wanted == "finalists" and finalist):
            folders.setdefault(cell.training_key, _adapter_folder(study, cell, folder))
    return folders


def _adapter_folder(study: Study, cell: Cell, folder: StudyFolder) -> str:
    name = f"g{study.confirm.generation}-s{cell.replicate}"
    return str(folder.adapters / cell.scenario / cell.arm / name)
