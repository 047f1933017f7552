"""TensorBoard logs of a study: per-seed curves, per-config means, and one HParams table.

    tensorboard/                                                  the columns of the HParams table
    tensorboard/by_arm/<arm>, tensorboard/by_config/<config>      means by scenario, for Custom Scalars
    tensorboard/<stage>/<scenario>/<config or arm>                a line of that table
    tensorboard/<stage>/<scenario>/<config or arm>/s<replicate>   curves of one run
    tensorboard/<stage>/<scenario>/<config or arm>/mean           mean over the replicates
    tensorboard/by_arm/_report                                    pictures and text of the report (`pictures`)

Event files are opened, appended to and closed again: a study has thousands of runs, and a writer
with a thread for each of them would not do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import (
    CellRow,
    EvaluationRow,
    MechanismRow,
    RecordedRow,
    SearchRow,
    TrainingRow,
)
from aqn_tune.report.custom_scalars import (
    BAND,
    CHARTS,
    HIGH,
    LOW,
    folder_of,
    interval,
    layout_summary,
    tag_of,
)
from aqn_tune.report.events import EVENT_FILE, write_events
from aqn_tune.report.hparams import (
    Status,
    arm_params,
    columns,
    config_params,
    experiment_summary,
    session_end,
    session_start,
)
from aqn_tune.report.mechanism_events import Profiles, mean_profiles, profiles, summary
from aqn_tune.study.cells import named_arms
from aqn_tune.study.folder import StudyFolder
from aqn_tune.study.schema import Study
from aqn_tune.study.seeds import Stage
from aqn_tune.study.space import Params

FINAL_TAGS = {
    "loss/faulty": "final/loss_faulty",
    "loss/clean": "final/loss_clean",
    "exact_match/faulty": "final/exact_match_faulty",
    "exact_match/clean": "final/exact_match_clean",
}


class _Line(NamedTuple):
    """A config or an arm: what a line of the HParams table and a mean curve stand for."""

    stage: Stage
    generation: int
    scenario: str
    arm: str

    @property
    def place(self) -> str:
        """The stage, and the generation of its seeds where that is not the first."""
        return _place(self.stage, self.generation)

    @property
    def name(self) -> str:
        return f"{self.place}/{self.scenario}/{self.arm}"


def _place(stage: Stage, generation: int) -> str:
    return f"{stage}-g{generation}" if generation else stage


def _line_of(cell: CellRow) -> _Line:
    return _Line(cell.stage, cell.generation, cell.scenario, cell.arm)


class _Point(NamedTuple):
    tag: str
    step: int
    value: float
    scenario: str
    """Scenario whose faults acted; empty where every scenario of the training shares the value."""
    stage: Stage | None
    """Stage whose split it was measured on; None for what does not depend on a split."""
    final: bool


class _Observed(NamedTuple):
    """What was seen of a training at one step."""

    step: int
    profiles: Profiles
    summary: Any


class TensorBoardWriter:
    """Write rows to TensorBoard as they come. Not thread-safe; rows may come in any order.

    Opening it writes the logs anew from the ledger, so that a study which continues has each point
    once. A non-finite loss is left out, and a mean is written once every replicate has its value:
    those that the study declares for its search and its own confirm generation, and those that the
    ledger has cells of for generations before it. Where the study declares looks, those of the last look
    that was begun; as another one begins, the logs are written anew.
    """

    def __init__(self, folder: StudyFolder, study: Study) -> None:
        self._folder, self._study = folder, study
        self._begin()

    def _begin(self) -> None:
        from aqn_tune.study.sweep import resolve_scenarios

        folder, study = self._folder, self._study
        scenarios = resolve_scenarios(study)
        self._root = folder.tensorboard
        self._values = {scenario.name: scenario.values for scenario in scenarios}
        self._numeric = columns(study, scenarios)
        self._arms = named_arms(study)
        rows = tuple(Ledger(folder.ledger).recorded())
        self._replicates = _replicates(study, rows)
        self._params: dict[tuple[str, str], Params] = {}
        self._cells: dict[str, list[CellRow]] = {}
        self._lines: dict[_Line, dict[int, str]] = {}
        self._ended: set[_Line] = set()
        self._trainings: dict[str, TrainingRow] = {}
        self._points: dict[str, list[_Point]] = {}
        self._means: dict[tuple[_Line, str, int], dict[int, float]] = {}
        self._observed: dict[str, list[_Observed]] = {}
        self._observed_means: dict[tuple[_Line, int], dict[int, Profiles]] = {}
        self._pending: dict[str, list[tuple[int, Any]]] = {}
        self._begun: set[str] = set()
        self._add("", 0, experiment_summary(study, scenarios))
        confirm = _place("confirm", study.confirm.generation)
        self._add(folder_of("confirm"), 0, layout_summary(confirm, scenarios))
        if study.search is not None:
            self._add(folder_of("search"), 0, layout_summary("search", scenarios))
        self._write(rows)
        self._remove_strangers()

    def write(self, rows: Sequence[RecordedRow]) -> None:
        """Add the rows, which the ledger holds already, to the curves; on disk when it returns."""
        if any(self._begins_a_look(row) for row in rows):
            self._begin()
        else:
            self._write(rows)

    def _begins_a_look(self, row: RecordedRow) -> bool:
        if not isinstance(row, CellRow) or row.stage != "confirm":
            return False
        confirm = self._study.confirm
        known = self._replicates.get((row.stage, row.generation), 0)
        return (
            bool(confirm.looks) and row.generation == confirm.generation and row.replicate >= known
        )

    def _write(self, rows: Sequence[RecordedRow]) -> None:
        for row in rows:
            if isinstance(row, CellRow):
                self._cell(row)
            elif isinstance(row, SearchRow):
                self._search(row)
            elif isinstance(row, TrainingRow):
                self._training(row)
            elif isinstance(row, MechanismRow):
                self._mechanism(row)
            elif isinstance(row, EvaluationRow):
                self._evaluation(row)
        self._flush()

    def close(self) -> None:
        """Write what is left. The logs stay readable without it."""
        self._flush()

    def _cell(self, row: CellRow) -> None:
        line = _line_of(row)
        if line not in self._lines:
            self._open(line, row)
        self._lines[line][row.replicate] = row.training_key
        self._cells.setdefault(row.training_key, []).append(row)
        for point in self._points.get(row.training_key, ()):
            self._point(row, point)
        for seen in self._observed.get(row.training_key, ()):
            self._observe(row, seen)
        self._end_if_done(line)

    def _open(self, line: _Line, row: CellRow) -> None:
        self._lines[line] = {}
        values: Params = {"stage": line.stage, "scenario": line.scenario, "arm": line.arm}
        values.update(self._values.get(line.scenario, {}))
        values.update(self._params_of(row))
        self._add(line.name, 0, session_start(line.name, values, self._numeric))

    def _params_of(self, row: CellRow) -> Params:
        if row.arm in self._arms:
            return arm_params(self._arms[row.arm])
        params = self._params.get((row.scenario, row.config))
        if params is None:
            return {}
        targeting = row.arm.rpartition("_")[2]
        return config_params(
            params, targeting=targeting if targeting in ("none", "global") else None
        )

    def _search(self, row: SearchRow) -> None:
        if row.event == "asked":
            self._params[row.scenario, row.config] = dict(row.params)
        line = _Line("search", 0, row.scenario, row.config)
        if row.event in ("finished", "stopped", "failed") and line in self._lines:
            self._end(line, Status.FAILURE if row.event == "failed" else Status.SUCCESS)

    def _training(self, row: TrainingRow) -> None:
        first = row.step_reached - len(row.train_losses) + 1
        for offset, loss in enumerate(row.train_losses):
            step = first + offset
            self._new_point(row.training_key, _Point("train_loss", step, loss, "", None, False))
        if row.step_reached == 0 and row.status != "failed":
            return  # the untrained base, recorded under the key of a run that is yet to be trained
        self._trainings[row.training_key] = row
        for cell in self._cells.get(row.training_key, ()):
            self._end_if_done(_line_of(cell))

    def _evaluation(self, row: EvaluationRow) -> None:
        for tag, value in _measures(row):
            stage: Stage = "search" if row.split == "validation" else "confirm"
            point = _Point(tag, row.step, value, row.scenario, stage, row.final)
            self._new_point(row.training_key, point)

    def _mechanism(self, row: MechanismRow) -> None:
        found = profiles(row)
        seen = _Observed(row.step, found, summary(found))
        self._observed.setdefault(row.training_key, []).append(seen)
        for cell in self._cells.get(row.training_key, ()):
            self._observe(cell, seen)

    def _observe(self, cell: CellRow, seen: _Observed) -> None:
        line = _line_of(cell)
        members = self._observed_means.setdefault((line, seen.step), {})
        if cell.replicate in members:
            return
        members[cell.replicate] = seen.profiles
        self._add(f"{line.name}/s{cell.replicate}", seen.step, seen.summary)
        if len(members) == self._replicates.get((cell.stage, cell.generation)):
            mean = mean_profiles([members[replicate] for replicate in sorted(members)])
            self._add(f"{line.name}/mean", seen.step, summary(mean))

    def _new_point(self, training_key: str, point: _Point) -> None:
        self._points.setdefault(training_key, []).append(point)
        for cell in self._cells.get(training_key, ()):
            self._point(cell, point)

    def _point(self, cell: CellRow, point: _Point) -> None:
        other_scenario = point.scenario and point.scenario != cell.scenario
        if other_scenario or (point.stage and point.stage != cell.stage):
            return
        if not math.isfinite(point.value):
            return
        line = _line_of(cell)
        seen = self._means.setdefault((line, point.tag, point.step), {})
        if cell.replicate in seen:
            return
        seen[cell.replicate] = point.value
        self._scalar(f"{line.name}/s{cell.replicate}", point.tag, point.step, point.value)
        if len(seen) != self._replicates.get((cell.stage, cell.generation)):
            return
        mean = math.fsum(seen.values()) / len(seen)
        self._scalar(f"{line.name}/mean", point.tag, point.step, mean)
        if point.tag in CHARTS:
            self._chart(line, point, mean, list(seen.values()))
        if point.final and point.tag in FINAL_TAGS:
            self._scalar(line.name, FINAL_TAGS[point.tag], point.step, mean)

    def _chart(self, line: _Line, point: _Point, mean: float, values: Sequence[float]) -> None:
        run = f"{folder_of(line.stage)}/{line.arm}"
        tag = tag_of(line.place, line.scenario, point.tag)
        self._scalar(run, tag, point.step, mean)
        ends = interval(values) if point.tag == BAND else None
        if ends is not None:
            self._scalar(run, tag + LOW, point.step, ends.low)
            self._scalar(run, tag + HIGH, point.step, ends.high)

    def _end_if_done(self, line: _Line) -> None:
        keys = self._lines[line]
        if len(keys) != self._replicates.get((line.stage, line.generation)):
            return
        rows = [self._trainings.get(key) for key in keys.values()]
        states = {row.status if row else "unfinished" for row in rows}
        if "unfinished" not in states:
            self._end(line, Status.FAILURE if "failed" in states else Status.SUCCESS)

    def _end(self, line: _Line, status: Status) -> None:
        if line in self._ended:
            return
        self._ended.add(line)
        self._add(line.name, 0, session_end(status))
        rows = [self._trainings.get(key) for key in self._lines[line].values()]
        reached = min((row.step_reached for row in rows if row), default=0)
        self._scalar(line.name, "step_reached", reached, float(reached))

    def _scalar(self, run: str, tag: str, step: int, value: float) -> None:
        from tensorboard.compat.proto import summary_pb2

        item = summary_pb2.Summary.Value(tag=tag, simple_value=value)
        self._add(run, step, summary_pb2.Summary(value=[item]))

    def _add(self, run: str, step: int, summary: Any) -> None:
        self._pending.setdefault(run, []).append((step, summary))

    def _flush(self) -> None:
        pending, self._pending = self._pending, {}
        for run, summaries in pending.items():
            write_events(self._root / run / EVENT_FILE, summaries, anew=run not in self._begun)
            self._begun.add(run)

    def _remove_strangers(self) -> None:
        """Remove event files of runs that the ledger does not know: they would show as runs."""
        known = {self._root / run / EVENT_FILE for run in self._begun}
        for path in self._root.rglob("*tfevents*"):
            if path not in known:
                path.unlink()


def _replicates(study: Study, rows: Sequence[RecordedRow]) -> dict[tuple[Stage, int], int]:
    """Return how many replicates a stage and generation has."""
    found: dict[tuple[Stage, int], int] = {}
    for row in rows:
        if isinstance(row, CellRow):
            key = (row.stage, row.generation)
            found[key] = max(found.get(key, 0), row.replicate + 1)
    # Cells of a stage that is only just beginning may still be coming.
    confirm = study.confirm
    own: tuple[Stage, int] = ("confirm", confirm.generation)
    begun = found.get(own, 0)
    found[own] = next((look for look in confirm.looks if look >= begun), confirm.replicates)
    found["search", 0] = study.search.replicates if study.search else 0
    return found


def _measures(row: EvaluationRow) -> Iterator[tuple[str, float]]:
    if row.loss is not None:
        yield f"loss/{row.condition}", row.loss
    yield f"exact_match/{row.condition}", row.exact_match
    for index, fault in enumerate(row.faults):
        suffix = f"/{index}_{fault.kind}" if len(row.faults) > 1 else ""
        yield f"affected_fraction{suffix}", fault.affected_fraction
        if fault.relative_error is not None:
            yield f"relative_error{suffix}", fault.relative_error
    if row.loss_sd is not None:
        yield f"loss_sd_over_draws/{row.condition}", row.loss_sd
    for quantizer in row.quantizers:
        where = f"{quantizer.format}_{quantizer.operand}/layer{quantizer.layer:02d}"
        if quantizer.sqnr_db is not None:
            yield f"sqnr_db/{where}", quantizer.sqnr_db


def rebuild(folder: StudyFolder, study: Study) -> None:
    """Write the logs of a study anew, from its ledger alone."""
    TensorBoardWriter(folder, study).close()
