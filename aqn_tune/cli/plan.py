"""`aqn-tune plan`: what a study will do, what it will cost and what it can detect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from aqn_tune.cli.options import Json, NoReuse, Overrides, PackSize, StudyFile, with_compute
from aqn_tune.cli.output import console, duration, print_json, size, table
from aqn_tune.study.compiling import Compiled
from aqn_tune.study.effort import StagePlan
from aqn_tune.study.loading import load_study
from aqn_tune.study.plan import MOST_STAGES, Plan, ScenarioPlan, SigmaStage, make_plan

if TYPE_CHECKING:
    from rich.table import Table


def command(
    study: StudyFile,
    overrides: Overrides = None,
    pack: PackSize = None,
    no_reuse: NoReuse = False,
    json: Json = False,
) -> None:
    """Say what a study will do: scenarios, arms, runs, time, disk, and the effect it can detect.

    Nothing is trained and nothing is written. What other studies have trained already is counted as
    if they had not.
    """
    plan = make_plan(load_study(study, with_compute(overrides, pack, no_reuse)))
    if json:
        print_json(plan)
        return
    out = console()
    out.print(f"[bold]{plan.study}[/bold]  {plan.hash}", highlight=False)
    state = "is there, a run continues it" if plan.exists else "new"
    out.print(f"folder  {plan.folder} ({state})", soft_wrap=True)
    out.print(
        f"model   {plan.model}, {plan.layer_count} layers; {plan.training_steps} steps per training"
    )
    for shown in (_scenarios(plan), _arms(plan), _schedule(plan), _work(plan)):
        out.print(shown)
    for line in _closing(plan):
        out.print(line, soft_wrap=True, markup=False)
    for text in plan.cautions:
        out.print(f"caution   {text}", soft_wrap=True, markup=False)


def _scenarios(plan: Plan) -> Table:
    rows = [
        (s.name, s.during, _device(s), ", ".join(a.arm for a in s.arms if a.reason) or "-")
        for s in plan.scenarios
    ]
    return table("Scenarios", ("scenario", "fault acts", "device", "arms n/a"), rows)


def _device(scenario: ScenarioPlan) -> str:
    parts = (*scenario.faults, *scenario.quantization, scenario.device)
    return "; ".join(part for part in parts if part)


def _arms(plan: Plan) -> Table:
    """Return the arms, each once where it is the same in every scenario."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for scenario in plan.scenarios:
        for row in _arm_rows(scenario):
            rows.setdefault(row, []).append(scenario.name)
    total = len(plan.scenarios)
    lines = [
        (*row, "all" if len(names) == total else ", ".join(names)) for row, names in rows.items()
    ]
    return table("Arms", ("arm", "carrier", "noised layers", "#dose", "scenarios"), lines)


def _arm_rows(scenario: ScenarioPlan) -> Iterator[tuple[str, ...]]:
    for arm in scenario.arms:
        if arm.reason:
            yield (arm.arm, "n/a", arm.reason, "")
            continue
        layers = arm.layers if arm.carrier else "no noise"
        where = f"{layers}; {arm.otherwise}" if arm.otherwise else layers
        yield (arm.arm, arm.carrier or "-", where, f"{arm.dose:g}" if arm.carrier else "")


def _schedule(plan: Plan) -> Table:
    rows = [_stage_row(stage) for stage in plan.schedule]
    if len(rows) > MOST_STAGES:
        half = MOST_STAGES // 2
        rows = [*rows[:half], ("...", "..."), *rows[1 - half :]]
    return table("Noise of the controls", ("steps", "#sigma"), rows)


def _stage_row(stage: SigmaStage) -> tuple[str, str]:
    steps = f"{stage.first_step}-{stage.last_step}"
    if stage.last_sigma == stage.sigma:
        return steps, f"{stage.sigma:.3g}"
    return steps, f"{stage.sigma:.3g} to {stage.last_sigma:.3g}"


def _work(plan: Plan) -> Table:
    rows = []
    for name, stage in (("search", plan.search), ("confirm", plan.confirm)):
        if stage is not None:
            rows.append(_work_row(name, stage))
    columns = ("stage", "#seeds", "#trainings", "#steps", "#at most", "#evaluations", "#rows each")
    return table("Work", columns, rows)


def _work_row(name: str, stage: StagePlan) -> tuple[object, ...]:
    return (
        name,
        len(stage.seeds),
        f"{stage.expected.trainings:,}",
        f"{stage.expected.steps:,}",
        f"{stage.most.steps:,}",
        f"{stage.expected.evaluations:,}",
        stage.split_rows,
    )


def _closing(plan: Plan) -> Iterator[str]:
    share = "share" if plan.reuse else "do not share (--no-reuse) and take"
    if plan.search is not None:
        rungs = ", ".join(str(step) for step in plan.rungs)
        yield (
            f"search    {plan.configs} configs in each of {len(plan.scenarios)} scenarios beside "
            f"the controls; rungs at steps {rungs}; {plan.search.cells} control cells {share} "
            f"{plan.search.unique} trainings"
        )
    yield (
        f"confirm   {plan.confirm.cells} cells of controls and own arms {share} "
        f"{plan.confirm.unique} trainings; finalists come on top"
    )
    yield f"packs     up to {plan.pack_replicas} runs of one shape share a forward pass"
    found = plan.detectable
    yield (
        f"claims    {found.family} primary contrasts ("
        + "; ".join(f"{arm} vs {reference}" for arm, reference in found.contrasts)
        + f") over {len(plan.scenarios)} scenarios, familywise alpha {found.alpha:g}, "
        f"margin {found.margin_text}"
    )
    if found.looks:
        *before, last = (str(seeds) for seeds in found.looks)
        yield (
            f"looks     at {', '.join(before)} and {last} seeds, each judged at alpha "
            f"{found.look_alpha:.3g}; the confirmation ends at the first that leaves nothing to decide, so "
            f"all {last} seeds, which are counted above and below, are the most that it takes"
        )
    where = f"n = {found.replicates}" + (", the last look" if found.looks else "")
    yield (
        f"detects   {found.effect_sd:.2f} sd of the paired difference with power {found.power:g} "
        f"at {where}, in the hardest place of the family (level {found.level:.2g}); "
        f"the sign-flip p cannot fall below {found.floor:.2g}"
    )
    estimate = plan.estimate
    if estimate.seconds is None or estimate.most_seconds is None:
        yield "time      not measured (a first run records it)"
    else:
        who = f"{plan.workers} at a time" if plan.workers else "one at a time (no cluster asked)"
        yield (
            f"time      about {duration(estimate.seconds)}, at most "
            f"{duration(estimate.most_seconds)}, {who}; {estimate.source}"
        )
    if estimate.compiled is not None:
        yield _compiled(estimate.compiled)
    disk = "not measured" if estimate.bytes is None else f"about {size(estimate.bytes)}"
    yield f"disk      {disk}"


def _compiled(found: Compiled) -> str:
    """Say whether compiled layers would pay in this study."""
    choice = "pays here" if found.pays else "does not pay here"
    return (
        f"compile   training.compile {choice}: about {duration(found.compiled_seconds)}, of which compiling "
        f"takes {duration(found.compile_seconds)} or less, against "
        f"{duration(found.plain_seconds)} without; {found.source}"
    )
