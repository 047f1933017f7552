"""Runs that go from rung to rung, in as few groups as the memory holds."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch

from aqn_tune.study.runs import Run
from aqn_tune.training.memory import Fit, is_out_of_memory
from aqn_tune.training.pack import ReplicaPack
from aqn_tune.training.state import ReplicaState, restore, state_of

T = TypeVar("T")


class Group(NamedTuple):
    """Runs that share their forward passes, while they are on the device."""

    pack: ReplicaPack
    first: int
    """Number of its first run among all."""


class Groups:
    """Takes runs through one rung after another, a group at a time.

    One group is the rule, and it stays on the device. Of several only one is there at a time: the
    others wait as states on the CPU, so that smaller groups need less memory for weights and moments
    as well as for activations. A group that runs out of memory is tried again in halves, from where
    its runs stood at the rung before.

    Args:
        runs: Runs of equal pack key.
        open_pack: Gives runs a pack of their own, at step 0.
        fit: How many may share a group, and why not more.
    """

    def __init__(
        self, runs: Sequence[Run], open_pack: Callable[[Sequence[Run]], ReplicaPack], fit: Fit
    ) -> None:
        self._runs = tuple(runs)
        self._open_pack = open_pack
        self.fit = fit
        self.held: int | None = None
        """Most runs that were held after the memory had run out; None while it has not."""
        self._states: list[ReplicaState] = []
        self._kept: ReplicaPack | None = None

    def through(self, work: Callable[[Group], T], *, last: bool) -> list[T]:
        """Give every group to `work`, which trains it to the next rung, and return what it returns.

        `last` says that no rung follows, so that no state is needed to go back to. Raises what `work`
        raises, and the error of a single run that the memory does not hold.
        """
        results: list[T] = []
        states: list[ReplicaState] = []
        waiting = deque(_cuts(0, len(self._runs), self.fit.runs))
        while waiting:
            first, end = waiting.popleft()
            try:
                result, reached = self._one(first, end, work, last=last)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or end - first == 1:
                    raise
            else:
                results.append(result)
                states += reached
                continue
            # Only here, out of the handler, has the traceback let go of the group.
            self.release()
            self.held = -(-(end - first) // 2)
            self.fit = Fit(self.held, f"the memory did not hold {end - first} at a time")
            halves = [(first, end), *waiting]
            waiting = deque(cut for one in halves for cut in _cuts(*one, self.held))
        self._states = states
        return results

    def _one(
        self, first: int, end: int, work: Callable[[Group], T], *, last: bool
    ) -> tuple[T, list[ReplicaState]]:
        is_all = end - first == len(self._runs)
        pack = self._kept
        if pack is None:
            pack = self._open_pack(self._runs[first:end])
            if self._states:
                restore(pack, self._states[first:end])
        self._kept = pack if is_all else None
        result = work(Group(pack, first))
        if is_all and last:
            return result, []
        states = [state_of(pack, replica) for replica in range(end - first)]
        if not is_all:
            del pack
            self.release()
        return result, states

    def states(self) -> list[ReplicaState]:
        """Return where every run stands; see `ReplicaState`."""
        if self._states or self._kept is None:
            return self._states
        return [state_of(self._kept, replica) for replica in range(len(self._runs))]

    def restore(self, states: Sequence[ReplicaState], held: int | None) -> None:
        """Let every run go on from a state, in groups of no more than the memory has `held` before."""
        self.release()
        self._states = list(states)
        if held is not None and held < self.fit.runs:
            self.held = held
            self.fit = Fit(held, f"the memory did not hold more than {held} at a time")

    def release(self) -> None:
        """Give back the memory of the group on the device."""
        self._kept = None
        # A pack and its hooks refer to one another: without this it would stay until some later time.
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()


def _cuts(first: int, end: int, size: int) -> list[tuple[int, int]]:
    """Return parts of a range of at most `size`, as even as they come."""
    count = -(-(end - first) // size)
    at = [first + round(part * (end - first) / count) for part in range(count + 1)]
    return list(pairwise(at))
