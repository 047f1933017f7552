"""`aqn-tune status`: how far a study has come."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aqn_tune.cli.options import Json, Overrides, Target
from aqn_tune.cli.output import console, duration, print_json, table
from aqn_tune.cli.targets import find_target
from aqn_tune.confirm.lock import LockFile, read_locks
from aqn_tune.errors import UserError
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import lockstep_limits, reused_from
from aqn_tune.study.folder import StudyFolder, study_hash
from aqn_tune.study.schema import Study
from aqn_tune.study.sweep import resolve_scenarios

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_FAILURES = 10


def command(target: Target, overrides: Overrides = None, json: Json = False) -> None:
    """Say how far a study has come: trainings, configs, failures, and what is written."""
    study, folder = find_target(target, overrides or ())
    state = study_status(study, folder)
    if json:
        print_json(state)
        return
    out = console()
    out.print(f"[bold]{study.study}[/bold]  {state['hash']}")
    out.print(f"folder  {folder.root}", soft_wrap=True)
    if state["seconds_since_last_row"] is not None:
        out.print(f"ledger  last row {duration(state['seconds_since_last_row'])} ago")
    out.print(
        _counts(
            "Trainings",
            "stage",
            ("finished", "unfinished", "stopped", "failed"),
            state["trainings"],
        )
    )
    if state["configs"]:
        events = ("asked", "finished", "stopped", "failed")
        out.print(_counts("Search", "scenario", events, state["configs"]))
    for failure in state["failures"][:SHOWN_FAILURES]:
        out.print(f"failed  {failure['cell']}: {failure['error']}", markup=False, soft_wrap=True)
    for source, number in state["reused"].items():
        trainings = "training" if number == 1 else "trainings"
        out.print(f"reused  {number} {trainings} from {source}", markup=False, soft_wrap=True)
    again = state["repeated"]
    if again["trainings"]:
        out.print(
            f"repeat  {again['trainings']} trainings that were there already (--no-reuse): "
            f"{again['steps']:,} steps, {duration(again['seconds'])}",
            soft_wrap=True,
        )
    for reason, number in state["apart"].items():
        out.print(
            f"apart   {number} trainings not in lockstep with their whole pack: {reason}",
            markup=False,
            soft_wrap=True,
        )
    if state["lock_error"]:
        out.print(f"lock    {state['lock_error']}", markup=False, soft_wrap=True)
    elif state["look"]:
        out.print(f"looks   {state['look']['words']}", markup=False, soft_wrap=True)
    done = [name for name, there in state["written"].items() if there]
    out.print(f"written {', '.join(done) or 'nothing yet'}")


def _counts(title: str, what: str, names: Sequence[str], counts: Mapping[str, Any]) -> Table:
    rows = [(name, *(row[column] for column in names)) for name, row in counts.items()]
    return table(title, (what, *(f"#{name}" for name in names)), rows)


def study_status(study: Study, folder: StudyFolder) -> dict[str, Any]:
    """Return the state of a study as plain data, from its ledger alone.

    A training is `unfinished` while it waits for its next rung; one whose config has ended, stopped
    or with another seed failed, takes no further step and counts as `stopped`. `reused` counts those
    that came from other studies, by their folder, `repeated` those that were trained again although
    they were recorded; the former are among the trainings, the latter are not. `apart` counts those
    that did not share every forward pass of their pack, by what kept them apart. `look` is where a locked
    confirmation with declared looks stands, None for any other. `lock_error` is why the lock cannot be read,
    None where it can or where there is none: whoever asks how a study stands is told so, not refused.
    """
    ledger = Ledger(folder.ledger)
    locks, lock_error = None, None
    try:
        locks = read_locks(folder.lock)
    except UserError as error:
        lock_error = str(error)
    stopped = _stopped_trainings(ledger)
    trainings = {
        stage: Counter(
            "stopped" if row.status == "unfinished" and key in stopped else row.status
            for key, row in ledger.trainings.items()
            if row.stage == stage
        )
        for stage in ("search", "confirm")
    }
    configs: dict[str, Counter[str]] = {}
    if study.search is not None:
        configs = {scenario.name: Counter() for scenario in resolve_scenarios(study)}
    for row in ledger.search:
        if row.event != "rung":
            configs.setdefault(row.scenario, Counter())[row.event] += 1
    cell_of = {
        row.training_key: f"{row.stage}/{row.scenario}/{row.arm}/{row.replicate}"
        for row in ledger.cells.values()
    }
    failures = [
        {"cell": cell_of.get(key, key), "training_key": key, "error": row.error}
        for key, row in ledger.trainings.items()
        if row.status == "failed"
    ]
    since = time.time() - folder.ledger.stat().st_mtime if folder.ledger.exists() else None
    return {
        "study": study.study,
        "hash": study_hash(study),
        "folder": str(folder.root),
        "seconds_since_last_row": since,
        "trainings": trainings,
        "configs": configs,
        "reused": reused_from(ledger.trainings.values()),
        "repeated": ledger.repeated()._asdict(),
        "apart": lockstep_limits(ledger.trainings.values()),
        "failures": failures,
        "look": None if locks is None else _look(study, ledger, locks),
        "lock_error": lock_error,
        "written": {
            "confirm.lock": folder.lock.exists(),
            "report.html": folder.report.exists(),
            "verdict.json": folder.verdict.exists(),
        },
    }


def _look(study: Study, ledger: Ledger, locks: LockFile) -> dict[str, Any] | None:
    lock = locks.generation(study.confirm.generation)
    if lock is None or not lock.looks:
        return None
    from aqn_tune.confirm.standing import look_of

    look = look_of(study, resolve_scenarios(study), ledger, lock)
    if look is None:
        return None
    return {"number": look.number, "of": look.of, "seeds": look.seeds, "words": look.words}


def _stopped_trainings(ledger: Ledger) -> set[str]:
    """Return the trainings that only configs use which have been stopped or have failed."""
    ended = {
        (row.scenario, row.config) for row in ledger.search if row.event in ("stopped", "failed")
    }
    users: dict[str, list[bool]] = {}
    for cell in ledger.cells.values():
        over = cell.stage == "search" and (cell.scenario, cell.config) in ended
        users.setdefault(cell.training_key, []).append(over)
    return {key for key, over in users.items() if all(over)}
