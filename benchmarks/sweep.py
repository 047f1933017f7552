"""A whole sweep, from the first import to the last table: written by hand, and as a study.

    python benchmarks/sweep.py [--rounds 3] [--steps 40] [--batch 8] [--max-length 64] [--seeds 6]

The sweep: a dead zone at layer 10 of the embedded model at two thresholds, trained through; four arms
(clean, fault_only, global and targeted noise) on as many seeds as asked; each evaluated without and with
the fault on the same rows in the same batches. It is run in three ways in turn:

by hand  `_user_sweep.py`: a Ray Tune function trainable, one trial per scenario, arm and seed, with
         transformers' Trainer, peft and forward hooks; with Tune's defaults, in which every trial has a
         process of its own.
reused   the same with `reuse_actors=True`, so that a process imports its libraries once.
aqn-tune `aqn-tune run` on a study that declares the same, without a search, report included.

Both have two workers of one thread each. A clock runs from the start of a command's process to its end, so
imports, the start of Ray and the building of models are inside on both sides. The hand-written side is meant
to be what a careful person writes: the rows are tokenized once for all trials, batches are padded to their
longest row, no mask is handed to attention, the optimiser is fused, the Trainer logs and saves nothing. Tune
writes what it writes of a trial by default. The command of the package does more: it measures what it
injects, hashes the frozen weights, evaluates the untrained base, records every step, and writes TensorBoard
logs and a report. It does less, too: the clean arm is one training for both scenarios.

The rows lie on the disk for the hand-written side, and the package generates them inside its time.

All draw adapters, rows and noise under the same keys, so in every round the losses of both sweeps by hand
are held against those of the study, seed by seed and arm by arm; where any do not agree, the work was not
the same and the command ends with 1. They are not equal bit for bit: sums are taken in another order, and a
value at the edge of the dead zone may then fall to either side.

A study takes at least six seeds. With fewer `--seeds` the package still trains six and the ratio is against
it; the cells that both have are compared. Before the last round, and with fewer seeds, what is measured is a
part and written to `sweep.part.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _common import Bar, Spread, add_out, bars, load, machine, spread, write
from rich.console import Console
from rich.table import Table

from aqn_tune.models.locate import EMBEDDED_FOLDER
from aqn_tune.study.loading import load_study
from aqn_tune.study.schema import ConfirmSpec, Study
from aqn_tune.study.seeds import replicate_seed
from aqn_tune.study.training import Lora
from aqn_tune.tasks.base import Example, completion, prompt

HERE = Path(__file__).resolve().parent
FAULTY_LAYER = 10
THRESHOLDS = (0.05, 0.2)
ARMS = ("clean", "fault_only", "global", "targeted")
WORKERS = 2
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
TYPICAL = 1e-4
"""Half of the seeds of an arm must agree within this many nats: rounding alone comes to 1e-7, other noise
or other rows to more than this."""
SHARE, FLOOR = 0.01, 0.0005
"""Mean losses must agree within this share of them, or within this many nats: room for a few seeds in
which a value falls to the other side of the dead zone's edge."""
BY_HAND, REUSED, PACKAGE = "by hand", "by hand, workers reused", "aqn-tune run"
WAYS = {BY_HAND: "#c73", REUSED: "#da7", PACKAGE: "#48a"}
NUMBERS = ("clean_loss", "faulty_loss", "clean_exact", "faulty_exact")


class Cell(NamedTuple):
    """One training under one scenario."""

    threshold: float
    arm: str
    replicate: int


class Swept(NamedTuple):
    """What one command took and found."""

    wall: float
    trainings: int
    cells: dict[Cell, dict[str, float]]
    load: float


# -- the two ways -----------------------------------------------------------------------------------


def study_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the sweep as a study."""
    return {
        "study": "sweep-benchmark",
        "task": {"kind": "word_problems", "validation_rows": 64, "test_rows": options.rows},
        "training": {
            "steps": options.steps,
            "batch_size": options.batch,
            "max_length": options.max_length,
            "warmup_steps": 5,
            "learning_rate": 3.0e-3,
        },
        "scenario": {
            "faults": [
                {
                    "kind": "dead_zone",
                    "layers": [FAULTY_LAYER],
                    "threshold": THRESHOLDS[0],
                    "reference": "tensor_max",
                }
            ],
            "during": "both",
        },
        "sweep": {"faults.0.threshold": list(THRESHOLDS)},
        "controls": {"include": list(ARMS)},
        "confirm": {"replicates": max(options.seeds, fewest_seeds()), "export": "none"},
        "compute": {"workers": WORKERS},
        "output": "runs",
    }


def fewest_seeds() -> int:
    """Return the smallest number of seeds that a study takes, as its schema says."""
    metadata = ConfirmSpec.model_fields["replicates"].metadata
    return next(int(limit.ge) for limit in metadata if hasattr(limit, "ge"))


def by_hand_spec(study: Study, seeds: int, folder: Path) -> dict[str, Any]:
    """Return what the hand-written sweep is told; the rows are written to `folder`."""
    training, splits = study.training, study.task.splits()
    method = training.method
    assert isinstance(method, Lora)
    for name, rows in (("train", splits.train), ("test", splits.test)):
        write_rows(rows, folder / f"{name}.jsonl")
    return {
        **training.model_dump(mode="json", exclude={"method"}),
        "model": str(EMBEDDED_FOLDER),
        "rank": method.rank,
        "alpha": method.alpha,
        "targets": list(method.target_modules),
        "eval_batch_size": study.eval_batch_size,
        "train": str(folder / "train.jsonl"),
        "test": str(folder / "test.jsonl"),
        "faulty_layer": FAULTY_LAYER,
        "thresholds": list(THRESHOLDS),
        "arms": list(ARMS),
        "seeds": [replicate_seed(study.seed, "confirm", index) for index in range(seeds)],
        "workers": WORKERS,
    }


def write_rows(rows: Sequence[Example], file: Path) -> None:
    """Write rows as JSONL of prompt and completion."""
    lines = [
        json.dumps({"prompt": prompt(row.question), "completion": completion(row.answer)})
        for row in rows
    ]
    file.write_text("\n".join(lines) + "\n")


def timed(command: Sequence[str], folder: Path) -> float:
    """Run a command in `folder` and return the seconds from its start to its end."""
    log = folder / "log.txt"
    with log.open("w") as out:
        started = time.perf_counter()
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **ENVIRONMENT}, stdout=out, stderr=out
        )
        wall = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)}: ended with {done.returncode}\n{log.read_text()[-3000:]}"
        )
    return wall


def by_hand(study: Study, seeds: int, folder: Path, *, reuse_actors: bool) -> Swept:
    """Run the hand-written sweep."""
    spec, result = folder / "spec.json", folder / "result.json"
    told = {**by_hand_spec(study, seeds, folder), "reuse_actors": reuse_actors}
    spec.write_text(json.dumps(told))
    wall = timed([sys.executable, str(HERE / "_user_sweep.py"), str(spec), str(result)], folder)
    cells = {
        Cell(line["threshold"], line["arm"], line["replicate"]): {
            name: float(line[name]) for name in NUMBERS
        }
        for line in json.loads(result.read_text())
    }
    return Swept(wall, len(cells), cells, load()[0])


def by_package(study: Mapping[str, Any], folder: Path) -> Swept:
    """Run the study."""
    import pandas as pd

    write_study(study, folder)
    wall = timed([sys.executable, "-m", "aqn_tune", "run", "study.yaml", "--quiet"], folder)
    (file,) = folder.glob("runs/*/runs.parquet")
    table = pd.read_parquet(file)
    cells: dict[Cell, dict[str, float]] = {}
    for line in table.to_dict("records"):
        cell = Cell(line["sweep_threshold"], line["arm"], line["replicate"])
        numbers = cells.setdefault(cell, {})
        numbers[f"{line['condition']}_loss"] = float(line["loss"])
        numbers[f"{line['condition']}_exact"] = float(line["exact_match"])
    return Swept(wall, int(table["training_key"].nunique()), cells, load()[0])


def write_study(study: Mapping[str, Any], folder: Path) -> Path:
    """Write a study as YAML; return the file."""
    import yaml

    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(dict(study), sort_keys=False))
    return file


# -- what they found --------------------------------------------------------------------------------


class Compared(NamedTuple):
    """The loss of one arm under one scenario and condition, from a way by hand and from the package."""

    way: str
    round: int
    threshold: float
    arm: str
    condition: str
    theirs: float
    """Mean over the seeds."""
    ours: float
    typical: float
    """Median difference of a seed."""
    furthest: float
    """Largest difference of a seed."""
    error: float
    """Standard error of their mean over the seeds; NaN for one seed."""

    def agrees(self) -> bool:
        """Return whether both sides found the same but for rounding and what follows from it."""
        tolerance = max(SHARE * abs(self.theirs), FLOOR)
        return self.typical <= TYPICAL and abs(self.theirs - self.ours) <= tolerance


def compare_round(swept: Mapping[str, Sequence[Swept]], number: int) -> list[Compared]:
    """Hold every way of a round against the package."""
    return [
        one
        for way in swept
        if way != PACKAGE
        for one in compare(way, number, swept[way][number], swept[PACKAGE][number])
    ]


def compare(way: str, number: int, theirs: Swept, ours: Swept) -> list[Compared]:
    """Hold the cells of both sides against each other."""
    missing = sorted(set(theirs.cells) - set(ours.cells))
    if missing:
        raise RuntimeError(f"the study has no {missing[0]}")
    found = []
    for condition in ("clean", "faulty"):
        for threshold in THRESHOLDS:
            for arm in ARMS:
                cells = [c for c in theirs.cells if (c.threshold, c.arm) == (threshold, arm)]
                one = [theirs.cells[cell][f"{condition}_loss"] for cell in cells]
                other = [ours.cells[cell][f"{condition}_loss"] for cell in cells]
                apart = [abs(a - b) for a, b in zip(one, other, strict=True)]
                error = statistics.stdev(one) / math.sqrt(len(one)) if len(one) > 1 else math.nan
                found.append(
                    Compared(
                        way, number, threshold, arm, condition,
                        statistics.fmean(one), statistics.fmean(other),
                        statistics.median(apart), max(apart), error,
                    )
                )  # fmt: skip
    return found


# -- report -----------------------------------------------------------------------------------------


def ratios(swept: Mapping[str, Sequence[Swept]], way: str) -> Spread:
    """Return how many times longer than the package's a way took, round by round."""
    pairs = zip(swept[way], swept[PACKAGE], strict=True)
    return spread([one.wall / ours.wall for one, ours in pairs])


def print_times(console: Console, swept: Mapping[str, Sequence[Swept]]) -> None:
    """Print one line per way."""
    table = Table(title="The whole sweep, from the start of the process to its end")
    for heading in ("", "seconds", "trainings", "seconds / training", "times ours"):
        table.add_column(heading, justify="right" if heading else "left")
    for way, rounds in swept.items():
        wall = spread([one.wall for one in rounds])
        count = rounds[0].trainings
        table.add_row(
            way, wall.text(), str(count), f"{wall.median / count:.2f}", ratios(swept, way).text(2)
        )
    console.print(table)
    ours, theirs = (len(swept[way][0].cells) for way in (PACKAGE, BY_HAND))
    if ours > theirs:
        console.print(
            f"aqn-tune has {ours} cells and the others {theirs}, as a study takes at least "
            f"{fewest_seeds()} seeds: for equal work the ratios would be larger"
        )


def print_losses(console: Console, compared: Sequence[Compared]) -> None:
    """Print the faulty losses of the last round, all that do not agree, and how far everything is apart."""
    table = Table(title="Loss, mean over the seeds: the last round under the fault, and all apart")
    for heading in (
        "way", "round", "condition", "threshold", "arm", "by hand", "± error", "aqn-tune run",
        "furthest seed", "",
    ):  # fmt: skip
        justify = "left" if heading in ("way", "condition", "arm") else "right"
        table.add_column(heading, justify=justify, no_wrap=heading == "way")  # type: ignore[arg-type]
    last = max(one.round for one in compared)
    for one in compared:
        if (one.round == last and one.condition == "faulty") or not one.agrees():
            table.add_row(
                one.way.removeprefix("by hand, "), str(one.round + 1), one.condition,
                f"{one.threshold:g}", one.arm, f"{one.theirs:.4f}", f"{one.error:.4f}",
                f"{one.ours:.4f}", f"{one.furthest:.1e}", "" if one.agrees() else "[red]apart[/]",
            )  # fmt: skip
    console.print(table)
    for condition in ("clean", "faulty"):
        furthest = max(one.furthest for one in compared if one.condition == condition)
        console.print(f"largest difference of a {condition} loss of one seed: {furthest:.1e}")
    apart = [one for one in compared if not one.agrees()]
    console.print(
        f"{len(compared) - len(apart)} of {len(compared)} losses of arms agree: half of the seeds within "
        f"{TYPICAL} nats, the means within {SHARE:.0%} or {FLOOR} nats"
    )


def picture(swept: Mapping[str, Sequence[Swept]], about: str) -> str:
    """Return the wall time of each way as bars."""
    rows = []
    for way, rounds in swept.items():
        wall = spread([one.wall for one in rounds])
        ratio = "" if way == PACKAGE else f", {ratios(swept, way).median:.2f} x"
        rows.append(Bar(way, wall, f"{wall.median:.0f} s{ratio}", WAYS[way]))
    return bars(
        "Wall time of a whole sweep, imports and report included",
        "bar: median of the rounds; line: least to most; shorter is better",
        [(about, rows)],
    )


def record(
    swept: Mapping[str, Sequence[Swept]], compared: Sequence[Compared], settings: dict[str, Any]
) -> dict[str, Any]:
    """Return everything as plain data."""
    return {
        "machine": machine(),
        "settings": settings,
        "ways": {
            way: {
                "wall": spread([one.wall for one in rounds])._asdict(),
                "times_ours": ratios(swept, way)._asdict(),
                "trainings": rounds[0].trainings,
                "cells": len(rounds[0].cells),
                "rounds": [{"wall": one.wall, "load": one.load} for one in rounds],
            }
            for way, rounds in swept.items()
        },
        "agree": all(one.agrees() for one in compared),
        "losses": [
            {**one._asdict(), "error": one.error if math.isfinite(one.error) else None}
            for one in compared
        ],
    }


def is_whole(swept: Mapping[str, Sequence[Swept]], rounds: int) -> bool:
    """Return whether every way was measured in every round, and on as many seeds as a study takes."""
    cells = len(THRESHOLDS) * len(ARMS) * fewest_seeds()
    return all(
        len(way) == rounds and all(len(one.cells) >= cells for one in way) for way in swept.values()
    )


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description="Time a whole sweep, by hand and as a study.")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each side once in each")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of every training")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument(
        "--max-length", type=int, default=64, help="longest row allowed; the task needs 52 tokens"
    )
    parser.add_argument("--seeds", type=int, default=6, help="seeds of every scenario and arm")
    parser.add_argument("--rows", type=int, default=256, help="rows of an evaluation")
    add_out(parser, "sweep")
    options = parser.parse_args()
    if min(options.rounds, options.batch, options.seeds, options.rows) < 1 or options.steps < 12:
        parser.error("--steps is at least 12 (fewer leave stages without a step), the rest 1")
    return options


def main() -> int:
    """Measure, print and write; return 1 where a way does not agree with the package in some round."""
    options = parse()
    console = Console()
    if not console.is_terminal:
        console.width = 120
    before = load()
    swept: dict[str, list[Swept]] = {way: [] for way in WAYS}
    compared: list[Compared] = []
    size = (
        f"{len(THRESHOLDS)} thresholds x {len(ARMS)} arms x {options.seeds} seeds, {options.steps} steps "
        f"of {options.batch} rows"
    )
    with tempfile.TemporaryDirectory() as name, console.status("reading libraries") as status:
        folder = Path(name)
        study = load_study(write_study(study_of(options), folder))
        # Once, so that the first command does not read from the disk what the second finds in memory.
        timed([sys.executable, "-c", "import peft, ray.tune, transformers.trainer"], folder)
        for number in range(options.rounds):
            turn = number % len(WAYS)
            for way in (*WAYS, *WAYS)[turn : turn + len(WAYS)]:
                status.update(f"round {number + 1} of {options.rounds}, {way}")
                with tempfile.TemporaryDirectory(dir=folder) as room:
                    if way == PACKAGE:
                        done = by_package(study_of(options), Path(room))
                    else:
                        reuse = way == REUSED
                        done = by_hand(study, options.seeds, Path(room), reuse_actors=reuse)
                swept[way].append(done)
            # After every round, so that an interrupted measurement is not lost.
            compared += compare_round(swept, number)
            settings = {
                **{key: value for key, value in vars(options).items() if key != "out"},
                "measured_rounds": number + 1, "workers": WORKERS, "thresholds": THRESHOLDS, "arms": ARMS,
                "load_before": before, "load_after": load(),
            }  # fmt: skip
            file = write(
                options.out, "sweep", record(swept, compared, settings), picture(swept, size),
                whole=is_whole(swept, options.rounds),
            )  # fmt: skip
    print_times(console, swept)
    print_losses(console, compared)
    about = machine()
    console.print(
        f"{about['cpu']}, {about['cores']} cores, {WORKERS} workers of one thread, load {before[0]} before "
        f"and {load()[0]} after; torch {about['torch']}, transformers {about['transformers']}, peft "
        f"{about['peft']}, ray {about['ray']}; {size}, {options.rows} rows evaluated\nwritten to {file}",
        highlight=False,
    )
    return 0 if all(one.agrees() for one in compared) else 1


if __name__ == "__main__":
    sys.exit(main())
