"""The one way to make a study's report: every file, from the study, the lock and the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from aqn_tune.report.files import replace_text
from aqn_tune.report.loading import load_results
from aqn_tune.report.manifest import read_manifest
from aqn_tune.report.page import context, render_html, render_markdown
from aqn_tune.report.parquet import write_parquet
from aqn_tune.report.tensorboard import rebuild
from aqn_tune.report.verdict_file import verdict_json
from aqn_tune.study.folder import StudyFolder


class ReportPaths(NamedTuple):
    """The files of a report."""

    html: Path
    """Self-contained page with charts."""
    markdown: Path
    """The same as text."""
    verdict: Path
    """For machines; `complete` is false while claims are not made."""
    runs: Path
    """One line per cell and condition."""
    tensorboard: Path
    """Root for `tensorboard --logdir`."""


def write_report(folder: StudyFolder, *, tensorboard: bool = True) -> ReportPaths:
    """Make every file of the report anew; call it at any time, as often as wanted.

    A study that is not complete gets a report that says what is missing and makes no claims.

    Args:
        folder: holds study.yaml; ledger.jsonl and confirm.lock as far as the study has come.
        tensorboard: make the TensorBoard logs anew as well.

    Raises:
        UserError: no study in the folder, or files of another version.
    """
    results = load_results(folder)
    values = context(results)
    manifest = read_manifest(folder)
    times = {
        "started": manifest.get("started"),
        "finished": manifest.get("finished"),
        "seconds": {cost.stage: cost.seconds for cost in results.evidence.costs},
    }
    replace_text(folder.report, render_html(values))
    replace_text(folder.report_markdown, render_markdown(values))
    write_parquet(results, folder.runs)
    if tensorboard:
        rebuild(folder, results.study)
    # Last, because its existence marks the results of a generation as shown.
    replace_text(folder.verdict, verdict_json(results, times=times))
    return ReportPaths(
        html=folder.report,
        markdown=folder.report_markdown,
        verdict=folder.verdict,
        runs=folder.runs,
        tensorboard=folder.tensorboard,
    )
