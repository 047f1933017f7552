"""Whether products round alike whatever else is in a pack: measured on the processor at hand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

FOLDS = (2, 3, 8)
RANK = 8
VECTOR = 16
"""Most values of a vector that a processor computes with at a time."""


def rounds_alike(rows: Sequence[int], widths: Sequence[int], dtype: torch.dtype) -> bool:
    """Return whether a run gives the same bits alone and in a fold of several runs.

    A library of matrix products chooses its order of summation by the shape: that is measured. With
    AVX-512 products of 6 rows and more were found alike, with AVX2 those of about 96 and more. And
    functions of single values compute in vectors, and what does not fill one in another way: other
    numbers of rows than multiples of 16 are not promised.

    Args:
        rows: Numbers of rows (tokens of a microbatch or of an evaluation batch) of one run.
        widths: Features of the model's layers.
        dtype: The model's number type.
    """
    return not any(number % VECTOR for number in rows) and all(
        _alike(number, width, other, folds, dtype)
        for number in sorted(set(rows))
        for width in sorted(set(widths))
        for other in sorted(set(widths))
        for folds in FOLDS
    )


@lru_cache(maxsize=4096)
def _alike(rows: int, width: int, other: int, folds: int, dtype: torch.dtype) -> bool:
    """Compare what a frozen layer and an adapter compute, forward and backward."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, gradient, weight = draw(folds, rows, width), draw(folds, rows, other), draw(other, width)
    a, inner = draw(folds, width, RANK), draw(folds, rows, RANK)
    pairs = (
        (x @ weight.T, [one @ weight.T for one in x]),
        (gradient @ weight, [one @ weight for one in gradient]),
        (
            torch.bmm(x, a),
            [torch.bmm(one[None], its[None])[0] for one, its in zip(x, a, strict=True)],
        ),
        (
            torch.bmm(x.mT, inner),
            [torch.bmm(one[None].mT, its[None])[0] for one, its in zip(x, inner, strict=True)],
        ),
    )
    return all(torch.equal(together, torch.stack(alone)) for together, alone in pairs)
