"""The errors that a user can mend, told apart from the ones that only a developer can."""

from __future__ import annotations

import difflib
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


def nearest(got: str, allowed: Iterable[str]) -> str:
    """Return `", did you mean 'x'?"` for the closest allowed name, or `""` when none is close."""
    matches = difflib.get_close_matches(str(got), [str(name) for name in allowed], n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""
