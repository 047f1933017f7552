"""Random draws of a training, each keyed by replicate seed, stream, step and place.

Keyed by place and not by order of drawing: layer 10 gets the same noise whether the arm noises layer
10 alone or all layers, and a training resumed at step 40 needs no generator state.

Limits: torch's CPU generator takes 32 bits of a seed, so among 100,000 streams about one pair is the
same by chance. torch promises equal values for one release, platform and device type only; drawn in float32
on the CPU, they are equal across processes, threads and packs there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aqn_tune.study.seeds import stream_seed


def keyed_generator(seed: int, *path: str | int) -> torch.Generator:
    """Return a CPU generator for the stream `path` under `seed`."""
    return torch.Generator().manual_seed(stream_seed(seed, *path))


class BatchOrder:
    """Which rows a replicate sees at each step: a keyed permutation per epoch, random access by step."""

    def __init__(self, rows: int, batch_size: int) -> None:
        if rows < 1:
            raise ValueError("a training needs at least one row")
        self._rows = rows
        self._batch_size = batch_size
        self._epochs: dict[tuple[int, int], Tensor] = {}

    def indices(self, seed: int, step: int) -> Tensor:
        """Return the row numbers of one batch, int64 [B]; batches run on across epoch ends."""
        position = torch.arange(step * self._batch_size, (step + 1) * self._batch_size)
        epochs = position // self._rows
        chosen = torch.empty_like(position)
        for epoch in sorted(set(epochs.tolist())):
            here = epochs == epoch
            chosen[here] = self._permutation(seed, int(epoch))[position[here] % self._rows]
        return chosen

    def _permutation(self, seed: int, epoch: int) -> Tensor:
        if (seed, epoch) not in self._epochs:
            self._epochs = {k: v for k, v in self._epochs.items() if k[1] >= epoch - 1}
            generator = keyed_generator(seed, "data", epoch)
            self._epochs[seed, epoch] = torch.randperm(self._rows, generator=generator)
        return self._epochs[seed, epoch]
