"""From the folder of a study to its results: study, lock and ledger, and what is still missing."""

from __future__ import annotations

from collections.abc import Sequence

from aqn_tune.confirm.lock import ConfirmLock, read_locks
from aqn_tune.errors import UserError
from aqn_tune.evidence.assemble import Evidence, assemble
from aqn_tune.evidence.declared import Declared, declare
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import CellRow, LedgerRow, SearchRow
from aqn_tune.report.availability import missing_by_lock, missing_by_study
from aqn_tune.report.results import Results, load_study_file
from aqn_tune.report.text import count
from aqn_tune.study.cells import NotAvailable
from aqn_tune.study.folder import StudyFolder
from aqn_tune.study.keys import content_hash
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study


def load_results(folder: StudyFolder) -> Results:
    """Read everything a report needs; works at any time, also while the study runs.

    Raises:
        UserError: no study in the folder, or files of another version.
        ValueError: a ledger whose seeds are not paired (see `aqn_tune.evidence.tables.Tables`).
    """
    from aqn_tune.study.sweep import resolve_scenarios

    study = load_study_file(folder)
    scenarios = resolve_scenarios(study)
    rows = tuple(Ledger(folder.ledger).rows())
    lock = read_locks(folder.lock).generation(study.confirm.generation)
    gaps: list[str] = []
    if lock is None:
        missing, gaps = _missing_so_far(study, scenarios)
        declared = declare(study, scenarios, missing, margin=None)
    else:
        missing = missing_by_lock(study, scenarios, lock)
        declared = _locked(study, scenarios, missing, lock)
    evidence = assemble(rows, declared)
    return Results(
        folder=folder,
        study=study,
        scenarios=scenarios,
        rows=rows,
        evidence=evidence,
        lock_hash=_lock_hash(lock),
        gaps=(*gaps, *_gaps(study, rows, evidence, locked=lock is not None)),
        not_available=missing,
    )


def _missing_so_far(
    study: Study, scenarios: Sequence[Scenario]
) -> tuple[tuple[NotAvailable, ...], list[str]]:
    try:
        return missing_by_study(study, scenarios), []
    except UserError as error:
        return (), [f"Which arms cannot exist is not known here: {error}"]


def _locked(
    study: Study,
    scenarios: Sequence[Scenario],
    missing: Sequence[NotAvailable],
    lock: ConfirmLock,
) -> Declared:
    """Return what was declared; where the lock and the study differ, the lock holds."""
    # A search whose clean arm gained nothing has no G to take a margin from.
    margin = lock.margin if lock.margin is not None and lock.margin > 0 else None
    declared = declare(study, scenarios, missing, margin=margin)
    absent = {(one.scenario, one.arm) for one in missing}
    family = tuple(
        (scenario.name, arm, reference)
        for scenario in scenarios
        for arm, reference in lock.contrasts
        if not absent & {(scenario.name, arm), (scenario.name, reference)}
    )
    return declared.model_copy(
        update={
            "family": family,
            "replicates": lock.replicates,
            "generation": lock.generation,
            "alpha": lock.alpha,
            "power": lock.power,
            "margin_share": lock.margin_fraction,
        }
    )


def _lock_hash(lock: ConfirmLock | None) -> str:
    """Return the hash of what was locked; when it was written down does not enter."""
    if lock is None:
        return ""
    return content_hash(lock.model_dump(mode="json", exclude={"created"}))


def _gaps(
    study: Study, rows: Sequence[LedgerRow], evidence: Evidence, *, locked: bool
) -> tuple[str, ...]:
    gaps = []
    if study.search is not None and not locked:
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
    if not locked:
        gaps.append("The confirmation has not begun; only it makes claims.")
        return tuple(gaps)
    generation = evidence.declared.generation
    if not any(
        isinstance(r, CellRow) and r.stage == "confirm" and r.generation == generation for r in rows
    ):
        gaps.append("The confirmation is locked and has not run yet.")
        return tuple(gaps)
    waiting = total = 0
    for scenario in evidence.scenarios:
        for arm in scenario.arms:
            total += len(arm.seeds)
            waiting += sum(cell.loss is None and not cell.failed for cell in arm.seeds)
    if waiting:
        gaps.append(
            f"The confirmation has no number yet for {waiting:,} of {count(total, 'cell')} "
            "(arm, scenario and seed)."
        )
    if evidence.base_clean_loss is None:
        gaps.append("The untrained base has not been evaluated on the test split.")
    return tuple(gaps)
