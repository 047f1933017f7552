"""The entry point `aqn-tune`: its commands, and what becomes of an error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from aqn_tune import __version__
from aqn_tune.cli import (
    cluster,
    compare,
    export,
    inspect,
    listing,
    plan,
    report,
    rerun,
    resume,
    run,
    status,
    train,
)
from aqn_tune.errors import Interrupted, UserError, storage_error

app = typer.Typer(
    name="aqn-tune",
    help="Find which layers should get Adaptive Quantization Noise on faulty hardware, how much, "
    "when, and whether the difference is real.",
    epilog="A study is one YAML file. `plan` says what it will cost, `run` does it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for name, function in (
    ("plan", plan.command),
    ("inspect", inspect.command),
    ("run", run.command),
    ("resume", resume.command),
    ("status", status.command),
    ("report", report.command),
    ("compare", compare.command),
    ("export", export.command),
    ("rerun", rerun.command),
    ("train", train.command),
):
    app.command(name)(function)
app.add_typer(listing.app, name="list")
app.add_typer(cluster.app, name="cluster")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aqn-tune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options of `aqn-tune` itself; the command's name comes after them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 something failed, 2 bad input, 130 interrupted."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="aqn-tune")
    except UserError as error:
        _complain(str(error))
        sys.exit(2)
    except Interrupted as error:
        _complain(str(error))
        sys.exit(130)
    except OSError as error:
        mendable = storage_error(error)
        if mendable is None:
            raise
        _complain(str(mendable))
        sys.exit(2)


def _complain(message: str) -> None:
    lines = message.splitlines() or ["unknown error"]
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(lines[0], err=True)
    for line in lines[1:]:
        typer.echo(f"       {line}", err=True)
