"""The margin in words, for the pages: which kind it is, what it comes to, and where that comes from."""

from __future__ import annotations

from aqn_tune.evidence.assemble import ScenarioEvidence
from aqn_tune.evidence.margins import margin_words
from aqn_tune.report.results import Results
from aqn_tune.report.scenario_tables import NATS, sweep_label
from aqn_tune.study.margin import AbsoluteMargin
from aqn_tune.study.scenario import During


def margin_fact(results: Results) -> str:
    """Return the margin in one line: its kind, and the nats that it comes to over all scenarios.

    Before a number is known there is the kind alone.
    """
    rule = results.evidence.declared.margin_rule
    margins = [one.margin for one in results.evidence.scenarios]
    found = sorted(one.nats for one in margins if one.nats is not None)
    if isinstance(rule, AbsoluteMargin) or not found:
        return rule.words()
    low, high = (f"{end:.3g}" for end in (found[0], found[-1]))
    text = f"{rule.words()}: {low if low == high else f'{low} to {high}'} {NATS}"
    lacking = len(margins) - len(found)
    return text + (f", none in {lacking} of {len(margins)} scenarios" if lacking else "")


def margin_notes(results: Results, during: During) -> tuple[str, ...]:
    """Return the margin of the scenarios in which the fault acts `during`, a sentence per margin."""
    rule = results.evidence.declared.margin_rule
    found: dict[str, list[str]] = {}
    for scenario, evidence in results.evidence_of(during):
        found.setdefault(margin_words(rule, evidence.margin), []).append(sweep_label(scenario))
    if len(found) == 1:
        return tuple(f"Margin: {text}." for text in found)
    return tuple(f"Margin of {', '.join(labels)}: {text}." for text, labels in found.items())


def no_margin(evidence: ScenarioEvidence) -> str:
    """Return why nothing can be called equivalent in a scenario, empty where something can."""
    if evidence.margin.nats is not None:
        return ""
    return f"no margin here, so that nothing can be called equivalent: {evidence.margin.reason}"
