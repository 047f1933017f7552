"""The trials of the search stage: controls first, then the configs of every scenario in turn."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from aqn_tune.errors import UserError
from aqn_tune.ledger.rows import LedgerRow, RecordedRow, SearchRow
from aqn_tune.search.asha import ScenarioASHA
from aqn_tune.search.history import ConfigRecord, History
from aqn_tune.search.record import Recorder
from aqn_tune.search.rungs import rung_steps
from aqn_tune.search.shelf import Shelf
from aqn_tune.search.state import drop_state, state_path
from aqn_tune.search.suggest import Proposer
from aqn_tune.search.work import Best, FixedPacks, Tally
from aqn_tune.study.cells import Cell, config_cells
from aqn_tune.study.engine import RungReport
from aqn_tune.study.packing import pack_size
from aqn_tune.study.runs import Pack, Setting
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import SearchSpec, Study
from aqn_tune.study.space import Params, arm_of


class _Open:
    """A config that is being trained."""

    def __init__(self, scenario: str, record: ConfigRecord, cells: tuple[Cell, ...], pack: Pack):
        self.scenario = scenario
        self.record = record
        self.keys = tuple(cell.training_key for cell in cells)
        self.pack = pack


class SearchWork:
    """Hands out controls and configs, and judges each config at each rung.

    All that it knows comes from search rows: it writes one for every decision before the decision
    takes effect, and a new instance reads them again. So a search that was cut off anywhere goes on
    as if it had not been; with one worker its rows are the same as those of an uninterrupted one.
    """

    def __init__(
        self,
        study: Study,
        setting: Setting,
        scenarios: Sequence[Scenario],
        *,
        layer_count: int,
        controls: FixedPacks,
        recorder: Recorder,
        state: Path,
        shelf: Shelf | None = None,
    ) -> None:
        if study.search is None:
            raise ValueError("the study has no search")
        self._study = study
        self._spec: SearchSpec = study.search
        self._setting = setting
        self._scenarios = {scenario.name: scenario for scenario in scenarios}
        self._layer_count = layer_count
        self._controls = controls
        self._recorder = recorder
        self._state = state
        self._shelf = shelf or Shelf()
        self.rungs = rung_steps(study.search, study.training.steps)
        self.history = History(self._scenarios)
        self.asha = ScenarioASHA(
            self._scenarios,
            rung_count=len(self.rungs),
            reduction_factor=study.search.reduction_factor,
        )
        self._open: dict[str, _Open] = {}
        self._proposers: dict[str, Proposer] = {}
        self._resumed: deque[tuple[str, ConfigRecord]] = deque()
        self._replay()

    def _replay(self) -> None:
        """Rebuild history and rung tables from the ledger; queue what was left unfinished."""
        verdicts: dict[tuple[str, str], bool] = {}
        for row in self._recorder.ledger.search:
            self.history.apply(row)
            if row.event == "rung":
                verdicts[row.scenario, row.config] = self.asha.report(
                    row.scenario, row.config, row.rung, row.value
                )
            elif row.event in ("stopped", "finished") and verdicts[row.scenario, row.config]:
                raise UserError(
                    f"{self._recorder.ledger.path}: config {row.config} of {row.scenario!r} was "
                    f"{row.event} where this version would go on; start anew (--fresh)"
                )
        for scenario in self._scenarios:
            for record in self.history.records(scenario):
                if record.status != "running":
                    continue
                if verdicts.get((scenario, record.config), True):
                    self._resumed.append((scenario, record))
                else:
                    self._close(scenario, record)

    @property
    def waiting(self) -> tuple[Pack, ...]:
        """The packs that an earlier run may have left a state file for."""
        configs = (self._opened(scenario, record).pack for scenario, record in self._resumed)
        return (*self._controls.queued, *configs)

    def next_pack(self) -> Pack | None:
        """See `Work.next_pack`. A config whose rungs the ledger holds already takes no trial."""
        with self._recorder.together():
            return self._next_pack()

    def _next_pack(self) -> Pack | None:
        pack = self._controls.next_pack()
        while pack is None:
            if self._resumed:
                opened = self._opened(*self._resumed.popleft())
            else:
                scenario = self._next_scenario()
                if scenario is None:
                    return None
                asked = self._ask(scenario)
                if asked is None:
                    continue
                opened = asked
            if self._answered(opened):
                continue
            self._open[opened.pack.name] = opened
            pack = opened.pack
        return pack

    def _next_scenario(self) -> str | None:
        asked = {name: len(self.history.records(name)) for name in self._scenarios}
        name = min(asked, key=lambda scenario: asked[scenario])
        return name if asked[name] < self._spec.configs else None

    def _ask(self, scenario: str) -> _Open | None:
        """Propose a config and record it; None when it cannot exist in the scenario."""
        history = self.history.records(scenario)
        number = len(history)
        params = self._proposer(scenario).propose(history)
        # A point that reads badly is a fault of the space and ends the search; one that only this
        # scenario cannot have (healthy where every layer is faulty) is a failed config.
        arm_of(params)
        config = f"c{number:03d}"
        asked = SearchRow(
            scenario=scenario, event="asked", config=config, number=number, params=params
        )
        try:
            cells = self._cells(scenario, config, params)
        except UserError as error:
            failed = asked.model_copy(update={"event": "failed", "params": {}, "error": str(error)})
            self._decide(asked, failed)
            return None
        self._decide(asked)
        self._recorder.cells(cells)
        return self._opened(scenario, self.history.record(scenario, config))

    def _proposer(self, scenario: str) -> Proposer:
        if scenario not in self._proposers:
            self._proposers[scenario] = Proposer(
                self._spec.space,
                study_seed=self._study.seed,
                scenario=scenario,
                startup_configs=self._spec.startup_configs,
            )
        return self._proposers[scenario]

    def _cells(self, scenario: str, config: str, params: Params) -> tuple[Cell, ...]:
        return config_cells(
            self._study,
            self._setting,
            self._scenarios[scenario],
            config=config,
            params=params,
            layer_count=self._layer_count,
        )

    def _opened(self, scenario: str, record: ConfigRecord) -> _Open:
        cells = self._cells(scenario, record.config, record.params)
        self._recorder.cells(cells)
        most = pack_size(self._study)
        pack = Pack(
            name=f"{scenario}-{record.config}",
            stage="search",
            runs=tuple(cell.run for cell in cells),
            rungs=self.rungs,
            split="validation",
            lockstep=most if most < len(cells) else None,
            own={}
            if self._study.compute.reuse
            else {cell.training_key: cell.name for cell in cells},
        )
        return _Open(scenario, record, cells, pack)

    def _answered(self, opened: _Open) -> bool:
        """Judge a config without a trial where all its runs have been trained; return whether so.

        They are in the ledger, under whatever name, or on the shelf. Never so without reuse.
        """
        if not self._study.compute.reuse or not self._recorded(opened):
            return False
        for rung in range(len(opened.record.values), len(self.rungs)):
            if not self._judge(opened, rung):
                break
        drop_state(state_path(self._state, opened.pack))
        return True

    def _recorded(self, opened: _Open) -> bool:
        """Return whether the ledger holds every run of a config whole; the shelf gives what it lacks."""
        ledger = self._recorder.ledger
        taken: list[RecordedRow] = []
        for key, run in zip(opened.keys, opened.pack.runs, strict=True):
            known = ledger.trainings.get(key)
            if known is None:
                rows = self._shelf.find(key, run, self.rungs)
                if rows is None:
                    return False
                taken += rows
            elif known.status != "finished" or not all(
                ledger.evaluation(key, step, c.name, c.scenario, "validation")
                for step in self.rungs
                for c in run.conditions
            ):
                return False
        self._recorder.write(taken)
        return True

    def arrived(self, pack: Pack, report: RungReport) -> bool:
        """See `Work.arrived`.

        Raises UserError when the untrained base fails: it would fail again, and nothing is confirmed without
        it, so that whatever the search found would be of no use.
        """
        if self._controls.owns(pack):
            goes_on = self._controls.arrived(pack, report)
            why = self._controls.broken.get(pack.name)
            if why is not None and pack.rungs == (0,):
                raise UserError(
                    f"the untrained base cannot be evaluated: {why}. It would fail again, and nothing is "
                    "confirmed without it: change what the study says of the device (scenario, sweep), which "
                    "starts a study of its own"
                )
            return goes_on
        opened = self._open[pack.name]
        with self._recorder.together():
            self._recorder.report(pack, (*report.evaluations, *report.trainings))
            rung = self.rungs.index(report.step)
            goes_on = rung < len(opened.record.values) or self._judge(opened, rung)
        if not goes_on:
            self._end(opened)
        return goes_on

    def broke(self, pack: Pack, error: str) -> None:
        """See `Work.broke`."""
        if self._controls.owns(pack):
            self._controls.broke(pack, error)
            return
        opened = self._open[pack.name]
        with self._recorder.together():
            self._recorder.broke(pack, opened.keys, error)
            self._decide(_event(opened.scenario, opened.record, "failed", error=error))
        self._end(opened)

    def _end(self, opened: _Open) -> None:
        del self._open[opened.pack.name]
        drop_state(state_path(self._state, opened.pack))

    def _judge(self, opened: _Open, rung: int) -> bool:
        """Record the value of a config at a rung and what follows; return whether it goes on."""
        scenario, record = opened.scenario, opened.record
        value = self._value(opened, self.rungs[rung])
        goes_on = self.asha.report(scenario, record.config, rung, value)
        row = _event(scenario, record, "rung").model_copy(update={"rung": rung, "value": value})
        if goes_on:
            self._decide(row)
        else:
            self._decide(row, self._closing(scenario, record, rung, value))
        return goes_on

    def _value(self, opened: _Open, step: int) -> float | None:
        """Return the mean faulty loss over all replicates, None unless each of them has one."""
        losses = []
        for key in opened.keys:
            row = self._recorder.ledger.evaluation(
                key, step, "faulty", opened.scenario, "validation"
            )
            training = self._recorder.ledger.trainings.get(key)
            if row is None or row.loss is None or training is None or training.status == "failed":
                return None
            losses.append(row.loss)
        return math.fsum(losses) / len(losses)

    def _close(self, scenario: str, record: ConfigRecord) -> None:
        """Write the end of a config whose last rung row says so, but was cut off before saying it."""
        rung = len(record.values) - 1
        self._decide(self._closing(scenario, record, rung, record.values[rung]))

    def _closing(
        self, scenario: str, record: ConfigRecord, rung: int, value: float | None
    ) -> SearchRow:
        if value is None:
            error = f"no finite loss in every replicate at step {self.rungs[rung]}"
            return _event(scenario, record, "failed", error=error)
        if rung == len(self.rungs) - 1:
            return _event(scenario, record, "finished")
        return _event(scenario, record, "stopped")

    def _decide(self, *rows: SearchRow) -> None:
        written: Sequence[LedgerRow] = rows
        self._recorder.write(written)
        for row in rows:
            self.history.apply(row)

    def tally(self) -> Tally:
        """See `Work.tally`. Configs still to come are taken to train as long as those before did."""
        controls = self._controls.tally()
        records = {name: self.history.records(name) for name in self._scenarios}
        everything = [record for own in records.values() for record in own]
        ended = [record for record in everything if record.status != "running"]
        trained = [self.rungs[len(r.values) - 1] for r in ended if r.values]
        usual = math.fsum(trained) / len(trained) if trained else float(self.rungs[-1])
        to_come = self._spec.configs * len(records) - len(ended)
        return Tally(
            total=controls.total + self._spec.configs * len(records),
            finished=controls.finished + sum(r.status == "finished" for r in everything),
            stopped=sum(r.status == "stopped" for r in everything),
            failed=controls.failed + sum(r.status == "failed" for r in everything),
            best=tuple(best for name, own in records.items() if (best := _best(name, own))),
            steps_left=controls.steps_left + to_come * usual * self._spec.replicates,
        )


def _best(scenario: str, records: Sequence[ConfigRecord]) -> Best | None:
    finished = [
        Best(scenario, record.config, value)
        for record in records
        if record.status == "finished" and (value := record.values[-1]) is not None
    ]
    return min(finished, key=lambda best: best.value) if finished else None


def _event(scenario: str, record: ConfigRecord, event: str, *, error: str = "") -> SearchRow:
    return SearchRow.model_validate(
        {
            "scenario": scenario,
            "event": event,
            "config": record.config,
            "number": record.number,
            "error": error,
        }
    )
