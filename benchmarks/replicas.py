"""What lockstep gains: packs of replicas against the runs that one would otherwise write.

    python benchmarks/replicas.py [--rounds 5] [--steps 40] [--only NAME ...] [--out FOLDER]

The work: two configs of five seeds each, on a 28-layer model; noise on hidden states (config 1: every
layer, config 2: the faulty layer), a dead zone at the output of layer 10, clipping, AdamW. The same work
is done by two Ray actors of one thread each, one config per actor, in one of these ways:

loops    a plain transformers + peft loop per run, one run after another; fused AdamW, forward hooks.
trainer  the same with transformers' Trainer.
packs    ours: one `ReplicaPack` of five replicas.
compiled the same with compiled decoder layers. What compiling took is reported apart, and it was cold: an
         empty cache, and nothing that these actors had compiled before.

Every way builds its models from the same arrays inside the timed span; imports and the start of Ray are
outside, every actor has done a short run before. The ways take turns, each in actors of its own. Equal on
both sides: weights, adapters at the start, rows of every step, learning rate, loss (mean over the answer
tokens of the batch), noise level and fault at each step. What differs: loops and trainer draw noise from
torch's global generator, ours from keyed streams; ours also hashes the frozen weights and measures the noise
it injects. The losses of the steps before the first noise must agree; the largest difference is printed.

Memory is measured apart, once for each way, in a fresh process: the peak of one run by loop or Trainer, or
of a pack of five, less what the process held before the model was built, for each replica. A model of one
layer has been trained in the same way before that: libraries take memory when they are first used.

What is measured is written after every workload, so that an interrupted run is not lost. `--only` takes
names of workloads, and `arithmetic` for where the rest of a step goes: the matrix products of a step alone,
each timed at its own shape, beside the step, and its time by kind of operation.
"""

from __future__ import annotations

import argparse
import gc
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _common import (
    FAULTY_LAYER,
    Bar,
    Clock,
    Prepared,
    Spread,
    Workload,
    add_out,
    bars,
    best_of,
    configs,
    load,
    machine,
    peak_above,
    prepare,
    spread,
    write,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from aqn_tune.models import build_model, decoder_layers
from aqn_tune.study.runs import Run
from aqn_tune.study.training import Lora
from aqn_tune.training.learning_rate import learning_rate
from aqn_tune.training.pack import ReplicaPack
from aqn_tune.training.streams import BatchOrder, keyed_generator

SEEDS = 5
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

XS = Workload("XS")
S = Workload("S", rows=8, tokens=32, rank=32)
STUDY = Workload("study", rows=16, tokens=64, vocabulary=384, embedded=True)
L = Workload("L", rows=8, tokens=64, rank=16, hidden=128, intermediate=256, vocabulary=512)
FULL = Workload("XS-full", rank=None)
WORKLOADS: dict[Workload, tuple[str, ...]] = {
    XS: ("loops", "trainer", "packs", "compiled"),
    S: ("loops", "trainer", "packs"),
    STUDY: ("loops", "packs", "compiled"),
    L: ("loops", "packs"),
    FULL: ("loops", "packs"),
}
ARITHMETIC = "arithmetic"
FEWEST_STEPS = 12
"""Fewer leave stages without a step."""
TOGETHER = ("packs", "compiled")
"""The ways that hold all seeds of a config at a time; the others hold one run."""


# -- the ways to train ------------------------------------------------------------------------------


def noise_and_fault(model: nn.Module, run: Run, step: Callable[[], int]) -> None:
    """Attach to every decoder layer what the run declares, as plain forward hooks."""
    noise = run.noise
    assert noise is not None

    def hook(layer: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        faults = [fault for fault in run.device.faults if layer in fault.layers]

        def forward_hook(module: nn.Module, args: Any, h: Tensor) -> Tensor:
            sigma = noise.sigma[step()] * noise.multipliers[layer]
            if sigma:
                h = h + sigma * h.detach().abs() * torch.randn_like(h)
            for fault in faults:
                magnitude = h.detach().abs()
                cut = fault.threshold * magnitude.amax(dim=-1, keepdim=True)
                h = h.masked_fill(magnitude < cut, 0.0)
            return h

        return forward_hook

    for number, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(hook(number))


def trainable(prepared: Prepared, run: Run) -> nn.Module:
    """Return the model of one run as peft makes it, with the adapters that the pack starts from."""
    model: nn.Module = build_model(prepared.spec, prepared.base)
    method = run.training.method
    if not isinstance(method, Lora):
        return model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=method.rank, lora_alpha=method.alpha, target_modules=list(method.target_modules)
    )
    model = get_peft_model(model, config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            site = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
            bound = 1.0 / math.sqrt(parameter.shape[1])
            generator = keyed_generator(run.seed, "init", site)
            with torch.no_grad():
                parameter.uniform_(-bound, bound, generator=generator)
    return model


def adamw(parameters: Sequence[nn.Parameter], run: Run) -> torch.optim.AdamW:
    """Return the optimiser that all ways use."""
    spec = run.training
    return torch.optim.AdamW(
        parameters,
        lr=spec.learning_rate,
        betas=(spec.beta1, spec.beta2),
        weight_decay=spec.weight_decay,
        fused=True,
    )


def run_loop(prepared: Prepared, run: Run) -> list[float]:
    """Train one run in a plain loop; return its losses."""
    spec, data = run.training, prepared.data
    model = trainable(prepared, run)
    now = [0]
    noise_and_fault(model, run, lambda: now[0])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, run)
    order = BatchOrder(len(data.tokens), spec.batch_size)
    labels = torch.where(data.answer, data.tokens, -100)
    losses = []
    for step in range(spec.steps):
        now[0] = step
        rows = order.indices(run.seed, step)
        loss = model(input_ids=data.tokens[rows], labels=labels[rows], use_cache=False).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, spec.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(spec, step)
        optimizer.step()
    return losses


def run_trainer(prepared: Prepared, run: Run) -> list[float]:
    """Train one run with transformers' Trainer; return its losses."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    spec, data = run.training, prepared.data
    model = trainable(prepared, run)
    order = BatchOrder(len(data.tokens), spec.batch_size)
    rows = torch.cat([order.indices(run.seed, step) for step in range(spec.steps)])
    labels = torch.where(data.answer, data.tokens, -100)
    dataset = [{"input_ids": data.tokens[row], "labels": labels[row]} for row in rows.tolist()]
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], run)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate(spec, min(step, spec.steps - 1)) / spec.learning_rate,
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=spec.steps,
            per_device_train_batch_size=spec.batch_size,
            train_sampling_strategy="sequential",
            max_grad_norm=spec.max_grad_norm,
            logging_strategy="steps",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            log_level="error",
        )
        trainer = Trainer(
            model=model,  # type: ignore[arg-type]
            args=arguments,
            train_dataset=dataset,  # type: ignore[arg-type]
            optimizers=(optimizer, schedule),
        )
        noise_and_fault(model, run, lambda: trainer.state.global_step)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run_packs(prepared: Prepared, runs: Sequence[Run]) -> list[list[float]]:
    """Train runs in lockstep."""
    pack = ReplicaPack(build_model(prepared.spec, prepared.base), runs, prepared.data)
    pack.train_to(runs[0].training.steps)
    if pack.failures:
        raise RuntimeError(f"{prepared.workload.name}: {pack.failures}")
    return pack.train_losses


def compiled(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with compiled decoder layers."""
    training = runs[0].training.model_copy(update={"compile": True})
    return [run.model_copy(update={"training": training}) for run in runs]


def train(way: str, prepared: Prepared, runs: Sequence[Run]) -> list[list[float]]:
    """Train runs in one of the ways; return the losses of each."""
    if way == "packs":
        return run_packs(prepared, runs)
    if way == "compiled":
        return run_packs(prepared, compiled(runs))
    one = {"loops": run_loop, "trainer": run_trainer}[way]
    return [one(prepared, run) for run in runs]


# -- timing -----------------------------------------------------------------------------------------


class Timed(NamedTuple):
    """What one actor took for its share."""

    wall: float
    cpu: float
    losses: list[list[float]]


class Worker:
    """One thread of a worker process; made an actor by the driver."""

    def __init__(self, prepared: Prepared) -> None:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        import peft
        import transformers

        assert peft.__version__
        transformers.utils.logging.set_verbosity_error()
        self._prepared = prepared

    def timed(self, way: str, runs: Sequence[Run]) -> Timed:
        """Train runs in one of the ways."""
        gc.collect()
        clock = Clock()
        losses = train(way, self._prepared, runs)
        wall, cpu = clock.read()
        return Timed(wall, cpu, losses)

    def held(self, way: str, small: Prepared, warm: Sequence[Run], runs: Sequence[Run]) -> float:
        """Return the peak MB of `runs` above this process, which is fresh; `warm` are runs of `small`."""
        train(way, small, warm)
        for array in self._prepared.base.values():
            array.sum()  # shared by all processes, and counted in each that has read it
        return peak_above(lambda: train(way, self._prepared, runs))

    def step_cost(self, runs: Sequence[Run]) -> float:
        """Return the CPU seconds of a replica-step of a pack, building it and warming up left out."""
        steps = runs[0].training.steps
        pack = ReplicaPack(
            build_model(self._prepared.spec, self._prepared.base), runs, self._prepared.data
        )
        pack.train_to(steps // 4)
        clock = Clock()
        pack.train_to(steps)
        return clock.read()[1] / (steps - steps // 4) / len(runs)


class Round(NamedTuple):
    """Both actors in one way, once."""

    wall: float
    """From the start of the first actor to the end of the last."""
    cpu: float
    """Of both."""
    actors: tuple[float, ...]
    """Wall seconds of each."""
    load: float


class Measured(NamedTuple):
    """A workload in all its ways, round by round."""

    workload: Workload
    steps: int
    rounds: dict[str, list[Round]]
    difference: float
    """Largest difference of a loss between ours and the loops, over the steps before the first noise."""
    final: dict[str, float]
    """Mean loss over the last five steps of all runs."""
    k_scaling: list[float]
    """XS: CPU time per replica-step at K = 10 over that at K = 1, each round."""
    cold_compile: float
    """Wall seconds that the first compiled pack took, two steps included; 0 without one."""
    memory: dict[str, float]
    """Peak MB of one replica by way, above the process before the model was built."""

    def ratios(self, way: str, what: str = "cpu") -> Spread:
        """Return how many times less than the loops a way takes, round by round."""
        pairs = zip(self.rounds["loops"], self.rounds[way], strict=True)
        return spread([getattr(one, what) / getattr(other, what) for one, other in pairs])

    def of(self, way: str, what: str) -> Spread:
        """Return one column of a way."""
        return spread([getattr(each, what) for each in self.rounds[way]])


def measure(
    workload: Workload, steps: int, rounds: int, folder: Path, say: Callable[[str], None]
) -> Measured:
    """Time a workload in all its ways, turn by turn; Ray runs already."""
    import ray

    ways = WORKLOADS[workload]
    prepared = prepare(workload, folder)
    both = configs(workload, steps, SEEDS)
    shared = ray.put(prepared)
    say(f"{workload.name}: starting actors")
    actor = actor_of(folder / f"{workload.name}-compiled")
    actors = {way: [actor.remote(shared) for _ in both] for way in ways}
    other = actor.remote(shared) if workload == XS else None
    short = configs(workload, 2, 1)
    ray.get(
        [
            a.timed.remote("packs" if way == "compiled" else way, runs)
            for way in ways
            for a, runs in zip(actors[way], short, strict=True)
        ]
    )
    cold_compile = 0.0
    if "compiled" in ways:
        say(f"{workload.name}: compiling")
        whole = configs(workload, 2, SEEDS)
        clock = Clock()
        pairs = zip(actors["compiled"], whole, strict=True)
        ray.get([a.timed.remote("compiled", runs) for a, runs in pairs])
        cold_compile = clock.read()[0]
    found: dict[str, list[Round]] = {way: [] for way in ways}
    losses: dict[str, list[list[float]]] = {}
    k_scaling = []
    for number in range(rounds):
        turn = number % len(ways)
        for way in (*ways[turn:], *ways[:turn]):
            say(f"{workload.name}: round {number + 1} of {rounds}, {way}")
            clock = Clock()
            timed = ray.get(
                [a.timed.remote(way, runs) for a, runs in zip(actors[way], both, strict=True)]
            )
            found[way].append(
                Round(
                    wall=clock.read()[0],
                    cpu=sum(each.cpu for each in timed),
                    actors=tuple(each.wall for each in timed),
                    load=load()[0],
                )
            )
            losses[way] = [row for each in timed for row in each.losses]
        if other is not None:
            say(f"{workload.name}: round {number + 1} of {rounds}, K = 10 and K = 1")
            sizes = [[run for runs in both for run in runs], both[0][:1]]
            order = sizes if number % 2 == 0 else sizes[::-1]
            cost = {len(runs): ray.get(other.step_cost.remote(runs)) for runs in order}
            k_scaling.append(cost[2 * SEEDS] / cost[1])
    for each in (*(each for way in ways for each in actors[way]), other):
        if each is not None:
            ray.kill(each)
    held = {}
    for way in ways:
        say(f"{workload.name}: memory, {way}")
        held[way] = memory_of(way, workload, shared, folder, actor)
    noise = both[0][0].noise
    assert noise is not None
    quiet = next(step for step, sigma in enumerate(noise.sigma) if sigma)
    return Measured(
        workload,
        steps,
        found,
        max(
            abs(one - other)
            for ours, theirs in zip(losses["packs"], losses["loops"], strict=True)
            for one, other in zip(ours[:quiet], theirs[:quiet], strict=True)
        ),
        {way: _mean([loss for row in rows for loss in row[-5:]]) for way, rows in losses.items()},
        k_scaling,
        cold_compile,
        held,
    )


def actor_of(cache: Path) -> Any:
    """Return `Worker` as an actor whose compiler keeps what it makes in a folder of its own."""
    import ray

    environment = {"env_vars": {**THREADS, "TORCHINDUCTOR_CACHE_DIR": str(cache)}}
    return ray.remote(num_cpus=0, runtime_env=environment)(Worker)


def memory_of(way: str, workload: Workload, shared: Any, folder: Path, actor: Any) -> float:
    """Return the peak MB of one replica of a way, above its process; `shared` is the workload, prepared."""
    import ray

    size = SEEDS if way in TOGETHER else 1
    small = workload._replace(name=f"{workload.name}-small", layers=1, embedded=False)
    warm, runs = (configs(each, FEWEST_STEPS, size)[0] for each in (small, workload))
    worker = actor.remote(shared)
    peak: float = ray.get(worker.held.remote(way, prepare(small, folder), warm, runs))
    ray.kill(worker)
    return peak / size


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# -- where the rest goes ----------------------------------------------------------------------------


class Product(NamedTuple):
    """A matrix product of a pack's step: [batch] x [m, k] x [k, n], so often."""

    what: str
    batch: int
    m: int
    k: int
    n: int
    count: int

    def flops(self) -> int:
        """Return the floating-point operations of all of them."""
        return 2 * self.batch * self.m * self.k * self.n * self.count


def products(workload: Workload, replicas: int, shapes: Sequence[tuple[int, int]]) -> list[Product]:
    """Return the matrix products of one step of a LoRA pack; `shapes` are (in, out) of the adapted layers.

    Frozen: y = x W^T, and back g W. Adapter: x A, (x A) B, and back two of each. The first layer's q, k
    and v need no gradient of their input, and are counted as if they did. Attention: scores and values,
    and back five. The head is the embedding: forward and back.
    """
    rank = workload.rank
    assert rank is not None
    tokens, heads = workload.rows * workload.tokens, workload.heads()[0]
    wide = replicas * tokens
    found = []
    for wanted in sorted(set(shapes)):
        inner, out = wanted
        count = shapes.count(wanted)
        found += [
            Product("frozen", 1, wide, inner, out, count),
            Product("frozen, back", 1, wide, out, inner, count),
            Product("adapter", replicas, tokens, inner, rank, count),
            Product("adapter", replicas, tokens, rank, out, count),
            Product("adapter, back", replicas, tokens, out, rank, count),
            Product("adapter, back", replicas, rank, tokens, out, count),
            Product("adapter, back", replicas, inner, tokens, rank, count),
            Product("adapter, back", replicas, tokens, rank, inner, count),
        ]
    size, length = workload.hidden // heads, workload.tokens
    groups = replicas * workload.rows * heads
    found += [
        Product("attention", groups, length, size, length, 3 * workload.layers),
        Product("attention", groups, length, length, size, 4 * workload.layers),
        Product("head", 1, wide, workload.hidden, workload.vocabulary, 1),
        Product("head, back", 1, wide, workload.vocabulary, workload.hidden, 1),
    ]
    return found


def product_seconds(product: Product) -> float:
    """Return the CPU seconds of one such product on its own, into memory that is there."""
    batch, m, k, n = product.batch, product.m, product.k, product.n
    if batch == 1:
        a, b, out = torch.randn(m, k), torch.randn(n, k).t(), torch.empty(m, n)
        return best_of(lambda: torch.mm(a, b, out=out))
    a, b, out = torch.randn(batch, m, k), torch.randn(batch, k, n), torch.empty(batch, m, n)
    return best_of(lambda: torch.bmm(a, b, out=out))


GROUPS = (
    ("attention", ("scaled_dot_product",)),
    ("matrix products", ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")),
    ("optimiser", ("adamw", "vector_norm", "optimizer.")),
    ("random numbers", ("aten::normal_", "aten::randn", "aten::random")),
    ("norm", ("aten::mean", "aten::rsqrt", "aten::pow")),
    ("activation", ("aten::silu",)),
    ("copies", ("copy", "aten::clone", "aten::cat", "aten::stack", "aten::index", "aten::gather")),
    (
        "views and allocation",
        (
            "aten::view", "aten::reshape", "aten::as_strided", "aten::transpose", "aten::t",
            "aten::slice", "aten::select", "aten::expand", "aten::unsqueeze", "aten::empty",
            "aten::permute", "aten::narrow", "aten::to", "aten::zeros", "aten::new_", "aten::detach",
            "aten::resize_", "aten::chunk", "aten::split", "aten::flatten", "aten::zero_", "aten::fill_",
            "aten::_unsafe_view", "aten::_reshape_alias", "aten::contiguous", "aten::alias", "detach",
        ),
    ),
    ("elementwise and reductions", ("aten::",)),
    ("autograd", ("autograd::", "torch::autograd", "Backward")),
)  # fmt: skip
REST = "Python and the rest"


def group_of(name: str) -> str:
    """Return the kind of an operation."""
    low = name.lower()
    for group, words in GROUPS:
        for word in words:
            is_exact = word.startswith("aten::") and word[-1] not in "_:"
            if low == word or (low.startswith(word + "_") if is_exact else word.lower() in low):
                return group
    return REST


class Arithmetic(NamedTuple):
    """A step of a pack, taken apart."""

    workload: Workload
    replicas: int
    step: float
    """CPU milliseconds of a replica-step, the fastest of some."""
    products: dict[str, tuple[float, float]]
    """By kind: million floating-point operations, and CPU milliseconds, per replica-step."""
    shares: dict[str, float]
    """Share of each kind of operation in the time of a profiled step."""

    def floor(self) -> float:
        """Return the CPU milliseconds of the matrix products of a replica-step."""
        return sum(milliseconds for _, milliseconds in self.products.values())

    def megaflops(self) -> float:
        """Return the million floating-point operations of a replica-step."""
        return sum(amount for amount, _ in self.products.values())


def arithmetic(workload: Workload, replicas: int, folder: Path, steps: int) -> Arithmetic:
    """Take a step of a LoRA pack apart, in this process."""
    torch.set_num_threads(1)
    prepared = prepare(workload, folder)
    runs = configs(workload, 10 * steps + 10, replicas)[0]
    model = build_model(prepared.spec, prepared.base)
    pack = ReplicaPack(model, runs, prepared.data)
    shapes = [(each.base_layer.in_features, each.base_layer.out_features) for each in pack.folded]
    warm = steps + 3  # beyond the steps without noise
    pack.train_to(warm)
    times = []
    for _ in range(steps):
        clock = Clock()
        pack.train_to(pack.step + 1)
        times.append(clock.read()[1])
    shares = profile(pack, max(steps // 4, 2))
    found: dict[str, tuple[float, float]] = {}
    for product in products(workload, replicas, shapes):
        amount, spent = found.get(product.what, (0.0, 0.0))
        found[product.what] = (
            amount + product.flops() / replicas / 1e6,
            spent + 1e3 * product_seconds(product) * product.count / replicas,
        )
    return Arithmetic(workload, replicas, 1e3 * min(times) / replicas, found, shares)


def profile(pack: ReplicaPack, steps: int) -> dict[str, float]:
    """Return the share of each kind of operation in some steps; what no operation took is the rest."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profiler:
        clock = Clock()
        pack.train_to(pack.step + steps)
        total = clock.read()[0] * 1e6
    groups = {group: 0.0 for group, _ in GROUPS} | {REST: 0.0}
    for event in profiler.key_averages():
        groups[group_of(event.key)] += event.self_cpu_time_total
    groups[REST] += max(total - sum(groups.values()), 0.0)
    whole = sum(groups.values())
    return {group: spent / whole for group, spent in groups.items()}


# -- report -----------------------------------------------------------------------------------------


class Floor(NamedTuple):
    """A figure that the engine has to reach."""

    what: str
    wanted: str
    got: str
    met: bool | None
    """None where it cannot be said."""


def floors(measured: Sequence[Measured]) -> list[Floor]:
    """Return what is demanded of the smallest workload, and whether it is met."""
    of_full = [
        Floor("full fine-tuning: CPU seconds, loops / packs", ">= 2.0", ratio.text(2), ratio.median >= 2.0)
        for ratio in (each.ratios("packs") for each in measured if each.workload == FULL)
    ]  # fmt: skip
    of_memory = [
        Floor(
            f"{'LoRA' if each.workload == XS else 'full'}, {way}: memory of a replica in a pack of {SEEDS} / "
            "of one loop", "<= 1.2", f"{share:.2f}", share <= 1.2,
        )
        for each in measured if each.workload in (XS, FULL)
        for way, share in memory_shares(each).items()
    ]  # fmt: skip
    found = next((each for each in measured if each.workload == XS), None)
    if found is None:
        return [*of_full, *of_memory]
    cpu, wall = found.ratios("packs", "cpu"), found.ratios("packs", "wall")
    alone = spread(
        [
            sum(one.actors) / other.wall
            for one, other in zip(found.rounds["loops"], found.rounds["packs"], strict=True)
        ]
    )
    faster = found.ratios("compiled")
    ratio = spread(found.k_scaling)
    return [
        Floor("CPU seconds, loops / packs", ">= 3.0", cpu.text(2), cpu.median >= 3.0),
        Floor("wall, loops / packs", ">= 3.0", wall.text(2), wall.median >= 3.0),
        Floor(
            "wall, all loops in one process / packs (sum of the two actors of the loops)",
            ">= 6", alone.text(2), alone.median >= 6,
        ),
        Floor("CPU seconds, the gate of an automatic check", ">= 2.5", cpu.text(2), cpu.median >= 2.5),
        Floor(
            f"CPU seconds, loops / compiled packs (compiling, cold: {found.cold_compile:.0f} s apart)",
            ">= 4.0", faster.text(2), faster.median >= 4.0,
        ),
        Floor(
            "cost of a replica-step, K = 10 / K = 1", "<= 0.5", ratio.text(2), ratio.median <= 0.5
        ),
        *of_full,
        *of_memory,
    ]  # fmt: skip


def memory_shares(measured: Measured) -> dict[str, float]:
    """Return what a replica of a pack holds, as a multiple of what one loop holds."""
    one = measured.memory["loops"]
    return {way: held / one for way, held in measured.memory.items() if way in TOGETHER}


def word(floor: Floor) -> str:
    """Return whether a floor is met, as a word."""
    return {True: "met", False: "not met", None: "-"}[floor.met]


def print_measured(console: Console, measured: Measured) -> None:
    """Print one line per way of a workload."""
    work = measured.steps * SEEDS * 2
    table = Table(title=f"{measured.workload.name}: {measured.workload.about()}")
    for heading in (
        "way", "seconds", "CPU seconds", "x wall", "x CPU", "steps/s", "MB", "loss",
    ):  # fmt: skip
        justify = "left" if heading == "way" else "right"
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for way in measured.rounds:
        wall = measured.of(way, "wall")
        table.add_row(
            way, wall.text(), measured.of(way, "cpu").text(), measured.ratios(way, "wall").text(2),
            measured.ratios(way).text(2), f"{work / wall.median:.1f}",
            f"{measured.memory[way]:.1f}", f"{measured.final[way]:.3f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "median (range) of the rounds; x: times less than loops; steps/s: replica-steps a second; MB: peak "
        "of one replica above its process; loss: of the last 5 steps\n"
        f"largest difference of a loss before the first noise, packs against loops: "
        f"{measured.difference:.1e}; load {min(r.load for r in measured.rounds['packs'])} to "
        f"{max(r.load for r in measured.rounds['packs'])}",
        highlight=False,
    )


def print_floors(console: Console, found: Sequence[Floor]) -> None:
    """Print one line per floor."""
    table = Table(title="What is demanded of XS")
    for heading in ("figure", "wanted", "got: median (range)", ""):
        table.add_column(heading)
    for floor in found:
        colour = {True: "green", False: "red", None: "none"}[floor.met]
        table.add_row(floor.what, floor.wanted, floor.got, f"[{colour}]{word(floor)}[/]")
    console.print(table)


def print_arithmetic(console: Console, found: Arithmetic) -> None:
    """Print the matrix products of a step, and where the time of a step goes."""
    size = f"{found.workload.name}, K = {found.replicas}"
    table = Table(title=f"{size}: matrix products of a replica-step, each alone at its shape")
    for heading in ("product", "MFLOP", "ms", "GFLOP/s"):
        table.add_column(heading, justify="left" if heading == "product" else "right")
    for what, (amount, spent) in found.products.items():
        table.add_row(what, f"{amount:.1f}", f"{spent:.2f}", f"{amount / spent:.0f}")
    floor = found.floor()
    table.add_row(
        "all", f"{found.megaflops():.1f}", f"{floor:.2f}", f"{found.megaflops() / floor:.0f}"
    )
    console.print(table)
    console.print(
        f"a replica-step takes {found.step:.2f} ms, {found.step / floor:.1f} x its matrix products",
        highlight=False,
    )
    table = Table(title=f"{size}: a profiled step by kind of operation")
    table.add_column("kind")
    table.add_column("share", justify="right")
    for group, share in sorted(found.shares.items(), key=lambda item: -item[1]):
        table.add_row(group, f"{100 * share:.1f} %")
    console.print(table)


def picture(measured: Sequence[Measured]) -> str:
    """Return the CPU time per replica-step of every way as bars."""
    colours = {"loops": "#c73", "trainer": "#a5a", "packs": "#48a", "compiled": "#285"}
    groups = []
    for each in measured:
        scale = 1e3 / (each.steps * SEEDS * 2)
        group = []
        for way in each.rounds:
            value = Spread(*(scale * figure for figure in each.of(way, "cpu")))
            ratio = "" if way == "loops" else f", {each.ratios(way).median:.2f} x"
            group.append(Bar(way, value, f"{value.median:.1f} ms{ratio}", colours[way]))
        groups.append((f"{each.workload.name}: {each.workload.about()}", group))
    return bars(
        "CPU time of a replica-step, model build included",
        "bar: median of the rounds; line: least to most; shorter is better; a scale per workload",
        groups,
    )


def record(
    measured: Sequence[Measured], parts: Sequence[Arithmetic], settings: dict[str, Any]
) -> dict[str, Any]:
    """Return everything as plain data."""
    return {
        "machine": machine(),
        "settings": settings,
        "workloads": [
            {
                "name": each.workload.name,
                "about": each.workload.about(),
                "loss_difference": each.difference,
                "last_loss": each.final,
                "k_scaling": each.k_scaling,
                "cold_compile_seconds": each.cold_compile,
                "replica_mb": each.memory,
                "replica_mb_times_loop": memory_shares(each),
                "ways": {
                    way: {
                        "wall": each.of(way, "wall")._asdict(),
                        "cpu": each.of(way, "cpu")._asdict(),
                        "times_loops_wall": each.ratios(way, "wall")._asdict(),
                        "times_loops_cpu": each.ratios(way)._asdict(),
                        "rounds": [one._asdict() for one in rounds],
                    }
                    for way, rounds in each.rounds.items()
                },
            }
            for each in measured
        ],
        "floors": [floor._asdict() for floor in floors(measured)],
        "arithmetic": [
            {
                **each._asdict(),
                "workload": each.workload.name,
                "floor_ms": each.floor(),
                "megaflops": each.megaflops(),
            }
            for each in parts
        ],
    }


def main() -> None:
    """Measure, print and write."""
    names = [*(workload.name for workload in WORKLOADS), ARITHMETIC]
    parser = argparse.ArgumentParser(description="Measure what lockstep gains.")
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds, at least 5 for a figure to keep"
    )
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of every run")
    parser.add_argument("--only", nargs="+", default=names, choices=names, help="parts to measure")
    add_out(parser, "replicas")
    options = parser.parse_args()
    if options.rounds < 1 or options.steps < FEWEST_STEPS:
        parser.error(
            f"--rounds is at least 1, --steps at least {FEWEST_STEPS}: fewer leave stages without a step"
        )
    console = Console()
    if not console.is_terminal:
        console.width = 120
    before = load()
    chosen = [workload for workload in WORKLOADS if workload.name in options.only]
    measured: list[Measured] = []
    parts: list[Arithmetic] = []

    def save() -> None:
        settings = {
            "rounds": options.rounds, "steps": options.steps, "seeds": SEEDS, "configs": 2, "actors": 2,
            "load_before": before, "load_after": load(),
        }  # fmt: skip
        drawn = picture(measured) if measured else None
        whole = set(options.only) == set(names)
        write(options.out, "replicas", record(measured, parts, settings), drawn, whole=whole)

    with tempfile.TemporaryDirectory() as name, console.status("starting") as status:
        folder = Path(name)
        if chosen:
            import ray

            ray.init(
                num_cpus=2,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
                runtime_env={"env_vars": THREADS},
            )
            for workload in chosen:
                measured.append(
                    measure(workload, options.steps, options.rounds, folder, status.update)
                )
                print_measured(console, measured[-1])
                save()
            ray.shutdown()
        if ARITHMETIC in options.only:
            for workload in (XS, STUDY):
                status.update(f"{workload.name}: arithmetic")
                parts.append(arithmetic(workload, SEEDS, folder, max(options.steps // 4, 4)))
                print_arithmetic(console, parts[-1])
                save()
    after = load()
    if found := floors(measured):
        print_floors(console, found)
    about = machine()
    console.print(
        f"{about['cpu']}, {about['cores']} cores, one thread per process, load {before[0]} before and "
        f"{after[0]} after; torch {about['torch']}, transformers {about['transformers']}, peft "
        f"{about['peft']}, ray {about['ray']}; 2 configs x {SEEDS} seeds x {options.steps} steps, "
        f"{options.rounds} rounds; dead zone at layer {FAULTY_LAYER}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
