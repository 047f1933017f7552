"""`aqn-tune report`: write the report again from the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aqn_tune.cli.options import Json, Overrides, Quiet, Target
from aqn_tune.cli.output import console, print_json
from aqn_tune.cli.targets import find_target

if TYPE_CHECKING:
    from aqn_tune.study.folder import StudyFolder


def command(
    target: Target, overrides: Overrides = None, json: Json = False, quiet: Quiet = False
) -> None:
    """Write report.html, report.md, verdict.json and runs.parquet from the ledger, and sum them up.

    Works on a study that is still running, and says what is missing.
    """
    from aqn_tune.report.write import write_report

    folder = find_target(target, overrides or ()).folder
    write_report(folder)
    show_results(folder, json=json, quiet=quiet)


def show_results(folder: StudyFolder, *, json: bool, quiet: bool) -> None:
    """Print what a study came to and where to read on, or verdict.json as it is."""
    from aqn_tune.report.summary import summary_text

    if json:
        from aqn_tune.report.write import verdict_of

        print_json(verdict_of(folder))
        return
    if quiet:
        return
    out = console()
    out.print(summary_text(folder, markup=True), soft_wrap=True)
    out.print()
    out.print(f"report       {folder.report}", soft_wrap=True, markup=False)
    logs = folder.tensorboard
    out.print(f"tensorboard  --logdir {logs}/by_arm", soft_wrap=True, markup=False)
    out.print(
        f"             --logdir {logs}    (every seed, HParams)", soft_wrap=True, markup=False
    )
