"""The margin of every scenario in nats, as far as it can be fixed before the first confirm run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from aqn_tune.confirm.lock import ConfirmLock, DetectableEffect
from aqn_tune.evidence.margins import ScenarioMargin, margin_words, scenario_margin
from aqn_tune.evidence.regimes import gap
from aqn_tune.evidence.tables import Tables
from aqn_tune.ledger import Ledger
from aqn_tune.study.margin import AbsoluteMargin, GainMargin, GapMargin
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study


def fixed_margins(
    ledger: Ledger,
    study: Study,
    scenarios: Sequence[Scenario],
    detectable: Sequence[DetectableEffect],
) -> tuple[ScenarioMargin, ...]:
    """Return the margin of every scenario for the lock, from the declaration and the search alone.

    Nothing of a confirmation is read, not even of an earlier generation. Empty for a share of G, which
    the lock holds as one number, and for a share of the gap in a study without a search: that is taken
    from the gap which the confirmation finds.

    Args:
        ledger: of the study, the search complete.
        study: says what the margin is.
        scenarios: of the study.
        detectable: see `aqn_tune.confirm.measured.detectable_effects`; gives the sd of each scenario.

    A scenario in which the search found no gap or no sd gets no margin, and the reason.
    """
    rule = study.confirm.margin
    if isinstance(rule, GainMargin):
        return ()
    if isinstance(rule, AbsoluteMargin):
        return tuple(scenario_margin(rule, one.name, None, "declared") for one in scenarios)
    if isinstance(rule, GapMargin):
        if study.search is None or study.search.configs == 0:
            return ()
        tables = Tables(ledger.rows())
        gaps = [_search_gap(tables, one.name, study.search.replicates) for one in scenarios]
        return tuple(
            scenario_margin(rule, one.name, found, "search", missing=missing)
            for one, (found, missing) in zip(scenarios, gaps, strict=True)
        )
    spreads: Mapping[str, float | None] = {one.scenario: one.sd for one in detectable}
    missing = "no primary contrast has numbers of both arms on every search seed that differ"
    return tuple(
        scenario_margin(rule, one.name, spreads.get(one.name), "search", missing=missing)
        for one in scenarios
    )


def _search_gap(tables: Tables, scenario: str, replicates: int) -> tuple[float | None, str]:
    """Return the gap of a scenario over all search seeds, or why there is none.

    A mean over the seeds that survived would be another gap, and with it another margin.
    """
    losses: dict[str, list[float]] = {"clean": [], "fault_only": []}
    for arm, found in losses.items():
        for cell in tables.cells("search", scenario, arm, replicates=replicates):
            loss = cell.clean_loss if arm == "clean" else cell.loss
            if loss is None:
                problem = cell.problem or "clean loss is not finite"
                return None, f"seed {cell.replicate} of {arm} has no loss in the search: {problem}"
            found.append(loss)
    return gap(losses["clean"], losses["fault_only"]), ""


def coming_margins(study: Study, scenarios: Sequence[Scenario]) -> tuple[ScenarioMargin, ...]:
    """Return the margins of a study before its lock, where the search will have measured them: none yet.

    Empty where nothing has to be measured, or the confirmation itself does it.
    """
    rule = study.confirm.margin
    if isinstance(rule, AbsoluteMargin) or study.search is None or study.search.configs == 0:
        return ()
    return tuple(
        scenario_margin(rule, one.name, None, "search", missing="it is not measured yet")
        for one in scenarios
    )


def locked_margins(lock: ConfirmLock, scenarios: Iterable[str]) -> tuple[ScenarioMargin, ...]:
    """Return the margin of each scenario that a lock fixes; empty where the confirmation measures it.

    A search whose clean arm gained nothing has no G to take a share of, and no scenario has a margin: a G
    of the confirmation in its place would not be fixed before the first run.
    """
    if lock.gain is None:
        return lock.margins
    found = (scenario_margin(lock.rule(), name, lock.gain, "search") for name in scenarios)
    return tuple(
        one if one.nats is None else one.model_copy(update={"nats": lock.margin}) for one in found
    )


def margin_lines(lock: ConfirmLock) -> tuple[str, ...]:
    """Return the margins of a lock, as lines to show before the first confirm run."""
    rule = lock.rule()
    if lock.margins:
        named = [f"  {one.scenario}: {margin_words(rule, one)}" for one in lock.margins]
        return (f"margin, {rule.words()}:", *named)
    for one in locked_margins(lock, [""]):
        return (f"margin: {margin_words(rule, one)}",)
    return (f"margin: {rule.words()}, as the confirmation itself measures it",)
