"""The sigma of every step, for looking at a schedule before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from aqn_tune.errors import UserError, nearest
from aqn_tune.noise.schedules import SCHEDULES, ScheduleSpec
from aqn_tune.study.messages import as_user_error
from aqn_tune.study.source import Place, Source


def sigma_schedule(
    schedule: ScheduleSpec | Mapping[str, Any] | str, total_steps: int
) -> tuple[float, ...]:
    """Return sigma at steps 0 to `total_steps`: one value more than the training has steps.

    The last value is what the schedule ends on; training uses the others. Every value is finite and
    not negative.

    Args:
        schedule: A schedule, the mapping that a study file would hold
            (`{"kind": "geometric", "stages": 9}`), or the name of a kind with its defaults.
        total_steps: Number of training steps, at least 1.

    Raises:
        UserError: An unknown kind, key or value, or a number of steps below 1; the message names
            the nearest valid name.
    """
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise UserError(f"total_steps: got {total_steps!r}; allowed are whole numbers from 1")
    spec = _schedule(schedule)
    return tuple(spec.sigma_at(step, total_steps) for step in range(total_steps + 1))


def _schedule(schedule: object) -> ScheduleSpec:
    if isinstance(schedule, ScheduleSpec):
        return schedule
    allowed = ", ".join(SCHEDULES)
    if isinstance(schedule, str):
        schedule = {"kind": schedule}
    if not isinstance(schedule, Mapping):
        raise UserError(
            f"schedule: got {schedule!r}; allowed are a schedule, a mapping with `kind`, or one of "
            f"{allowed}"
        )
    data = dict(schedule)
    if "kind" not in data:
        raise UserError(f"schedule: the key `kind` is missing; allowed kinds are {allowed}")
    kind = data["kind"]
    if not isinstance(kind, str) or kind not in SCHEDULES:
        raise UserError(
            f"schedule: unknown kind {kind!r}; allowed are {allowed}{nearest(str(kind), SCHEDULES)}"
        )
    try:
        return SCHEDULES[kind].model_validate(data)
    except ValidationError as error:
        source = Source(data, {(): Place("schedule", None)})
        raise as_user_error(error, SCHEDULES[kind], source) from None
