"""What mattered in the search: how much each parameter tells the best configs from the others.

It explores and claims nothing: it is said of the configs that one search has tried, with its seeds.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from aqn_tune.report.results import Results, SearchedConfig
from aqn_tune.report.table import Column, Table
from aqn_tune.report.text import NONE, count, percent
from aqn_tune.study.distributions import distribution_of
from aqn_tune.study.space import FixedDimension, SpaceSpec

if TYPE_CHECKING:
    from optuna.study import Study as OptunaStudy

FEWEST = 32
"""Finished configs that a parameter must be judged on. In simulated searches over six parameters, one of
which makes 80 % of the variance of the loss (a number with its best value at an end or in the middle, or a
choice of four; 120 searches each) with configs drawn at random, 24 show it beyond chance in 67 to 96 %, 32 in
78 to 98 %. A search by TPE shows it in a third to a half only (32 configs, 88 searches)."""
CHANCES = (
    "That holds for configs drawn at random: TPE gathers configs near good values, so that a parameter that "
    "decides much often shows nothing (found in a third to a half of simulated searches, against nearly "
    "all), one that decides nothing is beyond chance in 7 to 12 %, and a no does not say that it does not "
    "matter."
)
"""What a search that learns from its losses makes of the chances."""
BEST_SHARE = 0.25
"""Share of the finished configs that count as the best."""
SHUFFLES = 19
"""Shuffles of the losses that a parameter is held against."""


class Weight(NamedTuple):
    """One parameter of a search."""

    parameter: str
    configs: int
    """Finished configs that have it."""
    share: float | None
    """Its part of all that was found over what shuffles show, 0..1; None where too few configs have it."""
    beyond_chance: bool
    """Whether its difference is larger than after every shuffle."""


class Importance(NamedTuple):
    """What mattered in the search of one scenario."""

    configs: int
    """Finished configs with a loss."""
    weights: tuple[Weight, ...]
    """The searched parameters by share; empty where nothing can be said."""
    reason: str
    """Why nothing can be said; empty where something can."""


def importance(results: Results, scenario: str) -> Importance:
    """Return what mattered in the search of a scenario.

    PED-ANOVA (arXiv 2304.10255) as Optuna has it: how differently the best configs are spread over a
    parameter than all of them. A parameter that only some configs have is judged among those (arXiv
    2601.20800), the best being those of all configs; which configs have it counts for the parameter
    that decides it. Only finished configs are taken: a loss after fewer steps cannot be compared with
    one after all steps.

    What decides nothing shows some difference as well, and a number a larger one than a choice of few
    values. So each parameter is held against `SHUFFLES` shuffles of the losses among the configs: its
    share is of what it shows over their mean, and one that decides nothing is beyond all of them in one
    search of `SHUFFLES` + 1, if the configs were drawn at random. A search that learns from its losses
    gathers configs near good values, so that shuffles are no fair draws: see `CHANCES`.
    """
    search = results.study.search
    finished = [
        one
        for one in results.searched
        if one.scenario == scenario and one.state == "finished" and one.value is not None
    ]
    n = len(finished)
    if search is None or n < FEWEST:
        reason = (
            f"What mattered in the search is said from {FEWEST} finished configs on; here are {n}."
        )
        return Importance(n, (), reason)
    values = [one.value for one in finished if one.value is not None]
    if min(values) == max(values):
        return Importance(
            n, (), f"All {n} finished configs came to the same loss: nothing mattered."
        )
    having = {name: sum(name in one.params for one in finished) for name in _searched(search.space)}
    judged = [name for name, configs in having.items() if configs >= FEWEST]
    if not judged:
        return Importance(n, (), f"No searched parameter is in {FEWEST} finished configs or more.")
    study = _study(search.space, finished, judged)
    found = _differences(study, judged, values)
    shuffled = values.copy()
    rng = random.Random(f"{results.study.seed} {scenario}")
    chance = []
    for _ in range(SHUFFLES):
        rng.shuffle(shuffled)
        chance.append(_differences(study, judged, shuffled))
    excess = {
        name: max(found[name] - math.fsum(other[name] for other in chance) / SHUFFLES, 0.0)
        for name in judged
    }
    total = math.fsum(excess.values())
    weights = [
        Weight(
            name,
            configs,
            (excess[name] / total if total else 0.0) if name in found else None,
            name in found and all(found[name] > other[name] for other in chance),
        )
        for name, configs in having.items()
    ]
    weights.sort(key=lambda one: -1.0 if one.share is None else one.share, reverse=True)
    return Importance(n, tuple(weights), "")


def _searched(space: SpaceSpec) -> list[str]:
    """Return the dimensions that have more than one value to choose."""
    return [
        name
        for name, dimension in space.dimensions.items()
        if not isinstance(dimension, FixedDimension) and not distribution_of(dimension).single()
    ]


def _study(
    space: SpaceSpec, configs: Sequence[SearchedConfig], names: Sequence[str]
) -> OptunaStudy:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize")
    distributions = {name: distribution_of(space.dimensions[name]) for name in names}
    for one in configs:
        has = [name for name in names if name in one.params]
        study.add_trial(
            optuna.trial.create_trial(
                value=one.value,
                params={name: one.params[name] for name in has},
                distributions={name: distributions[name] for name in has},
            )
        )
    return study


def _differences(
    study: OptunaStudy, names: Sequence[str], values: Sequence[float]
) -> dict[str, float]:
    """Return how much the best configs differ from all in each parameter, with these losses."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    with warnings.catch_warnings():
        # Optuna warns of its own argument, and that a low target is taken to be good, as it is here.
        warnings.simplefilter("ignore")
        return dict(
            get_param_importances(
                study,
                evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE),
                params=list(names),
                target=lambda trial: values[trial.number],
                normalize=False,
            )
        )


def importance_table(found: Importance) -> Table:
    """Return the parameters of a search by what they told, for an `Importance` that has some."""
    columns = (
        Column("parameter", align="left"),
        Column("share"),
        Column("beyond chance", align="left"),
        Column("finished configs"),
    )
    rows = tuple(
        (
            one.parameter,
            NONE if one.share is None else percent(one.share, 0),
            NONE if one.share is None else "yes" if one.beyond_chance else "no",
            str(one.configs),
        )
        for one in found.weights
    )
    best = math.ceil(BEST_SHARE * found.configs)
    notes = [
        f"How differently the best {best} of {count(found.configs, 'finished config')} are spread over a "
        f"parameter than all of them (PED-ANOVA of Optuna), less what {SHUFFLES} shuffles of the losses "
        "among the configs show on average; as shares. Beyond chance: a larger difference than after each of "
        f"the shuffles, which a parameter that decides nothing shows once in {SHUFFLES + 1}. {CHANCES} Where "
        "only some configs have a parameter, it is judged among those, the best being those of all configs; "
        "which of them have it counts for the parameter that decides that. It explores one search and makes "
        "no claims."
    ]
    if any(one.share is None for one in found.weights):
        notes.append(f"{NONE}: fewer than {FEWEST} finished configs have the parameter.")
    return Table("What mattered in the search (exploratory)", columns, rows, tuple(notes))
