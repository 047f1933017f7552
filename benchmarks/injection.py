"""What injection costs: one forward and backward pass with it, against the same pass without it.

    python benchmarks/injection.py [--rounds 9] [--pairs 8] [--only NAME ...] [--out FOLDER]

The step: the embedded 28-layer model with stacked LoRA adapters of rank 8 on all 196 linear layers, as
`ReplicaPack` builds it for one run (K = 1); 8 rows of 56 tokens; forward, answer loss, backward. Timed:
`Injection.begin`, the forward pass with whatever the hooks do, `Injection.forward_done`, the backward
pass. Not timed: choosing the batch, attaching and removing hooks (once per rung in a training), the
optimiser, the audit of noise (first and last step of every sigma).

A round takes every configuration in turn, in an order of its own: pairs of one plain step and one step
with the injection, one right after the other, each first in every other pair. The ratio of the round is
the median of the ratios of its pairs; reported are the median of the rounds, the least and the most. A
target is met where all rounds are at or below it, missed where all are above it, and otherwise neither:
the range holds it, and the word says on which side the median is. The clock is the CPU time of the process,
which with one thread is the wall time of a core of its own; the same from the wall clock is reported beside
it.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import torch
from _common import FEWEST_ROUNDS, Spread, add_out, coloured, load, machine, verdict, write
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from aqn_tune.faults.dead_zone import DeadZone
from aqn_tune.faults.relative_gaussian import RelativeGaussian
from aqn_tune.injection.address import AddressBook
from aqn_tune.injection.fold import Entry
from aqn_tune.injection.injection import Injection
from aqn_tune.models import ModelSpec, build_model, load_tokenizer
from aqn_tune.noise import EffectiveNoise
from aqn_tune.noise.carriers import Carrier
from aqn_tune.noise.carriers.hidden import Hidden
from aqn_tune.noise.carriers.linear_weight import LinearWeight
from aqn_tune.noise.carriers.rmsnorm_weight import RmsnormWeight
from aqn_tune.quantization import MXFP4, NVFP4
from aqn_tune.study.device import Device
from aqn_tune.study.runs import Condition, Run
from aqn_tune.study.seeds import stream_seed
from aqn_tune.study.training import TrainingSpec
from aqn_tune.tasks import WordProblems
from aqn_tune.training.data import TokenSet, answer_logits, load_tokens, token_loss
from aqn_tune.training.pack import ReplicaPack

ROWS, LAYERS, SEED, FAULTY_LAYER = 8, 28, 2, 10
STEPS = 64
"""Length of the noise schedules; the steps of the benchmark go round in it."""


class Case(NamedTuple):
    """One configuration, and the most that it may cost."""

    name: str
    what: str
    entry: Entry | None
    """None attaches no Injection at all: the plain step against itself shows the error of the figures."""
    target: float | None = None


def noise(carrier: Carrier, sigma: float) -> Entry:
    """Return an entry with constant noise on all layers."""
    table, multipliers = (sigma,) * STEPS, (1.0,) * LAYERS
    return Entry(noise=EffectiveNoise(carrier=carrier, sigma=table, multipliers=multipliers))


def faulty(*faults: DeadZone | RelativeGaussian) -> Entry:
    """Return an entry with faults on hardware that is otherwise exact."""
    return Entry(Device(faults=faults))


def quantized(quantizer: MXFP4 | NVFP4) -> Entry:
    """Return an entry with one quantizer on all linear layers."""
    return Entry(Device(quantization=(quantizer,)))


IDLE = DeadZone(layers="all", modules=(".", "linear"), threshold=0.0)
DEAD = DeadZone(layers=(FAULTY_LAYER,), threshold=0.1)
CASES = (
    Case("plain", "no Injection on either side: the error of these figures", None),
    Case("no entries", "an Injection that has nothing to attach", Entry()),
    Case("empty sites", "224 sites of a fault at a level that does nothing", faulty(IDLE), 1.02),
    Case("dead zone", "threshold 0.1 on the output of one decoder layer", faulty(DEAD), 1.03),
    Case("AQN rmsnorm", "rmsnorm_weight, all 56 norms", noise(RmsnormWeight(), 0.01), 1.05),
    Case("AQN hidden", "hidden, all 28 layer outputs", noise(Hidden(), 0.05)),
    Case("AQN linear_weight", "linear_weight, all 196 weights", noise(LinearWeight(), 0.001)),
    Case(
        "relative Gaussian",
        "scale 0.05 on the outputs of all 196 linear layers",
        faulty(RelativeGaussian(layers="all")),
        1.3,
    ),
    Case("MXFP4 weights", "196 frozen weights, cached", quantized(MXFP4(operands="weight")), 1.02),
    Case("NVFP4 weights", "196 frozen weights, cached", quantized(NVFP4(operands="weight"))),
    Case("MXFP4 W4A4", "weights cached, activations of 196 products", quantized(MXFP4()), 1.3),
    Case("NVFP4 W4A4", "weights cached, activations of 196 products", quantized(NVFP4())),
)


class Seconds(NamedTuple):
    """Time of one step."""

    cpu: float
    wall: float


def stopwatch() -> Callable[[], Seconds]:
    """Start the clocks; return the function that reads them."""
    wall, cpu = time.perf_counter(), time.process_time()
    return lambda: Seconds(time.process_time() - cpu, time.perf_counter() - wall)


class Bench:
    """The step that is timed: model, adapters and one batch."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        spec = ModelSpec()
        task = WordProblems()
        data = load_tokens(load_tokenizer(spec), task.splits().train, max_length=64)
        training = TrainingSpec(batch_size=ROWS)
        run = Run(training=training, seed=SEED, conditions=(Condition(name="clean"),))
        pack = ReplicaPack(build_model(spec), [run], data)
        pack.train_to(3)  # adapters that are not zero any more
        self.model = pack.model
        self.book: AddressBook = pack.book
        self.batch: TokenSet = data.batch(torch.arange(ROWS))
        self.tokens = data.tokens.shape[1]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.step = 0

    def injection(self, entry: Entry) -> Injection:
        """Return an injection for one replica, keyed as a training keys it."""
        return Injection(self.book, [entry], seed_of=self._seed_of)

    def _seed_of(self, replica: int, path: tuple[str | int, ...]) -> int:
        stream, *place = path
        return stream_seed(SEED, stream, self.step, *place)

    def timed(self, begin: Callable[[], None], done: Callable[[], None]) -> Seconds:
        """Time one step."""
        self.step += 1
        for parameter in self.trained:
            parameter.grad = None
        read = stopwatch()
        begin()
        total: Tensor = token_loss(answer_logits(self.model, self.batch), self.batch).total.sum()
        done()
        total.backward()  # type: ignore[no-untyped-call]
        return read()

    def plain(self) -> Seconds:
        """Time a step without any injection."""
        return self.timed(_nothing, _nothing)

    def injected(self, injection: Injection) -> Seconds:
        """Time a step with an injection, which is attached for this step only."""
        valid = self.batch.valid.view(1, -1)
        with injection:
            return self.timed(
                lambda: injection.begin(valid, step=self.step % STEPS), injection.forward_done
            )


def _nothing() -> None:
    """Stand in for the two calls of an injection."""


class Figures(NamedTuple):
    """What one configuration costs."""

    ratio: float
    least: float
    most: float
    wall_ratio: float
    milliseconds: float
    """CPU time of the step with the injection."""
    plain_milliseconds: float
    rounds: tuple[float, ...]


Timed = Callable[[], Seconds]
Pair = tuple[Seconds, Seconds]
"""The step without and the step with what is measured."""


def measure(
    plain: Timed, cases: dict[str, Timed], rounds: int, pairs: int, said: Callable[[str], None]
) -> dict[str, Figures]:
    """Time every case against `plain`, round by round; see the top of this file."""
    order = random.Random(0)
    found: dict[str, list[list[Pair]]] = {name: [] for name in cases}
    plain()
    for timed in cases.values():
        timed()  # weights that are quantized once, and warm caches
    gc.collect()
    gc.freeze()  # what the imports left behind would be walked at random times
    for number in range(rounds):
        said(f"round {number + 1} of {rounds}")
        for name in order.sample(list(cases), len(cases)):
            found[name].append([_pair(plain, cases[name], pair % 2 == 0) for pair in range(pairs)])
    gc.unfreeze()
    return {name: _figures(its_rounds) for name, its_rounds in found.items()}


def _pair(plain: Timed, timed: Timed, plain_first: bool) -> Pair:
    if plain_first:
        return plain(), timed()
    later = timed()
    return plain(), later


def _figures(rounds: Sequence[Sequence[Pair]]) -> Figures:
    ratios = tuple(_median(b.cpu / a.cpu for a, b in pairs) for pairs in rounds)
    steps = [pair for pairs in rounds for pair in pairs]
    return Figures(
        ratio=_median(ratios),
        least=min(ratios),
        most=max(ratios),
        wall_ratio=_median(_median(b.wall / a.wall for a, b in pairs) for pairs in rounds),
        milliseconds=1e3 * _median(b.cpu for _, b in steps),
        plain_milliseconds=1e3 * _median(a.cpu for a, _ in steps),
        rounds=ratios,
    )


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


# -- report -----------------------------------------------------------------------------------------


def word(case: Case, figures: Figures) -> str:
    """Return whether the target of a configuration is met; "" where it has none."""
    if case.target is None:
        return ""
    value = Spread(figures.ratio, figures.least, figures.most)
    return verdict(value, case.target, at_most=True)


def print_table(console: Console, cases: Sequence[Case], figures: dict[str, Figures]) -> None:
    """Print one line per configuration."""
    table = Table(title="Cost of injection: step with / step without", box=SIMPLE)
    table.add_column("configuration", no_wrap=True)
    for heading in ("x plain", "least - most", "wall", "ms", "target"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for case in cases:
        f = figures[case.name]
        target = "" if case.target is None else f"{case.target:.2f}"
        table.add_row(
            case.name, f"{f.ratio:.3f}", f"{f.least:.3f} - {f.most:.3f}", f"{f.wall_ratio:.3f}",
            f"{f.milliseconds:.1f}", target, coloured(word(case, f)),
        )  # fmt: skip
    console.print(table)


def picture(cases: Sequence[Case], figures: dict[str, Figures]) -> str:
    """Return the ratios as bars, with their range over the rounds and their targets, as SVG."""
    left, width, height, top = 150, 430, 22, 44
    highest = max(1.3, *(f.most for f in figures.values())) + 0.02
    lowest = min(0.98, *(f.least for f in figures.values()))

    def at(ratio: float) -> float:
        return left + (ratio - lowest) / (highest - lowest) * width

    bottom = top + height * len(cases)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 90}" height="{bottom + 30}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="10" y="18" font-weight="bold">Cost of injection: step with / step without</text>',
        '<text x="10" y="34" fill="#666">bar: median of the rounds; line: least to most; '
        "red mark: target</text>",
    ]
    for tick in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0):
        if lowest <= tick <= highest:
            x = at(tick)
            parts.append(f'<path d="M{x:.1f} {top}V{bottom}" stroke="#ccc"/>')
            parts.append(
                f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}x</text>'
            )
    for number, case in enumerate(cases):
        f, y = figures[case.name], top + height * number
        fill = "#c44" if word(case, f) == "missed" else "#48a"
        start, end = sorted((at(1.0), at(f.ratio)))
        parts += [
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(case.name)}</text>',
            f'<rect x="{start:.1f}" y="{y + 4}" width="{end - start:.1f}" height="14" fill="{fill}"/>',
            f'<path d="M{at(f.least):.1f} {y + 11}H{at(f.most):.1f}" stroke="#000"/>',
            f'<text x="{at(f.most) + 6:.1f}" y="{y + 15}">{f.ratio:.3f}</text>',
        ]
        if case.target is not None:
            x = at(case.target)
            parts.append(f'<path d="M{x:.1f} {y + 1}V{y + 21}" stroke="#d00" stroke-width="2"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def record(
    cases: Sequence[Case], figures: dict[str, Figures], settings: dict[str, Any]
) -> dict[str, Any]:
    """Return everything as plain data."""
    return {
        "machine": machine(),
        "settings": settings,
        "figures": [
            {
                "name": case.name,
                "what": case.what,
                "target": case.target,
                "verdict": word(case, figures[case.name]),
                **figures[case.name]._asdict(),
            }
            for case in cases
        ],
    }


def is_whole(figures: dict[str, Figures]) -> bool:
    """Return whether every configuration was measured, often enough."""
    return set(figures) == {case.name for case in CASES} and all(
        len(each.rounds) >= FEWEST_ROUNDS for each in figures.values()
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Measure what injection costs.")
    parser.add_argument(
        "--rounds",
        type=int,
        default=9,
        help=f"rounds, at least {FEWEST_ROUNDS} for a figure to keep",
    )
    parser.add_argument("--pairs", type=int, default=8, help="steps with and without, per round")
    parser.add_argument("--only", nargs="+", default=[], help="names of configurations")
    add_out(parser, "injection")
    options = parser.parse_args()
    unknown = set(options.only) - {case.name for case in CASES}
    if unknown or options.rounds < 1 or options.pairs < 1:
        names = ", ".join(repr(case.name) for case in CASES)
        parser.error(f"--rounds and --pairs are at least 1, --only takes of {names}")
    cases = [case for case in CASES if not options.only or case.name in options.only]
    console = Console()
    if not console.is_terminal:
        console.width = 120
    before = load()
    bench = Bench()

    def timed(case: Case) -> Timed:
        if case.entry is None:
            return bench.plain
        injection = bench.injection(case.entry)
        return lambda: bench.injected(injection)

    with console.status("warming up") as status:
        figures = measure(
            bench.plain,
            {case.name: timed(case) for case in cases},
            options.rounds,
            options.pairs,
            status.update,
        )
    after = load()
    print_table(console, cases, figures)
    about = machine()
    console.print(
        f"{about['cpu']}, {about['cores']} cores, 1 thread, load {before[0]} before and {after[0]} after; "
        f"torch {about['torch']}; {ROWS} x {bench.tokens} tokens; "
        f"{options.rounds} rounds of {options.pairs} pairs",
        highlight=False,
    )
    settings = {
        "rounds": options.rounds, "pairs": options.pairs, "only": options.only,
        "measured": list(figures), "rows": ROWS, "tokens": bench.tokens,
        "layers": bench.book.layer_count, "load_before": before, "load_after": after,
    }  # fmt: skip
    found = record(cases, figures, settings)
    drawn = picture(cases, figures)
    file = write(options.out, "injection", found, drawn, whole=is_whole(figures))
    console.print(f"written to {file}", highlight=False)


if __name__ == "__main__":
    main()
