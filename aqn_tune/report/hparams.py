"""The HParams table of TensorBoard: its columns, and one session per config or arm.

TensorBoard takes its columns from the first experiment summary that it finds. One summary in the
root with the union of all columns keeps them right where spaces are conditional and where the
first config failed; a parameter that a config does not have is left blank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from aqn_tune.study.arms import ArmSpec
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study
from aqn_tune.study.space import Params, Value

FIRST_COLUMNS = ("stage", "scenario", "arm")


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
    table.update({"carrier": False, "targeting": False, "sigma_start": True, "sigma_ratio": True})
    for arm in study.arms.values():
        table.update({name: _is_number(value) for name, value in arm_params(arm).items()})
    if study.search is not None:
        for name, dimension in study.search.space.dimensions.items():
            if dimension.kind == "choice":
                table[name] = all(_is_number(value) for value in dimension.values)
            elif dimension.kind == "fixed":
                table[name] = _is_number(dimension.value)
            else:
                table[name] = True
    return table


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def arm_params(arm: ArmSpec) -> Params:
    """Return what an arm that was not searched has in the columns of the search."""
    params: Params = {}
    if arm.noise is not None:
        schedule = arm.noise.schedule.model_dump()
        params["carrier"] = arm.noise.carrier.kind
        params["targeting"] = arm.noise.targeting.kind
        start = schedule.get("sigma_start", schedule.get("sigma"))
        if start is not None:
            params["sigma_start"] = float(start)
            params["sigma_ratio"] = float(schedule.get("sigma_end", start)) / float(start)
    else:
        params["targeting"] = "none"
    if arm.learning_rate is not None:
        params["learning_rate"] = arm.learning_rate
    if arm.rank is not None:
        params["rank"] = arm.rank
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
