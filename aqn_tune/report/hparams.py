"""The HParams table of TensorBoard: its columns, and one session per config or arm.

TensorBoard takes its columns from the first experiment summary that it finds. One summary in the
root with the union of all columns keeps them right where spaces are conditional and where the
first config failed; a parameter that a config does not have is left blank.

Arms that were declared, configs of the search and twins of finalists all go by the names of the
search space, and all show their whole noise policy, defaults included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from aqn_tune.noise.carriers.rmsnorm_weight import RmsnormWeight
from aqn_tune.noise.policy import NoisePolicy
from aqn_tune.noise.schedules import Schedule
from aqn_tune.noise.schedules.constant import Constant
from aqn_tune.noise.targeting import Targeting
from aqn_tune.noise.targeting.multipliers import Multipliers
from aqn_tune.noise.targeting.subset import Healthy, Random, Targeted, Window
from aqn_tune.study.arms import ArmSpec
from aqn_tune.study.cells import named_arms, twin
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study
from aqn_tune.study.space import Params, Value, arm_of

FIRST_COLUMNS = ("stage", "scenario", "arm")

POLICY_COLUMNS = {
    "carrier": False,
    "schedule": False,
    "sigma_start": True,
    "sigma_ratio": True,
    "stages": True,
    "warmup_fraction": True,
    "targeting": False,
    "normalise": False,
}
"""Columns that every noise policy has, and whether they hold numbers."""


class Metric(NamedTuple):
    """A column of results."""

    tag: str
    label: str
    description: str


METRICS = (
    Metric("final/loss_faulty", "faulty loss", "mean over seeds at the last step, nats per token"),
    Metric("final/loss_clean", "clean loss", "mean over seeds at the last step, nats per token"),
    Metric("final/exact_match_faulty", "faulty exact match", "mean over seeds at the last step"),
    Metric("final/exact_match_clean", "clean exact match", "mean over seeds at the last step"),
    Metric("step_reached", "steps", "optimiser steps taken; below the full count when stopped"),
)
"""Blank for a config that was stopped or failed: no column mixes training lengths."""


class Status(IntEnum):
    """How a session ended, in TensorBoard's numbers."""

    SUCCESS = 1
    FAILURE = 2


def columns(study: Study, scenarios: Sequence[Scenario]) -> dict[str, bool]:
    """Return every hyper-parameter column, and whether it holds numbers."""
    table = dict.fromkeys(FIRST_COLUMNS, False)
    for scenario in scenarios:
        for name, value in scenario.values.items():
            table[name] = table.get(name, True) and _is_number(value)
    table.update(POLICY_COLUMNS)
    for arm in named_arms(study).values():
        for name, value in arm_params(arm).items():
            table[name] = table.get(name, True) and _is_number(value)
    if study.search is not None:
        for name, dimension in study.search.space.dimensions.items():
            if dimension.kind == "choice":
                numeric = all(_is_number(value) for value in dimension.values)
            else:
                numeric = dimension.kind != "fixed" or _is_number(dimension.value)
            table[name] = table.get(name, True) and numeric
            if name.startswith("multiplier_"):
                table.setdefault("multiplier_default", True)
    return table


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def arm_params(arm: ArmSpec) -> Params:
    """Return what an arm has in the columns: its whole noise policy and what it trains otherwise.

    An arm without noise has targeting `none` and no policy. Left blank are what the study's
    training decides, and the layers that follow from the scenario's faults.
    """
    params: Params = {"targeting": "none"} if arm.noise is None else _policy_params(arm.noise)
    if arm.learning_rate is not None:
        params["learning_rate"] = arm.learning_rate
    if arm.rank is not None:
        params["rank"] = arm.rank
    return params


def config_params(params: Params, *, targeting: str | None = None) -> Params:
    """Return the columns of a config of the search, or of its twin with another targeting.

    Args:
        params: as sampled.
        targeting: `none` or `global` for the twin, None for the config itself.
    """
    arm = arm_of(params)
    if targeting is None:
        # The sampled numbers last: sigma_ratio is not to come back from a division.
        return {**arm_params(arm), **params}
    changed = twin(arm, targeting)
    if changed is None:
        return {}
    shown = arm_params(changed)
    return {name: params.get(name, value) for name, value in shown.items()} | {
        "targeting": targeting
    }


def _policy_params(policy: NoisePolicy) -> Params:
    params: Params = {"carrier": policy.carrier.kind}
    if isinstance(policy.carrier, RmsnormWeight) and policy.carrier.relative:
        params["carrier_relative"] = "true"
    params.update(_schedule_params(policy.schedule))
    params.update(_targeting_params(policy.targeting))
    params["normalise"] = policy.normalise
    return params


def _schedule_params(schedule: Schedule) -> Params:
    if isinstance(schedule, Constant):
        return {
            "schedule": schedule.kind,
            "sigma_start": schedule.sigma,
            "sigma_ratio": 1.0,
            "stages": 1,
            "warmup_fraction": schedule.warmup_fraction,
        }
    warmup = schedule.warmup_fraction
    params: Params = {
        "schedule": schedule.kind,
        "sigma_start": schedule.sigma_start,
        "stages": schedule.stages,
        "warmup_fraction": 1 / (schedule.stages + 1) if warmup is None else warmup,
    }
    if schedule.sigma_start > 0:
        params["sigma_ratio"] = schedule.sigma_end / schedule.sigma_start
    return params


def _targeting_params(targeting: Targeting) -> Params:
    params: Params = {"targeting": targeting.kind}
    if isinstance(targeting, Window):
        params["window_centre"] = targeting.centre
        params["window_width"] = targeting.width
    elif isinstance(targeting, Targeted | Healthy) and targeting.layers is not None:
        layers = targeting.layers
        params["layers"] = layers if layers == "all" else ",".join(str(layer) for layer in layers)
    elif isinstance(targeting, Random):
        if targeting.count is not None:
            params["random_count"] = targeting.count
        if targeting.seed:
            params["random_seed"] = targeting.seed
    elif isinstance(targeting, Multipliers):
        if isinstance(targeting.values, dict):
            params.update({f"multiplier_{k}": v for k, v in sorted(targeting.values.items())})
            params["multiplier_default"] = targeting.default
        else:
            params["multipliers"] = ",".join(f"{value:g}" for value in targeting.values)
    return params


def experiment_summary(study: Study, scenarios: Sequence[Scenario]) -> Any:
    """Return the one summary that declares all columns; it belongs into the root of the logs."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    experiment = api_pb2.Experiment(
        description=study.description,
        hparam_infos=[
            api_pb2.HParamInfo(
                name=name,
                display_name=name,
                type=api_pb2.DATA_TYPE_FLOAT64 if numeric else api_pb2.DATA_TYPE_STRING,
            )
            for name, numeric in columns(study, scenarios).items()
        ],
        metric_infos=[
            api_pb2.MetricInfo(
                name=api_pb2.MetricName(group="", tag=metric.tag),
                display_name=metric.label,
                description=metric.description,
            )
            for metric in METRICS
        ],
    )
    return _summary(
        metadata.EXPERIMENT_TAG, plugin_data_pb2.HParamsPluginData(experiment=experiment)
    )


def session_start(name: str, values: Mapping[str, Value], numeric: Mapping[str, bool]) -> Any:
    """Return the summary that opens the line `name` with its parameters."""
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    info = plugin_data_pb2.SessionStartInfo(group_name=name)
    for key, value in values.items():
        if numeric.get(key, False):
            info.hparams[key].number_value = float(value)
        else:
            info.hparams[key].string_value = str(value)
    return _summary(
        metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=info)
    )


def session_end(status: Status) -> Any:
    """Return the summary that closes a line."""
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    info = plugin_data_pb2.SessionEndInfo(status=int(status))
    return _summary(
        metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=info)
    )


def _summary(tag: str, data: Any) -> Any:
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.plugins.hparams import metadata

    summary = summary_pb2.Summary()
    summary.value.add(
        tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR
    )
    return summary
