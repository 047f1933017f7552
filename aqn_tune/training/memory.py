"""What a run needs in memory, and what there is: how many runs fit into one pack."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import nn

from aqn_tune.injection.address import is_linear
from aqn_tune.study.runs import Run
from aqn_tune.training.data import TokenSet
from aqn_tune.training.pack import ReplicaPack

OPTIMISER_COPIES = 5
"""Weights, gradients, both moments of AdamW, and the copy that the weight audit compares with."""
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


def fitting(runs: tuple[Run, ...], model: nn.Module, data: TokenSet, *, sharers: int) -> Fit:
    """Return how many of `runs` fit in one pack on the model's device.

    A bound from the shapes alone decides where memory is plenty, as it is for small models. Where it
    does not, one run's activations are measured: one forward pass of a pack of one.

    Args:
        runs: Runs of equal pack key.
        model: The base model; it is used up where a measurement is needed.
        data: The training split.
        sharers: Processes that share the memory.
    """
    free = free_bytes(next(model.parameters()).device)
    budget = int(SHARE * free / sharers)
    if len(runs) == 1 or len(runs) * bound_per_run(runs[0], model, data) <= budget:
        return Fit(len(runs), "")
    needed = measured_per_run(runs[0], model, data)
    count = max(min(budget // needed, len(runs)), 1)
    if count == len(runs):
        return Fit(count, "")
    return Fit(
        count,
        f"a run takes {_mib(needed)} MiB (measured) and {_mib(budget)} MiB of {_mib(free)} MiB free "
        f"memory are this worker's",
    )


def bound_per_run(run: Run, model: nn.Module, data: TokenSet) -> int:
    """Return an upper bound on the bytes that one more run in a pack takes, from shapes alone."""
    spec = run.training
    tokens = spec.batch_size // spec.gradient_accumulation_steps * data.tokens.shape[1]
    size = next(model.parameters()).element_size()
    linears = [module for module in model.modules() if is_linear(module)]
    features = sum(sum(module.get_parameter("weight").shape) for module in linears)
    activations = tokens * features * ACTIVATIONS_PER_FEATURE * size
    if spec.method.kind == "full":
        trained = sum(parameter.numel() for parameter in model.parameters())
    else:
        trained, size = spec.method.rank * features, max(size, 4)
    return activations + OPTIMISER_COPIES * trained * size


def measured_per_run(run: Run, model: nn.Module, data: TokenSet) -> int:
    """Return the bytes that one run takes: its trained state, and what one step keeps until it goes back."""
    pack = ReplicaPack(model, [run], data, next(model.parameters()).device)
    state = OPTIMISER_COPIES * pack.arena.weights.numel() * pack.arena.weights.element_size()
    return state + pack.saved_bytes()


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes; of the CPU, what its container leaves as well."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    free = int(psutil.virtual_memory().available)
    limit, used = (_number(Path("/sys/fs/cgroup") / f"memory.{of}") for of in ("max", "current"))
    return free if limit is None or used is None else max(min(free, limit - used), 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of a device is spent."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _number(path: Path) -> int | None:
    """Return the number in a file, None where it is not there or says `max`."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _mib(size: int) -> int:
    return size >> 20
