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

from aqn_tune.errors import UserError
from aqn_tune.report.hparam_values import arm_params as arm_params
from aqn_tune.report.hparam_values import config_params as config_params
from aqn_tune.report.hparam_values import is_number, with_defaults
from aqn_tune.study.cells import named_arms
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study
from aqn_tune.study.space import Value
from aqn_tune.study.space_checks import corners

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
    """Return every hyper-parameter column, and whether it holds numbers.

    A space brings its dimensions and, by its corners, what its configs have beside them. A parameter
    of `DEFAULTS` has a column where something is not at the default or is searched.
    """
    table = dict.fromkeys(FIRST_COLUMNS, False)

    def add(name: str, numeric: bool) -> None:
        table[name] = table.get(name, True) and numeric

    for scenario in scenarios:
        for name, value in scenario.values.items():
            add(name, is_number(value))
    table.update(POLICY_COLUMNS)
    for arm_name, arm in named_arms(study).items():
        for name, value in arm_params(arm).items():
            if (arm_name, name) != ("clean", "device"):  # that one is in its name
                add(name, is_number(value))
    if study.search is not None:
        space = study.search.space
        for name, dimension in space.dimensions.items():
            if dimension.kind == "choice":
                add(name, all(is_number(value) for value in dimension.values))
            else:
                add(name, dimension.kind != "fixed" or is_number(dimension.value))
        for point in corners(space):
            try:
                params = config_params(point)
            except UserError:
                continue  # of a folder from before such a space was refused: no config is this point
            for name, value in params.items():
                add(name, is_number(value))
    return table


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
    """Return the summary that opens the line `name` with its parameters.

    Args:
        name: The line.
        values: Its parameters. Those without a column are left out, defaults are filled in.
        numeric: The columns, and whether each holds numbers.
    """
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    info = plugin_data_pb2.SessionStartInfo(group_name=name)
    for key, value in with_defaults(values).items():
        if key not in numeric:
            continue
        if numeric[key]:
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
