"""The search stage, from a study and its ledger to a longer ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from aqn_tune.ledger import Ledger
from aqn_tune.ledger.broken import broke_off
from aqn_tune.ledger.rows import RecordedRow
from aqn_tune.search.execute import execute
from aqn_tune.search.export import export_optuna
from aqn_tune.search.history import History
from aqn_tune.search.progress import ProgressSink
from aqn_tune.search.record import Recorder, RowListener
from aqn_tune.search.rungs import rung_steps
from aqn_tune.search.search_work import SearchWork
from aqn_tune.search.shelf import Shelf, announce_taken, open_shelf
from aqn_tune.search.state import drop_other_states
from aqn_tune.search.work import FixedPacks
from aqn_tune.study.cells import Cell, stage_cells
from aqn_tune.study.engine import Engine
from aqn_tune.study.folder import StudyFolder
from aqn_tune.study.packing import base_pack, jobs_of, make_packs, pack_size
from aqn_tune.study.runs import Pack, Setting
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import SearchSpec, Study

ANY_PACK = 8
"""Runs of the largest pack that rows are taken from; what rounds alike in it does so in larger ones."""

Announce = Callable[[str], None]
"""Shows a line that stays, for what a stage has to say once."""


def run_search(
    study: Study,
    setting: Setting,
    scenarios: Sequence[Scenario],
    folder: StudyFolder,
    *,
    layer_count: int,
    engine: Engine,
    listeners: Iterable[RowListener] = (),
    progress: ProgressSink | None = None,
    announce: Announce | None = None,
) -> None:
    """Run the search of a study, or what is left of it; a study without one does nothing.

    Controls come first and are never stopped; then configs, one Optuna study and one ASHA rung table
    per scenario. Everything that happens is in the ledger of `folder`, nothing else is needed to
    continue. At the end the Optuna studies are exported to `folder.optuna`. Controls that broke off
    are announced and tried again by the next call; `search_left` says whether there are any.

    With `compute.reuse` nothing is trained that the ledger holds, or that a study beside this one
    has trained with the same code: those rows are copied and name their source. Without it every
    cell trains a run of its own, also where the ledger holds its training from elsewhere, and the
    numbers have to be the recorded ones; a cell that has done so before is left alone.

    `listeners` are given rows as they are written. Call it inside `ray_session` to share Ray with the
    confirmation; by itself it starts and ends Ray, and only when there is something to run. Raises
    Interrupted on SIGINT or SIGTERM, UserError for what the user can mend.
    """
    if study.search is None or study.search.configs == 0:
        return
    recorder = Recorder(Ledger(folder.ledger), folder.root, listeners)
    packs = control_packs(study, setting, scenarios, recorder, layer_count=layer_count)
    shelf = open_shelf(
        study,
        folder,
        layer_count=layer_count,
        rounds_alike=lambda: engine.rounds_alike(setting, study.training, ANY_PACK),
        announce=announce,
    )
    taken = announce_taken(recorder.ledger, {}, None)
    take_over(packs, shelf, setting, recorder)
    taken = announce_taken(recorder.ledger, taken, announce)
    controls = FixedPacks(packs, setting=setting, recorder=recorder, state=folder.state)
    work = SearchWork(
        study,
        setting,
        scenarios,
        layer_count=layer_count,
        controls=controls,
        recorder=recorder,
        state=folder.state,
        shelf=shelf,
    )
    drop_other_states(folder.state, "search", work.waiting)
    left = work.tally().left
    if left:
        execute(
            work,
            stage="search",
            compute=study.compute,
            setting=setting,
            engine=engine,
            split="validation",
            max_length=study.training.max_length,
            folder=folder,
            progress=progress,
        )
    announce_taken(recorder.ledger, taken, announce)
    announce_broken(controls, "search", announce)
    if left or not folder.optuna.exists():
        export_optuna(folder.optuna, study, scenarios, recorder.ledger)


def take_over(packs: Iterable[Pack], shelf: Shelf, setting: Setting, recorder: Recorder) -> None:
    """Record the runs of `packs` that the shelf has and the ledger has never begun.

    What is to be exported is trained: a recorded training has no weights.
    """
    taken: list[RecordedRow] = []
    for pack in packs:
        if pack.rungs == (0,):
            continue
        for run in pack.runs:
            key = run.training_key(setting)
            if key not in recorder.ledger.trainings and key not in pack.export:
                taken += shelf.find(key, run, pack.rungs) or ()
    recorder.write(taken)


def announce_broken(work: FixedPacks, stage: str, announce: Announce | None) -> None:
    """Announce every pack that broke off, with its reason."""
    for name, error in work.broken.items():
        if announce is not None:
            announce(f"{stage} pack {name} broke off: {error}")


def search_left(
    study: Study,
    setting: Setting,
    scenarios: Sequence[Scenario],
    folder: StudyFolder,
    *,
    layer_count: int,
) -> tuple[str, ...]:
    """Return what the search of a study still has to do, in phrases; empty when it is complete.

    A control that broke off is left to do, a config that did has failed. Reads the folder and
    changes nothing.
    """
    if study.search is None or study.search.configs == 0:
        return ()
    recorder = Recorder(Ledger(folder.ledger), folder.root)
    cells = stage_cells(study, setting, scenarios, stage="search", layer_count=layer_count).cells
    controls = FixedPacks(
        _packs(study, study.search, scenarios, cells, layer_count),
        setting=setting,
        recorder=recorder,
        state=folder.state,
    )
    return (
        *_controls_left(controls, setting, recorder.ledger),
        *_configs_left(study.search, scenarios, recorder.ledger),
    )


def _controls_left(controls: FixedPacks, setting: Setting, ledger: Ledger) -> Iterator[str]:
    for pack in controls.queued:
        if pack.rungs == (0,):
            yield "the untrained base has not been evaluated"
            continue
        known = [ledger.trainings.get(run.training_key(setting)) for run in pack.runs]
        errors = [row.error for row in known if row is not None and broke_off(row)]
        yield f"control pack {pack.name} " + (errors[0] if errors else "is not finished")


def _configs_left(spec: SearchSpec, scenarios: Sequence[Scenario], ledger: Ledger) -> Iterator[str]:
    history = History(scenario.name for scenario in scenarios)
    for row in ledger.search:
        history.apply(row)
    for scenario in scenarios:
        ended = sum(record.status != "running" for record in history.records(scenario.name))
        if ended < spec.configs:
            yield f"{spec.configs - ended} of {spec.configs} configs of {scenario.name}"


def control_packs(
    study: Study,
    setting: Setting,
    scenarios: Sequence[Scenario],
    recorder: Recorder,
    *,
    layer_count: int,
) -> tuple[Pack, ...]:
    """Record the cells of the controls and return their packs, after the untrained base."""
    if study.search is None:
        raise ValueError("the study has no search")
    cells = stage_cells(study, setting, scenarios, stage="search", layer_count=layer_count).cells
    recorder.cells(cells)
    return _packs(study, study.search, scenarios, cells, layer_count)


def _packs(
    study: Study,
    spec: SearchSpec,
    scenarios: Sequence[Scenario],
    cells: Sequence[Cell],
    layer_count: int,
) -> tuple[Pack, ...]:
    clean = next(cell.run for cell in cells if cell.arm == "clean")
    reuse = study.compute.reuse
    packs = make_packs(
        jobs_of(cells, reuse=reuse),
        stage="search",
        prefix="control" if reuse else "own-control",
        size=pack_size(study),
        rungs=rung_steps(spec, study.training.steps),
        split="validation",
    )
    base = base_pack(clean, scenarios, layer_count=layer_count, stage="search", split="validation")
    return (base, *packs)
