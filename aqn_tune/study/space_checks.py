"""What a search space must hold beyond its schema: the values that it may offer, and its corners."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, get_args

from pydantic import TypeAdapter, ValidationError

from aqn_tune.errors import UserError, nearest
from aqn_tune.noise.carriers import CARRIERS
from aqn_tune.noise.effective import Redraw
from aqn_tune.noise.schedules import SCHEDULES
from aqn_tune.noise.targeting import TARGETINGS
from aqn_tune.study.layers import Layers, resolve_layers
from aqn_tune.study.space import (
    NUMBERED,
    ChoiceDimension,
    Dimension,
    FixedDimension,
    FloatDimension,
    IntDimension,
    Params,
    SpaceSpec,
    Value,
    parse_layers,
)

MOST_CORNERS = 4096
"""Corners of a search space that are tried; a space with more parents than that is refused."""

_NAMES: dict[str, tuple[str, ...]] = {
    "carrier": tuple(CARRIERS),
    "schedule": tuple(SCHEDULES),
    "targeting": tuple(TARGETINGS),
    "normalise": ("none", "energy"),
    "redraw": get_args(Redraw),
    "scores_map": ("power", "inverse_linear"),
}
"""Dimensions whose values are words."""
_SWITCHES = ("carrier_relative", "scores_ceiling")
"""Dimensions whose values are true and false."""
_LAYERS: TypeAdapter[Layers] = TypeAdapter(Layers)
_ONE_RULE = {
    **dict.fromkeys(("depth_low", "depth_high"), "depth"),
    **dict.fromkeys(
        ("stages", "epochs", "stages_per_epoch", "warmup_fraction", "stop_fraction"), "time"
    ),
}
"""Dimensions that must fit each other, by what they share. Those of the scores do, too."""


class _Range(NamedTuple):
    """The numbers that a dimension may offer."""

    low: float = 0.0
    high: float = math.inf
    whole: bool = False
    above: bool = False
    """Whether `low` itself is not allowed."""
    below: bool = False
    """Whether `high` itself is not allowed."""

    def holds(self, value: float) -> bool:
        """Return whether `value`, a finite number, is allowed."""
        if self.whole and value != int(value):
            return False
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        kind = "whole numbers" if self.whole else "numbers"
        if math.isinf(self.low):
            return f"finite {kind}"
        if math.isinf(self.high):
            return (
                f"{kind} above {self.low:g}" if self.above else f"{kind} of at least {self.low:g}"
            )
        low = f"above {self.low:g}" if self.above else f"from {self.low:g}"
        return f"{kind} {low} to {'below ' * self.below}{self.high:g}"


def _range(name: str, layer_count: int) -> _Range:
    """Return the numbers that a dimension may offer; at least 0 where nothing else is said."""
    ranges = {
        "sigma_ratio": _Range(0, 1, above=True),
        "stages": _Range(1, whole=True),
        "epochs": _Range(1, whole=True),
        "stages_per_epoch": _Range(1, whole=True),
        "warmup_fraction": _Range(0, 1, below=True),
        "stop_fraction": _Range(0, 1, below=True),
        "window_centre": _Range(0, layer_count - 1, whole=True),
        "window_width": _Range(1, whole=True),
        "random_count": _Range(1, layer_count, whole=True),
        "scores_alpha": _Range(-math.inf),
        "zone_boundary": _Range(0, 1, above=True),
        "depth_low": _Range(0, 1),
        "depth_high": _Range(0, 1),
        "learning_rate": _Range(above=True),
        "rank": _Range(1, whole=True),
    }
    return ranges.get(name, _Range())


def dimension_problem(name: str, dimension: Dimension, layer_count: int) -> str | None:
    """Return what is wrong with the values that a dimension offers, None when nothing is."""
    prefix, _, number = name.partition("_")
    if prefix in NUMBERED and number.isdigit() and int(number) >= layer_count:
        return f"there is no layer {number} of {layer_count}; allowed are 0 to {layer_count - 1}"
    allowed = _range(name, layer_count)
    if allowed.whole and isinstance(dimension, FloatDimension):
        return f"got kind float, which draws fractions; allowed are {allowed}: use kind int"
    problems = (_value_problem(name, value, layer_count) for value in _values(dimension))
    return next((problem for problem in problems if problem), None)


def _value_problem(name: str, value: Value, layer_count: int) -> str | None:
    if name in _NAMES:
        if value in _NAMES[name]:
            return None
        allowed = ", ".join(_NAMES[name])
        return f"got {value!r}; allowed are {allowed}{nearest(str(value), _NAMES[name])}"
    if name in _SWITCHES:
        return None if isinstance(value, bool) else f"got {value!r}; allowed are true and false"
    if name == "scores_file":
        return None if isinstance(value, str) else f"got {value!r}; allowed is the path of a file"
    if name == "layers":
        try:
            resolve_layers(_LAYERS.validate_python(parse_layers(str(value))), layer_count)
        except ValidationError as error:
            return error.errors()[0]["msg"].removeprefix("Value error, ")
        except UserError as error:
            return str(error).removeprefix("layers: ")
        return None
    if isinstance(value, str | bool):
        return f"got {value!r}; allowed are numbers"
    allowed_range = _range(name, layer_count)
    return None if allowed_range.holds(value) else f"got {value:g}; allowed are {allowed_range}"


def _values(dimension: Dimension) -> tuple[Value, ...]:
    """Return the values of a dimension to check: all of a choice, both ends of a range."""
    if isinstance(dimension, ChoiceDimension):
        return dimension.values
    if isinstance(dimension, FixedDimension):
        return (dimension.value,)
    return (dimension.low, dimension.high)


def corners(space: SpaceSpec) -> Iterator[Params]:
    """Yield points of a space that reach every value of every choice and both ends of every range, each once.

    All combinations of the dimensions that others depend on; the others run through their values
    together. Of those that one rule holds to each other (`depth_low` and `depth_high`) any end of one
    meets any end of another, and each one alone the other ends of all the rest.
    """
    parents = {p for dimension in space.dimensions.values() for p in dimension.when}
    offered = {name: _offered(space, name) for name in space.dimensions}
    combinations = 1
    for name in parents:
        combinations *= len(offered[name])
    if combinations > MOST_CORNERS:
        raise UserError(
            f"search.space.dimensions: {combinations} combinations of the dimensions that `when` "
            f"names; at most {MOST_CORNERS} can be checked"
        )
    rows = tuple(_rows({name: offered[name] for name in offered if name not in parents}))
    names = [name for name in space.dimensions if name in parents]
    seen: set[tuple[tuple[str, Value], ...]] = set()
    for combination in itertools.product(*(offered[name] for name in names)):
        for row in rows:
            values = {**row, **dict(zip(names, combination, strict=True))}
            params: Params = {}
            for name in space.dimensions:
                if space.active(name, params):
                    params[name] = values[name]
            point = tuple(params.items())
            if point not in seen:
                seen.add(point)
                yield params


def _offered(space: SpaceSpec, name: str) -> tuple[Value, ...]:
    """Return the values of a dimension to check, with those inside its range that others depend on."""
    dimension = space.dimensions[name]
    values = _values(dimension)
    if isinstance(dimension, IntDimension):
        values += tuple(
            value
            for other in space.dimensions.values()
            for value in other.when.get(name, ())
            if isinstance(value, int) and dimension.low < value < dimension.high
        )
    return tuple(dict.fromkeys(values))


def _rows(offered: Mapping[str, tuple[Value, ...]]) -> Iterator[Params]:
    """Yield the values that dimensions on which none depends take together; see `corners`."""
    for turn in range(max(map(len, offered.values()), default=1)):
        yield {name: values[turn % len(values)] for name, values in offered.items()}
    ends = {name: found for name, values in offered.items() if (found := _ends(values))}
    words = {name: values for name, values in offered.items() if name not in ends}
    groups: dict[str, list[str]] = {}
    for name in ends:
        rule = _ONE_RULE.get(name, "scores" if name.startswith(("score_", "scores_")) else "")
        if rule:
            groups.setdefault(rule, []).append(name)
    most = max(map(len, groups.values()), default=1)
    for turn in range(max(map(len, words.values()), default=1)):
        chosen = {name: values[turn % len(values)] for name, values in words.items()}
        for end, place in itertools.product((0, 1), range(most)):
            row: Params = {**chosen, **{name: pair[end] for name, pair in ends.items()}}
            yield dict(row)
            for group in groups.values():
                alone = group[place % len(group)]
                row[alone] = ends[alone][1 - end]
            yield row


def _ends(values: tuple[Value, ...]) -> tuple[float, float] | None:
    """Return the smallest and the largest of `values`; None where one is no number."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return (min(numbers), max(numbers)) if len(numbers) == len(values) else None
