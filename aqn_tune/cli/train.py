"""`aqn-tune train`: one arm, one seed, no search; prints its losses and exports the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqn_tune.cli.options import Arm, Json, Overrides, Quiet, ScenarioName, StudyFile, Verbose
from aqn_tune.cli.output import ProgressLine, console, print_json, set_verbosity, table
from aqn_tune.cli.targets import find_arm, find_scenario
from aqn_tune.errors import UserError
from aqn_tune.study.loading import layer_count, load_study, make_setting

if TYPE_CHECKING:
    from aqn_tune.study.engine import Engine
    from aqn_tune.study.schema import Study

SeedIndex = Annotated[
    int, typer.Option("--seed-index", min=0, help="Which of the search seeds to train with.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for the adapter; by default below the study's output."),
]


def command(
    study: StudyFile,
    arm: Arm,
    scenario: ScenarioName = None,
    seed_index: SeedIndex = 0,
    out: Out = None,
    overrides: Overrides = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Train one arm under one scenario, evaluate it on the validation split, export its adapter.

    Uses a search seed: the confirm seeds stay unseen. Nothing enters the study's ledger.
    """
    set_verbosity(verbose)
    loaded = load_study(study, overrides or ())
    with ProgressLine(quiet=quiet) as progress:
        from aqn_tune.training.engine import ENGINE

        result = train_arm(
            loaded, arm, scenario, seed_index, out=out, engine=ENGINE, progress=progress
        )
    if json:
        print_json(result)
    elif not quiet:
        columns = ("condition", "#loss", "#exact match")
        rows = [
            (f"{e['condition']} {e['scenario']}".strip(), e["loss"], e["exact_match"])
            for e in result["evaluations"]
        ]
        title = f"{result['arm']} in {result['scenario']}, seed {result['seed']}"
        printer = console()
        printer.print(table(title, columns, rows))
        printer.print(f"adapter  {result['adapter']}", markup=False, soft_wrap=True)
    if result["status"] == "failed":
        typer.secho(f"the training failed: {result['error']}", fg="red", err=True)
        raise typer.Exit(1)


def train_arm(
    study: Study,
    arm: str,
    scenario: str | None,
    seed_index: int,
    *,
    out: Path | None,
    engine: Engine,
    progress: ProgressLine,
) -> dict[str, Any]:
    """Train one arm with one search seed and return its final losses as plain data.

    Raises UserError for an unknown arm or scenario, an arm that cannot exist there, and an adapter
    folder that holds something already.
    """
    from aqn_tune.study.cells import resolve_run
    from aqn_tune.study.runs import Pack
    from aqn_tune.study.seeds import replicate_seed

    spec, found = find_arm(study, arm), find_scenario(study, scenario)
    name = found.name
    setting = make_setting(study)
    layers = layer_count(study.model)
    seed = replicate_seed(study.seed, "search", seed_index)
    run = resolve_run(study, found, spec, seed=seed, layer_count=layers)
    key = run.training_key(setting)
    label = f"{study.study}-{name}-{arm}-s{seed_index}-{key[:8]}"
    folder = (out or Path(study.output).expanduser() / "trained" / label).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out: {folder} holds something already; name another folder")
    pack = Pack(
        name="train",
        stage="search",
        runs=(run,),
        rungs=(run.training.steps,),
        split="validation",
        export={key: str(folder)},
    )
    progress(f"training {arm} in {name}, {run.training.steps} steps")
    shared = engine.load(setting, pack.split, run.training.max_length)
    training = engine.open_pack(pack, setting, shared)
    try:
        report = training.advance()
    finally:
        training.close()
    (row,) = report.trainings
    return {
        "arm": arm,
        "scenario": name,
        "seed": seed,
        "training_key": key,
        "status": row.status,
        "error": row.error,
        "steps": row.step_reached,
        "seconds": row.seconds,
        "evaluations": [e.model_dump(mode="json") for e in report.evaluations],
        "adapter": row.adapter,
    }
