"""What lockstep gains: packs of replicas against the runs that one would otherwise write.

    python benchmarks/replicas.py [--rounds 5] [--steps 40] [--only NAME ...] [--out FOLDER]

The work: two configs of five seeds each, on a 28-layer model; noise on hidden states (config 1: every
layer, config 2: the faulty layer), a dead zone at the output of layer 10, clipping, AdamW. The same work
is done by two Ray actors of one thread each, one config per actor, in one of these ways:

loops           a plain transformers + peft loop per run, one run after another; fused AdamW, forward hooks.
loops compiled  the same with torch.compile on every decoder layer, hooks outside, options as ours.
trainer         the loop by transformers' Trainer, which logs nothing.
packs           ours: one `ReplicaPack` of five replicas.
packs compiled  the same with compiled decoder layers.

Each reads the loss of every step back. What compiling took is reported apart, and it was cold: an empty
cache of each way's own, and nothing that these actors had compiled before. What compiling gains is no gain
of lockstep: beside the ratio of plain loops to compiled packs stand those of like to like.

Every way builds its models from the same arrays inside the timed span; imports and the start of Ray are
outside, every actor has done a short run before. The ways take turns, each in actors of its own. Equal on
both sides: weights, adapters at the start, rows of every step, learning rate, loss (mean over the answer
tokens of the batch), noise level and fault at each step. What differs: loops and trainer draw noise from
torch's global generator, ours from keyed streams; ours also hashes the frozen weights and measures the noise
it injects. In every round the losses of every way over the steps before the first noise are held against
the loops of the first round: four fifths of the runs must agree within 2e-5 nats at every step, the rest
within 5e-3, as a value at the edge of the dead zone may fall to either side. Where they do not, the work was
not the same and the command ends with 1.

Memory is measured apart, three times for each way and Trainer, in turns, each in a fresh process: the peak
of one run by loop or Trainer, or of a pack of five, less what the process held before the model was built,
for each replica. Libraries take memory when they are first used, so every process has trained a model of two
layers before: one run by loop, one by Trainer and a pack of five; for a compiled way that way too, whose code
is in the cache by then. What this freed is handed back to the system first.

After every workload what is measured is written to `replicas.part.json`, and to `replicas.json` when it is
all, in at least five rounds. `--only` takes names of workloads, and `arithmetic` for where the rest of a
step goes: the matrix products of a step alone, each timed at its own shape, beside the step, and its time by
kind of operation.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _common import (
    FAULTY_LAYER,
    FEWEST_ROUNDS,
    Bar,
    Clock,
    Prepared,
    Spread,
    Workload,
    add_out,
    bars,
    best_of,
    coloured,
    configs,
    load,
    machine,
    peak_above,
    prepare,
    spread,
    verdict,
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

LOOPS, LOOPS_COMPILED, TRAINER = "loops", "loops compiled", "trainer"
PACKS, PACKS_COMPILED = "packs", "packs compiled"
COMPILED = {LOOPS_COMPILED: LOOPS, PACKS_COMPILED: PACKS}
"""The ways that compile, each with what it is without."""
TOGETHER = (PACKS, PACKS_COMPILED)
"""The ways that hold all seeds of a config at a time; the others hold one run."""
WARM_UP = (LOOPS, TRAINER, PACKS)
"""What a process does before its memory is measured, whatever is measured."""

XS = Workload("XS")
S = Workload("S", rows=8, tokens=32, rank=32)
STUDY = Workload("study", rows=16, tokens=64, vocabulary=384, embedded=True)
L = Workload("L", rows=8, tokens=64, rank=16, hidden=128, intermediate=256, vocabulary=512)
FULL = Workload("XS-full", rank=None)
WORKLOADS: dict[Workload, tuple[str, ...]] = {
    XS: (LOOPS, LOOPS_COMPILED, TRAINER, PACKS, PACKS_COMPILED),
    S: (LOOPS, TRAINER, PACKS),
    STUDY: (LOOPS, LOOPS_COMPILED, PACKS, PACKS_COMPILED),
    L: (LOOPS, PACKS),
    FULL: (LOOPS, PACKS),
}
ARITHMETIC = "arithmetic"
TAKEN_APART = (XS, STUDY)
FEWEST_STEPS = 12
"""Fewer leave stages without a step."""
REPETITIONS = 3
"""How often the memory of a way is measured."""
ALIKE, TYPICAL, FURTHEST = 0.8, 2e-5, 5e-3
"""Before the first noise this share of the runs must be alike within so many nats, and the others within so
many. In float32 sums in another order come to some 1e-6, and to some 1e-4 in a run in which they move a value
over the edge of the dead zone."""


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


def compile_layers(model: nn.Module) -> None:
    """Compile every decoder layer as `training.compile` does; hooks on the layers stay outside."""
    for layer in decoder_layers(model):
        layer.forward = torch.compile(  # type: ignore[method-assign]
            layer.forward, fullgraph=True, dynamic=False, options={"cpp_wrapper": True}
        )


def run_loop(prepared: Prepared, run: Run, *, compiles: bool = False) -> list[float]:
    """Train one run in a plain loop; return its losses."""
    spec, data = run.training, prepared.data
    model = trainable(prepared, run)
    if compiles:
        compile_layers(model)
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
        optimizer.zero_grad()
        loss = model(input_ids=data.tokens[rows], labels=labels[rows], use_cache=False).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, spec.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(spec, step)
        optimizer.step()
        del loss  # its graph would live on through the next forward pass
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
    losses: list[float] = []

    class Reading(Trainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=spec.steps,
            per_device_train_batch_size=spec.batch_size,
            train_sampling_strategy="sequential",
            max_grad_norm=spec.max_grad_norm,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            log_level="error",
        )
        trainer = Reading(
            model=model,
            args=arguments,
            train_dataset=dataset,
            optimizers=(optimizer, schedule),
        )
        noise_and_fault(model, run, lambda: trainer.state.global_step)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return losses


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
    if way in TOGETHER:
        return run_packs(prepared, compiled(runs) if way in COMPILED else runs)
    if way == TRAINER:
        return [run_trainer(prepared, run) for run in runs]
    return [run_loop(prepared, run, compiles=way in COMPILED) for run in runs]


# -- timing -----------------------------------------------------------------------------------------


Losses = list[list[float]]
"""Of every run, at every step."""


class Timed(NamedTuple):
    """What one actor took for its share."""

    wall: float
    cpu: float
    losses: Losses


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
        for each in dict.fromkeys((*WARM_UP, way)):
            train(each, small, warm if each in TOGETHER else warm[:1])
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
    """Of the last minute, when it had ended."""


class Apart(NamedTuple):
    """How far the losses of one way in one round are from those of the loops."""

    runs: int
    alike: int
    """Runs of which no loss is further than `TYPICAL`."""
    furthest: float
    """Largest difference of a loss."""

    def agrees(self) -> bool:
        """Return whether both did the same work, but for rounding and what follows from it."""
        return self.alike >= ALIKE * self.runs and self.furthest <= FURTHEST


class Measured(NamedTuple):
    """A workload in all its ways, round by round."""

    workload: Workload
    steps: int
    rounds: dict[str, list[Round]]
    apart: dict[str, list[Apart]]
    """By way and round, how far it is from the loops of the first round before the first noise."""
    final: dict[str, float]
    """Mean loss over the last five steps of all runs, in the last round."""
    k_scaling: list[float]
    """XS: CPU time per replica-step at K = 10 over that at K = 1, each round."""
    cold_compile: dict[str, float]
    """By way that compiles, the wall seconds of its first two steps of every run."""
    memory: dict[str, list[float]]
    """Peak MB of one replica by way, above the process before the model was built, each repetition."""

    def ratios(self, way: str, what: str = "cpu", of: str = LOOPS) -> Spread:
        """Return how many times less than `of` a way takes, round by round."""
        pairs = zip(self.rounds[of], self.rounds[way], strict=True)
        return spread([getattr(one, what) / getattr(other, what) for one, other in pairs])

    def shares(self, way: str, of: str) -> Spread:
        """Return the memory of one replica of a way as a multiple of that of another, by repetition."""
        pairs = zip(self.memory[way], self.memory[of], strict=True)
        return spread([one / other for one, other in pairs])

    def compiled_ratios(self) -> dict[tuple[str, str], Spread]:
        """Return the CPU time of one way over another: what compiling gains, and lockstep over it."""
        if not set(COMPILED) <= set(self.rounds):
            return {}
        pairs = (
            *((plain, way) for way, plain in COMPILED.items()),
            (LOOPS_COMPILED, PACKS_COMPILED),
        )
        return {(one, other): self.ratios(other, of=one) for one, other in pairs}

    def agrees(self) -> bool:
        """Return whether all ways did the same work in every round."""
        return all(apart.agrees() for rounds in self.apart.values() for apart in rounds)

    def loads(self) -> Spread:
        """Return the load over all ways and rounds."""
        return spread([one.load for rounds in self.rounds.values() for one in rounds])

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
    kinds = {way: actor_of(folder, workload, way) for way in (*ways, TRAINER)}
    actors = {way: [kinds[way].remote(shared) for _ in both] for way in ways}
    other = kinds[PACKS].remote(shared) if workload == XS else None
    short = configs(workload, 2, 1)
    ray.get(
        [
            a.timed.remote(COMPILED.get(way, way), runs)
            for way in ways
            for a, runs in zip(actors[way], short, strict=True)
        ]
    )
    cold_compile = {}
    for way in (way for way in ways if way in COMPILED):
        say(f"{workload.name}: compiling, {way}")
        pairs = zip(actors[way], configs(workload, 2, SEEDS), strict=True)
        clock = Clock()
        ray.get([a.timed.remote(way, runs) for a, runs in pairs])
        cold_compile[way] = clock.read()[0]
    found: dict[str, list[Round]] = {way: [] for way in ways}
    losses: dict[str, list[Losses]] = {way: [] for way in ways}
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
            losses[way].append([row for each in timed for row in each.losses])
        if other is not None:
            say(f"{workload.name}: round {number + 1} of {rounds}, K = 10 and K = 1")
            sizes = [[run for runs in both for run in runs], both[0][:1]]
            order = sizes if number % 2 == 0 else sizes[::-1]
            cost = {len(runs): ray.get(other.step_cost.remote(runs)) for runs in order}
            k_scaling.append(cost[2 * SEEDS] / cost[1])
    for each in (*(each for way in ways for each in actors[way]), other):
        if each is not None:
            ray.kill(each)
    held = memory_of(workload, shared, folder, kinds, say)
    noise = both[0][0].noise
    assert noise is not None
    quiet = next(step for step, sigma in enumerate(noise.sigma) if sigma)
    return Measured(
        workload,
        steps,
        found,
        compare(losses, quiet),
        {way: _mean([x for row in rounds[-1] for x in row[-5:]]) for way, rounds in losses.items()},
        k_scaling,
        cold_compile,
        held,
    )


def compare(losses: Mapping[str, Sequence[Losses]], quiet: int) -> dict[str, list[Apart]]:
    """Hold the losses of the first `quiet` steps of every way in every round against those of the loops.

    The loops are those of the first round, so that the loops of every other round are held to them too.
    """
    reference = losses[LOOPS][0]
    return {
        way: [_apart(one, reference, quiet) for one in rounds] for way, rounds in losses.items()
    }


def _apart(losses: Losses, reference: Losses, quiet: int) -> Apart:
    furthest = []
    for ours, theirs in zip(losses, reference, strict=True):
        pairs = [*zip(ours, theirs, strict=True)][:quiet]
        differences = [abs(one - other) for one, other in pairs]
        is_number = all(math.isfinite(each) for each in differences)
        furthest.append(max(differences) if is_number else math.inf)
    return Apart(len(furthest), sum(each <= TYPICAL for each in furthest), max(furthest))


def actor_of(folder: Path, workload: Workload, way: str) -> Any:
    """Return `Worker` as an actor whose compiler keeps what it makes in a folder of its way's own."""
    import ray

    cache = folder / f"{workload.name}-{way.replace(' ', '-')}-compiled"
    environment = {"env_vars": {**THREADS, "TORCHINDUCTOR_CACHE_DIR": str(cache)}}
    return ray.remote(num_cpus=0, runtime_env=environment)(Worker)


def memory_of(
    workload: Workload,
    shared: Any,
    folder: Path,
    kinds: Mapping[str, Any],
    say: Callable[[str], None],
) -> dict[str, list[float]]:
    """Return the peak MB of one replica above its process by way; `shared` is the workload, prepared."""
    import ray

    # Two layers: the first gets no gradient of its input, and is another compiled function.
    small = workload._replace(name=f"{workload.name}-small", layers=2, embedded=False)
    warm, runs = (configs(each, FEWEST_STEPS, SEEDS)[0] for each in (small, workload))
    prepared = prepare(small, folder)
    held: dict[str, list[float]] = {way: [] for way in kinds}
    for number in range(REPETITIONS):
        for way in held:
            say(f"{workload.name}: memory {number + 1} of {REPETITIONS}, {way}")
            size = SEEDS if way in TOGETHER else 1
            worker = kinds[way].remote(shared)
            peak: float = ray.get(worker.held.remote(way, prepared, warm, runs[:size]))
            ray.kill(worker)
            held[way].append(peak / size)
    return held


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
    """A figure that the engine has to reach, or one that stands beside it."""

    what: str
    wanted: str
    got: str
    verdict: str
    """Empty where nothing is wanted."""


def at_least(what: str, got: Spread, wanted: float) -> Floor:
    """Return a figure that has to be at least so much over its whole range."""
    return Floor(what, f">= {wanted:g}", got.text(2), verdict(got, wanted, at_most=False))


def at_most(what: str, got: Spread, wanted: float) -> Floor:
    """Return a figure that has to be at most so much over its whole range."""
    return Floor(what, f"<= {wanted:g}", got.text(2), verdict(got, wanted, at_most=True))


def floors(measured: Sequence[Measured]) -> list[Floor]:
    """Return what is demanded of XS and of full fine-tuning, and whether it is met."""
    found: list[Floor] = []
    for each in measured:
        if each.workload == XS:
            found += _floors_of_xs(each)
        if each.workload == FULL:
            ratio = each.ratios(PACKS)
            found.append(at_least("full fine-tuning: CPU seconds, loops / packs", ratio, 2.0))
        if each.workload in (XS, FULL):
            method = "LoRA" if each.workload == XS else "full"
            for way in (way for way in each.rounds if way in TOGETHER):
                what = f"{method}, {way}: memory of a replica in a pack of {SEEDS} / of one"
                found.append(at_most(f"{what} loop", each.shares(way, LOOPS), 1.2))
                beside = each.shares(way, TRAINER).text(2)
                found.append(Floor(f"{what} run by Trainer", "", beside, ""))
    return found


def _floors_of_xs(found: Measured) -> list[Floor]:
    alone = spread(
        [
            sum(one.actors) / other.wall
            for one, other in zip(found.rounds[LOOPS], found.rounds[PACKS], strict=True)
        ]
    )
    return [
        at_least("CPU seconds, loops / packs", found.ratios(PACKS), 3.0),
        at_least("wall, loops / packs", found.ratios(PACKS, "wall"), 3.0),
        at_least("wall, all loops one after another / packs on two actors", alone, 6.0),
        at_least(
            "CPU seconds, loops without compiling / packs compiled",
            found.ratios(PACKS_COMPILED),
            4.0,
        ),
        *(
            Floor(f"CPU seconds, {one} / {other}", "", ratio.text(2), "")
            for (one, other), ratio in found.compiled_ratios().items()
        ),
        at_most("cost of a replica-step, K = 10 / K = 1", spread(found.k_scaling), 0.5),
    ]


def print_measured(console: Console, measured: Measured) -> None:
    """Print one line per way of a workload."""
    work = measured.steps * SEEDS * 2
    table = Table(title=f"{measured.workload.name}: {measured.workload.about()}")
    for heading in (
        "way", "seconds", "CPU seconds", "x wall", "x CPU", "steps/s", "loss",
    ):  # fmt: skip
        justify = "left" if heading == "way" else "right"
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for way in measured.rounds:
        wall = measured.of(way, "wall")
        table.add_row(
            way, wall.text(), measured.of(way, "cpu").text(), measured.ratios(way, "wall").text(2),
            measured.ratios(way).text(2), f"{work / wall.median:.1f}", f"{measured.final[way]:.3f}",
        )  # fmt: skip
    console.print(table)
    loads = measured.loads()
    compared = [apart for rounds in measured.apart.values() for apart in rounds]
    lines = [
        "median (range) of the rounds; x: times less than loops; steps/s: replica-steps a second; loss: of "
        "the last 5 steps",
        *(
            f"CPU seconds, {one} / {other}: {ratio.text(2)}"
            for (one, other), ratio in measured.compiled_ratios().items()
        ),
        *(f"compiling, cold, {way}: {wall:.0f} s" for way, wall in measured.cold_compile.items()),
        f"load {loads.least} to {loads.most} over all ways and rounds, two of it the benchmark's own actors",
        f"before the first noise, all ways and rounds: at least {min(each.alike for each in compared)} of "
        f"{compared[0].runs} runs within {TYPICAL:g} nats of the loops, all within "
        f"{max(each.furthest for each in compared):.1e}",
    ]
    console.print("\n".join(lines), highlight=False)
    if not measured.agrees():
        wrong = [
            f"{way} in round {number + 1} ({apart.alike} of {apart.runs} alike, {apart.furthest:.1e})"
            for way, rounds in measured.apart.items()
            for number, apart in enumerate(rounds)
            if not apart.agrees()
        ]
        console.print(f"[red]not the same work as loops: {', '.join(wrong)}[/]", highlight=False)
    print_memory(console, measured)


def print_memory(console: Console, measured: Measured) -> None:
    """Print what one replica of each way holds, against one run by loop and by Trainer."""
    table = Table(title=f"{measured.workload.name}: peak memory of one replica above its process")
    for heading in ("way", "MB", "/ loops", "/ trainer"):
        table.add_column(heading, justify="left" if heading == "way" else "right", no_wrap=True)
    for way, peaks in measured.memory.items():
        table.add_row(
            way, spread(peaks).text(), measured.shares(way, LOOPS).text(2),
            measured.shares(way, TRAINER).text(2),
        )  # fmt: skip
    console.print(table)


def print_floors(console: Console, found: Sequence[Floor]) -> None:
    """Print one line per floor."""
    table = Table(title="What is demanded, and what stands beside it")
    for heading in ("figure", "wanted", "got: median (range)", ""):
        table.add_column(heading)
    for floor in found:
        table.add_row(floor.what, floor.wanted, floor.got, coloured(floor.verdict))
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
    colours = {
        LOOPS: "#c73", LOOPS_COMPILED: "#a84", TRAINER: "#a5a", PACKS: "#48a", PACKS_COMPILED: "#285",
    }  # fmt: skip
    groups = []
    for each in measured:
        scale = 1e3 / (each.steps * SEEDS * 2)
        group = []
        for way in each.rounds:
            value = Spread(*(scale * figure for figure in each.of(way, "cpu")))
            ratio = "" if way == LOOPS else f", {each.ratios(way).median:.2f} x"
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
                "agree": each.agrees(),
                "losses_apart": {
                    way: [apart._asdict() for apart in rounds] for way, rounds in each.apart.items()
                },
                "last_loss": each.final,
                "k_scaling": each.k_scaling,
                "cold_compile_seconds": each.cold_compile,
                "load": each.loads()._asdict(),
                "replica_mb": {
                    way: {**spread(peaks)._asdict(), "repetitions": peaks}
                    for way, peaks in each.memory.items()
                },
                "replica_mb_over": {
                    of: {way: each.shares(way, of)._asdict() for way in each.memory}
                    for of in (LOOPS, TRAINER)
                },
                "cpu_compiled": {
                    f"{one} / {other}": ratio._asdict()
                    for (one, other), ratio in each.compiled_ratios().items()
                },
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


def is_whole(measured: Sequence[Measured], parts: Sequence[Arithmetic]) -> bool:
    """Return whether everything was measured, often enough."""
    rounds = [len(rounds) for each in measured for rounds in each.rounds.values()]
    return (
        {each.workload for each in measured} == set(WORKLOADS)
        and {part.workload for part in parts} == set(TAKEN_APART)
        and min(rounds) >= FEWEST_ROUNDS
    )


def main() -> int:
    """Measure, print and write; return 1 where the ways did not do the same work."""
    names = [*(workload.name for workload in WORKLOADS), ARITHMETIC]
    parser = argparse.ArgumentParser(description="Measure what lockstep gains.")
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help=f"rounds, at least {FEWEST_ROUNDS} for a figure to keep",
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

    def save() -> Path:
        settings = {
            "rounds": options.rounds, "steps": options.steps, "only": options.only,
            "measured": [each.workload.name for each in measured],
            "taken_apart": [part.workload.name for part in parts],
            "seeds": SEEDS, "configs": 2, "actors": 2, "memory_repetitions": REPETITIONS,
            "memory_steps": FEWEST_STEPS,
            "losses_alike": {"share": ALIKE, "typical": TYPICAL, "furthest": FURTHEST},
            "load_before": before, "load_after": load(),
        }  # fmt: skip
        drawn = picture(measured) if measured else None
        found = record(measured, parts, settings)
        return write(options.out, "replicas", found, drawn, whole=is_whole(measured, parts))

    file = None
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
                file = save()
            ray.shutdown()
        if ARITHMETIC in options.only:
            for workload in TAKEN_APART:
                status.update(f"{workload.name}: arithmetic")
                parts.append(arithmetic(workload, SEEDS, folder, max(options.steps // 4, 4)))
                print_arithmetic(console, parts[-1])
                file = save()
    after = load()
    if found := floors(measured):
        print_floors(console, found)
    about = machine()
    console.print(
        f"{about['cpu']}, {about['cores']} cores, one thread per process, load {before[0]} before and "
        f"{after[0]} after; torch {about['torch']}, transformers {about['transformers']}, peft "
        f"{about['peft']}, ray {about['ray']}; 2 configs x {SEEDS} seeds x {options.steps} steps, "
        f"rounds: {options.rounds}; dead zone at layer {FAULTY_LAYER}\nwritten to {file}",
        highlight=False,
    )
    return 0 if all(each.agrees() for each in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
