"""The configs of a scenario and what became of them, read from the search rows of the ledger."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from aqn_tune.errors import UserError
from aqn_tune.ledger.rows import SearchRow
from aqn_tune.study.space import Params

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass
class ConfigRecord:
    """One config of a scenario, up to now."""

    config: str
    number: int
    params: Params
    values: list[float | None] = field(default_factory=list)
    """Value at each rung reached; None where it was not finite."""
    status: Status = "running"
    error: str = ""


class History:
    """The configs of every scenario, in the order in which they were asked.

    It is built by `apply` alone, row by row, whether a row has just been written or is read again
    after a restart: what is known never differs between the two.
    """

    def __init__(self, scenarios: Iterable[str]) -> None:
        self._records: dict[str, dict[str, ConfigRecord]] = {name: {} for name in scenarios}

    def records(self, scenario: str) -> tuple[ConfigRecord, ...]:
        """Return the configs of `scenario` by number."""
        return tuple(self._records[scenario].values())

    def record(self, scenario: str, config: str) -> ConfigRecord:
        """Return one config; KeyError when it was never asked."""
        return self._records[scenario][config]

    def apply(self, row: SearchRow) -> None:
        """Take one search row into account.

        Raises UserError for a row that cannot follow the earlier ones: the ledger was edited, or
        belongs to another study.
        """
        known = self._records.get(row.scenario)
        if known is None:
            raise UserError(f"ledger: search row of an unknown scenario {row.scenario!r}")
        if row.event == "asked":
            if row.config in known or row.number != len(known):
                raise _out_of_order(row)
            known[row.config] = ConfigRecord(row.config, row.number, dict(row.params))
            return
        record = known.get(row.config)
        if record is None or record.status != "running":
            raise _out_of_order(row)
        if row.event == "rung":
            if row.rung != len(record.values):
                raise _out_of_order(row)
            record.values.append(row.value)
        else:
            record.status = row.event
            record.error = row.error


def _out_of_order(row: SearchRow) -> UserError:
    return UserError(
        f"ledger: the search row {row.event!r} of config {row.config} in scenario {row.scenario!r} "
        "does not follow from the rows before it; the file was changed"
    )
