"""The Custom Scalars page of TensorBoard: the arms of each scenario in one chart, with their intervals.

    tensorboard/by_arm/<arm>          one run per confirmed arm; its tags name stage and scenario
    tensorboard/by_config/<config>    the same of the search: controls and configs

A chart of that page holds tags, whichever run they are in. So each arm is a run, and a scenario is a tag: the
chart of a scenario has a line per arm. TensorBoard shows no run of a folder with more than forty until some
are chosen; these folders have few, and opened by themselves they show everything without set-up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from statistics import stdev
from typing import Any, NamedTuple

from aqn_tune.evidence.contrasts import t_quantile
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.seeds import Stage

CHARTS = {
    "loss/faulty": "faulty loss (nats/token)",
    "exact_match/faulty": "faulty exact match",
    "loss/clean": "clean loss (nats/token)",
    "train_loss": "training loss (nats/token)",
}
"""Tags that have a chart in each scenario, with its title."""
BAND = "loss/faulty"
"""The tag that has a chart of its interval as well."""
LEVEL = 0.95
OPEN = 4
"""Sections that are open from the start."""
LOW, HIGH = "_low", "_high"


class Ends(NamedTuple):
    """A t interval of a mean over seeds."""

    low: float
    high: float


def folder_of(stage: Stage) -> str:
    """Return the folder of a stage's charts, below that of all logs."""
    return "by_arm" if stage == "confirm" else "by_config"


def tag_of(stage: str, scenario: str, tag: str) -> str:
    """Return the tag of a mean, behind which `LOW` and `HIGH` name the ends of its interval."""
    return f"{stage}/{scenario}/{tag.replace('/', '_')}"


def interval(values: Sequence[float]) -> Ends | None:
    """Return the 95 % t interval of the mean of some seeds; None for one seed."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    half = t_quantile(len(values) - 1, 0.5 + LEVEL / 2) * stdev(values) / math.sqrt(len(values))
    return Ends(mean - half, mean + half)


def layout_summary(stage: str, scenarios: Sequence[Scenario]) -> Any:
    """Return the summary that lays the page out: a section per scenario.

    Args:
        stage: Name of the stage as the tags have it.
        scenarios: Scenarios in the order of the study.
    """
    from tensorboard.compat.proto import summary_pb2, tensor_pb2, types_pb2
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    sections = [
        layout_pb2.Category(
            title=f"{stage}: {scenario.name}",
            chart=list(_charts(stage, scenario.name)),
            closed=number >= OPEN,
        )
        for number, scenario in enumerate(scenarios)
    ]
    layout = layout_pb2.Layout(category=sections)
    tensor = tensor_pb2.TensorProto(
        dtype=types_pb2.DT_STRING, string_val=[layout.SerializeToString()]
    )
    described = summary_pb2.SummaryMetadata(
        plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME)
    )
    value = summary_pb2.Summary.Value(
        tag=metadata.CONFIG_SUMMARY_TAG, tensor=tensor, metadata=described
    )
    return summary_pb2.Summary(value=[value])


def _charts(stage: str, scenario: str) -> Iterator[Any]:
    from tensorboard.plugins.custom_scalar import layout_pb2

    for tag, title in CHARTS.items():
        name = tag_of(stage, scenario, tag)
        yield layout_pb2.Chart(
            title=f"{title}: mean of each arm",
            multiline=layout_pb2.MultilineChartContent(tag=[f"^{re.escape(name)}$"]),
        )
    name = tag_of(stage, scenario, BAND)
    series = layout_pb2.MarginChartContent.Series(value=name, lower=name + LOW, upper=name + HIGH)
    yield layout_pb2.Chart(
        title=f"{CHARTS[BAND]}: 95 % interval over seeds",
        margin=layout_pb2.MarginChartContent(series=[series]),
    )
