"""Dose and response in words: what rises with the fault level, and between which levels the regime turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aqn_tune.evidence.assemble import ScenarioEvidence
from aqn_tune.evidence.trend import Trend, trend, turns
from aqn_tune.report.text import p_value, plain
from aqn_tune.study.scenario import Scenario

SHOWN_BELOW = 0.05
"""A larger p-value is no trend that one could speak of."""

Pairs = Sequence[tuple[Scenario, ScenarioEvidence]]


def levels_of(scenarios: Sequence[Scenario]) -> list[float] | None:
    """Return the one number that was swept, `during` aside, of each scenario; None when there is not one."""
    found = []
    for scenario in scenarios:
        swept = [v for k, v in scenario.values.items() if k != "during"]
        if len(swept) != 1 or isinstance(swept[0], str):
            return None
        found.append(float(swept[0]))
    return found


def dose_notes(pairs: Pairs) -> list[str]:
    """Return sentences about scenarios that are levels of one number; none about others.

    Trends were not declared and make no claim: the sentences say so.
    """
    levels = levels_of([scenario for scenario, _ in pairs])
    if levels is None or len(set(levels)) < len(levels):
        return []
    order = sorted(range(len(levels)), key=levels.__getitem__)
    rising = [pairs[place] for place in order]
    key = next(k for k in rising[0][0].values if k != "during")
    notes = [
        f"From {turn.before} to {turn.after} between {key} {plain(turn.below)} and {plain(turn.above)}."
        for turn in turns([(levels[place], pairs[place][1].regime.regime) for place in order])
    ]
    found = list(_trends(rising))
    if found:
        seen = [f"{what} {_way(one)}" for what, one in found if one.p < SHOWN_BELOW]
        unseen = [f"{what} (p = {one.p:.2f})" for what, one in found if one.p >= SHOWN_BELOW]
        said = [*seen, *([f"no trend is seen in {', '.join(unseen)}"] if unseen else [])]
        notes.append(
            f"Against {key} (Page's trend test, two-sided, each by itself; not declared, so no claim): "
            f"{'; '.join(said)}."
        )
    return notes


def _way(found: Trend) -> str:
    p = p_value(found.p)
    return f"{'rises' if found.rises else 'falls'} (p {p if p.startswith('<') else f'= {p}'})"


def _trends(rising: Pairs) -> Iterator[tuple[str, Trend]]:
    """Yield the trend of the loss of fault_only, and of the difference of each primary contrast."""
    losses = _losses(rising, "fault_only")
    if losses is not None and (found := trend(losses)):
        yield "the loss of fault_only", found
    names = [
        {one.name.removeprefix(f"{scenario.name}/") for one in evidence.contrasts}
        for scenario, evidence in rising
    ]
    for one in rising[0][1].contrasts:
        name = one.name.removeprefix(f"{rising[0][0].name}/")
        arm, _, reference = name.partition("-vs-")
        ours, theirs = _losses(rising, arm), _losses(rising, reference)
        if ours is None or theirs is None or not all(name in there for there in names):
            continue
        gains = [
            [b - a for a, b in zip(own, other, strict=True)]
            for own, other in zip(ours, theirs, strict=True)
        ]
        if found := trend(gains):
            yield f"what {arm} wins over {reference}", found


def _losses(rising: Pairs, arm: str) -> list[list[float]] | None:
    """Return the losses of an arm, seed by seed and by rising level; None unless every one is there."""
    table = []
    for _, evidence in rising:
        found = next((one for one in evidence.arms if one.arm == arm), None)
        losses = [cell.loss for cell in found.seeds] if found else []
        if not losses or any(loss is None for loss in losses):
            return None
        table.append([loss for loss in losses if loss is not None])
    if len({len(own) for own in table}) > 1:
        return None
    return [list(seed) for seed in zip(*table, strict=True)]
