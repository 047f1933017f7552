"""What the search looked at: its configs from best to failed, the noise of each layer, what came of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from aqn_tune.errors import UserError
from aqn_tune.report.results import Results, SearchedConfig
from aqn_tune.report.text import NONE, PLUS_MINUS, number, spread
from aqn_tune.study.arms import ArmSpec
from aqn_tune.study.cells import named_arms
from aqn_tune.study.plan import ranges
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import SearchSpec, Study
from aqn_tune.study.space import Value, arm_of

MOST_ROWS = 16
"""Configs that are shown of a scenario; the others are counted."""
STATES = ("finished", "stopped", "running", "failed")
"""What becomes of a config, in the order of the rows."""


class MapRow(NamedTuple):
    """A config of the search, or an arm that always runs."""

    name: str
    """Config id, or name of the arm."""
    state: str
    """One of `STATES`."""
    finalist: str
    """Its arm in the confirmation; empty where it has none."""
    carrier: str
    """What carries the noise, and whether relative to its values; empty without noise."""
    levels: tuple[float, ...] | None
    """Largest sigma of the noise over the steps, by decoder layer; None where unknown."""
    params: Mapping[str, Value]
    """What the search chose; empty for an arm."""
    value: float | None
    """Mean faulty validation loss at the last rung it reached."""
    error: float | None
    """Standard error of that mean over the search seeds; None unless finished with two or more."""
    rung: int
    """Last rung it reached, from 0; -1 before the first."""

    @property
    def loss(self) -> float | None:
        """The value at the end of the whole training: the only one that can be compared."""
        return self.value if self.state == "finished" else None

    @property
    def largest(self) -> float:
        """The largest noise of any layer, 0 without noise."""
        return max(self.levels or (0.0,))


class ScenarioMap(NamedTuple):
    """What the search of one scenario looked at."""

    scenario: Scenario
    rows: tuple[MapRow, ...]
    """The best `MOST_ROWS` configs: finished ones by their loss, stopped ones by the rung they reached and
    their loss there, then those under way, then the failed ones."""
    controls: tuple[MapRow, ...]
    """Arms that always run, in the order of the study, without `clean`."""
    states: Mapping[str, int]
    """How many configs came to what, in the order of `STATES`."""
    left_out: Mapping[str, int]
    """The same of those that are not in `rows`."""
    layers: int | None
    """Number of decoder layers; None where the model cannot be read here."""
    fault_layers: tuple[int, ...]
    """Layers that hold a fault."""
    rungs: int
    """Number of rungs of the search."""
    seeds: int
    """Number of search seeds."""


def search_maps(results: Results) -> tuple[ScenarioMap, ...]:
    """Return one map per scenario whose search has asked a config, in the order of the study."""
    search = results.study.search
    if search is None or not results.searched:
        return ()
    layers = _layers(results.study)
    searched: dict[str, list[SearchedConfig]] = {}
    for one in results.searched:
        searched.setdefault(one.scenario, []).append(one)
    return tuple(
        _scenario_map(results, search, scenario, searched[scenario.name], layers)
        for scenario in results.scenarios
        if scenario.name in searched
    )


def _layers(study: Study) -> int | None:
    from aqn_tune.study.loading import layer_count

    try:
        return layer_count(study.model)
    except UserError:
        return None


def _scenario_map(
    results: Results,
    search: SearchSpec,
    scenario: Scenario,
    searched: list[SearchedConfig],
    layers: int | None,
) -> ScenarioMap:
    ordered = sorted(searched, key=_standing)
    finalists = _finalists(results, scenario)
    rows = []
    for one in ordered[:MOST_ROWS]:
        arm = arm_of(dict(one.params))
        rows.append(
            MapRow(
                name=one.config,
                state=one.state,
                finalist=finalists.get(one.config, ""),
                carrier=_carrier(arm),
                levels=_levels(results.study, scenario, arm, layers),
                params=one.params,
                value=one.value,
                error=_error(_losses(results, scenario, one.config, search.replicates)),
                rung=one.rung,
            )
        )
    last = [one.rung + 1 for one in searched if one.state == "finished"]
    return ScenarioMap(
        scenario=scenario,
        rows=tuple(rows),
        controls=_controls(results, scenario, layers, search.replicates),
        states=_count(ordered),
        left_out=_count(ordered[MOST_ROWS:]),
        layers=layers,
        fault_layers=scenario.spec.fault_layers(layers) if layers else (),
        # Shares of a short training may round to one step and be one rung.
        rungs=max(last, default=len(search.rungs)),
        seeds=search.replicates,
    )


def _standing(one: SearchedConfig) -> tuple[int, int, float]:
    return STATES.index(one.state), -one.rung, math.inf if one.value is None else one.value


def _count(configs: list[SearchedConfig]) -> dict[str, int]:
    found = Counter(one.state for one in configs)
    return {state: found[state] for state in STATES if found[state]}


def _finalists(results: Results, scenario: Scenario) -> dict[str, str]:
    """Return the arm of each config that went to the confirmation; its twins carry its id as well."""
    evidence = next(e for e in results.evidence.scenarios if e.scenario == scenario.name)
    return {
        arm.seeds[0].config: arm.arm
        for arm in evidence.arms
        if arm.seeds and arm.seeds[0].config and not arm.arm.endswith(("_none", "_global"))
    }


def _controls(
    results: Results, scenario: Scenario, layers: int | None, seeds: int
) -> tuple[MapRow, ...]:
    recorded = set(results.tables.arms("search", scenario.name))
    rows = []
    for name, arm in named_arms(results.study).items():
        # The clean arm does not train through the fault: it is no way to meet it.
        if name == "clean" or name not in recorded:
            continue
        cells = results.tables.cells("search", scenario.name, name, replicates=seeds)
        losses = [cell.loss for cell in cells]
        state = "finished" if None not in losses else "running"
        rows.append(
            MapRow(
                name=name,
                state="failed" if any(cell.failed for cell in cells) else state,
                finalist="",
                carrier=_carrier(arm),
                levels=_levels(results.study, scenario, arm, layers),
                params={},
                value=spread(losses).mean,
                error=_error(losses),
                rung=-1,
            )
        )
    return tuple(rows)


def _carrier(arm: ArmSpec) -> str:
    if arm.noise is None:
        return ""
    carrier = arm.noise.carrier
    # `hidden` has no such choice: its noise is always relative.
    return f"{carrier.kind}, relative" if getattr(carrier, "relative", False) else carrier.kind


def _losses(results: Results, scenario: Scenario, config: str, seeds: int) -> list[float | None]:
    cells = results.tables.cells("search", scenario.name, config, replicates=seeds)
    return [cell.loss for cell in cells]


def _error(losses: list[float | None]) -> float | None:
    sd = spread(losses).sd
    return None if sd is None else sd / math.sqrt(len(losses))


def _levels(
    study: Study, scenario: Scenario, arm: ArmSpec, layers: int | None
) -> tuple[float, ...] | None:
    if layers is None:
        return None
    try:
        return largest_noise(
            arm,
            steps=study.training.steps,
            layer_count=layers,
            fault_layers=scenario.spec.fault_layers(layers),
        )
    except UserError:
        # It cannot exist in this scenario, or reads a file of scores that is not here.
        return None


def largest_noise(
    arm: ArmSpec, *, steps: int, layer_count: int, fault_layers: tuple[int, ...]
) -> tuple[float, ...]:
    """Return the largest sigma that each layer's noise has at any step, 0 without noise.

    With a schedule that begins at sigma_start and a targeting that stays the same, that is
    sigma_start * multiplier. Raises UserError for a policy that injects nothing there.
    """
    noise = None
    if arm.noise is not None:
        noise = arm.noise.resolve(steps=steps, layer_count=layer_count, fault_layers=fault_layers)
    if noise is None:
        return (0.0,) * layer_count
    phases = [(0, noise.multipliers), *((one.step, one.multipliers) for one in noise.later)]
    ends = [step for step, _ in phases[1:]] + [steps]
    peaks = [
        (max(noise.sigma[start:end], default=0.0), multipliers)
        for (start, multipliers), end in zip(phases, ends, strict=True)
    ]
    return tuple(
        max(peak * multipliers[layer] for peak, multipliers in peaks)
        for layer in range(layer_count)
    )


def noise_text(levels: tuple[float, ...] | None, word: str = "") -> str:
    """Return where the noise is and how much: `layers 11-13, 0.08`; `none` without, `n/a` if unknown.

    `word` stands before the numbers, where no heading says what they are.
    """
    if levels is None:
        return NONE
    noised = [layer for layer, level in enumerate(levels) if level > 0]
    if not noised:
        return "none"
    low, high = (f"{pick(levels[layer] for layer in noised):.3g}" for pick in (min, max))
    where = f"layer{'' if len(noised) == 1 else 's'} {ranges(noised)}"
    if len(noised) == len(levels):
        where = f"all {len(levels)} layers"
    return f"{where}, {word}{high if low == high else f'{low} to {high}'}"


def loss_text(row: MapRow) -> str:
    """Return the mean loss and its standard error, `n/a` for a row that has not finished."""
    if row.loss is None or row.error is None:
        return number(row.loss)
    return f"{number(row.loss)} {PLUS_MINUS} {row.error:.4f}"


def state_text(row: MapRow, rungs: int) -> str:
    """Return what became of a row: where a config failed, or was stopped and with what loss."""
    if row.state == "finished" or row.rung < 0:
        return row.state
    if row.state == "failed":
        return f"failed after rung {row.rung + 1} of {rungs}"
    there = "no finite loss" if row.value is None else number(row.value)
    return f"{row.state} at rung {row.rung + 1} of {rungs}: {there} there"


def counted(states: Mapping[str, int]) -> str:
    """Return `3 finished, 5 stopped`."""
    return ", ".join(f"{count} {state}" for state, count in states.items())
