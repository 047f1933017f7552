"""Where the gradient goes: what the observed steps say about each arm of each scenario.

It explains results and claims nothing: the numbers are means over seeds of single steps, without
intervals, and no verdict rests on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aqn_tune.ledger.rows import Activation, MechanismRow, SiteActivation
from aqn_tune.report.curve import drawn_arms
from aqn_tune.report.results import Results
from aqn_tune.report.scenario_tables import DURING, sweep_label
from aqn_tune.report.table import Cell, Column, Table
from aqn_tune.report.text import NONE, number, percent, spread
from aqn_tune.study.cells import named_arms
from aqn_tune.study.plan import ranges
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.seeds import Stage

LOST = 0.5
"""Cosine to the clean gradient below which a layer is said to have lost its gradient."""
MOST_STEPS = 4
"""Steps that are shown; of more, the first, the last and some between."""
MOST_PLACES = 4
"""Places of an injection that get lines of their own in the table; more are pooled."""


class LayerMean(NamedTuple):
    """Means over seeds of one layer; None where a seed has no number."""

    ratio: float | None
    """Norm of the gradient over that of the clean gradient."""
    cosine: float | None
    """Cosine to the clean gradient."""


@dataclass(frozen=True)
class Scene:
    """What was observed of the arms that share their trainings over one or more scenarios."""

    title: str
    stage: Stage
    steps: tuple[int, ...]
    """The steps that are shown."""
    arms: Mapping[str, int]
    """Arms with observations, each with the number of its style."""
    rows: Mapping[tuple[str, int], tuple[MechanismRow | None, ...]]
    """By arm and step, one entry per seed; None for a seed that failed before."""

    def profile(self, arm: str, step: int) -> dict[int, LayerMean]:
        """Return the means over seeds by layer; a layer that some seed lacks has None."""
        seeds = [
            {layer.layer: layer for layer in row.layers} if row else {}
            for row in self.rows.get((arm, step), ())
        ]
        layers = sorted({layer for seed in seeds for layer in seed})
        return {
            layer: LayerMean(
                spread([seed[layer].norm_ratio if layer in seed else None for seed in seeds]).mean,
                spread([seed[layer].cosine if layer in seed else None for seed in seeds]).mean,
            )
            for layer in layers
        }

    def layer_count(self) -> int:
        """Return the number of layers up to the last one that was seen."""
        return 1 + max(site.layer for row in self._present() for site in row.sites)

    def fault_layers(self) -> frozenset[int]:
        """Return the layers in which a fault acted on activations in some arm."""
        return frozenset(
            site.layer for row in self._present() for site in row.sites if site.injected == "fault"
        )

    def reading(self) -> str:
        """Return in a sentence where the mean cosine falls below `LOST`."""
        alike: dict[str, list[str]] = {}
        for step in self.steps:
            alike.setdefault(self._lost(step), []).append(str(step))
        found = (
            f"at step{'s' * (len(steps) > 1)} {', '.join(steps)} {where}"
            for where, steps in alike.items()
        )
        return f"The cosine to the clean gradient falls below {LOST:g} " + "; ".join(found) + "."

    def _lost(self, step: int) -> str:
        groups: dict[str, list[str]] = {}
        for arm in self.arms:
            profile = self.profile(arm, step)
            known = {n: one.cosine for n, one in profile.items() if one.cosine is not None}
            lost = [layer for layer, cosine in known.items() if cosine < LOST]
            where = "nowhere"
            if not known:
                where = "in no layer that is known"
            elif lost:
                where = f"in layer{'s' * (len(lost) > 1)} {ranges(lost)}"
            groups.setdefault(where, []).append(arm)
        if len(groups) == 1:
            return f"{next(iter(groups))} (every arm)"
        return ", ".join(f"{where} ({', '.join(arms)})" for where, arms in groups.items())

    def _present(self) -> Iterable[MechanismRow]:
        return (row for seeds in self.rows.values() for row in seeds if row is not None)


def scenes(results: Results) -> tuple[Scene, ...]:
    """Return one scene per scenario with observations; scenarios with the same trainings share one.

    The confirmation is shown once it has any, the search's controls before.
    """
    stage: Stage = "confirm"
    seen = {key for key, _ in results.mechanism}
    if not any(cell.training_key in seen for cell in results.stage_cells(stage)):
        stage = "search"
    groups: dict[tuple[tuple[str, tuple[str, ...]], ...], list[Scenario]] = {}
    for scenario in results.scenarios:
        keys = _keys(results, stage, scenario)
        if any(key in seen for own in keys.values() for key in own):
            groups.setdefault(tuple(keys.items()), []).append(scenario)
    return tuple(
        _scene(results, stage, dict(keys), scenarios) for keys, scenarios in groups.items()
    )


def _keys(results: Results, stage: Stage, scenario: Scenario) -> dict[str, tuple[str, ...]]:
    """Return the trainings of the arms that are drawn, in the order of their styles."""
    found: dict[str, list[str]] = {}
    for cell in results.stage_cells(stage):
        if cell.scenario == scenario.name:
            found.setdefault(cell.arm, []).append(cell.training_key)
    return {name: tuple(found[name]) for name in _styles(results, scenario) if name in found}


def _styles(results: Results, scenario: Scenario) -> dict[str, int]:
    """Return the arms that may be drawn, with the styles that they have in the scenario's curves."""
    drawn = drawn_arms([evidence for _, evidence in results.evidence_of(scenario.spec.during)])
    others = [name for name in named_arms(results.study) if name not in drawn]
    first = max(drawn.values(), default=-1) + 1
    return {**drawn, **{name: first + i for i, name in enumerate(others)}}


def _scene(
    results: Results,
    stage: Stage,
    keys: Mapping[str, tuple[str, ...]],
    scenarios: Sequence[Scenario],
) -> Scene:
    rows: dict[tuple[str, int], tuple[MechanismRow | None, ...]] = {}
    steps = sorted(
        {step for key, step in results.mechanism if any(key in k for k in keys.values())}
    )
    for arm, own in keys.items():
        for step in steps:
            seeds = [
                results.mechanism.get((key, step))
                for key in own
                if (key, step) in results.mechanism or _failed(results, key)
            ]
            if any(seeds):
                rows[arm, step] = tuple(seeds)
    labels = "; ".join(dict.fromkeys(sweep_label(scenario) for scenario in scenarios))
    styles = _styles(results, scenarios[0])
    return Scene(
        title=f"{labels}, {DURING[scenarios[0].spec.during]}",
        stage=stage,
        steps=_shown(steps),
        arms={arm: styles[arm] for arm in keys if any(name == arm for name, _ in rows)},
        rows=rows,
    )


def _failed(results: Results, training_key: str) -> bool:
    training = results.trainings.get(training_key)
    return training is not None and training.status == "failed"


def _shown(steps: Sequence[int]) -> tuple[int, ...]:
    if len(steps) <= MOST_STEPS:
        return tuple(steps)
    last = len(steps) - 1
    return tuple(steps[round(i * last / (MOST_STEPS - 1))] for i in range(MOST_STEPS))


# -- activations -----------------------------------------------------------------------------------


class _Place(NamedTuple):
    layer: int
    module: str
    site: str
    kind: str


def activation_table(scene: Scene) -> Table | None:
    """Return activations before and after what the device injects, at the last step that is shown.

    None where the device injects nothing into activations.
    """
    step = scene.steps[-1]
    found = {
        arm: [_injected(row) for row in scene.rows.get((arm, step), ()) if row is not None]
        for arm in scene.arms
    }
    places = sorted({place for seeds in found.values() for seed in seeds for place in seed})
    if not places:
        return None
    groups: dict[tuple[str, str, str], list[_Place]] = {}
    for place in places:
        own = len(places) <= MOST_PLACES
        module = "layer" if place.module == "." else place.module if own else "modules"
        layers = str(place.layer) if own else ""
        groups.setdefault((place.kind, f"{module} {place.site}", layers), []).append(place)
    rows: list[tuple[Cell, ...]] = []
    for (kind, where, _), members in groups.items():
        layers = ranges(sorted({place.layer for place in members}))
        for arm, seeds in found.items():
            own_sites = [seed[place] for seed in seeds for place in members if place in seed]
            if own_sites:
                rows.append((kind, layers, where, arm, *_statistics(own_sites)))
    columns = (
        Column("injected", align="left"),
        Column("layers"),
        Column("at", align="left"),
        Column("arm", align="left"),
        *(
            Column(what, side)
            for what in ("rms", "largest", "excess kurtosis", "zeros")
            for side in ("before", "after")
        ),
    )
    note = (
        "Mean over seeds (and over layers and modules where a line has several) in the first "
        "microbatch, padding excluded. Excess kurtosis is 0 for a normal distribution; large values "
        "mean that few elements carry the rest."
    )
    return Table(
        f"Activations before and after the fault, step {step}", columns, tuple(rows), (note,)
    )


def _injected(row: MechanismRow) -> dict[_Place, SiteActivation]:
    return {
        _Place(site.layer, site.module, site.site, site.kind): site
        for site in row.sites
        if site.injected in ("fault", "quantizer")
    }


def _statistics(sites: Sequence[SiteActivation]) -> tuple[Cell, ...]:
    before = [site.before for site in sites if site.before is not None]
    after = [site.after for site in sites]
    cells: list[Cell] = []
    for what in ("rms", "max_abs"):
        cells += [_short(_mean(side, what)) for side in (before, after)]
    cells += [number(_mean(side, "kurtosis"), 1) for side in (before, after)]
    cells += [percent(_mean(side, "zero_fraction")) for side in (before, after)]
    return tuple(cells)


def _mean(activations: Sequence[Activation], what: str) -> float | None:
    return spread([getattr(one, what) for one in activations]).mean


def _short(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}"
