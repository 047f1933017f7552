"""The Custom Scalars page of TensorBoard: the arms of each scenario in one chart, with their intervals.

    tensorboard/by_arm/<arm>      one run per arm or config; its tags name stage and scenario

A chart of that page holds tags, whichever run they are in. So each arm is a run, and a scenario is a tag: the
chart of a scenario has a line per arm, and no set-up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from statistics import stdev
from typing import Any, NamedTuple

from aqn_tune.evidence.contrasts import t_quantile
from aqn_tune.study.scenario import Scenario

CHARTS = {
    "loss/faulty": "faulty loss (nats/token)",
    "exact_match/faulty": "faulty exact match",
    "loss/clean": "clean loss (nats/token)",
}
"""Tags that have a chart in each scenario, with its title."""
LEVEL = 0.95
LOW, HIGH = "_low", "_high"


class Ends(NamedTuple):
    """A t interval of a mean over seeds."""

    low: float
    high: float


def run_of(arm: str) -> str:
    """Return the run that an arm has in these charts."""
    return f"by_arm/{arm}"


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


def layout_summary(stages: Sequence[str], scenarios: Sequence[Scenario]) -> Any:
    """Return the summary that lays the page out: a section per stage and scenario.

    Args:
        stages: Names of stages as the tags have them, those that matter most first.
        scenarios: Scenarios in the order of the study.
    """
    from tensorboard.compat.proto import summary_pb2, tensor_pb2, types_pb2
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    sections = [
        layout_pb2.Category(
            title=f"{stage}: {scenario.name}",
            chart=list(_charts(stage, scenario.name)),
            closed=bool(number),
        )
        for number, (stage, scenario) in enumerate((a, b) for a in stages for b in scenarios)
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
    name = tag_of(stage, scenario, "loss/faulty")
    series = layout_pb2.MarginChartContent.Series(value=name, lower=name + LOW, upper=name + HIGH)
    yield layout_pb2.Chart(
        title=f"{CHARTS['loss/faulty']}: 95 % interval over seeds",
        margin=layout_pb2.MarginChartContent(series=[series]),
    )
