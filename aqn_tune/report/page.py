"""The report page, as HTML and as Markdown, from the same tables."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from aqn_tune.evidence.exploratory import Exploratory
from aqn_tune.evidence.regimes import Regime
from aqn_tune.evidence.verdicts import Verdict
from aqn_tune.report.curve import EXACT_MATCH, LOSS, curve_svg
from aqn_tune.report.custom_scalars import folder_of
from aqn_tune.report.device_tables import device_tables, effect_text
from aqn_tune.report.exploratory_table import exploratory_table, explored
from aqn_tune.report.forest import forest_svg
from aqn_tune.report.generated_table import generated_tables
from aqn_tune.report.margins import margin_fact, no_margin
from aqn_tune.report.mechanism_figure import CAPTION, DEFINITION, mechanism_sections
from aqn_tune.report.record_tables import cost_table, failed_table, missing_table, search_table
from aqn_tune.report.results import Results, cell_id
from aqn_tune.report.scenario_tables import (
    DURING,
    arms_table,
    recovery_table,
    scenario_table,
    sweep_label,
)
from aqn_tune.report.search_section import DEFINITION as SEARCH_DEFINITION
from aqn_tune.report.search_section import search_sections
from aqn_tune.report.table import Mark, Table, escape
from aqn_tune.report.text import count
from aqn_tune.report.verdict_tables import (
    GIVEN_THE_TEST_SET,
    alpha_text,
    contrast_label,
    contrasts_table,
    detectable_text,
    legend_table,
    look_text,
    luck_table,
    seeds_text,
    verdict_mark,
)
from aqn_tune.study.folder import study_hash
from aqn_tune.study.scenario import During

CAUTION = {
    Regime.HARMLESS: "the fault costs next to nothing here, so there is nothing to win",
    Regime.CATASTROPHIC: "worse than not training at all; a better arm may still be useless here",
    Regime.UNDETERMINED: "the regime is unknown",
}


class Answer(NamedTuple):
    """What the study says about one scenario."""

    scenario: str
    regime: Mark
    effect: str
    """What the device did to the values that it computes."""
    verdicts: tuple[tuple[str, Mark], ...]
    """Each primary contrast with its verdict."""
    conclusion: str
    """The sentence of the decision matrix, empty when the study declares none."""
    caution: str
    """Why the regime, or a margin that is missing, limits what can be said; empty where neither does."""


class Part(NamedTuple):
    """Everything about the scenarios in which the fault acts at the same time."""

    title: str
    answers: tuple[Answer, ...]
    curves: tuple[str, ...]
    scenarios: Table
    devices: tuple[Table, ...]
    """What number formats and draws of the fault did; empty where there are none."""
    forest: str
    contrasts: Table | None
    recovery: Table
    exploratory: Table | None
    arms: tuple[Table, ...]


def tally(results: Results) -> str:
    """Return how often each verdict was given, every symbol with its word."""
    given = Counter(one.verdict for each in results.evidence.scenarios for one in each.contrasts)
    total = count(sum(given.values()), "primary contrast")
    return f"{total}: " + ", ".join(f"{given[v]} {v.word} ({v.value})" for v in Verdict)


def answers(results: Results, during: During) -> tuple[Answer, ...]:
    """Return one answer per scenario; nothing before there are verdicts."""
    if not results.shows_verdicts:
        return ()
    return tuple(
        Answer(
            scenario=sweep_label(scenario),
            regime=Mark(str(evidence.regime.regime), str(evidence.regime.regime)),
            effect=effect_text(results, scenario, evidence),
            verdicts=tuple(
                (contrast_label(one), verdict_mark(one.verdict)) for one in evidence.contrasts
            ),
            conclusion=evidence.decision.say if evidence.decision else "",
            caution="; ".join(
                text for text in (CAUTION.get(evidence.regime.regime), no_margin(evidence)) if text
            ),
        )
        for scenario, evidence in results.evidence_of(during)
    )


def _part(results: Results, during: During, found: tuple[Exploratory, ...]) -> Part:
    claims = results.shows_verdicts
    pairs = results.evidence_of(during)
    curves = tuple(curve_svg(results, during, quantity) for quantity in (LOSS, EXACT_MATCH))
    return Part(
        title=DURING[during].capitalize(),
        answers=answers(results, during),
        curves=tuple(curve for curve in curves if curve),
        scenarios=scenario_table(results, during),
        devices=(*device_tables(results, during), *generated_tables(results, during)),
        forest=forest_svg(results, during) if claims else "",
        contrasts=contrasts_table(results, during) if claims else None,
        recovery=recovery_table(results, during),
        exploratory=exploratory_table(results, during, found),
        arms=tuple(arms_table(results, scenario, evidence) for scenario, evidence in pairs),
    )


def context(results: Results) -> dict[str, Any]:
    """Return what the templates print."""
    study, declared = results.study, results.evidence.declared
    confirmed = any(cell.stage == "confirm" for cell in results.cells)
    found = explored(results)
    records = (
        luck_table(results) if results.makes_claims else None,
        search_table(results),
        failed_table(results),
        missing_table(results),
        cost_table(results),
    )
    example = next(
        (cell_id(c) for c in results.cells if c.stage == "confirm" and c.arm == "fault_only"),
        next((cell_id(cell) for cell in results.cells), "confirm/SCENARIO/ARM/REPLICATE"),
    )
    # As the user named it: a page that is passed on should not name folders of one machine.
    place = f"{study.output}/{results.folder.root.name}"
    return {
        "study": study,
        "hash": study_hash(study),
        "lock_hash": results.lock_hash,
        "gaps": results.gaps,
        "claims": results.shows_verdicts,
        "confirmed": confirmed,
        "tally": tally(results) if results.shows_verdicts else "",
        "margin": margin_fact(results),
        "alpha": alpha_text(results),
        "seeds": seeds_text(results),
        "look": look_text(results),
        "generation": declared.generation,
        "detectable": detectable_text(results),
        "given_the_test_set": GIVEN_THE_TEST_SET,
        "legend": legend_table(results),
        "parts": tuple(_part(results, during, found) for during in results.during_values),
        "mechanism": mechanism_sections(results),
        "mechanism_definition": DEFINITION,
        "mechanism_caption": CAPTION,
        "search": search_sections(results),
        "search_definition": SEARCH_DEFINITION,
        "records": tuple(table for table in records if table is not None),
        "rerun": f"aqn-tune rerun {place} {example}",
        "tensorboard": f"tensorboard --logdir {place}/{results.folder.tensorboard.name}",
        "by_arm": folder_of("confirm"),
    }


def render_html(values: dict[str, Any]) -> str:
    """Return the page: one file, no scripts, nothing loaded from elsewhere."""
    return str(_environment(html=True).get_template("report.html.j2").render(values))


def render_markdown(values: dict[str, Any]) -> str:
    """Return the same report as GitHub Markdown, without the charts."""
    return str(_environment(html=False).get_template("report.md.j2").render(values))


def _environment(*, html: bool) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("aqn_tune.report"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = Markup
    environment.filters["md"] = escape
    environment.tests["mark"] = lambda cell: isinstance(cell, Mark)
    return environment
