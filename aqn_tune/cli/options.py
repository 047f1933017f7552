"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="The study's YAML file.")]
Target = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Folder of a study, or the study's YAML file.")
]
Arm = Annotated[str, typer.Option("--arm", help="A control, or one of the study's own arms.")]
ScenarioName = Annotated[
    str | None, typer.Option("--scenario", help="Scenario, by default the first.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the study, for example `training.steps=50`; may be repeated.",
    ),
]
PackSize = Annotated[
    int | None,
    typer.Option(
        "--pack",
        min=1,
        metavar="N",
        help="Most runs that share a forward pass, in place of `compute.pack_replicas`; 1 trains "
        "every run alone. The numbers stay the same (on a GPU, and where this processor adds up "
        "in another order in other shapes, to rounding).",
    ),
]
NoReuse = Annotated[
    bool,
    typer.Option(
        "--no-reuse",
        help="Train a run for every cell, also where another cell or another study has trained the "
        "same; what is trained again must give the recorded numbers. Like `compute.reuse: false`.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="Say more; twice for debugging.")
]


def with_compute(overrides: Sequence[str] | None, pack: int | None, no_reuse: bool) -> list[str]:
    """Return the overrides of a study with those that `--pack` and `--no-reuse` stand for, last."""
    chosen = list(overrides or ())
    if pack is not None:
        chosen.append(f"compute.pack_replicas={pack}")
    if no_reuse:
        chosen.append("compute.reuse=false")
    return chosen
