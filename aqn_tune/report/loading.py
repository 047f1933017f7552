"""From the folder of a study to its results: study, lock and ledger, and what is still missing."""

from __future__ import annotations

from collections.abc import Sequence

from aqn_tune.evidence.assemble import Evidence, assemble
from aqn_tune.evidence.declared import Declared, declare
from aqn_tune.ledger.rows import CellRow, LedgerRow, SearchRow
from aqn_tune.report.availability import not_available
from aqn_tune.report.results import Results, load_study_file, read_rows
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
    rows = tuple(read_rows(folder.ledger))
    missing = not_available(study, scenarios, rows)
    declared, lock_hash = _declared(folder, study, scenarios, missing)
    evidence = assemble(rows, declared)
    return Results(
        folder=folder,
        study=study,
        scenarios=scenarios,
        rows=rows,
        evidence=evidence,
        lock_hash=lock_hash,
        gaps=_gaps(study, rows, evidence, locked=bool(lock_hash)),
        not_available=missing,
    )


def _declared(
    folder: StudyFolder,
    study: Study,
    scenarios: Sequence[Scenario],
    missing: Sequence[NotAvailable],
) -> tuple[Declared, str]:
    if not folder.lock.is_file():
        return declare(study, scenarios, missing, margin=None), ""
    return declare(study, scenarios, missing, margin=None), content_hash(
        folder.lock.read_text(encoding="utf-8")
    )


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
