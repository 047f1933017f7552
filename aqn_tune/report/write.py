"""The one way to make a study's report: every file, from the study, the lock and the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from aqn_tune.report.files import replace_text
from aqn_tune.report.loading import load_results
from aqn_tune.report.manifest import read_manifest
from aqn_tune.report.page import context, render_html, render_markdown
from aqn_tune.report.parquet import write_parquet
from aqn_tune.report.pictures import write_pictures
from aqn_tune.report.results import Results
from aqn_tune.report.tensorboard import rebuild
from aqn_tune.report.verdict_file import verdict_content, verdict_json
from aqn_tune.study.folder import StudyFolder


class ReportPaths(NamedTuple):
    """The files of a report."""

    html: Path
    """Self-contained page with charts."""
    markdown: Path
    """The same as text."""
    verdict: Path | None
    """For machines; None while the study makes no claims."""
    runs: Path
    """One line per cell and condition."""
    tensorboard: Path
    """Root for `tensorboard --logdir`."""


def write_report(folder: StudyFolder, *, tensorboard: bool = True) -> ReportPaths:
    """Make every file of the report anew; call it at any time, as often as wanted.

    A study that is not complete gets a report that says what is missing and makes no claims, and no
    `verdict.json`: that file marks the results of a confirm generation as shown.

    Args:
        folder: holds study.yaml; ledger.jsonl and confirm.lock as far as the study has come.
        tensorboard: make the TensorBoard logs anew as well; leave them to the live writer while
            the study runs, but for the pictures and the text of the report, which have a file of their own.

    Raises:
        UserError: no study in the folder, or files of another version; see also `write_pictures`, which
            comes when all else is written.
    """
    results = load_results(folder)
    values = context(results)
    replace_text(folder.report, render_html(values))
    markdown = render_markdown(values)
    replace_text(folder.report_markdown, markdown)
    write_parquet(results, folder.runs)
    if tensorboard:
        rebuild(folder, results.study)
    if results.makes_claims:
        replace_text(folder.verdict, verdict_json(verdict_content(results, times=_times(results))))
    # Last: they need more of a machine than the rest, which is what counts.
    write_pictures(folder.tensorboard, values, markdown)
    return ReportPaths(
        html=folder.report,
        markdown=folder.report_markdown,
        verdict=folder.verdict if results.makes_claims else None,
        runs=folder.runs,
        tensorboard=folder.tensorboard,
    )


def verdict_of(folder: StudyFolder) -> dict[str, Any]:
    """Return what `verdict.json` says, or would say of a study that is not complete.

    Nothing is written. `complete` tells the two apart; see `verdict_content`.
    """
    results = load_results(folder)
    return verdict_content(results, times=_times(results))


def _times(results: Results) -> dict[str, Any]:
    manifest = read_manifest(results.folder)
    return {
        "started": manifest.get("started"),
        "finished": manifest.get("finished"),
        "seconds": {cost.stage: cost.seconds for cost in results.evidence.costs},
    }
