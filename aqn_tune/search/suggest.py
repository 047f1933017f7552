"""One proposal of Optuna: a pure function of the space, the history and the trial's number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aqn_tune.search.history import ConfigRecord
from aqn_tune.study.seeds import stream_seed
from aqn_tune.study.space import (
    ChoiceDimension,
    Dimension,
    FixedDimension,
    FloatDimension,
    Params,
    SpaceSpec,
)

if TYPE_CHECKING:
    from optuna.study import Study as OptunaStudy

_STATES = {"running": "RUNNING", "finished": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL"}


def propose(
    space: SpaceSpec,
    history: Sequence[ConfigRecord],
    *,
    study_seed: int,
    scenario: str,
    startup_configs: int,
) -> Params:
    """Return the parameters of the next config of `scenario`.

    The Optuna study is rebuilt from `history` and its sampler (TPE, arXiv 2304.11127) is seeded by
    scenario and number. So a proposal depends on what is known and on nothing else: it is the same
    after a restart, and no random state has to be saved.
    """
    import optuna

    number = len(history)
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=startup_configs,
        seed=stream_seed(study_seed, "optuna", scenario, number) & 0xFFFFFFFF,
    )
    trial = build_study(space, history, scenario=scenario, sampler=sampler).ask()
    return suggest(space, trial)


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
        searched = {
            name: value
            for name, value in record.params.items()
            if not isinstance(space.dimensions[name], FixedDimension)
        }
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[_STATES[record.status]],
                value=record.values[-1] if record.status == "finished" else None,
                params=searched,
                distributions={name: _distribution(space.dimensions[name]) for name in searched},
                intermediate_values={
                    rung: value
                    for rung, value in enumerate(record.values)
                    if value is not None and math.isfinite(value)
                },
                user_attrs={"config": record.config},
            )
        )
    return study


def _distribution(dimension: Dimension) -> Any:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(dimension, ChoiceDimension):
        return CategoricalDistribution(dimension.values)
    if isinstance(dimension, FixedDimension):
        raise TypeError("a fixed dimension is not sampled")
    kind = FloatDistribution if isinstance(dimension, FloatDimension) else IntDistribution
    return kind(dimension.low, dimension.high, log=dimension.log)
