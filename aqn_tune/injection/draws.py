"""Keyed random numbers of one call of a fault or noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aqn_tune.study.seeds import stream_seed


class Scratch:
    """Memory that draws are made in again and again: fresh memory is cold, and half the cost of a draw."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.generator = torch.Generator(device)
        self._size = 0
        self._views: dict[torch.Size, Tensor] = {}

    def of(self, shape: torch.Size) -> Tensor:
        """Return memory for float32 values of `shape`, the same at every call; it holds anything."""
        if shape not in self._views:
            self._size = max(self._size, shape.numel())
            memory = torch.empty(self._size, device=self._device)
            shapes = (*self._views, shape)
            self._views = {known: memory[: known.numel()].view(known) for known in shapes}
        return self._views[shape]


def keyed_normal(x: Tensor, seeds: Sequence[int], scratch: Scratch | None = None) -> Tensor:
    """Return standard normal values of x's shape [K, N, D], type and device, row k drawn under seeds[k].

    Drawn in float32 on the device of `x`, row by row, so that a replica's values depend neither on the
    pack it is in nor on the type of the model. Generators of different devices draw different values.
    Rows of equal seed share memory: not to be written to. With a `scratch` the values stand until its
    next use.
    """
    scratch = scratch or Scratch(x.device)
    generator = scratch.generator
    if len(seeds) == 1:
        return scratch.of(x.shape).normal_(generator=generator.manual_seed(seeds[0])).to(x)
    if len(set(seeds)) == 1:
        row = scratch.of(x.shape[1:]).normal_(generator=generator.manual_seed(seeds[0]))
        return row.to(x).expand_as(x)
    z = scratch.of(x.shape)
    rows: dict[int, Tensor] = {}
    for index, seed in enumerate(seeds):
        if seed in rows:
            z[index].copy_(rows[seed])
            continue
        rows[seed] = z[index].normal_(generator=generator.manual_seed(seed))
    return z.to(x)


class CallDraws:
    """Draws of one call, for the replicas that have the fault; see `aqn_tune.faults.base.Draws`.

    Args:
        x: The values of the call, [A, N, D].
        fresh: Gives the seed of each replica in this step or evaluation batch.
        permanent: Gives the seed of each replica's device at this site.
        scratch: Memory for the first normal values, which stand until the next call of any fault.
    """

    def __init__(
        self,
        x: Tensor,
        fresh: Callable[[], list[int]],
        permanent: Callable[[], list[int]],
        scratch: Scratch,
    ) -> None:
        self._x = x
        self._scratch = scratch
        self._fresh = fresh
        self._permanent = permanent
        self._calls = 0

    def normal(self) -> Tensor:
        """Return standard normal values, fresh at every step, another draw at every call."""
        self._calls += 1
        if self._calls == 1:
            return keyed_normal(self._x, self._fresh(), self._scratch)
        return keyed_normal(self._x, [stream_seed(s, "again", self._calls) for s in self._fresh()])

    def generators(self, stream: str, *, fresh: bool) -> tuple[torch.Generator, ...]:
        """Return one generator per replica: this call's own, or the device's at this site."""
        seeds = self._fresh() if fresh else self._permanent()
        return tuple(
            torch.Generator().manual_seed(stream_seed(seed, "places", stream)) for seed in seeds
        )
