"""What a replica costs in a pack: CPU time per replica-step and memory, against the size of things.

    python benchmarks/scaling.py [--rounds 5] [--steps 2] [--only NAME ...] [--out FOLDER]

The pack: `ReplicaPack` with LoRA of rank 8 on all linear layers of a random Qwen2 model, noise on the
hidden states of every layer, a dead zone at the output of one. The base point is 28 layers, hidden size
64, 64 tokens per replica and step; one size is changed at a time (heads and the feed-forward part go
with the hidden size), each with K = 1, 2, 4, 8 and 16 replicas. One thread. All packs are built first; a
round then takes `--steps` steps of each of them, in an order of its own, and counts the fastest; what is
reported is the median over the rounds.

Memory is measured in a fresh process for each K: the peak of what is resident, less what was there before
the model was built; once as it is, and once with `MALLOC_MMAP_THRESHOLD_` set, so that the C library gives
back what is freed at once: what a pack holds, without the holes that freed tensors leave in the heap. Beside
it stands what a replica has to hold, counted: adapters, their gradients and the two moments of AdamW; and the
activations that the backward pass needs.

`--only` takes of tokens, layers, hidden and memory. A part, which fewer than five rounds are too, is
written to `scaling.part.json`.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _common import (
    FEWEST_ROUNDS,
    Clock,
    Curve,
    Prepared,
    Spread,
    Workload,
    add_out,
    configs,
    curves,
    load,
    machine,
    peak_above,
    prepare,
    spread,
    write,
)
from rich.console import Console
from rich.table import Table

from aqn_tune.models import build_model
from aqn_tune.training.pack import ReplicaPack

REPLICAS = (1, 2, 4, 8, 16)
NO_HOLES = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
"""Tensors from this size on get memory of their own, that goes back when they do."""
STEPS = 2000
"""Length of the schedules: long, so that hardly any step is one whose noise is audited."""
FIRST = STEPS // 10 + 1
"""The first step that counts: noise is on, and the step is not the first of its sigma."""

BASE = Workload("base")
SWEEPS: dict[str, dict[int, Workload]] = {
    "tokens": {
        64: BASE,
        256: BASE._replace(name="t256", rows=8, tokens=32),
        512: BASE._replace(name="t512", rows=8, tokens=64),
        1024: BASE._replace(name="t1024", rows=16, tokens=64),
    },
    "layers": {
        7: BASE._replace(name="l7", layers=7),
        14: BASE._replace(name="l14", layers=14),
        28: BASE,
    },
    "hidden": {
        32: BASE._replace(name="h32", hidden=32, intermediate=64),
        64: BASE,
        128: BASE._replace(name="h128", hidden=128, intermediate=256),
        256: BASE._replace(name="h256", hidden=256, intermediate=512),
    },
}
LABELS = {
    "tokens": "tokens per replica and step",
    "layers": "decoder layers",
    "hidden": "hidden size",
}
MEMORY = "memory"
MEMORY_SIZES = (64, 1024)


# -- time -------------------------------------------------------------------------------------------


def open_pack(prepared: Prepared, replicas: int) -> ReplicaPack:
    """Return a pack of one config that stands at a step with noise."""
    runs = configs(prepared.workload, STEPS, replicas)[0]
    pack = ReplicaPack(build_model(prepared.spec, prepared.base), runs, prepared.data)
    pack.train_to(1)
    pack.step = (
        FIRST  # no need to take the steps before: the data and the noise of any step are keyed
    )
    pack.train_to(FIRST + 1)
    return pack


Cell = tuple[Workload, int]
"""A workload and a number of replicas."""


def time_packs(
    cells: Sequence[Cell], rounds: int, steps: int, folder: Path, say: Callable[[str], None]
) -> dict[Cell, list[float]]:
    """Return the CPU milliseconds per replica-step of every cell, one for each round."""
    torch.set_num_threads(1)
    prepared = {
        workload: prepare(workload, folder) for workload in dict.fromkeys(w for w, _ in cells)
    }
    packs: dict[Cell, ReplicaPack] = {}
    for workload, replicas in cells:
        say(f"building {workload.about()}, {workload.layers} layers, K = {replicas}")
        packs[workload, replicas] = open_pack(prepared[workload], replicas)
    gc.collect()
    gc.freeze()  # what is built would be walked at random times
    found: dict[Cell, list[float]] = {cell: [] for cell in cells}
    order = random.Random(0)
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for cell in order.sample(list(cells), len(cells)):
            pack = packs[cell]
            times = []
            for _ in range(steps):
                clock = Clock()
                pack.train_to(pack.step + 1)
                times.append(clock.read()[1])
            found[cell].append(1e3 * min(times) / cell[1])
    gc.unfreeze()
    return found


# -- memory -----------------------------------------------------------------------------------------


class Held(NamedTuple):
    """What one more replica has to hold, in MB, counted."""

    adapters: float
    """Weights, gradients and two moments."""
    activations: float
    """What the backward pass needs."""


def held(workload: Workload) -> Held:
    """Count what a replica of a LoRA pack has to hold.

    Per token and layer, in numbers of 4 bytes: both norms keep their input and give one that the adapters
    keep (4 hidden); attention keeps queries, keys, values and its output; the feed-forward part the gate,
    its activation, the up projection and their product; every adapter its inner values.
    """
    rank = workload.rank
    assert rank is not None
    heads, kv_heads = workload.heads()
    size = workload.hidden // heads
    hidden, inner, kv = workload.hidden, workload.intermediate, kv_heads * size
    widths = (
        (hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden),
        (hidden, inner), (hidden, inner), (inner, hidden),
    )  # fmt: skip
    parameters = workload.layers * rank * sum(a + b for a, b in widths)
    layer = 4 * hidden + 2 + 2 * hidden + 2 * kv + heads + 4 * inner + len(widths) * rank
    token = workload.layers * layer + hidden + 2 * workload.vocabulary
    activations = workload.rows * workload.tokens * token
    return Held(4 * 4 * parameters / 2**20, 4 * activations / 2**20)


def peak_of(workload: Workload, replicas: int, answer: Any) -> None:
    """Send the peak memory of three steps of a pack, in MB above what was there before; in a process of
    its own."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(workload, Path(folder))
        # A model and a step of a smaller pack first: libraries take memory when they are first used.
        small = prepare(workload._replace(name="small", layers=1), Path(folder))
        open_pack(small, 1)

        def work() -> None:
            pack = open_pack(prepared, replicas)
            pack.train_to(pack.step + 1)

        answer.send(peak_above(work))


class Peak(NamedTuple):
    """The peak memory of a pack in MB."""

    as_is: float
    without_holes: float


def measure_memory(workload: Workload, replicas: int) -> Peak:
    """Return the peak memory of a pack."""
    return Peak(
        peak_in_process(workload, replicas, {}), peak_in_process(workload, replicas, NO_HOLES)
    )


def peak_in_process(workload: Workload, replicas: int, environment: Mapping[str, str]) -> float:
    """Return what `peak_of` finds in a fresh process, which sees `environment` beside its own."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        return _peak_in_process(workload, replicas)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _peak_in_process(workload: Workload, replicas: int) -> float:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=peak_of, args=(workload, replicas, sender))
    process.start()
    sender.close()
    try:
        peak: float = receiver.recv()
    finally:
        process.join()
    return peak


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the least-squares slope."""
    return statistics.linear_regression(*zip(*points, strict=True)).slope


# -- report -----------------------------------------------------------------------------------------


class Result(NamedTuple):
    """All that was measured."""

    times: dict[Cell, list[float]]
    peaks: dict[int, dict[int, Peak]]
    """By tokens per replica and by K."""
    sweeps: tuple[str, ...]

    def cost(self, workload: Workload, replicas: int) -> Spread:
        """Return the CPU milliseconds per replica-step."""
        return spread(self.times[workload, replicas])

    def per_replica(self, size: int) -> Peak:
        """Return what one more replica adds to the peak, MB."""
        as_is, without = zip(*self.peaks[size].values(), strict=True)
        ks = list(self.peaks[size])
        return Peak(*(slope(list(zip(ks, found, strict=True))) for found in (as_is, without)))

    def is_whole(self) -> bool:
        """Return whether every size was measured, often enough."""
        return (
            set(self.sweeps) == set(SWEEPS)
            and set(self.peaks) == set(MEMORY_SIZES)
            and all(len(rounds) >= FEWEST_ROUNDS for rounds in self.times.values())
        )


def print_sweep(console: Console, result: Result, name: str) -> None:
    """Print one line per size, one column per K."""
    table = Table(title=f"CPU ms per replica-step: {LABELS[name]} against K")
    table.add_column(name)
    for replicas in REPLICAS:
        table.add_column(f"K = {replicas}", justify="right", no_wrap=True)
    table.add_column("K = 1 / K = 16", justify="right", no_wrap=True)
    for size, workload in SWEEPS[name].items():
        costs = [result.cost(workload, replicas) for replicas in REPLICAS]
        table.add_row(
            str(size),
            *(f"{c.median:.1f}" for c in costs),
            f"{costs[0].median / costs[-1].median:.2f}",
        )
    console.print(table)


def print_memory(console: Console, result: Result) -> None:
    """Print measured and counted memory."""
    table = Table(title="Peak memory of a pack in MB, above the process before it was built")
    table.add_column("tokens")
    table.add_column("")
    for replicas in REPLICAS:
        table.add_column(f"K = {replicas}", justify="right", no_wrap=True)
    for heading in ("a replica", "counted", "of counted"):
        table.add_column(heading, justify="right")
    for size, peaks in result.peaks.items():
        counted = sum(held(SWEEPS["tokens"][size]))
        for way, name in zip(Peak._fields, ("as it is", "without holes"), strict=True):
            found = getattr(result.per_replica(size), way)
            table.add_row(
                str(size), name, *(f"{getattr(peaks[k], way):.0f}" for k in REPLICAS),
                f"{found:.1f}", f"{counted:.1f}", f"{found / counted:.2f}",
            )  # fmt: skip
    console.print(table)
    for size in result.peaks:
        own = held(SWEEPS["tokens"][size])
        console.print(
            f"{size} tokens, counted: {own.adapters:.1f} MB of adapters and their moments, "
            f"{own.activations:.1f} of activations",
            highlight=False,
        )


def picture(result: Result) -> str:
    """Return the curves."""
    panels: list[tuple[str, str, Sequence[Curve]]] = []
    for name in result.sweeps:
        lines = [
            Curve(str(size), [(k, result.cost(workload, k).median) for k in REPLICAS])
            for size, workload in SWEEPS[name].items()
        ]
        panels.append((f"CPU ms per replica-step, by {name}", "replicas in the pack, K", lines))
    lines = []
    for size, peaks in result.peaks.items():
        if math.isnan(sum(map(sum, peaks.values()))):
            continue
        own = sum(held(SWEEPS["tokens"][size]))
        rest = max(peaks[REPLICAS[0]].without_holes - own, 0.0)
        lines.append(Curve(f"{size}", [(k, peak.as_is) for k, peak in peaks.items()]))
        lines.append(Curve(f"{size} counted", [(k, rest + own * k) for k in REPLICAS]))
    if lines:
        panels.append(("Peak MB of a pack, by tokens", "replicas in the pack, K", lines))
    note = "28 layers, hidden size 64, 64 tokens per replica unless said; LoRA r 8; one thread"
    return curves("What a replica costs in a pack", note, panels)


def record(result: Result, settings: dict[str, Any]) -> dict[str, Any]:
    """Return everything as plain data."""
    return {
        "machine": machine(),
        "settings": settings,
        "sweeps": {
            name: [
                {
                    name: size,
                    "replicas": replicas,
                    **result.cost(workload, replicas)._asdict(),
                    "rounds": result.times[workload, replicas],
                }
                for size, workload in SWEEPS[name].items()
                for replicas in REPLICAS
            ]
            for name in result.sweeps
        },
        "memory": [
            {
                "tokens": size,
                "peak_mb": {k: peak._asdict() for k, peak in peaks.items()},
                "per_replica_mb": result.per_replica(size)._asdict(),
                "counted_mb": held(SWEEPS["tokens"][size])._asdict(),
            }
            for size, peaks in result.peaks.items()
        ],
    }


def main() -> None:
    """Measure, print and write."""
    names = [*SWEEPS, MEMORY]
    parser = argparse.ArgumentParser(description="Measure what a replica costs in a pack.")
    parser.add_argument(
        "--rounds", type=int, default=5, help=f"rounds, at least {FEWEST_ROUNDS} to keep a figure"
    )
    parser.add_argument("--steps", type=int, default=2, help="steps of a pack in a round")
    parser.add_argument("--only", nargs="+", default=names, choices=names, help="parts to measure")
    add_out(parser, "scaling")
    options = parser.parse_args()
    if options.rounds < 1 or options.steps < 1 or options.rounds * options.steps > STEPS // 18:
        parser.error(f"--rounds and --steps are at least 1, their product at most {STEPS // 18}")
    console = Console()
    if not console.is_terminal:
        console.width = 120
    before = load()
    sweeps = tuple(name for name in SWEEPS if name in options.only)
    workloads = dict.fromkeys(w for name in sweeps for w in SWEEPS[name].values())
    cells = [(workload, replicas) for workload in workloads for replicas in REPLICAS]
    with tempfile.TemporaryDirectory() as name, console.status("starting") as status:
        peaks: dict[int, dict[int, Peak]] = {}
        for size in MEMORY_SIZES if MEMORY in options.only else ():
            peaks[size] = {}
            for replicas in REPLICAS:
                status.update(f"memory: {size} tokens, K = {replicas}")
                peaks[size][replicas] = measure_memory(SWEEPS["tokens"][size], replicas)
        times = time_packs(cells, options.rounds, options.steps, Path(name), status.update)
    result = Result(times, peaks, sweeps)
    after = load()
    for sweep in sweeps:
        print_sweep(console, result, sweep)
    if peaks:
        print_memory(console, result)
    about = machine()
    console.print(
        f"{about['cpu']}, {about['cores']} cores, one thread, load {before[0]} before and {after[0]} after; "
        f"torch {about['torch']}; medians of {options.rounds} rounds of {options.steps} steps",
        highlight=False,
    )
    settings = {
        "rounds": options.rounds, "steps": options.steps, "only": options.only,
        "measured": [*result.sweeps, *([MEMORY] if peaks else [])],
        "load_before": before, "load_after": after,
    }  # fmt: skip
    found = record(result, settings)
    file = write(options.out, "scaling", found, picture(result), whole=result.is_whole())
    console.print(f"written to {file}", highlight=False)


if __name__ == "__main__":
    main()
