"""State files: what a pack needs to go on after the last rung that it reached."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from aqn_tune.study.code import code_hash
from aqn_tune.study.engine import RungReport
from aqn_tune.study.keys import content_hash
from aqn_tune.study.runs import Pack

REPORT = TypeAdapter(RungReport)
"""Reads and writes reports as JSON."""


class SavedState(NamedTuple):
    """A pack at a rung."""

    report: RungReport
    """What it reported there, or was about to report when it was cut off."""
    state: bytes
    """See `PackTraining.state`."""


def state_path(folder: Path, pack: Pack) -> Path:
    """Return the state file of a pack."""
    return folder / f"{pack.stage}-{pack.name}.bin"


def pack_hash(pack: Pack) -> str:
    """Return the identity of what a pack trains, and with which code.

    Where it exports to, for whom it trains and how many runs share a pass do not enter: a state
    continues in any parts. The code does: half a training of another version would be continued
    without a word otherwise.
    """
    content = pack.model_dump(mode="json", exclude={"export", "own", "lockstep"})
    return content_hash([code_hash(), content])


def write_state(path: Path, pack: Pack, saved: SavedState) -> None:
    """Write a state file. It is replaced as a whole: a reader never finds half of one.

    It does not wait for the disk. What a failure of the machine takes from the file its digest shows
    (see `read_state`), and the pack is trained again.
    """
    header = {
        "pack": pack_hash(pack),
        "report": REPORT.dump_python(saved.report, mode="json"),
        "state": _digest(saved.state),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with new.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        file.write(saved.state)
    new.replace(path)


def read_state(path: Path, pack: Pack) -> SavedState | None:
    """Return the state of `pack`; None when there is none, or one of another pack, or a damaged one.

    A storage that has lost the end of a file loses the pack's training that way, and no result: the ledger
    holds what was reported, and the pack comes to the same when it is trained again.
    """
    if not path.exists():
        return None
    with path.open("rb") as file:
        try:
            header = json.loads(file.readline())
        except ValueError:
            return None
        if header.get("pack") != pack_hash(pack):
            return None
        state = file.read()
    if header.get("state") != _digest(state):
        return None
    return SavedState(REPORT.validate_python(header["report"]), state)


def _digest(state: bytes) -> str:
    return hashlib.sha256(state).hexdigest()


def drop_state(path: Path) -> None:
    """Delete a state file, if there is one."""
    path.unlink(missing_ok=True)


def drop_other_states(folder: Path, stage: str, packs: Iterable[Pack]) -> None:
    """Delete what earlier runs left of a stage and none of `packs` can use.

    That is a state whose pack has ended before its file was deleted, and half-written files.
    """
    wanted = {state_path(folder, pack) for pack in packs}
    for path in folder.glob(f"{stage}-*"):
        if path not in wanted:
            drop_state(path)
