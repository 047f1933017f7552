"""`aqn-tune export`: a study as CSV files and as Optuna studies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aqn_tune.cli.options import Json, Overrides, Target
from aqn_tune.cli.output import console, print_json
from aqn_tune.cli.targets import find_target
from aqn_tune.study.loading import resolve_scenarios

if TYPE_CHECKING:
    from aqn_tune.report.export import Exported
    from aqn_tune.study.folder import StudyFolder
    from aqn_tune.study.schema import Study

To = Annotated[
    Path | None,
    typer.Option(
        "--to",
        metavar="DIR",
        help="Folder for the files; by default `export` in the study's folder.",
    ),
]


def command(target: Target, overrides: Overrides = None, to: To = None, json: Json = False) -> None:
    """Write runs.csv, arms.csv, contrasts.csv, configs.csv and optuna.sqlite, for other programs.

    Works on a study that is still running. The database opens with
    `optuna-dashboard sqlite:///DIR/optuna.sqlite`.
    """
    study, folder = find_target(target, overrides or ())
    found = export_study(study, folder, to if to is not None else folder.root / "export")
    if json:
        print_json([{"path": str(one.path), "lines": one.lines} for one in found])
        return
    out = console()
    for one in found:
        out.print(f"{one.lines:6d}  {one.path}", markup=False, soft_wrap=True)


def export_study(study: Study, folder: StudyFolder, target: Path) -> tuple[Exported, ...]:
    """Write a study's tables, and of one with a search its Optuna studies, into the folder `target`.

    Raises UserError as `export_tables` does.
    """
    from aqn_tune.ledger import Ledger
    from aqn_tune.report.export import Exported, export_tables
    from aqn_tune.search.export import export_optuna

    found = export_tables(folder, target)
    ledger = Ledger(folder.ledger)
    asked = sum(row.event == "asked" for row in ledger.search)
    if study.search is None or not asked:
        return found
    database = target / "optuna.sqlite"
    export_optuna(database, study, resolve_scenarios(study), ledger)
    return (*found, Exported(database, asked))
