"""Proposals of Optuna: each a pure function of the space, the history and the trial's number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aqn_tune.search.history import ConfigRecord
from aqn_tune.study.distributions import distribution_of
from aqn_tune.study.seeds import stream_seed
from aqn_tune.study.space import (
    ChoiceDimension,
    FixedDimension,
    FloatDimension,
    Params,
    SpaceSpec,
)

if TYPE_CHECKING:
    from optuna.study import Study as OptunaStudy
    from optuna.trial import FrozenTrial, TrialState

_STATES = {"running": "RUNNING", "finished": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL"}


class Proposer:
    """Asks Optuna for the configs of one scenario.

    A proposal is that of an Optuna study built from the history alone, whose sampler (TPE, arXiv
    2304.11127) is seeded by scenario and number. So it depends on what is known and on nothing else: it
    is the same after a restart, and no random state has to be saved. The study is kept from one proposal
    to the next and told only what is new, as building it again takes time in proportion to the history.

    Args:
        space: What is searched.
        study_seed: Seed of the study.
        scenario: Name of the scenario.
        startup_configs: Configs drawn at random before TPE has enough to go by.
    """

    def __init__(
        self, space: SpaceSpec, *, study_seed: int, scenario: str, startup_configs: int
    ) -> None:
        self._space = space
        self._study_seed = study_seed
        self._scenario = scenario
        self._startup_configs = startup_configs
        self._forget()

    def _forget(self) -> None:
        import optuna

        self._storage = optuna.storages.InMemoryStorage()
        self._study = build_study(self._space, (), scenario=self._scenario, storage=self._storage)
        self._told: list[ConfigRecord] = []
        """What the Optuna study holds, by number."""

    def propose(self, history: Sequence[ConfigRecord]) -> Params:
        """Return the parameters of the config that follows on `history`.

        Any history may follow on any other; the study is built again where one does not go on from the
        one before it, or the last proposal was not taken up.
        """
        import optuna

        number = len(history)
        self._follow(history)
        self._study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=self._startup_configs,
            seed=stream_seed(self._study_seed, "optuna", self._scenario, number) & 0xFFFFFFFF,
        )
        params = suggest(self._space, self._study.ask())
        self._told.append(ConfigRecord("", number, dict(params)))
        return params

    def _follow(self, history: Sequence[ConfigRecord]) -> None:
        """Bring the Optuna study to what `build_study` would make of `history`."""
        known = len(self._told)
        if known > len(history) or not all(map(_goes_on, self._told, history)):
            self._forget()
        for number, record in enumerate(history):
            if number >= len(self._told):
                self._study.add_trial(frozen_trial(self._space, record))
                self._told.append(_copy(record))
            elif self._told[number].status == "running":
                self._tell(self._told[number], record)
                self._told[number] = _copy(record)

    def _tell(self, told: ConfigRecord, record: ConfigRecord) -> None:
        study = self._storage.get_study_id_from_name(self._scenario)
        trial = self._storage.get_trial_id_from_study_id_trial_number(study, record.number)
        for rung, value in _intermediate_values(record).items():
            if rung >= len(told.values):
                self._storage.set_trial_intermediate_value(trial, rung, value)
        if record.status != "running":
            final = _value(record)
            values = None if final is None else [final]
            self._storage.set_trial_state_values(trial, _state(record), values)


def _goes_on(told: ConfigRecord, record: ConfigRecord) -> bool:
    """Return whether `record` is what `told` is or may become."""
    told_values = record.values[: len(told.values)]
    if (told.params, told.values) != (record.params, told_values):
        return False
    ended = told.status != "running"
    return not ended or (told.status, told.values) == (record.status, record.values)


def _copy(record: ConfigRecord) -> ConfigRecord:
    return replace(record, values=list(record.values))


def suggest(space: SpaceSpec, trial: Any) -> Params:
    """Return one value per active dimension of `space`, asked from an Optuna trial in order."""
    params: Params = {}
    for name, dimension in space.dimensions.items():
        if not space.active(name, params):
            continue
        if isinstance(dimension, FixedDimension):
            params[name] = dimension.value
        elif isinstance(dimension, ChoiceDimension):
            params[name] = trial.suggest_categorical(name, dimension.values)
        elif isinstance(dimension, FloatDimension):
            params[name] = trial.suggest_float(
                name, dimension.low, dimension.high, log=dimension.log
            )
        else:
            params[name] = trial.suggest_int(name, dimension.low, dimension.high, log=dimension.log)
    return params


def build_study(
    space: SpaceSpec,
    history: Sequence[ConfigRecord],
    *,
    scenario: str,
    sampler: Any = None,
    storage: Any = None,
) -> OptunaStudy:
    """Return the Optuna study (minimise) that a history comes to, in memory unless `storage` is given.

    Finished configs are COMPLETE with the value of the last rung, configs that ASHA stopped are
    PRUNED with their intermediate values, failed ones FAIL. TPE so never compares values of
    different fidelity.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=scenario, direction="minimize", sampler=sampler, storage=storage
    )
    for record in history:
        study.add_trial(frozen_trial(space, record))
    return study


def frozen_trial(space: SpaceSpec, record: ConfigRecord) -> FrozenTrial:
    """Return a config as a trial of Optuna; see `build_study`."""
    import optuna

    searched = {
        name: value
        for name, value in record.params.items()
        if not isinstance(space.dimensions[name], FixedDimension)
    }
    return optuna.trial.create_trial(
        state=_state(record),
        value=_value(record),
        params=searched,
        distributions={name: distribution_of(space.dimensions[name]) for name in searched},
        intermediate_values=_intermediate_values(record),
        user_attrs={"config": record.config},
    )


def _state(record: ConfigRecord) -> TrialState:
    import optuna

    return optuna.trial.TrialState[_STATES[record.status]]


def _value(record: ConfigRecord) -> float | None:
    return record.values[-1] if record.status == "finished" else None


def _intermediate_values(record: ConfigRecord) -> dict[int, float]:
    return {
        rung: value
        for rung, value in enumerate(record.values)
        if value is not None and math.isfinite(value)
    }
