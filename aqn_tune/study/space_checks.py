"""What a search space must hold beyond its schema: the values that it may offer, and its corners."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
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
    """Yield points of a space that reach every value of every choice and both ends of every range.

    All combinations of the dimensions that others depend on; the others run through their values
    together.
    """
    parents = {p for dimension in space.dimensions.values() for p in dimension.when}
    offered = {name: _values(dimension) for name, dimension in space.dimensions.items()}
    combinations = 1
    for name in parents:
        combinations *= len(offered[name])
    if combinations > MOST_CORNERS:
        raise UserError(
            f"search.space.dimensions: {combinations} combinations of the dimensions that `when` "
            f"names; at most {MOST_CORNERS} can be checked"
        )
    rounds = max(2, *(len(v) for n, v in offered.items() if n not in parents), 2)
    names = [name for name in space.dimensions if name in parents]
    for combination in itertools.product(*(offered[name] for name in names)):
        fixed = dict(zip(names, combination, strict=True))
        for turn in range(rounds):
            params: Params = {}
            for name in space.dimensions:
                if space.active(name, params):
                    values = offered[name]
                    params[name] = fixed.get(name, values[turn % len(values)])
            yield params
