"""From a ledger back to the runs behind it, so that one of them can be done again."""

from __future__ import annotations

from collections.abc import Sequence

from aqn_tune.errors import UserError, nearest
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import CellRow
from aqn_tune.study.cells import Cell, Finalist, config_cells, stage_cells, unique_runs
from aqn_tune.study.runs import Run, Setting
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study


def recorded_runs(
    study: Study,
    setting: Setting,
    scenarios: Sequence[Scenario],
    ledger: Ledger,
    finalists: Sequence[Finalist],
    layer_count: int,
) -> dict[str, Run]:
    """Return every run that a study has, by training key, under all its conditions.

    Built from the study, the configs recorded in the ledger and the finalists; the ledger's
    training keys say whether the result is what really ran.
    """
    cells: list[Cell] = []
    if study.search is not None:
        found = stage_cells(study, setting, scenarios, stage="search", layer_count=layer_count)
        cells += found.cells
        by_name = {scenario.name: scenario for scenario in scenarios}
        for row in ledger.search:
            if row.event == "asked":
                cells += config_cells(
                    study,
                    setting,
                    by_name[row.scenario],
                    config=row.config,
                    params=row.params,
                    layer_count=layer_count,
                )
    generations: dict[int, int] = {}
    for cell in ledger.cells.values():
        if cell.stage == "confirm":
            seeds = generations.get(cell.generation, 0)
            generations[cell.generation] = max(seeds, cell.replicate + 1)
    for generation, replicates in generations.items():
        changes = {"generation": generation, "replicates": replicates}
        confirm = study.confirm.model_copy(update=changes)
        found = stage_cells(
            study.model_copy(update={"confirm": confirm}),
            setting,
            scenarios,
            stage="confirm",
            layer_count=layer_count,
            finalists=finalists,
        )
        cells += found.cells
    return unique_runs(cells)


def find_cell(ledger: Ledger, name: str) -> CellRow:
    """Return the cell `stage/scenario/arm/replicate`, or one that a training key serves.

    Of several confirm generations the last one counts. Raises UserError with the nearest name when
    there is none.
    """
    cells = {
        f"{row.stage}/{row.scenario}/{row.arm}/{row.replicate}": row
        for row in ledger.cells.values()
    }
    by_key = {row.training_key: row for row in ledger.cells.values()}
    found = cells.get(name) or by_key.get(name)
    if found is None:
        example = next(iter(cells), "")
        raise UserError(
            f"cell: got {name!r}; allowed are stage/scenario/arm/replicate"
            + (f", for example {example}" if example else " (nothing has run yet)")
            + f", or a training key{nearest(name, cells)}"
        )
    return found
