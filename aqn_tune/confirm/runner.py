"""The confirm stage: every arm of every scenario on fresh seeds, once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from aqn_tune.confirm.lock import check_code, hold_lock, make_lock
from aqn_tune.ledger import Ledger
from aqn_tune.search.execute import execute
from aqn_tune.search.progress import ProgressSink
from aqn_tune.search.record import Recorder, RowListener
from aqn_tune.search.state import drop_other_states
from aqn_tune.search.work import FixedPacks
from aqn_tune.study.cells import (
    Cell,
    Finalist,
    base_pack,
    make_packs,
    stage_cells,
    unique_runs,
)
from aqn_tune.study.code import code_hash
from aqn_tune.study.engine import Engine
from aqn_tune.study.folder import StudyFolder
from aqn_tune.study.runs import Pack, Setting
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study


def run_confirm(
    study: Study,
    setting: Setting,
    scenarios: Sequence[Scenario],
    folder: StudyFolder,
    finalists: Sequence[Finalist],
    *,
    layer_count: int,
    engine: Engine,
    listeners: Iterable[RowListener] = (),
    progress: ProgressSink | None = None,
) -> None:
    """Run the confirmation of a study, or what is left of it.

    The lock is written before the first run. A generation is run once: what is in the ledger is not
    run again, and nothing is ever added to it; raise `confirm.generation` for fresh seeds. Arms that
    come to the same training share it, and packs go through replicate after replicate, so that an
    interrupted stage is balanced.

    Raises UserError when the study, or the code that would go on, is not the one that the generation
    was locked to; Interrupted on SIGINT or SIGTERM.
    """
    ledger = Ledger(folder.ledger)
    recorder = Recorder(ledger, folder.root, listeners)
    planned = stage_cells(
        study,
        setting,
        scenarios,
        stage="confirm",
        layer_count=layer_count,
        finalists=finalists,
    )
    gain = search_gain(ledger, study)
    held = hold_lock(folder.lock, make_lock(study, finalists, planned, gain=gain))
    recorder.cells(planned.cells, generation=held.generation)
    work = FixedPacks(
        confirm_packs(study, scenarios, planned.cells, folder),
        setting=setting,
        recorder=recorder,
        state=folder.state,
    )
    drop_other_states(folder.state, "confirm", work.queued)
    if not work.queued:
        return
    if folder.verdict.exists() and held.code != code_hash():
        return  # its results have been shown: what broke off then stays as it was shown
    check_code(folder.lock, held)
    execute(
        work,
        stage="confirm",
        compute=study.compute,
        setting=setting,
        engine=engine,
        folder=folder,
        progress=progress,
    )


def confirm_packs(
    study: Study, scenarios: Sequence[Scenario], cells: Sequence[Cell], folder: StudyFolder
) -> tuple[Pack, ...]:
    """Return the packs of the confirmation, the untrained base first."""
    clean = next(cell.run for cell in cells if cell.arm == "clean")
    packs = make_packs(
        unique_runs(cells),
        stage="confirm",
        prefix=f"g{study.confirm.generation}-",
        size=study.compute.pack_replicas,
        rungs=(study.training.steps,),
        split="test",
        export=export_folders(study, cells, folder),
    )
    return (base_pack(clean, scenarios, stage="confirm", split="test"), *packs)


def export_folders(study: Study, cells: Sequence[Cell], folder: StudyFolder) -> dict[str, str]:
    """Return the adapter folder of each training to export, by training key.

    Arms that share a training share the adapter, under the name of the first of them.
    """
    wanted = study.confirm.export
    folders: dict[str, str] = {}
    for cell in cells:
        finalist = bool(cell.config) and not cell.arm.endswith(("_none", "_global"))
        if wanted == "all" or (wanted == "finalists" and finalist):
            place = folder.adapters / cell.scenario / cell.arm
            name = f"g{study.confirm.generation}-s{cell.replicate}"
            folders.setdefault(cell.training_key, str(place / name))
    return folders


def search_gain(ledger: Ledger, study: Study) -> float | None:
    """Return G as the search measured it, None when it did not.

    G is the clean validation loss of the untrained base less the mean of the clean arm's.
    """
    keys = [
        row.training_key
        for row in ledger.cells.values()
        if row.stage == "search" and row.arm == "clean"
    ]
    trained = [
        ledger.evaluation(key, study.training.steps, "clean", "", "validation") for key in keys
    ]
    base = [ledger.evaluation(key, 0, "clean", "", "validation") for key in keys]
    before = [row.loss for row in base if row is not None and row.loss is not None]
    after = [row.loss for row in trained if row is not None and row.loss is not None]
    if not before or not after:
        return None
    return before[0] - math.fsum(after) / len(after)
