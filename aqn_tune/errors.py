"""The errors that a user can mend, told apart from the ones that only a developer can."""

from __future__ import annotations

import difflib
import errno
import sqlite3
from collections.abc import Iterable


class UserError(Exception):
    """Input that cannot be used: what was got, where, what is allowed.

    The command line prints the message alone and exits with code 2. Raise it for anything that the
    user can put right (a file, a key, a value, a folder); let any other defect raise its own error.
    """


class TrainingFailed(Exception):
    """A training that broke off (non-finite loss, an audit that did not hold).

    The runs it belongs to are recorded as `failed` with this message; they never become a number.
    """


class Interrupted(Exception):
    """The user or the machine asked the work to end (SIGINT, SIGTERM).

    Everything reported by then is in the ledger; running the same study again continues from there.
    The command line exits with code 130.
    """


_STORAGE = {
    errno.ENOSPC: "no space is left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than is allowed",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted",
    errno.EIO: "the device does not answer",
    errno.ESTALE: "the network file system has gone",
}


_SQLITE = {
    "disk is full": errno.ENOSPC,
    "disk I/O error": errno.EIO,
    "readonly database": errno.EROFS,
    "unable to open database file": errno.EACCES,
}
"""What SQLite says of its own, without a number of the system."""


def storage_error(error: BaseException | None, where: object = "") -> UserError | None:
    """Return what a failed write means to the user; None for an error that has nothing to do with storage.

    What `error` passes on is looked through as well, see `_passed_on`. What was recorded before is on disk,
    so that the study continues where it was once the storage is mended.

    Args:
        error: What was raised.
        where: The file or folder, where the error does not name one.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        said = _STORAGE.get(error.errno or 0) if isinstance(error, OSError) else None
        if isinstance(error, sqlite3.OperationalError):
            said = next((_STORAGE[n] for text, n in _SQLITE.items() if text in str(error)), None)
        if said is not None:
            place = getattr(error, "filename", None) or where or "the study's folder"
            return UserError(
                f"{place}: {said}. What was reported before is in the ledger: mend the "
                "storage and run the study again to continue it"
            )
        error = _passed_on(error)
    return None


def _passed_on(error: BaseException) -> BaseException | None:
    """Return the error that `error` tells of; None where it only happened after one.

    That is its cause. Without one it is what was being handled: for an OSError, which may come of
    clearing up, and for an error that quotes it, as those of Ray do. Any other is a defect of the handler.
    """
    before = error.__context__
    if error.__cause__ is not None or before is None or error.__suppress_context__:
        return error.__cause__
    quoted = bool(str(before)) and str(before) in str(error)
    return before if quoted or isinstance(error, OSError) else None


def nearest(got: str, allowed: Iterable[str]) -> str:
    """Return `", did you mean 'x'?"` for the closest allowed name, or `""` when none is close."""
    matches = difflib.get_close_matches(str(got), [str(name) for name in allowed], n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""
