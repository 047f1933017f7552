"""The table of what is attached to a model: layers with the same sites share their rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from aqn_tune.faults import FAULTS, FaultSpec
from aqn_tune.study.plan import ranges

if TYPE_CHECKING:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from aqn_tune.injection.inspect import Attached

COLUMNS = ("order", "site", "what", "parameters", "adapter")


class _Row(NamedTuple):
    """What makes two sites alike: everything but layer, module and multipliers."""

    order: int
    site: str
    what: str
    parameters: str
    adapter: str


class _Block(NamedTuple):
    """Modules of a layer with the same sites in the same order."""

    modules: tuple[str, ...]
    rows: tuple[_Row, ...]


class _Group(NamedTuple):
    """Layers with the same blocks."""

    layers: tuple[int, ...]
    blocks: tuple[_Block, ...]


def attached_table(
    sites: Sequence[Attached], *, every_row: bool
) -> Iterator[Text | Padding | Table]:
    """Yield a table of `sites`, which come in order, as headings and rows that line up.

    Layers with the same sites share their rows, as do the modules of a layer; `every_row` keeps all
    of them apart.
    """
    from rich.padding import Padding
    from rich.text import Text

    groups = list(_every_row(sites) if every_row else _summary(sites))
    rows = [row for group in groups for block in group.blocks for row in block.rows]
    widths = [
        max(len(name), *(len(str(row[at])) for row in rows)) for at, name in enumerate(COLUMNS)
    ]
    yield _grid([COLUMNS], widths, "dim")
    for group in groups:
        yield Text(
            f"{'layer' if len(group.layers) == 1 else 'layers'} {ranges(group.layers)}", "bold"
        )
        for block in group.blocks:
            yield Padding(Text(_names(block.modules), "cyan"), (0, 0, 0, 2), expand=False)
            of_block = [s for s in sites if s.layer in group.layers and s.module in block.modules]
            yield _grid([_with_multipliers(row, of_block) for row in block.rows], widths)


def _grid(rows: Sequence[Sequence[object]], widths: Sequence[int], style: str = "") -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(width=2)
    for name, width in zip(COLUMNS, widths, strict=True):
        if name == "parameters":
            grid.add_column(ratio=1)
        else:
            grid.add_column(justify="right" if name == "order" else "left", width=width)
    for row in rows:
        grid.add_row("", *(Text(str(cell), style) for cell in row))
    return grid


def _every_row(sites: Sequence[Attached]) -> Iterator[_Group]:
    for layer, group in itertools.groupby(sites, key=lambda site: site.layer):
        yield _Group((layer,), tuple(_blocks(list(group), merge=False)))


def _summary(sites: Sequence[Attached]) -> Iterator[_Group]:
    alike: dict[tuple[_Block, ...], list[int]] = {}
    for layer, group in itertools.groupby(sites, key=lambda site: site.layer):
        alike.setdefault(tuple(_blocks(list(group), merge=True)), []).append(layer)
    for blocks, layers in alike.items():
        yield _Group(tuple(layers), blocks)


def _blocks(sites: Sequence[Attached], *, merge: bool) -> Iterator[_Block]:
    """Yield the blocks of one layer, in the order of their first modules."""
    chains: dict[tuple[str, bool], list[_Row]] = {}
    for site in sites:
        # The layer itself is met twice: before what is inside it and after.
        chains.setdefault((site.module, site.ends_layer), []).append(_row(site))
    if not merge:
        yield from (_Block((module,), tuple(rows)) for (module, _), rows in chains.items())
        return
    alike: dict[tuple[_Row, ...], list[str]] = {}
    for (module, _), rows in chains.items():
        alike.setdefault(tuple(rows), []).append(module)
    yield from (_Block(tuple(modules), shared) for shared, modules in alike.items())


def _row(site: Attached) -> _Row:
    what = "left out" if site.what == "skip" else f"{site.what} {site.kind}"
    adapter = "" if site.adapter == "none" else site.adapter
    return _Row(site.order, site.site, what, _parameters(site), adapter)


def _with_multipliers(row: _Row, sites: Sequence[Attached]) -> _Row:
    """Return the row with the multipliers of all of `sites` that it stands for."""
    own = [site for site in sites if (site.order, site.site) == (row.order, row.site)]
    parts = (row.parameters, _multipliers(own))
    return row._replace(parameters=", ".join(part for part in parts if part))


def _parameters(site: Attached) -> str:
    """Return the parameters as text, without those that are at a default that changes nothing."""
    values = dict(site.parameters)
    if site.what == "noise":
        high, low = values.pop("sigma_max"), values.pop("sigma_min")
        values.pop("multipliers")
        levels = f"sigma {high:.3g}" + (f" to {low:.3g}" if low != high else "")
        kept = {k: v for k, v in values.items() if v and (k, v) != ("redraw", "step")}
        return ", ".join([levels, *_written(kept)])
    if site.what == "fault":
        values = {k: v for k, v in values.items() if _says_something(site.kind, k, v)}
    return ", ".join(_written(values))


def _says_something(kind: str, name: str, value: Any) -> bool:
    is_own = name not in FaultSpec.model_fields
    return bool(value != FAULTS[kind].model_fields[name].default or (is_own and value))


def _written(values: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if value is True:
            yield name
        elif isinstance(value, float):
            yield f"{name} {value:g}"
        elif isinstance(value, list | tuple):
            yield f"{name} {'+'.join(str(item) for item in value)}"
        else:
            yield f"{name} {value}"


def _multipliers(sites: Iterable[Attached]) -> str:
    """Return the multipliers of noise sites: one, one after the other, or the range of several."""
    found = list(dict.fromkeys(tuple(s.parameters.get("multipliers", ())) for s in sites))
    numbers = [number for numbers in found for number in numbers]
    if not numbers:
        return ""
    if len(found) > 1:
        return f"multipliers {min(numbers):.3g} to {max(numbers):.3g}"
    return "multiplier " + " then ".join(f"{number:.3g}" for number in numbers)


def _names(modules: Sequence[str]) -> str:
    if len(modules) == 1:
        return ". (the layer itself)" if modules[0] == "." else modules[0]
    last = [module.rpartition(".")[2] for module in modules]
    short = last if len(set(last)) == len(last) else modules
    return f"{len(modules)} each: {', '.join(short)}"
