"""The report in a few lines, for the end of a run in a terminal."""

from __future__ import annotations

from aqn_tune.report.loading import load_results
from aqn_tune.report.page import answers, tally
from aqn_tune.report.results import Results
from aqn_tune.report.scenario_tables import DURING
from aqn_tune.report.text import count
from aqn_tune.study.folder import StudyFolder

COLOURS = {
    "better": "green",
    "worse": "red",
    "equivalent": "blue",
    "inconclusive": "yellow",
    "harmless": "green",
    "degrading": "yellow",
    "catastrophic": "red",
    "undetermined": "dim",
}


def summary_text(folder: StudyFolder, *, markup: bool = False) -> str:
    """Return the verdicts of a study, or what is missing for them.

    Args:
        folder: of the study.
        markup: colour the words with rich's console markup; without it the text is plain.

    Raises:
        UserError: no study in the folder, or files of another version.
    """
    return summary_of(load_results(folder), markup=markup)


def summary_of(results: Results, *, markup: bool = False) -> str:
    """Return the summary of results that are already loaded; see `summary_text`."""
    paint = _Painter(markup)
    lines = [paint.bold(results.study.study)]
    if results.gaps:
        lines.append("Not complete yet:" if results.shows_verdicts else "No claims yet:")
        lines += [f"  - {paint.plain(gap)}" for gap in results.gaps]
    if results.shows_verdicts:
        lines.append(paint.plain(tally(results) + "."))
        look = results.evidence.look
        if look is not None and look.over:
            lines.append(paint.plain(f"Confirmation: {look.words}."))
    for during in results.during_values:
        found = answers(results, during)
        if found:
            lines.append(f"{DURING[during].capitalize()}:")
        for answer in found:
            regime = paint(answer.regime.text, answer.regime.kind)
            lines.append(f"  {paint.plain(answer.scenario)}: {regime}, {answer.effect}")
            for label, mark in answer.verdicts:
                symbol = paint(mark.symbol, mark.kind)
                lines.append(f"    {symbol} {paint.plain(label)} {mark.text}")
            if answer.conclusion:
                lines.append(f"    -> {paint.plain(answer.conclusion)}")
    for folder, number in results.reused.items():
        lines.append(paint.plain(f"{count(number, 'training')} reused from {folder}"))
    if results.failed:
        lines.append(paint(f"{count(len(results.failed), 'run')} failed", "worse"))
    return "\n".join(lines)


class _Painter:
    """Colours words when asked to, and keeps rich from reading brackets as colours."""

    def __init__(self, markup: bool) -> None:
        self._markup = markup

    def __call__(self, text: str, kind: str) -> str:
        colour = COLOURS.get(kind, "")
        return f"[{colour}]{text}[/{colour}]" if self._markup and colour else text

    def plain(self, text: str) -> str:
        return text.replace("[", "\\[") if self._markup else text

    def bold(self, text: str) -> str:
        return f"[bold]{text}[/bold]" if self._markup else text
