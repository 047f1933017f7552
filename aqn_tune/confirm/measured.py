"""What the search measured that a confirmation is planned with: the gain, and the spread of pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from aqn_tune.confirm.lock import ConfirmLock, DetectableEffect
from aqn_tune.errors import UserError
from aqn_tune.evidence.contrasts import paired_contrast
from aqn_tune.evidence.power import mde_sd_units
from aqn_tune.evidence.tables import CellResult, Tables
from aqn_tune.ledger import Ledger
from aqn_tune.study.cells import ArmCells, Finalist
from aqn_tune.study.looks import alpha_at_look
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study


def search_gain(ledger: Ledger, study: Study, scenarios: Sequence[Scenario]) -> float | None:
    """Return G as the search measured it, None without a search or where the margin is no share of G.

    G is the clean validation loss of the untrained base less the mean of the clean arm's over every
    search seed, in nats per token.

    Raises UserError when the base or any seed of the clean arm has no finite loss: a mean over the
    seeds that survived would be another G, and with it another margin.
    """
    if study.search is None or study.search.configs == 0 or study.confirm.margin.kind != "gain":
        return None
    tables = Tables(ledger.rows())
    losses: dict[str, float] = {}
    for scenario in scenarios:
        for cell in tables.cells(
            "search", scenario.name, "clean", replicates=study.search.replicates
        ):
            if cell.clean_loss is None:
                problem = cell.problem or "clean loss is not finite"
                raise _no_gain(f"seed {cell.replicate} of the clean arm has no loss ({problem})")
            losses[cell.training_key] = cell.clean_loss
    base = tables.base_clean_loss("validation")
    if base is None:
        raise _no_gain("the untrained base has no finite clean loss")
    return base - math.fsum(losses.values()) / len(losses)


def _no_gain(why: str) -> UserError:
    return UserError(
        f"the gain G cannot be measured on the search: {why}; the margin is a share of G, and nothing "
        "is confirmed without it. Run the study again if its search was cut short; if the training "
        "itself fails, mend the study (training.learning_rate, say)"
    )


def detectable_effects(
    ledger: Ledger,
    study: Study,
    scenarios: Sequence[Scenario],
    finalists: Sequence[Finalist],
    cells: ArmCells,
) -> tuple[DetectableEffect, ...]:
    """Return the minimum detectable effect of every scenario, in nats per token.

    The sd of a paired difference is pooled (mean variance) over the primary contrasts whose arms both
    ran in the search, a finalist as its config; its twins did not run there. An estimate from few
    pairs on another split: it tells the order of magnitude. A contrast without a number on every
    search seed, or without any spread, does not enter. Where looks are declared it is the effect at the last
    of them, at its share of alpha.

    Args:
        ledger: of the study, the search complete.
        study: gives n, alpha, power and the contrasts.
        scenarios: of the study.
        finalists: the configs that are confirmed.
        cells: of the confirm stage; they tell the size m of the family, tested at alpha / m, with L looks
            at alpha / (L m).
    """
    exist = {(cell.scenario, cell.arm) for cell in cells.cells}
    pairs = study.primary_contrasts()
    family = sum((s.name, a) in exist and (s.name, b) in exist for s in scenarios for a, b in pairs)
    alpha = alpha_at_look(study.confirm.alpha, study.confirm.looks)
    in_sd = mde_sd_units(study.confirm.replicates, alpha / max(1, family), study.confirm.power)
    tables = Tables(ledger.rows())
    found = []
    for scenario in scenarios:
        configs = {f"finalist{f.rank}": f.config for f in finalists if f.scenario == scenario.name}
        variances = []
        for arm, reference in pairs:
            sd = _search_sd(
                tables,
                study,
                scenario.name,
                configs.get(arm, arm),
                configs.get(reference, reference),
            )
            if sd is not None:
                variances.append(sd * sd)
        pooled = math.sqrt(fmean(variances)) if variances else None
        found.append(
            DetectableEffect(
                scenario=scenario.name,
                contrasts=len(variances),
                sd=pooled,
                effect=None if pooled is None else pooled * in_sd,
            )
        )
    return tuple(found)


def _search_sd(
    tables: Tables, study: Study, scenario: str, arm: str, reference: str
) -> float | None:
    if study.search is None:
        return None
    n = study.search.replicates
    ours, theirs = (
        _losses(tables.cells("search", scenario, name, replicates=n)) for name in (arm, reference)
    )
    if ours is None or theirs is None:
        return None
    contrast = paired_contrast(ours, theirs, alpha=study.confirm.alpha, seed=study.seed)
    return contrast.sd if contrast.degenerate is None else None


def _losses(cells: Sequence[CellResult]) -> list[float] | None:
    losses = [cell.loss for cell in cells if cell.loss is not None]
    return losses if cells and len(losses) == len(cells) else None


def detectable_lines(lock: ConfirmLock) -> tuple[str, ...]:
    """Return what a confirmation can see, as lines to show before its first run."""
    seeds, where = f"{lock.replicates} seeds", ""
    if lock.looks:
        looks = ", ".join(str(look) for look in lock.looks)
        level = alpha_at_look(lock.alpha, lock.looks)
        seeds = f"at most {seeds}, judged at {looks} (each at alpha {level:.3g})"
        where = " at the last look"
    lines = [
        f"confirmation, generation {lock.generation}: {seeds}; effects found{where} with "
        f"probability {lock.power:g} at a familywise error rate of {lock.alpha:g}:"
    ]
    for one in lock.detectable:
        known = "not known in nats, no primary contrast was measured in the search"
        if one.effect is not None:
            known = (
                f"{one.effect:.3g} nats per token (sd {one.sd:.3g} in the search, contrasts "
                f"pooled: {one.contrasts})"
            )
        lines.append(f"  {one.scenario}: {known}")
    return tuple(lines)
