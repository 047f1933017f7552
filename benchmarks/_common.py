"""What the benchmarks of packs share: models, data and runs to time, clocks, the machine, pictures."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aqn_tune.faults import DeadZone
from aqn_tune.models import ModelSpec, base_arrays
from aqn_tune.models.load import no_progress_bars
from aqn_tune.noise import EffectiveNoise, NoisePolicy
from aqn_tune.study.device import Device
from aqn_tune.study.engine import BaseArrays
from aqn_tune.study.runs import Condition, Run
from aqn_tune.study.training import Full, Lora, TrainingSpec
from aqn_tune.training.data import TokenSet

FAULTY_LAYER = 10
DATA_ROWS = 256
SEED = 2
FEWEST_ROUNDS = 5
"""With fewer, what was measured is a part and not a figure to keep."""


class Workload(NamedTuple):
    """A model and a batch; the default is the size at which dispatch, not arithmetic, is the cost."""

    name: str
    rows: int = 4
    tokens: int = 16
    rank: int | None = 8
    """Rank of the adapters; None trains all parameters."""
    hidden: int = 64
    intermediate: int = 128
    vocabulary: int = 256
    layers: int = 28
    embedded: bool = False
    """The model that the package ships, in place of a random one."""

    def heads(self) -> tuple[int, int]:
        """Return the number of query heads and of key and value heads, of 32 features each."""
        heads = max(self.hidden // 32, 1)
        return heads, max(heads // 2, 1)

    def about(self) -> str:
        """Return the size in words."""
        method = "full" if self.rank is None else f"LoRA r {self.rank}"
        model = "embedded" if self.embedded else f"hidden {self.hidden}"
        return f"{model}, {self.rows} x {self.tokens} tokens, {method}"


class Prepared(NamedTuple):
    """What every run of a workload starts from."""

    workload: Workload
    spec: ModelSpec
    base: BaseArrays
    data: TokenSet


def prepare(workload: Workload, folder: Path) -> Prepared:
    """Return model and data; a random model is written to `folder`, as models are read from folders."""
    spec = ModelSpec() if workload.embedded else ModelSpec(path=str(folder / workload.name))
    if not workload.embedded:
        _save_random_model(workload, Path(spec.path))
    return Prepared(workload, spec, base_arrays(spec), random_tokens(workload))


def _save_random_model(workload: Workload, folder: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    heads, kv_heads = workload.heads()
    config = Qwen2Config(
        vocab_size=workload.vocabulary,
        hidden_size=workload.hidden,
        intermediate_size=workload.intermediate,
        num_hidden_layers=workload.layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        initializer_range=0.08,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen2ForCausalLM(config)
    with no_progress_bars():
        model.save_pretrained(folder)


def random_tokens(workload: Workload) -> TokenSet:
    """Return random rows of uneven length, the first part of each a question.

    One question is a single token, so that both sides of a comparison need the logits of every position.
    """
    generator = torch.Generator().manual_seed(SEED)

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (DATA_ROWS, 1), generator=generator)

    width = workload.tokens
    tokens = torch.randint(workload.vocabulary, (DATA_ROWS, width), generator=generator)
    question, end = draw(1, width // 2), draw(3 * width // 4, width)
    question[0] = 1
    position = torch.arange(width)
    valid = position < end
    return TokenSet(tokens, (position >= question) & valid, valid, 0)


def training(workload: Workload, steps: int) -> TrainingSpec:
    """Return how a workload is trained."""
    method: Lora | Full = Full() if workload.rank is None else Lora(rank=workload.rank)
    return TrainingSpec(
        method=method,
        steps=steps,
        batch_size=workload.rows,
        max_length=workload.tokens,
        warmup_steps=min(4, steps - 1),
        learning_rate=1e-3,
    )


def configs(workload: Workload, steps: int, seeds: int) -> list[list[Run]]:
    """Return two configs of `seeds` runs: noise in all layers, and noise in the faulty layer alone."""
    spec = training(workload, steps)
    faulty = min(FAULTY_LAYER, workload.layers - 1)
    both: list[list[Run]] = []
    for targeting, threshold in (("global", 0.1), ("targeted", 0.2)):
        policy = NoisePolicy.model_validate({"targeting": targeting})
        noise = policy.resolve(steps=steps, layer_count=workload.layers, fault_layers=(faulty,))
        device = Device(faults=(DeadZone(layers=(faulty,), threshold=threshold),))
        both.append(replicates(spec, device, noise, seeds))
    return both


def replicates(
    spec: TrainingSpec, device: Device, noise: EffectiveNoise | None, count: int
) -> list[Run]:
    """Return runs that differ in their seeds alone."""
    return [
        Run(
            training=spec,
            device=device,
            noise=noise,
            seed=SEED + 2 * index,
            conditions=(Condition(name="clean"),),
        )
        for index in range(count)
    ]


# -- clocks -----------------------------------------------------------------------------------------


class Clock:
    """Wall and CPU time of this process, all its threads together, since the clock was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Return wall and CPU seconds."""
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


def give_back() -> None:
    """Hand the memory that is free back to the system, where the C library can (glibc)."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)


def reset_peak() -> bool:
    """Let the peak of this process's memory start from what it holds now; return whether Linux did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory(peak: bool = True) -> float:
    """Return the resident memory of this process in MB: its peak, or what it holds now (Linux alone)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    word = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in status.read_text().splitlines() if line.startswith(word))
    return int(line.split()[1]) / 1024


def peak_above(work: Callable[[], object]) -> float:
    """Return the peak memory of this process in MB while it does some work, less what it held before.

    What earlier work has freed is given back first: pages that the process keeps would not be counted.
    Holes smaller than a page stay, so ask in a fresh process. NaN where the system does not tell.
    """
    give_back()
    before = memory(peak=False)
    if not reset_peak():
        return math.nan
    work()
    return memory() - before


class Spread(NamedTuple):
    """The same thing measured in several rounds."""

    median: float
    least: float
    most: float

    def text(self, digits: int = 1) -> str:
        """Return it as `median (least-most)`."""
        return f"{self.median:.{digits}f} ({self.least:.{digits}f}-{self.most:.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    """Return median and range."""
    return Spread(statistics.median(values), min(values), max(values))


def verdict(value: Spread, wanted: float, *, at_most: bool) -> str:
    """Return whether a target is met by the whole range, missed by the whole range, or neither."""
    if math.isnan(value.median):
        return "not measured"
    met = value.most <= wanted if at_most else value.least >= wanted
    missed = value.least > wanted if at_most else value.most < wanted
    side = "above" if value.median > wanted else "below"
    return "met" if met else "missed" if missed else f"within the error (median {side})"


VERDICT_COLOURS = {"met": "green", "missed": "red", "": "none"}
"""Of what is neither: yellow."""


def coloured(word: str) -> str:
    """Return a verdict with its colour, for a table."""
    return f"[{VERDICT_COLOURS.get(word, 'yellow')}]{word}[/]"


def best_of(work: Callable[[], object], seconds: float = 0.02, batches: int = 5) -> float:
    """Return the CPU seconds of one call: the fastest of some batches of calls, after one to warm up."""
    work()
    clock = Clock()
    work()
    calls = max(int(seconds / max(clock.read()[1], 1e-6)), 1)
    times = []
    for _ in range(batches):
        clock = Clock()
        for _ in range(calls):
            work()
        times.append(clock.read()[1] / calls)
    return min(times)


# -- what was measured where ------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return what the figures depend on beside the code."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "ray", "aqn_tune")},
        "date": date.today().isoformat(),
    }


def load() -> tuple[float, ...]:
    """Return the load of the machine over 1, 5 and 15 minutes."""
    return tuple(round(value, 2) for value in os.getloadavg())


# -- where it goes ----------------------------------------------------------------------------------

RESULTS = Path(__file__).resolve().parent / "results"


def add_out(parser: argparse.ArgumentParser, name: str) -> None:
    """Give a benchmark its option `--out`."""
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help=f"folder for {name}.json and {name}.svg"
    )


def write(
    folder: Path, name: str, content: dict[str, Any], picture: str | None, *, whole: bool = True
) -> Path:
    """Write what was measured, and its picture where there is one; return the JSON file.

    What is not `whole` goes to `NAME.part.json`, so that no part takes the place of a whole; a whole
    removes the part beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem, part = name if whole else f"{name}.part", f"{name}.part"
    file = folder / f"{stem}.json"
    file.write_text(f"{json.dumps(content, indent=1)}\n")
    if picture is not None:
        (folder / f"{stem}.svg").write_text(picture)
    if whole:
        for kind in ("json", "svg"):
            (folder / f"{part}.{kind}").unlink(missing_ok=True)
    return file


# -- pictures ---------------------------------------------------------------------------------------

TICKS_APART, LABELS_APART = 30, 13
"""Pixels between numbers on an axis, and between the names of curves."""
COLOURS = ("#48a", "#c73", "#5a5", "#a5a", "#888")


class Bar(NamedTuple):
    """One bar of a picture."""

    label: str
    value: Spread
    text: str
    colour: str


def bars(title: str, note: str, groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Return horizontal bars in groups as SVG; each group has a scale of its own, from zero."""
    longest = max((len(bar.label) for _, own in groups for bar in own), default=0)
    left, width, height = max(130, 7 * longest + 16), 380, 20
    y = 44
    parts: list[str] = []
    for name, group in groups:
        y += 22
        parts.append(f'<text x="10" y="{y}" font-weight="bold">{escape(name)}</text>')
        y += 6
        scale = width / max(bar.value.most for bar in group)
        for bar in group:
            value = bar.value
            parts += [
                f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(bar.label)}</text>',
                f'<rect x="{left}" y="{y + 3}" width="{value.median * scale:.1f}" height="14" '
                f'fill="{bar.colour}"/>',
                f'<path d="M{left + value.least * scale:.1f} {y + 10}H{left + value.most * scale:.1f}" '
                'stroke="#000"/>',
                f'<text x="{left + value.most * scale + 6:.1f}" y="{y + 14}">{escape(bar.text)}</text>',
            ]
            y += height
    return _svg(left + width + 190, y + 14, title, note, parts)


class Curve(NamedTuple):
    """Points joined by a line."""

    name: str
    points: Sequence[tuple[float, float]]


def curves(title: str, note: str, panels: Sequence[tuple[str, str, Sequence[Curve]]]) -> str:
    """Return panels side by side as SVG, (heading, x label, curves), both axes in powers of two."""
    import math

    size, gap, left, top = 230, 60, 46, 74
    parts: list[str] = []
    rows = 0
    for number, (heading, label, lines) in enumerate(panels):
        at_x = left + (number % 2) * (size + gap + 60)
        at_y = top + (number // 2) * (size + 90)
        rows = max(rows, number // 2 + 1)
        xs = [math.log2(x) for line in lines for x, _ in line.points]
        ys = [math.log2(y) for line in lines for _, y in line.points]
        x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
        y_low, y_high = math.floor(min(ys)), max(math.ceil(max(ys)), math.floor(min(ys)) + 1)

        def place(x: float, y: float) -> tuple[float, float]:
            across = (math.log2(x) - x_low) / (x_high - x_low)  # noqa: B023
            up = (math.log2(y) - y_low) / (y_high - y_low)  # noqa: B023
            return at_x + across * size, at_y + size - up * size  # noqa: B023

        parts.append(
            f'<text x="{at_x}" y="{at_y - 12}" font-weight="bold">{escape(heading)}</text>'
        )
        for power in range(y_low, y_high + 1):
            _, y = place(2**x_low, 2.0**power)
            parts.append(f'<path d="M{at_x} {y:.1f}h{size}" stroke="#ddd"/>')
            parts.append(
                f'<text x="{at_x - 5}" y="{y + 4:.1f}" text-anchor="end">{2.0**power:g}</text>'
            )
        taken = -math.inf
        for value in sorted({x for line in lines for x, _ in line.points}):
            x, _ = place(value, 2.0**y_low)
            if x - taken < TICKS_APART:
                continue
            taken = x
            parts.append(
                f'<text x="{x:.1f}" y="{at_y + size + 16}" text-anchor="middle">{value:g}</text>'
            )
        parts.append(
            f'<text x="{at_x + size / 2}" y="{at_y + size + 34}" text-anchor="middle" fill="#666">'
            f"{escape(label)}</text>"
        )
        heights = _apart([place(*line.points[-1])[1] for line in lines])
        for index, line in enumerate(lines):
            colour = COLOURS[index % len(COLOURS)]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in line.points))
            end_x, _ = place(*line.points[-1])
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
            )
            parts.append(
                f'<text x="{end_x + 5:.1f}" y="{heights[index] + 4:.1f}" fill="{colour}">'
                f"{escape(line.name)}</text>"
            )
    return _svg(2 * (size + gap + 60) + 60, top + rows * (size + 90), title, note, parts)


def _apart(heights: Sequence[float]) -> list[float]:
    """Return the heights of labels, moved down where one would lie on another."""
    placed = list(heights)
    last = -float("inf")
    for index in sorted(range(len(placed)), key=placed.__getitem__):
        placed[index] = last = max(placed[index], last + LABELS_APART)
    return placed


def _svg(width: float, height: float, title: str, note: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="18" font-weight="bold">{escape(title)}</text>',
        f'<text x="10" y="34" fill="#666">{escape(note)}</text>',
    )
    return "\n".join([*head, *parts, "</svg>"]) + "\n"
