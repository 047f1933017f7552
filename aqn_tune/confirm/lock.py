"""The lock: what a confirmation was fixed to before its first run."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from aqn_tune.errors import UserError
from aqn_tune.evidence.margins import ScenarioMargin
from aqn_tune.study.base import Spec
from aqn_tune.study.cells import ArmCells, Finalist
from aqn_tune.study.code import code_hash
from aqn_tune.study.folder import study_hash
from aqn_tune.study.keys import content_hash
from aqn_tune.study.margin import GainMargin, Margin
from aqn_tune.study.schema import Study
from aqn_tune.study.space import Value

LOCK_FORMAT: Final = 2
"""Raised when a key of the lock file changes its meaning or goes away, or one comes that every lock holds.

A key that is left out at its default raises nothing: locks without it are the same locks, of the same hash.
"""


class LockedFinalist(Spec):
    """A config that was chosen by the search."""

    scenario: str = Field(description="Scenario whose search chose it.")
    rank: int = Field(ge=1, description="1 for the best.")
    config: str = Field(description="Config id in the search.")
    params: dict[str, Value] = Field(description="Its parameters.")


class LockedArm(Spec):
    """An arm of one scenario."""

    scenario: str = Field(description="The scenario.")
    arm: str = Field(description="Name of the arm.")
    training_keys: tuple[str, ...] = Field(
        description="Its trainings, one per seed, in their order."
    )


class MissingArm(Spec):
    """An arm that cannot exist in a scenario."""

    scenario: str = Field(description="The scenario.")
    arm: str = Field(description="Name of the arm.")
    reason: str = Field(description="Why it cannot exist.")


class DetectableEffect(Spec):
    """What the confirmation can see in one scenario."""

    scenario: str = Field(description="The scenario.")
    contrasts: int = Field(
        ge=0,
        description="Primary contrasts whose arms both ran in the search: the sd is pooled over them.",
    )
    sd: float | None = Field(
        description="Standard deviation of the paired difference in the search, in nats per token; "
        "null when no contrast could be measured there."
    )
    effect: float | None = Field(
        description="Minimum detectable effect at alpha over the size of the family, in nats per "
        "token; null without an sd."
    )


class ConfirmLock(Spec):
    """Everything a confirmation could be tempted to choose after seeing results."""

    generation: int = Field(ge=0, description="Generation of confirm seeds.")
    study: str = Field(description="Hash of the study.")
    metric: Literal["faulty test loss"] = Field(
        "faulty test loss",
        description="What is compared: mean answer cross-entropy under the scenario's faults.",
    )
    replicates: int = Field(description="Seeds per arm.")
    # Left out at its default, so that a lock written before it existed keeps its hash.
    looks: tuple[int, ...] = Field(
        (),
        exclude_if=lambda looks: not looks,
        description="Numbers of seeds at which the results are judged, each at an equal share of alpha; "
        "empty: once, at the end.",
    )
    seeds: tuple[int, ...] = Field(description="The seeds, the same in every arm.")
    finalists: tuple[LockedFinalist, ...] = Field(description="Configs taken from the search.")
    arms: tuple[LockedArm, ...] = Field(description="Every arm of every scenario.")
    missing: tuple[MissingArm, ...] = Field(description="Arms that cannot exist, with the reason.")
    contrasts: tuple[tuple[str, str], ...] = Field(
        description="Primary contrasts (arm, reference) of every scenario: the family."
    )
    alpha: float = Field(description="Familywise error rate.")
    power: float = Field(description="Power at which detectable effects are stated.")
    margin_fraction: float | None = Field(
        description="Smallest difference worth acting on, as a share of G; null: see margin_rule."
    )
    gain: float | None = Field(
        description="G in the search (validation): clean loss of the untrained base less that of the "
        "clean arm; null without a search, and where the margin is no share of it."
    )
    margin: float | None = Field(
        description="margin_fraction * gain, in units of loss; null: taken from the confirmation's G, or "
        "see margin_rule."
    )
    # Both are left out of dumps where the margin is a share of G, so that locks from before they existed
    # keep their identity.
    margin_rule: Margin | None = Field(
        None,
        exclude_if=lambda rule: rule is None,
        description="Smallest difference worth acting on where it is no share of G.",
    )
    margins: tuple[ScenarioMargin, ...] = Field(
        (),
        exclude_if=lambda margins: not margins,
        description="What margin_rule comes to in each scenario; empty: taken from the gap of the "
        "confirmation.",
    )
    detectable: tuple[DetectableEffect, ...] = Field(
        (), description="Minimum detectable effect of every scenario, known before the first run."
    )
    version: str = Field(description="Version of aqn_tune.")
    code: str = Field(description="Hash of the code of aqn_tune.")
    created: str = Field(description="When it was written (UTC, ISO 8601).")

    def rule(self) -> Margin:
        """Return what the margin is."""
        if self.margin_rule is not None:
            return self.margin_rule
        return GainMargin.model_validate({"share": self.margin_fraction})

    def identity(self) -> str:
        """Return the hash of what is locked; equal for two locks that differ in their time only."""
        return content_hash(self.model_dump(mode="json", exclude={"created"}))

    def chosen(self) -> tuple[Finalist, ...]:
        """Return the finalists that were locked."""
        return tuple(Finalist(f.scenario, f.rank, f.config, f.params) for f in self.finalists)


def _identities(data: dict[str, Any]) -> tuple[str, ...]:
    return tuple(lock.identity() for lock in data["generations"])


_ABOUT_THE_WRITING = {"version", "code", "created"}


class LockFile(Spec):
    """The locks of a study, one per generation; an earlier one is never changed."""

    format: Literal[2] = Field(LOCK_FORMAT, description="Format of the file.")
    generations: tuple[ConfirmLock, ...] = Field((), description="The locks, in the order written.")
    identities: tuple[str, ...] = Field(
        default_factory=_identities,
        description="`ConfirmLock.identity` of each: a lock whose values were edited does not fit it.",
    )

    @model_validator(mode="after")
    def _unchanged(self) -> LockFile:
        now = _identities({"generations": self.generations})
        if self.identities != now:
            raise ValueError(
                f"the locks have the hashes {', '.join(now) or 'none'}, and "
                f"{', '.join(self.identities) or 'none'} were written: a locked value was edited"
            )
        return self

    def generation(self, number: int) -> ConfirmLock | None:
        """Return the lock of one generation, None when it was not locked."""
        return next((lock for lock in self.generations if lock.generation == number), None)


def make_lock(
    study: Study,
    finalists: Sequence[Finalist],
    cells: ArmCells,
    *,
    gain: float | None,
    detectable: Sequence[DetectableEffect] = (),
    margins: Sequence[ScenarioMargin] = (),
) -> ConfirmLock:
    """Return the lock that a study comes to, given what its search has found.

    Args:
        study: the resolved study.
        finalists: the configs that are confirmed.
        cells: of the confirm stage.
        gain: G in the search; None without one.
        detectable: see `aqn_tune.confirm.measured.detectable_effects`.
        margins: see `aqn_tune.confirm.margins.fixed_margins`.
    """
    confirm = study.confirm
    share = confirm.margin.share if isinstance(confirm.margin, GainMargin) else None
    seeds = {cell.replicate: cell.run.seed for cell in cells.cells}
    keys: dict[tuple[str, str], list[str]] = {}
    for cell in cells.cells:
        keys.setdefault((cell.scenario, cell.arm), []).append(cell.training_key)
    return ConfirmLock(
        generation=confirm.generation,
        study=study_hash(study),
        metric="faulty test loss",
        replicates=confirm.replicates,
        looks=confirm.looks,
        seeds=tuple(seeds[replicate] for replicate in sorted(seeds)),
        finalists=tuple(LockedFinalist.model_validate(each._asdict()) for each in finalists),
        arms=tuple(
            LockedArm(scenario=scenario, arm=arm, training_keys=tuple(own))
            for (scenario, arm), own in keys.items()
        ),
        missing=tuple(MissingArm.model_validate(each._asdict()) for each in cells.missing),
        contrasts=study.primary_contrasts(),
        alpha=confirm.alpha,
        power=confirm.power,
        margin_fraction=share,
        gain=gain,
        margin=None if gain is None or share is None else share * gain,
        margin_rule=confirm.margin if share is None else None,
        margins=tuple(margins),
        detectable=tuple(detectable),
        version=metadata.version("aqn_tune"),
        code=code_hash(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def read_locks(path: Path) -> LockFile:
    """Return the locks of a study, none when it was never locked.

    Raises UserError when the file was changed (a value edited by hand is seen) or belongs to
    another version.
    """
    if not path.exists():
        return LockFile()
    try:
        locks = LockFile.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        raise _not_a_lock(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    # In a file they are never made up: there they are what was written with the locks.
    if "identities" not in locks.model_fields_set:
        raise _not_a_lock(path, "identities: missing")
    return locks


def _not_a_lock(path: Path, why: str) -> UserError:
    return UserError(
        f"{path}: not a lock file ({why}); the file was changed, or written by another version"
    )


def hold_lock(path: Path, wanted: ConfirmLock) -> ConfirmLock:
    """Return the lock of a generation; write it if there is none yet.

    Raises UserError when the generation is locked to something else than `wanted`, with every
    difference. What wrote it and when may differ; `check_code` is for that.
    """
    locks = read_locks(path)
    held = locks.generation(wanted.generation)
    if held is None:
        generations = (*locks.generations, wanted)
        _replace(path, LockFile(generations=generations))
        return wanted
    check_lock(path, held, wanted)
    return held


def check_lock(path: Path, held: ConfirmLock, wanted: ConfirmLock) -> None:
    """Raise UserError with every difference when a generation is locked to something else."""
    differences = [
        f"  {name}: locked {_short(old)}, now {_short(new)}"
        for name, old, new in _pairs(held, wanted)
        if old != new
    ]
    if differences:
        newest = max(lock.generation for lock in read_locks(path).generations)
        raise UserError(
            f"{path}: generation {held.generation} was locked on {held.created} to something else:\n"
            + "\n".join(differences)
            + "\nA locked confirmation is not changed or extended; put the study back, or raise "
            f"confirm.generation to {newest + 1} to confirm afresh on new seeds"
        )


def check_code(path: Path, held: ConfirmLock) -> None:
    """Raise UserError when the code is not the one the lock was written with."""
    if held.code != code_hash():
        raise UserError(
            f"{path}: generation {held.generation} was locked with aqn_tune {held.version}, code "
            f"{held.code}; this is code {code_hash()}. One confirmation cannot mix two versions: "
            "finish it with the one it began with, or start anew (--fresh)"
        )


def _pairs(held: ConfirmLock, wanted: ConfirmLock) -> list[tuple[str, Any, Any]]:
    old, new = (lock.model_dump(mode="json", exclude=_ABOUT_THE_WRITING) for lock in (held, wanted))
    # What is left out of a dump at its default is in one of the two only.
    return [(name, old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new])]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def _replace(path: Path, locks: LockFile) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".tmp")
    new.write_text(locks.model_dump_json(indent=2) + "\n", encoding="utf-8")
    new.replace(path)
