"""A dimension of a search space as Optuna's distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aqn_tune.study.space import ChoiceDimension, Dimension, FixedDimension, FloatDimension

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


def distribution_of(dimension: Dimension) -> BaseDistribution:
    """Return what Optuna samples a dimension from.

    Raises TypeError for a fixed dimension, which is not sampled.
    """
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(dimension, ChoiceDimension):
        return CategoricalDistribution(dimension.values)
    if isinstance(dimension, FixedDimension):
        raise TypeError("a fixed dimension is not sampled")
    kind = FloatDistribution if isinstance(dimension, FloatDimension) else IntDistribution
    return kind(dimension.low, dimension.high, log=dimension.log)
