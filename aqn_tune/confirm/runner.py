"""The confirm stage: every arm of every scenario on fresh seeds, once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aqn_tune.confirm.lock import ConfirmLock, hold_lock, make_lock, read_locks
from aqn_tune.confirm.margins import fixed_margins, margin_lines
from aqn_tune.confirm.measured import detectable_effects, detectable_lines, search_gain
from aqn_tune.confirm.standing import locked_work, look_of
from aqn_tune.errors import UserError
from aqn_tune.ledger import Ledger
from aqn_tune.search.execute import execute
from aqn_tune.search.progress import ProgressSink
from aqn_tune.search.ranking import finalists as best_configs
from aqn_tune.search.record import Recorder, RowListener
from aqn_tune.search.runner import Announce, announce_broken, search_left
from aqn_tune.search.state import drop_other_states
from aqn_tune.study.cells import Finalist, stage_cells
from aqn_tune.study.engine import Engine
from aqn_tune.study.folder import StudyFolder
from aqn_tune.study.runs import Setting
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study


def run_confirm(
    study: Study,
    setting: Setting,
    scenarios: Sequence[Scenario],
    folder: StudyFolder,
    finalists: Sequence[Finalist] | None = None,
    *,
    layer_count: int,
    engine: Engine,
    listeners: Iterable[RowListener] = (),
    progress: ProgressSink | None = None,
    announce: Announce | None = None,
) -> None:
    """Run the confirmation of a study, or what is left of it.

    The lock is written before the first run, once the search is complete; from then on finalists,
    gain and margin are those of the lock. Arms that come to the same training share it, and packs
    go through replicate after replicate, so that an interrupted stage is balanced.

    The rule of a generation: each run is run until it has ended, in a number or in a failure of its
    own. A run that broke off (its worker died) has not ended: it is a gap in the report, and the next
    call tries it again. Verdicts are written only when every run has ended, and after that nothing
    of the generation is run or changed; raise `confirm.generation` for fresh seeds. Where looks are
    declared it is run look by look, up to the first that leaves nothing to decide
    (`aqn_tune.evidence.looks`); seeds beyond that are never run.

    Args:
        study: the resolved study.
        setting: what its runs share.
        scenarios: its scenarios.
        folder: its folder.
        finalists: configs to confirm; None takes the lock's, or before it the best of the search.
        layer_count: layers of the model.
        engine: trains.
        listeners: are given rows as they are written.
        progress: shows how the stage goes on.
        announce: shows what the stage can detect before its first run, and what broke off.

    Raises UserError when the search is not complete, or when the study, or the code that would go
    on, is not the one that the generation was locked to; Interrupted on SIGINT or SIGTERM.
    """
    held = read_locks(folder.lock).generation(study.confirm.generation)
    if held is None:
        held = _lock(study, setting, scenarios, folder, finalists, layer_count=layer_count)
    recorder = Recorder(Ledger(folder.ledger), folder.root, listeners)
    say = announce or (lambda line: None)
    for attempt, _ in enumerate(held.looks or (held.replicates,)):
        work, cells = locked_work(
            study,
            setting,
            scenarios,
            folder,
            held,
            layer_count=layer_count,
            finalists=finalists,
            recorder=recorder,
        )
        recorder.cells(cells, generation=held.generation)
        drop_other_states(folder.state, "confirm", work.queued)
        if not work.queued:
            return
        if not attempt:
            for line in (*detectable_lines(held), *margin_lines(held)):
                say(line)
        execute(
            work,
            stage="confirm",
            compute=study.compute,
            setting=setting,
            engine=engine,
            split="test",
            max_length=study.training.max_length,
            folder=folder,
            progress=progress,
        )
        announce_broken(work, "confirm", announce)
        look = look_of(study, scenarios, recorder.ledger, held)
        if look is not None:
            say(f"confirmation: {look.words}")
        if work.broken:
            return


def _lock(
    study: Study,
    setting: Setting,
    scenarios: Sequence[Scenario],
    folder: StudyFolder,
    finalists: Sequence[Finalist] | None,
    *,
    layer_count: int,
) -> ConfirmLock:
    """Lock a generation to what the search has found, once it is complete."""
    left = search_left(study, setting, scenarios, folder, layer_count=layer_count)
    if left:
        raise UserError(
            "the search is not complete, and nothing is confirmed before it is; run the study again "
            "to continue it. Left to do:\n" + "\n".join(f"  {one}" for one in left)
        )
    ledger = Ledger(folder.ledger)
    if finalists is None:
        finalists = [each for one in scenarios for each in best_configs(ledger, one, study)]
    cells = stage_cells(
        study, setting, scenarios, stage="confirm", layer_count=layer_count, finalists=finalists
    )
    gain = search_gain(ledger, study, scenarios)
    detectable = detectable_effects(ledger, study, scenarios, finalists, cells)
    margins = fixed_margins(ledger, study, scenarios, detectable)
    return hold_lock(
        folder.lock,
        make_lock(study, finalists, cells, gain=gain, detectable=detectable, margins=margins),
    )
