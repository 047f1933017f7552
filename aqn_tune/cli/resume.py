"""`aqn-tune resume`: continue the study in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aqn_tune.cli.options import Json, NoReuse, Overrides, PackSize, Quiet, Verbose, with_compute
from aqn_tune.cli.output import set_verbosity
from aqn_tune.cli.run import run_and_report
from aqn_tune.errors import UserError
from aqn_tune.study.difference import differences, differences_text
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.loading import load_study
from aqn_tune.study.schema import Study

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a study.")]


def command(
    folder: Folder,
    overrides: Overrides = None,
    pack: PackSize = None,
    no_reuse: NoReuse = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Continue the study in a folder: the same as `aqn-tune run` with the YAML that it came from.

    `--set` may change where and how it runs (`compute`) and ask for another generation of confirm seeds;
    what would make another study of it is refused, key by key.
    """
    set_verbosity(verbose)
    study = study_of(folder, with_compute(overrides, pack, no_reuse))
    run_and_report(study, json=json, quiet=quiet)


def study_of(path: Path, overrides: list[str]) -> Study:
    """Return the study in a folder with `overrides`, to be continued there.

    Raises UserError where the folder holds none, where overrides make it another study, and where the
    folder has lost the name that a study's folder has.
    """
    from aqn_tune.report.results import load_study_file

    if not path.is_dir():
        raise UserError(
            f"{path}: not a folder; `aqn-tune resume` takes the folder of a study, `aqn-tune run` its YAML"
        )
    folder = StudyFolder(path.resolve())
    recorded = load_study_file(folder)
    study = load_study(folder.study, overrides)
    if study.output != recorded.output:
        raise UserError(
            f"--set output={study.output}: {path} is continued where it is; move the folder to have its "
            "results elsewhere, or leave the option out"
        )
    study = study.model_copy(update={"output": str(folder.root.parent)})
    changed = differences(recorded, study)
    if changed:
        raise UserError(
            f"{path}: the study that is continued cannot become another one ({differences_text(changed)}); "
            "`aqn-tune run` with a YAML that says so starts it in a folder of its own"
        )
    expected = study_folder(study).root
    if expected != folder.root:
        raise UserError(
            f"{path}: the folder of this study is called {expected.name}; give it that name to continue it"
        )
    return study
