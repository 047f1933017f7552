"""Everything that a report says, read from the study, the lock and the ledger."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from aqn_tune.errors import UserError
from aqn_tune.evidence.arms import ArmEvidence
from aqn_tune.evidence.assemble import Evidence, ScenarioEvidence
from aqn_tune.evidence.looks import settled
from aqn_tune.evidence.tables import CellResult, Tables
from aqn_tune.evidence.verdicts import Judged
from aqn_tune.ledger.ledger import NOTHING_REPEATED, Repeated
from aqn_tune.ledger.rows import (
    CellRow,
    EvaluationRow,
    LedgerRow,
    MechanismRow,
    SearchRow,
    TrainingRow,
    reused_from,
)
from aqn_tune.report.text import Spread, spread
from aqn_tune.study.cells import NotAvailable
from aqn_tune.study.folder import StudyFolder
from aqn_tune.study.scenario import During, Scenario
from aqn_tune.study.schema import Study
from aqn_tune.study.seeds import Stage


class FailedRun(NamedTuple):
    """A training that gives no number, or none under the faults of some scenario."""

    stage: str
    cells: tuple[str, ...]
    """Every cell that it was to give numbers to, as `rerun` takes them."""
    training_key: str
    step_reached: int
    error: str


class SearchedConfig(NamedTuple):
    """What became of one config of the search."""

    scenario: str
    config: str
    params: Mapping[str, float | int | str | bool]
    state: str
    """finished, stopped, failed or running."""
    value: float | None
    """Mean faulty validation loss at the last rung it reached."""
    rung: int
    """Last rung it reached, from 0; -1 before the first."""


@dataclass(frozen=True)
class Results:
    """What a study has found so far. Build it with `load_results`."""

    folder: StudyFolder
    study: Study
    scenarios: tuple[Scenario, ...]
    rows: tuple[LedgerRow, ...]
    evidence: Evidence
    lock_hash: str
    """Content hash of the lock that holds; empty before the confirmation."""
    gaps: tuple[str, ...]
    """What is missing, one sentence each; claims are made only when nothing is."""
    not_available: tuple[NotAvailable, ...]
    """Arms that cannot exist in a scenario, each with its reason."""
    mechanism: Mapping[tuple[str, int], MechanismRow] = field(default_factory=dict)
    """What was seen of each training, by training key and step."""
    repeated: Repeated = NOTHING_REPEATED
    """What was trained again although it was recorded."""

    @property
    def makes_claims(self) -> bool:
        """Whether every run that the declared claims take has ended, so that the verdicts are final."""
        return not self.gaps

    @property
    def shows_verdicts(self) -> bool:
        """Whether verdicts are given: the final ones, or those of a declared look with more to come."""
        look = self.evidence.look
        return self.makes_claims or (look is not None and look.goes_on)

    def left_to_the_next_look(self, judged: Judged) -> bool:
        """Return whether a contrast is open at a look that has another one after it.

        How large a new generation has to be for it is no question while this one goes on.
        """
        look = self.evidence.look
        return look is not None and look.goes_on and not settled(judged)

    @cached_property
    def cells(self) -> tuple[CellRow, ...]:
        """Every cell, the last row of each, in order."""
        found: dict[tuple[str, int, str, str, int], CellRow] = {}
        for row in self.rows:
            if isinstance(row, CellRow):
                key = (row.stage, row.generation, row.scenario, row.arm, row.replicate)
                found[key] = row
        return tuple(found.values())

    def stage_cells(self, stage: Stage) -> tuple[CellRow, ...]:
        """Return the cells of the search, or those that the numbers of the confirmation rest on.

        These are of its generation, and where looks are declared of the seeds of the look at which it stands:
        those of a look that is under way are not the same for every arm, and none of its contrasts has them.
        """
        if stage == "search":
            return tuple(cell for cell in self.cells if cell.stage == stage)
        generation, look = self.evidence.declared.generation, self.evidence.look
        return tuple(
            cell
            for cell in self.cells
            if (cell.stage, cell.generation) == (stage, generation)
            and (look is None or cell.replicate < look.seeds)
        )

    @cached_property
    def trainings(self) -> dict[str, TrainingRow]:
        """The last row of each training that took a step or failed."""
        return {
            row.training_key: row
            for row in self.rows
            if isinstance(row, TrainingRow) and (row.step_reached or row.status == "failed")
        }

    @cached_property
    def reused(self) -> Mapping[str, int]:
        """How many trainings came from each other study, by its folder."""
        return reused_from(self.trainings.values())

    @cached_property
    def seconds(self) -> Mapping[str, float]:
        """Wall time that each training has taken, all its rows together."""
        total: dict[str, float] = defaultdict(float)
        for row in self.rows:
            if isinstance(row, TrainingRow):
                total[row.training_key] += row.seconds
        return total

    @cached_property
    def _evaluations(self) -> dict[tuple[str, int, str, str, str], EvaluationRow]:
        return {
            (row.training_key, row.step, row.condition, row.scenario, row.split): row
            for row in self.rows
            if isinstance(row, EvaluationRow)
        }

    @cached_property
    def tables(self) -> Tables:
        """The index of evidence over the rows."""
        return Tables(self.rows)

    def scenario(self, name: str) -> Scenario:
        """Return a scenario by name."""
        return next(scenario for scenario in self.scenarios if scenario.name == name)

    def base(self, condition: str, scenario: str, split: str = "test") -> EvaluationRow | None:
        """Return the evaluation of the untrained base, None when it was not made."""
        for (_, step, name, where, part), row in self._evaluations.items():
            if step == 0 and (name, where, part) == (condition, scenario, split):
                return row
        return None

    def evaluation(
        self, training_key: str, step: int, condition: str, scenario: str, split: str
    ) -> EvaluationRow | None:
        """Return one evaluation, None when it was not made."""
        return self._evaluations.get((training_key, step, condition, scenario, split))

    def clean_evaluation(self, cell: CellResult) -> EvaluationRow | None:
        """Return the clean evaluation beside a confirmed cell's faulty one."""
        if cell.step is None:
            return None
        return self._evaluations.get((cell.training_key, cell.step, "clean", "", "test"))

    def clean_exact_match(self, arm: ArmEvidence) -> Spread:
        """Return mean and sd over seeds of the exact match without faults."""
        found = [self.clean_evaluation(cell) for cell in arm.seeds]
        return spread([row.exact_match if row else None for row in found])

    @cached_property
    def failed(self) -> tuple[FailedRun, ...]:
        """Trainings that failed, with the cells that they leave without a number."""
        users: dict[str, list[CellRow]] = {}
        lost: dict[str, list[CellRow]] = {}
        for cell in self.cells:
            users.setdefault(cell.training_key, []).append(cell)
            if self._diverged(cell):
                lost.setdefault(cell.training_key, []).append(cell)
        broken = tuple(
            FailedRun(
                stage=row.stage,
                cells=tuple(cell_id(cell) for cell in users.get(key, ())),
                training_key=key,
                step_reached=row.step_reached,
                error=row.error or "no reason was recorded",
            )
            for key, row in self.trainings.items()
            if row.status == "failed"
        )
        return broken + tuple(
            FailedRun(
                stage=self.trainings[key].stage,
                cells=tuple(cell_id(cell) for cell in cells),
                training_key=key,
                step_reached=self.trainings[key].step_reached,
                error="faulty loss is not finite",
            )
            for key, cells in lost.items()
        )

    def _diverged(self, cell: CellRow) -> bool:
        """Return whether a finished training has no finite loss under the faults of the cell."""
        training = self.trainings.get(cell.training_key)
        if training is None or training.status != "finished":
            return False
        split = "validation" if cell.stage == "search" else "test"
        row = self.evaluation(
            cell.training_key, training.step_reached, "faulty", cell.scenario, split
        )
        return row is not None and row.loss is None

    @cached_property
    def searched(self) -> tuple[SearchedConfig, ...]:
        """Every config of the search, scenario by scenario in the order asked."""
        found: dict[tuple[str, str], SearchedConfig] = {}
        for row in self.rows:
            if not isinstance(row, SearchRow):
                continue
            key = (row.scenario, row.config)
            known = found.get(key)
            if known is None:
                known = SearchedConfig(row.scenario, row.config, {}, "running", None, -1)
            if row.event == "asked":
                known = known._replace(params=row.params)
            elif row.event == "rung":
                known = known._replace(value=row.value, rung=row.rung)
            else:
                known = known._replace(state=row.event)
            found[key] = known
        return tuple(found.values())

    @property
    def during_values(self) -> tuple[During, ...]:
        """Values of `during` in the order of the study; each has tables and panels of its own."""
        return tuple(dict.fromkeys(scenario.spec.during for scenario in self.scenarios))

    def evidence_of(self, during: During) -> tuple[tuple[Scenario, ScenarioEvidence], ...]:
        """Return the scenarios in which the fault acts `during`, with their evidence."""
        by_name = {one.scenario: one for one in self.evidence.scenarios}
        return tuple(
            (scenario, by_name[scenario.name])
            for scenario in self.scenarios
            if scenario.spec.during == during
        )


def cell_id(cell: CellRow) -> str:
    """Return the cell as `aqn-tune rerun` takes it: stage/scenario/arm/replicate."""
    return f"{cell.stage}/{cell.scenario}/{cell.arm}/{cell.replicate}"


def load_study_file(folder: StudyFolder) -> Study:
    """Return the resolved study of a folder.

    Raises UserError when the folder holds none, or one that this version cannot read.
    """
    import yaml
    from pydantic import ValidationError

    if not folder.study.is_file():
        raise UserError(f"{folder.root}: no study.yaml here; give the folder of a study")
    try:
        return Study.model_validate(yaml.safe_load(folder.study.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        raise UserError(
            f"{folder.study}: not a study of this version ({error}); it is written by "
            "`aqn-tune run` and not meant to be changed"
        ) from None
