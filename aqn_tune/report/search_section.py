"""The section "What the search looked at": its maps, the same as tables, and what mattered."""

from __future__ import annotations

from typing import NamedTuple

from aqn_tune.report.results import Results
from aqn_tune.report.scenario_tables import DURING, NATS, sweep_label
from aqn_tune.report.search_figure import search_svg, shades_of
from aqn_tune.report.search_importance import importance, importance_table
from aqn_tune.report.search_map import (
    MapRow,
    ScenarioMap,
    counted,
    loss_text,
    noise_text,
    search_maps,
    state_text,
)
from aqn_tune.report.table import Cell, Column, Table
from aqn_tune.report.text import NONE, PLUS_MINUS, count
from aqn_tune.report.verdict_tables import params_text

SIGMA = "sigma "
READ_ALOUD = 3
"""Configs that the text of a picture names; the table beside it has all rows."""

DEFINITION = (
    "Each row is a config: the largest sigma of each decoder layer over the steps, and the loss that the "
    "config came to on the search seeds, the same seeds for every row. Finished configs come "
    "first, the best at the top, then stopped ones by the rung that they reached. Sigma: the standard "
    "deviation of the noise, for the carrier hidden and relative noise as a share of the value it is "
    "added to. Equal shades are equal sigmas in every picture; that of one carrier is not that of another. "
    "Exploration: the numbers of the best are flattered by having been picked, and no claim rests on them."
)


class Section(NamedTuple):
    """What the pages print of one scenario."""

    title: str
    summary: str
    """The best config in a few words."""
    figure: str
    """The map; empty where the number of layers cannot be read."""
    table: Table
    """The same in words and numbers."""
    notes: tuple[str, ...]
    """What belongs below both."""
    importance: Table | None
    unsaid: str
    """Why there is no importance; empty where there is."""


def search_sections(results: Results) -> tuple[Section, ...]:
    """Return one section per scenario that was searched, none without a search."""
    maps = search_maps(results)
    shades = shades_of(maps)
    sections = []
    for one in maps:
        title = f"{sweep_label(one.scenario)}, {DURING[one.scenario.spec.during]}"
        found = importance(results, one.scenario.name)
        sections.append(
            Section(
                title=title,
                summary=_summary(one),
                figure=search_svg(one, shades, f"Search map, {title}. {map_text(one)}"),
                table=map_table(one, title),
                notes=_notes(one),
                importance=importance_table(found) if found.weights else None,
                unsaid=found.reason,
            )
        )
    return tuple(sections)


def map_text(one: ScenarioMap) -> str:
    """Return what a map shows, in words: counts, the best configs, the controls."""
    total = count(sum(one.states.values()), "config")
    sentences = [f"{total}: {counted(one.states)}."]
    best = [_aloud(row) for row in one.rows if row.loss is not None][:READ_ALOUD]
    if best:
        sentences.append(f"Best first: {'; '.join(best)}.")
    controls = [_aloud(row) for row in one.controls]
    if controls:
        sentences.append(f"Controls: {'; '.join(controls)}.")
    return " ".join(sentences)


def _aloud(row: MapRow) -> str:
    loss = row.state if row.loss is None else f"loss {loss_text(row)}"
    return f"{_name(row)}, {loss}, noise {noise_text(row.levels, SIGMA)}"


def _name(row: MapRow) -> str:
    return f"{row.name} ({row.finalist})" if row.finalist else row.name


def _summary(one: ScenarioMap) -> str:
    total = count(sum(one.states.values()), "config")
    best = next((row for row in one.rows if row.loss is not None), None)
    if best is None:
        return f"{total}, none finished with a loss"
    noise = noise_text(best.levels, SIGMA)
    return f"best of {total}: {best.name}, loss {loss_text(best)}, noise {noise}"


def map_table(one: ScenarioMap, title: str) -> Table:
    """Return the rows of a map as a table."""
    columns = (
        Column("config", align="left"),
        Column("became", align="left"),
        Column("faulty validation loss", NATS),
        Column("carrier", align="left"),
        Column("noise: layers, largest sigma", align="left"),
        Column("parameters", align="left"),
    )
    rows = [_line(row, state_text(row, one.rungs)) for row in one.rows]
    rows += [_line(row, f"control, {row.state}") for row in one.controls]
    return Table(f"Search: {title}", columns, tuple(rows))


def _notes(one: ScenarioMap) -> tuple[str, ...]:
    notes = []
    if any(row.error is not None for row in (*one.rows, *one.controls)):
        notes.append(
            f"Losses are means over {one.seeds} search seeds {PLUS_MINUS} their standard error."
        )
    if one.left_out:
        notes.append(
            f"Not shown: {count(sum(one.left_out.values()), 'further config')} "
            f"({counted(one.left_out)})."
        )
    if one.layers is None:
        notes.append(
            "The model cannot be read here, so that its number of layers is not known: no map."
        )
    return tuple(notes)


def _line(row: MapRow, state: str) -> tuple[Cell, ...]:
    params = params_text(row.params) if row.params else ""
    return (_name(row), state, loss_text(row), row.carrier or NONE, noise_text(row.levels), params)
