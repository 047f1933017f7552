"""Whether products round alike whatever else is in a pack: measured on the processor at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

FOLDS = (2, 3, 8)
RANKS = (2, 3, 8, 17, 33)
WIDEST_RANK = 64
VECTOR = 16
"""Most values of a vector that a processor computes with at a time."""
BUDGET = 2**35
"""Multiplications of a product that is still measured: seconds on one core."""


def rounds_alike(rows: Mapping[int, int], widths: Sequence[int], dtype: torch.dtype) -> bool:
    """Return whether a run gives the same bits alone and in a fold of several runs.

    A library of matrix products chooses its order of summation by the shape: that is measured, on one
    thread, as workers compute. With AVX-512 products of 6 rows and more were found alike, with AVX2
    those of about 96 and more. And functions of single values compute in vectors, and what does not
    fill one in another way: other numbers of rows than multiples of 16 are not promised. Nor is what is
    too large to be measured in seconds, or a model whose widths are not known.

    Args:
        rows: Numbers of rows (tokens of a microbatch or of an evaluation batch) of one run, each with
            the most runs that share such a pass. What never shares one needs no promise.
        widths: Features of the model's layers.
        dtype: The model's number type.
    """
    shared = {number: most for number, most in rows.items() if most > 1}
    if not widths or any(number % VECTOR for number in shared):
        return False
    with _one_thread():
        return all(
            _measured(number, most, width, other, dtype)
            for number, most in sorted(shared.items())
            for width in sorted(set(widths))
            for other in sorted(set(widths))
        )


def _measured(rows: int, most: int, width: int, other: int, dtype: torch.dtype) -> bool:
    """Compare every number of folds up to `most` that is not too large, two of them at the least."""
    known = [folds for folds in FOLDS if folds <= most and folds * rows * width * other <= BUDGET]
    return bool(known) and all(_alike(rows, width, other, folds, dtype) for folds in known)


@lru_cache(maxsize=4096)
def _alike(rows: int, width: int, other: int, folds: int, dtype: torch.dtype) -> bool:
    """Compare what a frozen layer and adapters compute, forward and backward."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, gradient, weight = draw(folds, rows, width), draw(folds, rows, other), draw(other, width)
    if not _same(x @ weight.T, [one @ weight.T for one in x]):
        return False
    if not _same(gradient @ weight, [one @ weight for one in gradient]):
        return False
    for rank in RANKS:
        a, b, inner = draw(folds, width, rank), draw(folds, rank, other), draw(folds, rows, rank)
        products = ((x, a), (inner, b), (x.mT, inner), (gradient, b.mT), (inner.mT, gradient))
        for left, right in products:
            alone = [
                torch.bmm(one[None], its[None])[0] for one, its in zip(left, right, strict=True)
            ]
            if not _same(torch.bmm(left, right), alone):
                return False
            if not _same(_among_wider(left, right, rank), alone):
                return False
    return True


def _among_wider(left: Tensor, right: Tensor, rank: int) -> Tensor:
    """Return a product of adapters as a pack computes it in which another one is of the widest rank."""
    zeros = WIDEST_RANK - rank
    columns, inner, rows = right.shape[-1], right.shape[-2], left.shape[-2]
    if inner == rank:
        return torch.bmm(pad(left, (0, zeros)), pad(right, (0, 0, 0, zeros)))
    if columns == rank:
        return torch.bmm(left, pad(right, (0, zeros)))[..., :rank]
    if rows == rank:
        return torch.bmm(pad(left, (0, 0, 0, zeros)), right)[:, :rank]
    raise ValueError(f"no side of {tuple(left.shape)} x {tuple(right.shape)} has rank {rank}")


def _same(together: Tensor, alone: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, its) for one, its in zip(together, alone, strict=True))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
