"""What lockstep gains on a GPU: a pack of K replicas against K ordinary runs, one after another.

    python benchmarks/gpu.py [--rounds 5] [--steps 10] [--replicas 1 5 10] [--only NAME ...]

The models have the shapes of SmolLM2-135M and Qwen2.5-1.5B and random weights: nothing is downloaded, and a
matrix product costs the same whatever is in it. They are frozen in bfloat16 with float32 adapters of rank 16
on all linear layers, which compute in bfloat16 on both sides. A batch is 4 x 128 or 8 x 256 tokens per
replica, all of them trained on; a third workload adds noise at every layer and a dead zone at layer 10.

one by one  an ordinary transformers + peft loop under autocast, with fused AdamW, which reads no loss back. K
            runs one after another are timed as K times the steps of one run.
pack        `ReplicaPack` of K runs, with all that it does: losses read back, gradients audited. Both sides
            draw noise on the GPU: the pack replica by replica under each run's keys, the loop at once.

A round times both, each first in every other round; ratios are taken within a round. Building and warming up
are left out. Tokens per second are those of all K runs. The share of the peak is what the matrix products of
a step come to (frozen layers forward and back to their inputs, adapters, head, attention under the causal
mask) over what a large product of bfloat16 matrices reaches in the same process. Memory is the peak of what
torch has allocated for one side, model included. What does not fit says so and is not a number.

A part (`--only`, other `--replicas`, fewer than five rounds, an interrupted run) is in `gpu.part.json`.

It needs a GPU that CUDA can use; without one it ends with 2 and writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _common import (
    FAULTY_LAYER,
    FEWEST_ROUNDS,
    SEED,
    Bar,
    Spread,
    add_out,
    bars,
    load,
    machine,
    replicates,
    spread,
    write,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from aqn_tune.faults.dead_zone import DeadZone
from aqn_tune.models import decoder_layers
from aqn_tune.noise import NoisePolicy
from aqn_tune.study.device import HEALTHY, Device
from aqn_tune.study.runs import Run
from aqn_tune.study.training import SEVEN_LINEARS, Lora, TrainingSpec
from aqn_tune.training.data import TokenSet
from aqn_tune.training.learning_rate import learning_rate
from aqn_tune.training.pack import ReplicaPack
from aqn_tune.training.streams import BatchOrder, keyed_generator

DEVICE = "cuda"
DTYPE = torch.bfloat16
RANK = 16
DATA_ROWS = 256
SCHEDULE = 2000
"""Length of the schedules: long, so that hardly any step is one whose noise is audited."""
WARM = 3
"""Steps before anything is timed."""
REPLICAS = (1, 5, 10)
SIGMA, THRESHOLD = 0.05, 0.1
FURTHEST = 0.05
"""Losses of the first steps must be this near, in nats: bfloat16 has three digits."""


class Shape(NamedTuple):
    """The shape of a model."""

    name: str
    kind: str
    """Which config of transformers it takes: llama or qwen2."""
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


SMOL = Shape("SmolLM2-135M", "llama", 576, 1536, 30, 9, 3, 49152)
QWEN = Shape("Qwen2.5-1.5B", "qwen2", 1536, 8960, 28, 12, 2, 151936)


class Workload(NamedTuple):
    """A model and a batch."""

    shape: Shape
    rows: int
    tokens: int
    injected: bool = False
    """Whether there are noise and a fault."""

    @property
    def name(self) -> str:
        """The size in a word, which `--only` takes."""
        return f"{self.shape.name}/{self.rows}x{self.tokens}{'/injected' if self.injected else ''}"


WORKLOADS = tuple(
    Workload(shape, *size)
    for shape in (SMOL, QWEN)
    for size in ((4, 128), (8, 256), (4, 128, True))
)


# -- models, data and runs --------------------------------------------------------------------------


def build(shape: Shape) -> nn.Module:
    """Return a frozen model of the shape with random weights, the same at every call."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[shape.kind](
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(SEED)
    with torch.device(DEVICE):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    return model.requires_grad_(False).eval()


def random_rows(workload: Workload) -> TokenSet:
    """Return rows of random tokens without padding, all of them answers but the first."""
    shape = (DATA_ROWS, workload.tokens)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(workload.shape.vocabulary, shape, generator=generator)
    answer = torch.ones(shape, dtype=torch.bool)
    answer[:, 0] = False
    return TokenSet(tokens, answer, torch.ones(shape, dtype=torch.bool), 0)


def runs_of(workload: Workload, count: int) -> list[Run]:
    """Return runs that differ in their seeds."""
    noise, device = None, HEALTHY
    if workload.injected:
        policy = NoisePolicy.model_validate({"schedule": {"kind": "constant", "sigma": SIGMA}})
        noise = policy.resolve(
            steps=SCHEDULE, layer_count=workload.shape.layers, fault_layers=(FAULTY_LAYER,)
        )
        device = Device(faults=(DeadZone(layers=(FAULTY_LAYER,), threshold=THRESHOLD),))
    training = TrainingSpec(
        method=Lora(rank=RANK),
        steps=SCHEDULE,
        batch_size=workload.rows,
        max_length=workload.tokens,
        learning_rate=1e-4,
    )
    return replicates(training, device, noise, count)


def flops_per_token(workload: Workload, linears: Sequence[tuple[int, int]]) -> float:
    """Return the floating-point operations of a step's matrix products for each token.

    `linears` are (in, out) of the adapted layers. The first layer's q, k and v need no gradient of
    their input, and are counted as if they did.
    """
    shape = workload.shape
    frozen = sum(2 * 2 * inner * out for inner, out in linears)
    adapters = sum(3 * 2 * RANK * (inner + out) for inner, out in linears)
    head = 2 * 2 * shape.hidden * shape.vocabulary
    # Two products forward and four back; a token sees half of the row on average.
    attention = shape.layers * (2 + 4) * 2 * (workload.tokens / 2) * shape.hidden
    return frozen + adapters + head + attention


# -- the two ways -----------------------------------------------------------------------------------


class Loop:
    """An ordinary loop with transformers and peft, which stands for one run."""

    def __init__(self, workload: Workload, run: Run, data: TokenSet) -> None:
        from peft import LoraConfig, get_peft_model

        base = build(workload.shape)
        self.linears = [
            (module.in_features, module.out_features)
            for name, module in base.named_modules()
            if name.rpartition(".")[2] in SEVEN_LINEARS and isinstance(module, nn.Linear)
        ]
        spec = run.training
        assert isinstance(spec.method, Lora)
        config = LoraConfig(
            r=RANK, lora_alpha=spec.method.alpha, target_modules=list(SEVEN_LINEARS)
        )
        self._model: nn.Module = get_peft_model(base, config)
        for name, parameter in self._model.named_parameters():
            if "lora_A" in name:
                site = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
                bound = 1.0 / math.sqrt(parameter.shape[1])
                drawn = torch.empty(parameter.shape)
                drawn.uniform_(-bound, bound, generator=keyed_generator(run.seed, "init", site))
                with torch.no_grad():
                    parameter.copy_(drawn)
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=spec.learning_rate,
            betas=(spec.beta1, spec.beta2),
            weight_decay=spec.weight_decay,
            fused=True,
        )
        self._run = run
        self._tokens = data.tokens.to(DEVICE)
        self._order = BatchOrder(len(data.tokens), spec.batch_size)
        self._step = 0
        self.losses: list[Tensor] = []
        if workload.injected:
            self._add_hooks()

    def _add_hooks(self) -> None:
        def noise(module: nn.Module, args: Any, h: Tensor) -> Tensor:
            return h + SIGMA * h.detach().abs() * torch.randn_like(h)

        def dead_zone(module: nn.Module, args: Any, h: Tensor) -> Tensor:
            magnitude = h.detach().abs()
            cut = THRESHOLD * magnitude.amax(dim=-1, keepdim=True)
            return h.masked_fill(magnitude < cut, 0.0)

        layers = decoder_layers(self._model)
        for layer in layers:
            layer.register_forward_hook(noise)
        layers[FAULTY_LAYER].register_forward_hook(dead_zone)

    def train(self, steps: int) -> None:
        """Take optimiser steps."""
        spec = self._run.training
        for _ in range(steps):
            rows = self._tokens[self._order.indices(self._run.seed, self._step).to(DEVICE)]
            self._optimizer.zero_grad()
            with torch.autocast(DEVICE, dtype=DTYPE):
                loss = self._model(input_ids=rows, labels=rows, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, spec.max_grad_norm)
            self._optimizer.param_groups[0]["lr"] = learning_rate(spec, self._step)
            self._optimizer.step()
            self.losses.append(loss.detach())
            del loss  # its graph would live on through the next forward pass
            self._step += 1


def open_pack(workload: Workload, runs: Sequence[Run], data: TokenSet) -> ReplicaPack:
    """Return a pack on the GPU: the one place that says where model and data go."""
    return ReplicaPack(build(workload.shape), runs, data, device=DEVICE)


# -- clocks and memory ------------------------------------------------------------------------------


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that some work takes, until the GPU is done with it."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def matmul_peak(size: int = 8192, products: int = 20, rounds: int = 5) -> float:
    """Return the floating-point operations a second of a large product: the fastest of some rounds."""
    a, b, out = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(3))

    def work() -> None:
        for _ in range(products):
            torch.mm(a, b, out=out)

    timed(work)
    return 2 * size**3 * products / min(timed(work) for _ in range(rounds))


class Held:
    """What torch has allocated on the GPU since this was made."""

    def __init__(self) -> None:
        self._before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """Return the most that it was, in GB."""
        return float(torch.cuda.max_memory_allocated() - self._before) / 1e9


class Measured(NamedTuple):
    """A workload at one K."""

    workload: Workload
    replicas: int
    loop: list[float]
    """Seconds of the K runs one by one, each round."""
    pack: list[float]
    loop_memory: float
    """GB of one run: one by one, no more is ever there."""
    pack_memory: float
    flops: float
    """Floating-point operations of a step's matrix products for each token."""
    difference: float | None
    """Largest difference of a loss of the first run before anything was timed; None with noise, which
    the two sides draw differently."""
    missing: str = ""
    """Why there are no figures; empty where there are."""

    def rate(self, seconds: Sequence[float], steps: int) -> Spread:
        """Return tokens per second of all runs."""
        tokens = self.workload.rows * self.workload.tokens * self.replicas * steps
        return spread([tokens / second for second in seconds])

    def ratios(self) -> Spread:
        """Return how many times faster the pack is, round by round."""
        return spread([a / b for a, b in zip(self.loop, self.pack, strict=True)])


def measure(workload: Workload, replicas: int, rounds: int, steps: int) -> Measured:
    """Time a pack of K replicas against K runs; out of memory is an outcome, not an error."""
    try:
        return _measure(workload, replicas, rounds, steps)
    except torch.OutOfMemoryError:
        missing = "out of memory"
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return Measured(workload, replicas, [], [], 0.0, 0.0, 0.0, None, missing)


def _measure(workload: Workload, replicas: int, rounds: int, steps: int) -> Measured:
    data, runs = random_rows(workload), runs_of(workload, replicas)
    held = Held()
    loop = Loop(workload, runs[0], data)
    loop.train(WARM)
    loop_memory = held.peak()
    held = Held()
    pack = open_pack(workload, runs, data)
    pack.train_to(WARM)
    pack_memory = held.peak()
    difference = None
    if not workload.injected:
        difference = max(
            abs(float(one) - other)
            for one, other in zip(loop.losses, pack.train_losses[0], strict=True)
        )
        if difference > FURTHEST:
            raise RuntimeError(
                f"{workload.name}: losses of the two sides differ by {difference:.3f}; they do not do "
                "the same work"
            )

    def one_by_one() -> None:
        for _ in range(replicas):
            loop.train(steps)

    def together() -> None:
        pack.train_to(pack.step + steps)

    seconds: dict[str, list[float]] = {"loop": [], "pack": []}
    ways = [("loop", one_by_one), ("pack", together)]
    for number in range(rounds):
        for name, way in ways[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(timed(way))
    if pack.failures:
        raise RuntimeError(f"{workload.name}: {pack.failures}")
    return Measured(
        workload, replicas, seconds["loop"], seconds["pack"], loop_memory, pack_memory,
        flops_per_token(workload, loop.linears), difference,
    )  # fmt: skip


# -- report -----------------------------------------------------------------------------------------


def print_measured(console: Console, found: Sequence[Measured], peak: float, steps: int) -> None:
    """Print the figures of one workload."""
    table = Table(title=found[0].workload.name)
    for heading in ("K", "way", "tokens/s", "of peak", "GB", "times"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for each in found:
        if each.missing:
            table.add_row(str(each.replicas), each.missing)
            continue
        for way, seconds, memory in (
            ("one by one", each.loop, each.loop_memory),
            ("pack", each.pack, each.pack_memory),
        ):
            rate = each.rate(seconds, steps)
            table.add_row(
                str(each.replicas), way, rate.text(0), f"{rate.median * each.flops / peak:.1%}",
                f"{memory:.2f}", each.ratios().text(2) if way == "pack" else "",
            )  # fmt: skip
    console.print(table)


def picture(measured: Sequence[Measured], steps: int) -> str:
    """Return the tokens per second of every workload as bars."""
    groups = []
    for workload in WORKLOADS:
        rows = []
        for each in measured:
            if each.workload != workload or each.missing:
                continue
            for way, seconds, colour in (
                ("one by one", each.loop, "#c73"),
                ("pack", each.pack, "#48a"),
            ):
                rate = each.rate(seconds, steps)
                ratio = f", {each.ratios().median:.2f} x" if way == "pack" else ""
                label = f"K = {each.replicas}, {way}"
                rows.append(Bar(label, rate, f"{rate.median:,.0f}{ratio}", colour))
        if rows:
            groups.append((workload.name, rows))
    return bars(
        "Tokens per second of all K runs",
        "bar: median of the rounds; line: least to most; longer is better; a scale per workload",
        groups,
    )


def record(
    measured: Sequence[Measured], peak: float, settings: dict[str, Any], steps: int
) -> dict[str, Any]:
    """Return everything as plain data."""

    def one(each: Measured) -> dict[str, Any]:
        about = {"workload": each.workload.name, "replicas": each.replicas}
        if each.missing:
            return {**about, "missing": each.missing}
        sides = {}
        for way, seconds, memory in (
            ("one_by_one", each.loop, each.loop_memory),
            ("pack", each.pack, each.pack_memory),
        ):
            rate = each.rate(seconds, steps)
            sides[way] = {
                "tokens_per_second": rate._asdict(),
                "share_of_peak": rate.median * each.flops / peak,
                "peak_gb": memory,
                "seconds": seconds,
            }
        return {
            **about, **sides, "times": each.ratios()._asdict(), "flops_per_token": each.flops,
            "loss_difference": each.difference,
        }  # fmt: skip

    return {
        "machine": {
            **machine(),
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "matmul_tflops": peak / 1e12,
        },
        "settings": settings,
        "results": [one(each) for each in measured],
    }


def is_whole(measured: Sequence[Measured]) -> bool:
    """Return whether every workload was measured at every size, often enough."""
    done = {(each.workload, each.replicas) for each in measured}
    wanted = {(workload, replicas) for workload in WORKLOADS for replicas in REPLICAS}
    often = all(each.missing or len(each.pack) >= FEWEST_ROUNDS for each in measured)
    return wanted <= done and often


def obstacle() -> str:
    """Return why nothing can be measured here, "" where it can."""
    if not torch.cuda.is_available():
        return (
            "benchmarks/gpu.py needs a CUDA GPU, and torch finds none here: nothing was measured."
        )
    return ""


def main() -> int:
    """Measure, print and write; return 2 where nothing can be measured."""
    names = [workload.name for workload in WORKLOADS]
    parser = argparse.ArgumentParser(description="Measure what lockstep gains on a GPU.")
    parser.add_argument(
        "--rounds", type=int, default=5, help=f"rounds, at least {FEWEST_ROUNDS} for a figure"
    )
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps of a run per round")
    parser.add_argument(
        "--replicas", type=int, nargs="+", default=list(REPLICAS), help="sizes of a pack"
    )
    parser.add_argument("--only", nargs="+", default=names, choices=names, help="what to measure")
    add_out(parser, "gpu")
    options = parser.parse_args()
    if min(options.rounds, options.steps, *options.replicas) < 1:
        parser.error("--rounds, --steps and --replicas are at least 1")
    if WARM + options.rounds * options.steps * max(options.replicas) > SCHEDULE:
        parser.error(
            f"rounds x steps x replicas is more than the {SCHEDULE} steps of the schedules"
        )
    if reason := obstacle():
        print(reason, file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console.width = 120
    before = load()
    peak = matmul_peak()
    measured: list[Measured] = []

    def save() -> Path:
        settings = {
            "rounds": options.rounds, "steps": options.steps, "replicas": options.replicas,
            "only": options.only, "measured": list(dict.fromkeys(m.workload.name for m in measured)),
            "rank": RANK, "dtype": "bfloat16", "load_before": before, "load_after": load(),
        }  # fmt: skip
        drawn = any(not each.missing for each in measured)
        return write(
            options.out, "gpu", record(measured, peak, settings, options.steps),
            picture(measured, options.steps) if drawn else None, whole=is_whole(measured),
        )  # fmt: skip

    file = None
    for workload in (each for each in WORKLOADS if each.name in options.only):
        found = []
        for replicas in options.replicas:
            with console.status(f"{workload.name}, K = {replicas}"):
                found.append(measure(workload, replicas, options.rounds, options.steps))
        measured += found
        print_measured(console, found, peak, options.steps)
        file = save()  # after every workload, so that an interrupted measurement is not lost
    about = machine()
    console.print(
        f"{torch.cuda.get_device_name()}, {peak / 1e12:.0f} TFLOP/s in a product of bfloat16 matrices; "
        f"torch {about['torch']}, transformers {about['transformers']}, peft {about['peft']}; median "
        f"(range) of {options.rounds} rounds of {options.steps} steps",
        highlight=False,
    )
    console.print(f"written to {file}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
