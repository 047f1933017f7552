"""From the folder of a study to its results: study, lock and ledger, and what is still missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aqn_tune.confirm.declared import locked_declaration, missing_by_lock
from aqn_tune.confirm.lock import ConfirmLock, LockFile, read_locks
from aqn_tune.confirm.margins import coming_margins
from aqn_tune.errors import UserError
from aqn_tune.evidence.assemble import Evidence, assemble
from aqn_tune.evidence.declared import declare
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.broken import broke_off
from aqn_tune.ledger.rows import (
    CellRow,
    EvaluationRow,
    LedgerRow,
    OwnTrainingRow,
    SearchRow,
    TrainingRow,
)
from aqn_tune.report.availability import missing_by_study
from aqn_tune.report.results import Results, load_study_file
from aqn_tune.report.text import count
from aqn_tune.study.cells import NotAvailable
from aqn_tune.study.folder import StudyFolder, study_hash
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study


def load_results(folder: StudyFolder) -> Results:
    """Read everything a report needs; works at any time, also while the study runs.

    Raises:
        UserError: no study in the folder, or files of another version; a lock that was written for
            another study than study.yaml, or that was edited; confirmed cells that train something
            else than was locked.
        ValueError: a ledger whose seeds are not paired (see `aqn_tune.evidence.tables.Tables`).
    """
    from aqn_tune.study.sweep import resolve_scenarios

    study = load_study_file(folder)
    scenarios = resolve_scenarios(study)
    ledger = Ledger(folder.ledger)
    rows = tuple(ledger.rows())
    locks = read_locks(folder.lock)
    _check_study(folder, study, locks)
    lock = locks.generation(study.confirm.generation)
    if lock is not None:
        _check_cells(folder, rows, lock)
    gaps: list[str] = []
    if lock is None:
        missing, gaps = _missing_so_far(study, scenarios)
        declared = declare(study, scenarios, missing, margin=None).model_copy(
            update={"margins": coming_margins(study, scenarios)}
        )
    else:
        missing = missing_by_lock(study, scenarios, lock)
        declared = locked_declaration(study, scenarios, lock, missing)
    evidence = assemble(rows, declared)
    return Results(
        folder=folder,
        study=study,
        scenarios=scenarios,
        rows=rows,
        evidence=evidence,
        lock_hash="" if lock is None else lock.identity(),
        gaps=(*gaps, *_gaps(study, rows, ledger.own_trainings.values(), evidence, lock)),
        not_available=missing,
        mechanism=ledger.mechanism,
        repeated=ledger.repeated(),
    )


def _missing_so_far(
    study: Study, scenarios: Sequence[Scenario]
) -> tuple[tuple[NotAvailable, ...], list[str]]:
    try:
        return missing_by_study(study, scenarios), []
    except UserError as error:
        return (), [f"Which arms cannot exist is not known here: {error}"]


def _check_study(folder: StudyFolder, study: Study, locks: LockFile) -> None:
    for lock in locks.generations:
        if lock.study == study_hash(study):
            continue
        confirm = study.confirm
        pairs = {
            "study hash": (lock.study, study_hash(study)),
            "alpha": (lock.alpha, confirm.alpha),
            "power": (lock.power, confirm.power),
            "margin": (lock.rule().words(), confirm.margin.words()),
            "contrasts": (lock.contrasts, study.primary_contrasts()),
        }
        differ = (f"{k}: locked {old}, now {new}" for k, (old, new) in pairs.items() if old != new)
        raise UserError(
            f"{folder.lock}: generation {lock.generation} was locked for another study than "
            f"{folder.study.name} beside it ({'; '.join(differ)}); one of the two was changed or "
            "copied here: put it back"
        )


def _check_cells(folder: StudyFolder, rows: Sequence[LedgerRow], lock: ConfirmLock) -> None:
    locked = {
        (arm.scenario, arm.arm, replicate): key
        for arm in lock.arms
        for replicate, key in enumerate(arm.training_keys)
    }
    for row in rows:
        if not isinstance(row, CellRow) or row.stage != "confirm":
            continue
        if row.generation != lock.generation:
            continue
        expected = locked.get((row.scenario, row.arm, row.replicate))
        if expected != row.training_key:
            raise UserError(
                f"{folder.ledger}: confirm/{row.scenario}/{row.arm}/{row.replicate} of generation "
                f"{lock.generation} is training {row.training_key}, and {folder.lock.name} has "
                f"{expected or 'no such cell'}: the ledger and the lock do not belong together"
            )


def _gaps(
    study: Study,
    rows: Sequence[LedgerRow],
    own_trainings: Iterable[OwnTrainingRow],
    evidence: Evidence,
    lock: ConfirmLock | None,
) -> tuple[str, ...]:
    gaps = []
    if study.search is not None and lock is None:
        asked = {(r.scenario, r.config) for r in rows if isinstance(r, SearchRow)}
        ended = {
            (r.scenario, r.config)
            for r in rows
            if isinstance(r, SearchRow) and r.event in ("finished", "stopped", "failed")
        }
        total = study.search.configs * len(evidence.scenarios)
        if len(ended) < total:
            gaps.append(
                f"The search has ended {len(ended)} of {count(total, 'config')} "
                f"({len(asked - ended)} under way)."
            )
    if lock is None:
        gaps.append("The confirmation has not begun; only it makes claims.")
        return tuple(gaps)
    if not any(
        isinstance(r, CellRow) and r.stage == "confirm" and r.generation == lock.generation
        for r in rows
    ):
        gaps.append("The confirmation is locked and has not run yet.")
        return tuple(gaps)
    waiting = total = 0
    for scenario in evidence.scenarios:
        for arm in scenario.arms:
            total += len(arm.seeds)
            waiting += sum(cell.loss is None and not cell.failed for cell in arm.seeds)
    look = evidence.look
    if waiting:
        where = f" of look {look.number} of {look.of}" if look else ""
        gaps.append(
            f"The confirmation has no number yet for {waiting:,} of {count(total, 'cell')}{where} "
            "(arm, scenario and seed)."
        )
    if look is not None and look.goes_on:
        gaps.append(f"The confirmation goes on: {look.words}.")
    keys = {key for arm in lock.arms for key in arm.training_keys}
    own = [row for row in own_trainings if row.error and row.training_key in keys]
    if own and not study.compute.reuse:
        gaps.append(
            f"{count(len(own), 'run')} of cells that train for themselves (--no-reuse) broke off and will "
            f"be tried again when the study is run the next time (the first: {own[0].error})."
        )
    broken = _broken(rows, lock)
    if broken:
        gaps.append(
            f"{count(len(broken), 'confirmed training')} broke off and will be tried again when the "
            f"study is run the next time (the first: {broken[0].error})."
        )
    if evidence.base_clean_loss is None or not _base_evaluated(rows, evidence, lock):
        gaps.append("The untrained base has not been evaluated on the test split.")
    return tuple(gaps)


def _broken(rows: Sequence[LedgerRow], lock: ConfirmLock) -> tuple[TrainingRow, ...]:
    """Return what broke off of a generation: runs that have not ended, whatever their status says."""
    keys = {key for arm in lock.arms for key in arm.training_keys}
    last = {r.training_key: r for r in rows if isinstance(r, TrainingRow)}
    return tuple(row for key, row in last.items() if key in keys and broke_off(row))


def _base_evaluated(rows: Sequence[LedgerRow], evidence: Evidence, lock: ConfirmLock) -> bool:
    """Return whether this generation has evaluated the base under every condition of the study."""
    keys = {arm.training_keys[0] for arm in lock.arms if arm.arm == "clean"}
    found = {
        (row.condition, row.scenario)
        for row in rows
        if isinstance(row, EvaluationRow)
        and (row.step, row.split) == (0, "test")
        and row.training_key in keys
    }
    return found >= {("clean", ""), *(("faulty", one.scenario) for one in evidence.scenarios)}
