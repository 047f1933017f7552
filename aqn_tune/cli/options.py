"""Options that several commands share."""

from __future__ import annotations

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
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="Say more; twice for debugging.")
]
