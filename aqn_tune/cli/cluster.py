"""`aqn-tune cluster check`: whether a cluster is fit for a study, before it is started and while it runs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from aqn_tune.cli.options import Json, Overrides
from aqn_tune.cli.output import console, print_json, table
from aqn_tune.cluster.findings import Finding
from aqn_tune.errors import UserError
from aqn_tune.study.loading import load_study
from aqn_tune.study.schema import ComputeSpec, Study

app = typer.Typer(help="Check a Ray cluster.", no_args_is_help=True)
StudyOrNot = Annotated[
    Path | None,
    typer.Argument(
        metavar="[STUDY]", help="The study that is to run there, to hold its trials against it."
    ),
]
File = Annotated[
    Path | None,
    typer.Option(
        "--file",
        "-f",
        help="File for `ray up`, or manifest of a KubeRay RayJob; by default cluster.yaml. With `--live` "
        "there need not be one.",
    ),
]
DEFAULT_FILE = Path("cluster.yaml")
Live = Annotated[
    bool,
    typer.Option("--live", help="Also join the cluster that runs and look at each of its nodes."),
]


@app.callback()
def _group() -> None:
    """Check a Ray cluster."""


@app.command()
def check(
    study: StudyOrNot = None,
    file: File = None,
    overrides: Overrides = None,
    live: Live = False,
    json: Json = False,
) -> None:
    """Say whether a cluster file is in order, a line per rule; nothing is started and no network used.

    A study is checked as the launch line in the file would run it: with its `--set`, then those given here.

    With `--live` a small task runs on every node of the cluster that runs at `compute.address` (by default
    the one on this machine): it looks for the output folder, the code, the libraries and the token.
    Exits with 2 when anything is wrong.
    """
    if study is None and overrides:
        raise UserError("--set: it changes a study; name one")
    if file is None and (DEFAULT_FILE.exists() or not live):
        file = DEFAULT_FILE
    found = _look(file, study, overrides or [], live)
    wrong = sum(one.status == "wrong" for one in found)
    if json:
        lines = [one._asdict() for one in found]
        print_json({"file": file and str(file), "ok": not wrong, "findings": lines})
    else:
        _show("the cluster" if file is None else str(file), found, wrong)
    if wrong:
        raise typer.Exit(2)


def _look(file: Path | None, path: Path | None, overrides: list[str], live: bool) -> list[Finding]:
    from aqn_tune.cluster.check import check_file
    from aqn_tune.cluster.document import Checked

    study = _study(path, file, overrides)
    read, found = check_file(file, study) if file is not None else (None, [])
    if not live:
        return found
    output = Checked(read, study).output if read is not None else None
    folder = Path(output or (study.output if study is not None else "runs")).expanduser().resolve()
    from aqn_tune.cluster.live import look_at_nodes

    if study is None:
        return [*found, *look_at_nodes(folder, ComputeSpec())]
    model = study.model.path if Path(study.model.path).expanduser().is_dir() else ""
    return [*found, *look_at_nodes(folder, study.compute, model=model)]


def _study(path: Path | None, file: Path | None, overrides: list[str]) -> Study | None:
    """Return the study as the launch line in the file runs it; a file that cannot be read has none."""
    from aqn_tune.cluster.document import launch_overrides, read_cluster_file

    if path is None:
        return None
    load_study(path, overrides)  # what is wrong with these two has nothing to do with the file
    launched: list[str] = []
    if file is not None:
        with suppress(UserError):  # the first rule says so
            launched = launch_overrides(read_cluster_file(file))
    return load_study(path, [*launched, *overrides])


def _show(title: str, found: list[Finding], wrong: int) -> None:
    out = console()
    rows = [
        (one.rule, one.status, f"{one.place}: {one.text}" if one.place else one.text)
        for one in found
    ]
    out.print(table(title, ("rule", "", "what"), rows))
    rules = len({one.rule for one in found if one.rule != "node"})
    nodes = sum(one.rule == "node" for one in found)
    looked = f"{rules} rules" + (f", {nodes} nodes" if nodes else "")
    out.print(f"{looked}: {f'{wrong} wrong' if wrong else 'all in order'}", markup=False)
