"""What a run needs in memory, and what there is: how many runs fit into one pack."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import nn

from aqn_tune.injection.address import is_linear
from aqn_tune.study.runs import Run
from aqn_tune.study.training import Lora
from aqn_tune.training.data import TokenSet
from aqn_tune.training.pack import ReplicaPack

STATE_COPIES = 8
"""Weights, gradients, both moments of AdamW, the copy that the weight audit compares with, and weights and
moments once more as they were at the rung before, to go back to."""
PADDED_COPIES = 3
"""Beside them, where ranks differ: a run's own weights and gradients, packed, and their places in its row."""
ACTIVATIONS_PER_FEATURE = 3
"""Values that a step keeps for its backward pass, at most, for each token and feature that enters or
leaves a linear layer. Measured on Qwen, Llama, Mistral, Gemma and GPT-2 shapes: 1.0 to 1.7; noise, faults
and quantizers keep up to as much again."""
SHARE = 0.5
"""Share of the free memory that packs may plan to use."""


class Fit(NamedTuple):
    """How many runs can train in lockstep."""

    runs: int
    why: str
    """What limits it; empty where nothing does."""


def fitting(runs: tuple[Run, ...], model: nn.Module, data: TokenSet, *, share: float) -> Fit:
    """Return how many of `runs` fit in one pack on the model's device.

    A bound from the shapes alone decides where memory is plenty, as it is for small models. Where it
    does not, a run's activations are measured, in one forward pass of a pack of one: those of the run
    with the largest bound, at a step that has its noise. It stands for all; adapters are padded to the
    largest rank.

    Args:
        runs: Runs of equal pack key.
        model: The base model; it is used up where a measurement is needed.
        data: The training split.
        share: Share of the free memory that is this process's, 0 to 1.
    """
    budget = int(SHARE * share * free_bytes(next(model.parameters()).device))
    padded = len({_rank(run) for run in runs}) > 1
    largest = max(runs, key=_rank)
    bounds = {
        run: bound_per_run(run, model, data, rank=_rank(largest), padded=padded)
        for run in {_without_seed(run) for run in runs}
    }
    if len(runs) == 1 or len(runs) * max(bounds.values()) <= budget:
        return Fit(len(runs), "")
    run = max(bounds, key=lambda run: bounds[run])
    needed = measured_per_run(run, model, data, rank=_rank(largest), padded=padded)
    count = max(min(budget // needed, len(runs)), 1)
    if count == len(runs):
        return Fit(count, "")
    # No free memory in it: the reasons of a study are counted, and that is another number every time.
    return Fit(count, f"a run takes {needed >> 20} MiB, and a worker's memory holds {count}")


def _without_seed(run: Run) -> Run:
    return run.model_copy(update={"seed": 0})


def _rank(run: Run) -> int:
    method = run.training.method
    return method.rank if isinstance(method, Lora) else 0


def _copies(padded: bool) -> int:
    return STATE_COPIES + (PADDED_COPIES if padded else 0)


def bound_per_run(
    run: Run, model: nn.Module, data: TokenSet, *, rank: int = 0, padded: bool = False
) -> int:
    """Return an upper bound on the bytes that one more run in a pack takes, from shapes alone.

    Args:
        run: The run.
        model: The base model.
        data: The training split.
        rank: Largest rank of the pack, where that is not the run's own.
        padded: Whether the ranks of the pack differ.
    """
    spec = run.training
    tokens = spec.batch_size // spec.gradient_accumulation_steps * data.tokens.shape[1]
    size = next(model.parameters()).element_size()
    linears = [module for module in model.modules() if is_linear(module)]
    features = sum(sum(module.get_parameter("weight").shape) for module in linears)
    # Noise, faults and quantizers keep as much again; logits are float32 whatever the model is.
    acting = 1 if run.noise is None and run.device.is_healthy() else 2
    activations = acting * tokens * features * ACTIVATIONS_PER_FEATURE * max(size, 4)
    # A run may compute with weights of its own, changed on their way, and keep them to go back.
    weights = sum(parameter.numel() for parameter in model.parameters())
    changed = 2 * weights * size if acting > 1 else 0
    # What is trained is held in float32 at the least, and the model computes with rounded copies of it.
    kept = max(size, 4)
    if spec.method.kind == "full":
        trained = weights
        changed += weights * size if kept > size else 0
    else:
        trained = max(rank, spec.method.rank) * features
    return activations + changed + _copies(padded) * trained * kept


def measured_per_run(
    run: Run, model: nn.Module, data: TokenSet, *, rank: int = 0, padded: bool = False
) -> int:
    """Return the bytes that one run takes: its trained state, and what one step keeps until it goes back.

    See `bound_per_run`; the adapters are measured at the run's own rank and counted at `rank`.
    """
    pack = ReplicaPack(model, [run], data, next(model.parameters()).device)
    noised = (step for step, sigma in enumerate(run.noise.sigma if run.noise else ()) if sigma > 0)
    pack.step = next(noised, 0)
    weights = pack.arena.weights
    trained = weights.numel()
    if _rank(run):
        trained = trained * max(rank, _rank(run)) // _rank(run)
    needed = _copies(padded) * trained * weights.element_size() + pack.saved_bytes()
    del pack, weights
    gc.collect()  # a pack and its hooks refer to one another
    return needed


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes; of the CPU, what its container leaves as well.

    Memory that this process keeps for itself and does not use counts as free.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    _return_freed_memory()
    free = int(psutil.virtual_memory().available)
    limit, used = (_number(Path("/sys/fs/cgroup") / f"memory.{of}") for of in ("max", "current"))
    if limit is None or used is None:
        return free
    cached = _cached_files(Path("/sys/fs/cgroup/memory.stat"))
    return max(min(free, limit - used + cached), 0)


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _return_freed_memory() -> None:
    """Give freed memory back to the system, which workers otherwise keep (glibc alone has the call)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _cached_files(stat: Path) -> int:
    """Return the bytes of a container's memory that hold files and are given up where memory is short."""
    try:
        lines = stat.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    counts = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return int(counts.get("inactive_file", 0))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of a device is spent."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("DefaultCPUAllocator", "CUDA error: out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


def _number(path: Path) -> int | None:
    """Return the number in a file, None where it is not there or says `max`."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
