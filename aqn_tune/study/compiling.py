"""Whether compiled decoder layers would pay within a study, by what was recorded of such trainings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from aqn_tune.errors import UserError
from aqn_tune.study.calibration import Costs, find_both_costs, workload_of
from aqn_tune.study.checks import check_compile
from aqn_tune.study.effort import Load, seconds_of
from aqn_tune.study.packing import pack_size
from aqn_tune.study.runs import Setting
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study


class Compiled(NamedTuple):
    """The time of a study with its layers as they are and with compiled ones."""

    plain_seconds: float
    compiled_seconds: float
    """With what compiling takes."""
    compile_seconds: float
    """What of it is compiling, where it takes as long as it ever did."""
    source: str
    """Where the rates come from."""

    @property
    def pays(self) -> bool:
        """Whether compiling saves more than it takes."""
        return self.compiled_seconds < self.plain_seconds


def compare_compiled(
    study: Study,
    setting: Setting,
    scenarios: Sequence[Scenario],
    loads: Sequence[Load],
    *,
    workers: int,
) -> Compiled | None:
    """Return what compiling the decoder layers would change; None where that cannot be told.

    It is a comparison, never a switch: compiled layers round otherwise, so `training.compile` belongs to
    what a study declares, and a study must not become another one because a calibration has changed.

    Args:
        study: the resolved study, compiled or not.
        setting: what its runs share.
        scenarios: of the study.
        loads: of its stages.
        workers: trials at a time.

    Limits: None where compiling is refused for this study, and where no machine has measured both ways in
    packs of one size: the rates of two machines or two sizes are not compared. A study that varies rank
    or batch size has more shapes than are counted here.
    """
    plain, compiled = (
        study.model_copy(
            update={"training": study.training.model_copy(update={"compile": is_compiled})}
        )
        for is_compiled in (False, True)
    )
    try:
        check_compile(compiled, scenarios)
    except UserError:
        return None
    if study.training.gradient_checkpointing:
        return None
    costs = find_both_costs(
        study.output,
        workload_of(setting, plain.training),
        workload_of(setting, compiled.training),
        pack_size(study),
    )
    # One that was recorded before compiling was counted apart holds it in its steps.
    if costs is None or not costs[1].compile_seconds:
        return None
    compiling = compile_wait(study, costs[1])
    # What is evaluated is not compiled: two rates of it would differ by the error of measuring.
    faster = costs[1]._replace(seconds_per_row=costs[0].seconds_per_row)
    return Compiled(
        plain_seconds=seconds_of(loads, costs[0], workers),
        compiled_seconds=seconds_of(loads, faster, workers) + compiling,
        compile_seconds=compiling,
        source=costs[1].source,
    )


def compile_wait(study: Study, costs: Costs) -> float:
    """Return the seconds that a study waits for compiled layers, where they take as long as they ever did.

    All workers wait for a shape: they start on it at about the same time.
    """
    return _shapes(study) * costs.compile_seconds


def _shapes(study: Study) -> int:
    """Return how many pack sizes a study meets at least: configs of the search, and full packs."""
    sizes = {pack_size(study)}
    if study.search is not None and study.search.configs:
        sizes.add(min(study.search.replicates, pack_size(study)))
    return len(sizes)
