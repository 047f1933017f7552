"""The claims: primary contrasts with their verdicts, and how much of a finalist's win was luck."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from aqn_tune.evidence.verdicts import Judged, Verdict
from aqn_tune.report.margins import margin_notes
from aqn_tune.report.results import Results
from aqn_tune.report.scenario_tables import DURING, NATS, sweep_label
from aqn_tune.report.table import Cell, Column, Mark, Table
from aqn_tune.report.text import (
    NONE,
    confidence,
    count,
    interval,
    number,
    p_value,
    percent,
    plain,
    signed,
)
from aqn_tune.study.scenario import During

GIVEN_THE_TEST_SET = "Intervals hold over training seeds given this test set."

ENDED_EARLY = (
    "It ended early: improvements that are found at an early look lean away from zero, and their sd towards "
    "it. The intervals hold at their level over all confirmations, not over those alone that end early."
)

MEANING = {
    Verdict.BETTER: "the arm has the smaller loss: Holm p < alpha, interval not within the margin",
    Verdict.WORSE: "the arm has the larger loss, by the same rule",
    Verdict.EQUIVALENT: "the difference lies within the margin, whatever its sign",
    Verdict.INCONCLUSIVE: "nothing can be said; more seeds are needed, in a new generation",
}


OPEN_BETWEEN_LOOKS = (
    "nothing can be said so far; the confirmation goes on and is judged again at the next look"
)


def verdict_mark(verdict: Verdict) -> Mark:
    """Return a verdict as its symbol and its word."""
    return Mark(verdict.word, verdict.word, symbol=verdict.value)


def legend_table(results: Results) -> Table:
    """Return what the four symbols mean, at the end of a confirmation or between two looks of it."""
    look = results.evidence.look
    meaning = dict(MEANING)
    if look is not None and look.goes_on:
        meaning[Verdict.INCONCLUSIVE] = OPEN_BETWEEN_LOOKS
    rows = tuple((verdict_mark(v), meaning[v]) for v in Verdict)
    return Table(
        "The four verdicts",
        (Column("verdict", align="left"), Column("meaning", align="left")),
        rows,
    )


def contrast_label(judged: Judged) -> str:
    """Return a contrast as `arm vs reference`, without its scenario."""
    return judged.name.rpartition("/")[2].replace("-vs-", " vs ")


def contrasts_table(results: Results, during: During) -> Table:
    """Return the primary contrasts of the scenarios in which the fault acts `during`."""
    declared = results.evidence.declared
    family = max(1, len(declared.family))
    columns = (
        Column("scenario", align="left"),
        Column("arm vs reference", align="left"),
        Column("verdict", align="left"),
        Column("improvement", NATS),
        Column(f"{confidence(declared.alpha)} interval"),
        Column(f"{percent(1 - 2 * declared.alpha / family, 2)} interval"),
        Column("margin", NATS),
        Column("p"),
        Column("Holm p"),
        Column("sign-flip p (floor)"),
        Column("pairing gain"),
        Column("wins / ties / losses"),
    )
    rows: list[tuple[Cell, ...]] = []
    notes: list[str] = []
    for scenario, evidence in results.evidence_of(during):
        for judged in evidence.contrasts:
            head = (sweep_label(scenario), contrast_label(judged))
            rows.append((*head, *_contrast_cells(judged)))
            label = f"{sweep_label(scenario)}, {contrast_label(judged)}"
            notes += _notes(label, judged, goes_on=results.left_to_the_next_look(judged))
    explained = (
        "Improvement = loss of the reference - loss of the arm: positive means that the arm is "
        "better. The second interval is the one that the margin is held to "
        f"({count(family, 'contrast')} in the family). p is the paired t-test's; 'pairing gain' is "
        "the variance of the paired difference over that of an unpaired one, so a small number "
        "says that sharing seeds paid. "
        f"{GIVEN_THE_TEST_SET}"
    )
    notes = [explained, *margin_notes(results, during), *notes]
    return Table(f"Primary contrasts: {DURING[during]}", columns, tuple(rows), tuple(notes))


def _contrast_cells(judged: Judged) -> tuple[Cell, ...]:
    one = judged.contrast
    verdict = verdict_mark(judged.verdict)
    if judged.real_but_below_margin:
        verdict = verdict._replace(text="equivalent (real but below the margin)")
    if one is None:
        return (verdict, NONE, NONE, NONE, number(judged.margin), *[NONE] * 5)
    return (
        verdict,
        signed(one.improvement),
        interval(one.low, one.high),
        interval(judged.low, judged.high),
        number(judged.margin),
        p_value(one.t_p),
        p_value(judged.holm_p),
        f"{p_value(one.sign_flip_p)} ({one.sign_flip_floor:.2g})",
        number(one.pairing_gain, 2),
        f"{one.wins} / {one.ties} / {one.losses}",
    )


def _notes(label: str, judged: Judged, *, goes_on: bool) -> list[str]:
    notes = list(judged.contrast.notes) if judged.contrast else []
    if judged.verdict is Verdict.INCONCLUSIVE:
        words = "inconclusive so far" if goes_on else judged.words
        notes.insert(0, f"{judged.verdict.value} {words}")
    return [f"{label}: {note}." for note in dict.fromkeys(notes)]


def seeds_text(results: Results) -> str:
    """Return the seeds that were judged: `8 fresh seeds`, `6 fresh seeds, look 1 of 3`."""
    look = results.evidence.look
    text = count(results.evidence.declared.replicates, "fresh seed")
    return text if look is None else f"{text}, look {look.number} of {look.of}"


def alpha_text(results: Results) -> str:
    """Return alpha of the whole study, and what of it each declared look has."""
    look = results.evidence.look
    if look is None:
        return f"{results.evidence.declared.alpha:g}"
    return f"{look.whole_alpha:g} ({look.alpha:.3g} at each of {look.of} looks)"


def look_text(results: Results) -> str:
    """Return at which of the declared looks the confirmation stands, empty where none are declared."""
    look = results.evidence.look
    if look is None:
        return ""
    looks = ", ".join(str(seeds) for seeds in look.planned)
    words = look.words
    text = (
        f"{words[0].upper()}{words[1:]}. Looks were declared at {looks} seeds, each judged at an equal share "
        f"of alpha {look.whole_alpha:g}; the confirmation ends at the first that leaves nothing to decide."
    )
    return f"{text} {ENDED_EARLY}" if look.early else text


def detectable_text(results: Results) -> str:
    """Return how small an effect this confirmation can see."""
    evidence = results.evidence
    declared = evidence.declared
    family = max(1, len(declared.family))
    text = (
        f"With {count(declared.replicates, 'fresh seed')} and {count(family, 'contrast')} in the "
        f"family, an effect of {evidence.mde_in_sd:.2f} sd of the paired difference is found with "
        f"probability {percent(declared.power, 0)} (minimum detectable effect at alpha = "
        f"{declared.alpha:g} / {family})."
    )
    spreads = [
        one.contrast.sd
        for scenario in evidence.scenarios
        for one in scenario.contrasts
        if one.contrast is not None and one.contrast.sd
    ]
    if not spreads or not results.shows_verdicts:
        return text
    sd = median(spreads)
    return (
        f"{text} The median paired sd was {number(sd)} {NATS}, which makes that "
        f"{number(sd * evidence.mde_in_sd)} {NATS}."
    )


def luck_table(results: Results) -> Table | None:
    """Return each finalist's improvement in the search and on fresh seeds, None without any."""
    rows: list[tuple[Cell, ...]] = []
    params = {(one.scenario, one.config): one for one in results.searched}
    for evidence in results.evidence.scenarios:
        for arm in evidence.arms:
            if arm.shrinkage is None or arm.arm.endswith(("_none", "_global")):
                continue
            found = params.get((evidence.scenario, arm.shrinkage.config))
            searched, confirmed = (
                arm.shrinkage.search_improvement,
                arm.shrinkage.confirm_improvement,
            )
            lost = None if searched is None or confirmed is None else searched - confirmed
            rows.append(
                (
                    evidence.scenario,
                    arm.arm,
                    arm.shrinkage.config,
                    params_text(found.params) if found else NONE,
                    number(found.value if found else None),
                    number(arm.mean_loss),
                    signed(searched),
                    signed(confirmed),
                    signed(lost),
                )
            )
    if not rows:
        return None
    columns = (
        Column("scenario", align="left"),
        Column("finalist", align="left"),
        Column("config", align="left"),
        Column("parameters", align="left"),
        Column("search: faulty loss", NATS),
        Column("confirm: faulty loss", NATS),
        Column("search: over fault_only", NATS),
        Column("confirm: over fault_only", NATS),
        Column("shrank by", NATS),
    )
    note = (
        "The winner of a search was picked for its numbers there, so those flatter it; the numbers "
        "on fresh seeds do not. Search is on the validation split, confirmation on the test split: "
        "compare the improvements over fault_only, not the losses."
    )
    return Table("How much of the win was luck", columns, tuple(rows), (note,))


def params_text(params: Mapping[str, object]) -> str:
    """Return the parameters of a config as `name value, ...`."""
    return ", ".join(f"{name} {plain(value)}" for name, value in params.items()) or NONE
