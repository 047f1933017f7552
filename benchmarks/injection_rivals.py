"""What other fault injectors cost for the same fault, against no fault and against ours.

    python benchmarks/injection_rivals.py [--rounds 9] [--pairs 8] [--out FOLDER]

Compares with PyTorchFI (`pip install --no-deps pytorchfi==0.6.0`) and MRFI (`pip install --no-deps
mrfi==2.1.0`), each where it can be imported; one line says so where it cannot.

The model is the embedded one without adapters, all weights trainable, 8 rows of 56 tokens on one thread;
timed are a forward pass without gradients, and a forward and backward pass. The faults are a dead zone
(0.1 of the tensor's largest magnitude) and flips of 8 values, on the output of decoder layer 10, or of its
down_proj where a tool reaches leaf modules only. Ours is timed on the same site, each against the same
pass of a model of its own kind without any fault, in pairs as in `injection.py`. What a tool cannot do is
printed as the error it ends in.

`extra` is their extra time as a multiple of ours; a lower bound where ours is not to be seen, and no number
where the ranges of the two over the rounds overlap. Where the fault draws nothing at random, the logits
have to be equal bit for bit, and the output says whether they are. Not compared: what the tools can express.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from _common import Bar, Spread, add_out, bars, load, machine, write
from injection import FAULTY_LAYER, ROWS, SEED, Figures, Seconds, Timed, measure, stopwatch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from aqn_tune.faults.bit_flip import BitFlip
from aqn_tune.faults.dead_zone import DeadZone
from aqn_tune.injection.address import AddressBook
from aqn_tune.injection.fold import Entry
from aqn_tune.injection.injection import Injection
from aqn_tune.models import ModelSpec, build_model, load_tokenizer
from aqn_tune.study.device import Device
from aqn_tune.study.seeds import stream_seed
from aqn_tune.tasks import WordProblems
from aqn_tune.training.data import TokenSet, load_tokens, token_loss

THRESHOLD, FLIPS, BIT = 0.1, 8, 20
LAYER = f"model.layers.{FAULTY_LAYER}"
LEAF = "mlp.down_proj"
ERROR = 0.005
"""Extra time, as a share of the pass, that the figures do not tell from none."""

Kind = Literal["dead zone", "bit flips"]
Place = Literal["layer", "leaf"]


class Compared(NamedTuple):
    """One fault at one site through one tool."""

    tool: str
    kind: Kind
    place: Place
    trains: bool
    """Whether there is a backward pass."""

    def name(self) -> str:
        """Return it in words."""
        site = "layer output" if self.place == "layer" else LEAF
        return f"{self.tool}, {self.kind}, {site}, {'training' if self.trains else 'inference'}"


class Bench:
    """The batch, and how a pass over it is timed."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.spec = ModelSpec()
        task = WordProblems()
        data = load_tokens(load_tokenizer(self.spec), task.splits().train, max_length=64)
        self.batch: TokenSet = data.batch(torch.arange(ROWS))
        self.step = 0
        self.logits = torch.empty(0)
        """Of the last pass."""

    def model(self) -> nn.Module:
        """Return a model of its own, all weights trainable."""
        model: nn.Module = build_model(self.spec)
        return model.requires_grad_(True)

    def timed(self, model: nn.Module, trains: bool, before: Callable[[], None]) -> Seconds:
        """Time one pass; `before` counts in, getting the batch of pairs ready does not."""
        self.step += 1
        for parameter in model.parameters():
            parameter.grad = None
        read = stopwatch()
        before()
        with nullcontext() if trains else torch.no_grad():
            logits: Tensor = model(self.batch.tokens).logits
            if trains:
                whole = self.batch._replace(first=0)
                token_loss(logits, whole).total.sum().backward()  # type: ignore[no-untyped-call]
        seconds = read()
        self.logits = logits.detach()
        return seconds

    def plain(self, trains: bool) -> Timed:
        """Return the pass without any fault."""
        model = self.model()
        return lambda: self.timed(model, trains, _nothing)


def _nothing() -> None:
    """Stand in for what a tool does before a pass."""


Tool = Callable[[Bench, Compared], Timed]


def dead_zone(values: Tensor) -> Tensor:
    """Return values with the small ones flushed to zero, as a user would write it for another tool."""
    magnitude = values.detach().abs()
    return values.masked_fill(magnitude < THRESHOLD * magnitude.max(), 0.0)


def ours(bench: Bench, case: Compared) -> Timed:
    """Inject with this project."""
    where: dict[str, Any] = {
        "layers": (FAULTY_LAYER,),
        "modules": (".",) if case.place == "layer" else (LEAF,),
    }
    fault = (
        DeadZone(threshold=THRESHOLD, reference="tensor_max", **where)
        if case.kind == "dead zone"
        else BitFlip(bits=(BIT,), count=FLIPS, **where)
    )

    def seed_of(replica: int, path: tuple[str | int, ...]) -> int:
        return stream_seed(SEED, *path, bench.step)

    model = bench.model()
    entry = Entry(Device(faults=(fault,)))
    injection = Injection(AddressBook(model), [entry], seed_of=seed_of)
    # The other tools know of no padding: all tokens enter the reference of the dead zone.
    valid = torch.ones(1, bench.batch.tokens.numel(), dtype=torch.bool)

    def timed() -> Seconds:
        with injection:
            return bench.timed(model, case.trains, lambda: injection.begin(valid))

    return timed


def mrfi(bench: Bench, case: Compared) -> Timed:
    """Inject with MRFI: a pair of hooks on every module, values written in place."""
    from mrfi import MRFI, EasyConfig, add_function  # type: ignore[import-not-found]

    add_function("DeadZone", dead_zone)
    fault: dict[str, Any] = {
        "type": "activation_out",
        "module_fullname": [LAYER if case.place == "layer" else f"{LAYER}.{LEAF}"],
        "error_mode": {"method": "DeadZone"},
    }
    if case.kind == "bit flips":
        fault["selector"] = {"method": "RandomPositionByNumber", "n": FLIPS}
        fault["error_mode"] = {"method": "FloatFixedBitFlip", "bit": BIT, "floattype": "float32"}
    model = bench.model()
    MRFI(model, EasyConfig({"faultinject": [fault]}))
    # Calling the MRFI object would switch gradients off; its hooks are on the model itself.
    return lambda: bench.timed(model, case.trains, _nothing)


class FromFloats(nn.Module):
    """A language model that takes vectors as well: PyTorchFI probes a model with random floats."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        """Return the logits for token numbers, or for vectors in their place."""
        return self.model(inputs_embeds=x) if x.is_floating_point() else self.model(input_ids=x)


def pytorchfi(bench: Bench, case: Compared) -> Timed:
    """Inject with PyTorchFI: a hook on every linear layer of a copy of the model."""
    from pytorchfi.neuron_error_models import (  # type: ignore[import-not-found]
        single_bit_flip_func,
    )

    model = FromFloats(bench.model())
    width = model.model.get_input_embeddings().embedding_dim  # type: ignore[operator]
    tokens = bench.batch.tokens.shape[1]
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    target = linears.index(f"model.{LAYER}.{LEAF}")
    shape = [tokens, int(width)]
    injector = single_bit_flip_func(
        model, ROWS, input_shape=shape, layer_types=[nn.Linear], use_cuda=False, bits=8
    )
    if case.kind == "dead zone":

        def hook(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            is_here = injector.get_current_layer() == target
            injector.updateLayer()
            if injector.get_current_layer() >= injector.get_total_layers():
                injector.reset_current_layer()
            return dead_zone(output) if is_here else output

        faulty = injector.declare_neuron_fi(function=hook)
    else:
        injector.set_conv_max([8.0] * len(linears))
        faulty = injector.declare_neuron_fi(
            batch=list(range(FLIPS)), layer_num=[target] * FLIPS, dim1=[3] * FLIPS,
            dim2=list(range(FLIPS)), dim3=[None] * FLIPS,
            function=injector.single_bit_flip_signed_across_batch,
        )  # fmt: skip
    return lambda: bench.timed(faulty, case.trains, injector.reset_current_layer)


class Rival(NamedTuple):
    """Another tool."""

    module: str
    tool: Tool
    place: Place
    """The largest unit whose output it reaches."""


RIVALS = {"MRFI": Rival("mrfi", mrfi, "layer"), "PyTorchFI": Rival("pytorchfi", pytorchfi, "leaf")}


class Result(NamedTuple):
    """How a rival did, beside ours."""

    case: Compared
    theirs: Figures | None
    ours: Figures
    error: str
    """What it ended in, where there are no figures of it."""
    is_equal: bool
    """Whether both came to the same logits, bit for bit; flips fall elsewhere, so theirs never do."""


def compare(
    bench: Bench, cases: list[Compared], rounds: int, pairs: int, said: Callable[[str], None]
) -> list[Result]:
    """Time every case and ours beside it."""
    results: dict[Compared, Result] = {}
    for trains in (False, True):
        timed: dict[str, Timed] = {}
        errors: dict[Compared, str] = {}
        equal: set[Compared] = set()
        for case in (case for case in cases if case.trains is trains):
            own = case._replace(tool="ours")
            timed.setdefault(own.name(), ours(bench, own))()
            expected = bench.logits
            try:
                tried = RIVALS[case.tool].tool(bench, case)
                tried()
            except Exception as error:  # whatever it is, it is the finding
                errors[case] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                continue
            timed[case.name()] = tried
            if torch.equal(bench.logits, expected):
                equal.add(case)
        stage = "training" if trains else "inference"
        figures = measure(bench.plain(trains), timed, rounds, pairs, partial(_say, said, stage))
        for case in (case for case in cases if case.trains is trains):
            beside = figures[case._replace(tool="ours").name()]
            theirs = figures.get(case.name())
            results[case] = Result(case, theirs, beside, errors.get(case, ""), case in equal)
    return [results[case] for case in cases]


def _say(said: Callable[[str], None], stage: str, text: str) -> None:
    said(f"{stage}, {text}")


def print_table(console: Console, results: list[Result]) -> None:
    """Print one line per case."""
    table = Table(title="The same fault through another tool: pass with / pass without", box=SIMPLE)
    for heading in ("tool", "fault", "site", "pass"):
        table.add_column(heading, no_wrap=True)
    for heading in ("theirs", "ours", "extra"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        case, theirs = result.case, result.theirs
        words = (
            case.tool,
            case.kind,
            "layer" if case.place == "layer" else LEAF,
            "training" if case.trains else "inference",
        )
        mine = f"{result.ours.ratio:.3f}"
        if theirs is None:
            table.add_row(*words, "fails", mine, "")
            continue
        table.add_row(*words, f"{theirs.ratio:.3f}", mine, times_ours(theirs, result.ours))
    console.print(table)


def times_ours(theirs: Figures, ours: Figures) -> str:
    """Return their extra time as a multiple of ours, in words where the rounds do not tell them apart."""
    extra, own = theirs.ratio - 1, ours.ratio - 1
    overlap = theirs.least <= ours.most and ours.least <= theirs.most
    if overlap or max(extra, own) <= ERROR:
        return "within the error"
    return f"x {max(extra, 0.0) / own:.1f}" if own > ERROR else f"> x {math.floor(extra / ERROR)}"


def picture(results: list[Result]) -> str:
    """Return what every tool takes, beside ours, as bars."""
    groups: list[tuple[str, list[Bar]]] = []
    for result in results:
        rows = []
        for label, figures, colour in (
            (result.case.tool, result.theirs, "#c73"),
            ("ours", result.ours, "#48a"),
        ):
            if figures is not None:
                value = Spread(figures.ratio, figures.least, figures.most)
                rows.append(Bar(label, value, value.text(3), colour))
        groups.append((result.case.name(), rows))
    return bars(
        "The same fault through another tool: pass with / pass without",
        "bar: median of the rounds; line: least to most; shorter is better; 1 is no cost",
        groups,
    )


def main() -> None:
    """Measure what is installed, print and write."""
    parser = argparse.ArgumentParser(description="Compare with other fault injectors.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pairs", type=int, default=8, help="passes with and without, per round")
    add_out(parser, "injection_rivals")
    options = parser.parse_args()
    console = Console()
    logging.getLogger().setLevel(logging.ERROR)
    for name, rival in RIVALS.items():
        if find_spec(rival.module) is None:
            console.print(f"{name} is not installed: nothing to compare with.")
    kinds: tuple[Kind, ...] = ("dead zone", "bit flips")
    cases = [
        Compared(name, kind, rival.place, trains)
        for name, rival in RIVALS.items()
        if find_spec(rival.module) is not None
        for kind in kinds
        for trains in (False, True)
    ]
    if not cases:
        return
    before = load()
    with console.status("warming up") as status:
        results = compare(Bench(), cases, options.rounds, options.pairs, status.update)
    after = load()
    print_table(console, results)
    for result in results:
        if result.error:
            console.print(f"{result.case.name()}: {result.error}", highlight=False)
        elif result.case.kind == "dead zone":
            word = "equal ours bit for bit" if result.is_equal else "differ from ours"
            console.print(f"{result.case.name()}: its logits {word}", highlight=False)
    console.print(f"load {before[0]} before and {after[0]} after", highlight=False)
    found = {
        "machine": machine(),
        "settings": {
            "rounds": options.rounds, "pairs": options.pairs,
            "load_before": before, "load_after": after,
        },
        "figures": [
            {
                **result.case._asdict(),
                "theirs": result.theirs and result.theirs._asdict(),
                "ours": result.ours._asdict(),
                "error": result.error,
                "equal_logits": result.is_equal,
            }
            for result in results
        ],
    }  # fmt: skip
    write(options.out, "injection_rivals", found, picture(results))


if __name__ == "__main__":
    main()
