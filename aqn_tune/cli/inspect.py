"""`aqn-tune inspect`: what an arm attaches to the model, read back from the model itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqn_tune.cli.attached_table import attached_table
from aqn_tune.cli.inspected import Inspected, as_data, inspect_arm
from aqn_tune.cli.options import Arm, Json, Overrides, ScenarioName, StudyFile
from aqn_tune.cli.output import ProgressLine, console, print_json
from aqn_tune.errors import UserError
from aqn_tune.report.sigma_picture import sigma_svg
from aqn_tune.study.loading import load_study, resolve_scenarios

if TYPE_CHECKING:
    from rich.console import Console

ORDER = (
    "In order at a module: input (quantizer, fault), weight (noise, fault, quantizer), the module, "
    "output (noise, fault); gradients on their way back."
)
ADAPTER = "The LoRA branch passes through it (inside), or runs past it in full precision (beside)."
MOST_MISSING = 10
"""Sites that are named when they are not attached; the rest is counted."""
MOST_STAGES = 12
"""Levels of sigma that are written out, each with its steps; more than that are summed up."""

ConditionName = Annotated[
    str,
    typer.Option(
        "--condition",
        metavar="train|clean|faulty",
        help="What to attach for: the training, or one of its two evaluations.",
    ),
]
Picture = Annotated[
    Path | None,
    typer.Option(
        "--picture", metavar="FILE.svg", help="Also write sigma per layer and step as a picture."
    ),
]
EveryRow = Annotated[bool, typer.Option("--verbose", "-v", help="Show every site on its own row.")]


def command(
    study: StudyFile,
    arm: Arm,
    scenario: ScenarioName = None,
    condition: ConditionName = "train",
    picture: Picture = None,
    overrides: Overrides = None,
    json: Json = False,
    verbose: EveryRow = False,
) -> None:
    """Show what an arm hooks where, in which order, and its noise over layers and steps.

    Everything is read back from the hooks on the model, not from the study. Nothing is trained; the
    only file written is that of `--picture`. Exits with 1 when something that the study declares is
    not attached.
    """
    loaded = load_study(study, overrides or ())
    if picture is not None:
        _check_picture(picture)
    with ProgressLine(quiet=json) as progress:
        inspected = inspect_arm(loaded, arm, scenario, condition, progress=progress)
    if picture is not None:
        title = f"Noise of arm {arm} in scenario {inspected.scenario.name}"
        note = f"study {loaded.study}, {_subject(inspected)}; sigma x multiplier of the layer"
        picture.write_text(sigma_svg(inspected.picture(), title, note), encoding="utf-8")
    if json:
        print_json(as_data(inspected))
    else:
        _show(console(), inspected, picture, is_first=scenario is None, every_row=verbose)
    if inspected.found.missing:
        count = _count(len(inspected.found.missing), "site")
        typer.secho(f"declared and not attached: {count}", fg="red", err=True)
        raise typer.Exit(1)


def _show(
    out: Console, inspected: Inspected, picture: Path | None, *, is_first: bool, every_row: bool
) -> None:
    from rich.markup import escape

    found = inspected.found
    scenarios = len(resolve_scenarios(inspected.study))
    which = f" (the first of {scenarios})" if is_first and scenarios > 1 else ""
    out.print(
        f"[bold]{inspected.study.study}[/bold]  arm {inspected.arm} in scenario "
        f"{escape(inspected.scenario.name)}{which}, {_subject(inspected)}"
    )
    out.print(f"model   {_model(inspected)}", markup=False)
    if found.sites:
        layers = len({site.layer for site in found.sites})
        title = f"{_count(len(found.sites), 'site')} in {_count(layers, 'layer')}"
        out.print(f"\n[bold]{title}[/bold]")
        for part in attached_table(found.sites, every_row=every_row):
            out.print(part)
        out.print(ORDER, style="dim")
        if inspected.adapters:
            out.print(ADAPTER, style="dim")
    else:
        out.print("\nNothing is attached: the model runs as it is.")
    for missing in found.missing[:MOST_MISSING]:
        text = f"NOT ATTACHED  layer {missing.layer}, {missing.module}, {missing.site}: "
        out.print(text + missing.kind, style="bold red", markup=False)
    for line in _noise(out, inspected):
        out.print(line)
    if picture is not None:
        out.print(f"picture {picture}", soft_wrap=True, markup=False)


def _subject(inspected: Inspected) -> str:
    return {
        "train": "in training",
        "clean": "in the clean evaluation",
        "faulty": "in the faulty evaluation",
    }[inspected.condition]


def _model(inspected: Inspected) -> str:
    from aqn_tune.study.training import Lora

    method = inspected.run.training.method
    how = (
        f"LoRA of rank {method.rank} on {inspected.adapters} linear layers"
        if isinstance(method, Lora)
        else "every parameter is trained"
    )
    return f"{inspected.study.model.path}, {inspected.layers} layers; {how}"


def _noise(out: Console, inspected: Inspected) -> Iterator[Any]:
    from rich.table import Table
    from rich.text import Text

    from aqn_tune.cli.heat_map import heat_map

    if not any(inspected.sigma):
        off = "off in evaluations" if inspected.condition != "train" else "this arm has none"
        yield Text(f"noise   {off}")
        return
    yield Text("\nNoise of each layer: sigma x multiplier, over the training steps", "bold")
    yield from heat_map(inspected.picture(), out.width)
    levels = Table.grid(padding=(0, 2))
    levels.add_row("sigma", _stages(inspected.found.sigma))
    yield levels


def _stages(sigma: tuple[float, ...]) -> str:
    """Return the levels of sigma with the steps that have them: `0 at 0-9, 0.05 at 10-19`."""
    stages = []
    first = 0
    for level, group in itertools.groupby(sigma):
        last = first + len(list(group)) - 1
        stages.append(f"{level:.3g} at {first}" + (f"-{last}" if last > first else ""))
        first = last + 1
    if len(stages) <= MOST_STAGES:
        return ", ".join(stages)
    noised = [level for level in sigma if level]
    return f"{len(stages)} levels, {max(noised):.3g} to {min(noised):.3g}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _check_picture(picture: Path) -> None:
    if picture.suffix.lower() != ".svg":
        raise UserError(
            f"--picture: got {picture}; the picture is an SVG, name a file ending in .svg"
        )
    if not picture.parent.is_dir():
        raise UserError(f"--picture: there is no folder {picture.parent}")
