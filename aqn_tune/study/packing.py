"""From cells to packs: which runs are trained, for whom, and which of them share a trial."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import ceil
from typing import NamedTuple

from aqn_tune.study.cells import Cell, unique_runs
from aqn_tune.study.resolve import conditions_of
from aqn_tune.study.runs import Condition, Pack, Run, Split, pack_key
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study
from aqn_tune.study.seeds import Stage

PACK_ON_CPU = 8
"""By then the cost of dispatching operations is shared by enough replicas; what is left is arithmetic and
memory traffic, which each replica brings along."""
TOKENS_PER_GPU_PASS = 16_384
"""About where a pass of a model of half a billion parameters takes as long to compute as to launch.
An estimate from counted kernels, not measured."""


def pack_size(study: Study) -> int:
    """Return the most runs of `study` that a pack takes; `compute.pack_replicas` where that is a number.

    It knows nothing of memory: a worker measures its own, and takes a pack in parts where it has to.
    """
    compute, training = study.compute, study.training
    if compute.pack_replicas != "auto":
        return compute.pack_replicas
    if not compute.gpus_per_worker:
        return PACK_ON_CPU
    tokens = training.batch_size // training.gradient_accumulation_steps * training.max_length
    return max(TOKENS_PER_GPU_PASS // tokens, 1)


class Job(NamedTuple):
    """A run to be trained."""

    training_key: str
    run: Run
    cell: str = ""
    """The cell that it is trained for alone; empty for every cell with its training key."""
    export: str = ""
    """Folder that receives the adapter; empty for none."""


def jobs_of(cells: Sequence[Cell], *, reuse: bool) -> tuple[Job, ...]:
    """Return what has to be trained for `cells`, in their order.

    With `reuse` that is one run per training key, evaluated under the conditions of all its cells;
    without it one run per cell, under the conditions of that cell.
    """
    if reuse:
        return tuple(Job(key, run) for key, run in unique_runs(cells).items())
    return tuple(Job(cell.training_key, cell.run, cell.name) for cell in cells)


class _Group:
    """A pack that may still take jobs."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}

    def takes(self, job: Job, size: int) -> bool:
        """Return whether there is room. Rows name their run by training key, so a pack holds it once."""
        return len(self.jobs) < size and job.training_key not in self.jobs


def make_packs(
    jobs: Iterable[Job],
    *,
    stage: Stage,
    prefix: str,
    size: int,
    rungs: tuple[int, ...],
    split: Split,
    generate: bool = False,
) -> tuple[Pack, ...]:
    """Group runs into packs of at most `size` runs of equal pack key, keeping their order.

    Packs of one key are as even as they come: a last pack of two would keep one worker waiting.
    Runs of equal training key, which are those of cells that do not share it, go to different packs.
    """
    groups: list[_Group] = []
    by_key: dict[str, list[_Group]] = {}
    jobs = tuple(jobs)
    number_of = Counter(pack_key(job.run) for job in jobs)
    even = {key: ceil(number / ceil(number / size)) for key, number in number_of.items()}
    for job in jobs:
        key = pack_key(job.run)
        alike = by_key.setdefault(key, [])
        group = next((group for group in alike if group.takes(job, even[key])), None)
        if group is None:
            group = _Group()
            alike.append(group)
            groups.append(group)
        group.jobs[job.training_key] = job
    return tuple(
        Pack(
            name=f"{prefix}{number:03d}",
            stage=stage,
            runs=tuple(job.run for job in group.jobs.values()),
            rungs=rungs,
            split=split,
            generate=generate,
            export={key: job.export for key, job in group.jobs.items() if job.export},
            own={key: job.cell for key, job in group.jobs.items() if job.cell},
        )
        for number, group in enumerate(groups)
    )


def base_pack(
    run: Run, scenarios: Sequence[Scenario], *, layer_count: int, stage: Stage, split: Split
) -> Pack:
    """Return the pack that evaluates the untrained base under every condition of the study."""
    conditions: dict[str, Condition] = {}
    for scenario in scenarios:
        for condition in conditions_of(scenario, layer_count):
            conditions[f"{condition.name} {condition.scenario}"] = condition
    # An arm that leaves layers out is another model: the untrained base has them all.
    base = run.model_copy(update={"conditions": tuple(conditions.values()), "skip": ()})
    return Pack(name="base", stage=stage, runs=(base,), rungs=(0,), split=split)
