"""How long trainings took, so that `plan` can say how long they will take."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationError

from aqn_tune.errors import UserError
from aqn_tune.ledger import Ledger
from aqn_tune.study.base import Spec
from aqn_tune.study.cells import named_arms, training_of
from aqn_tune.study.folder import StudyFolder
from aqn_tune.study.runs import Setting
from aqn_tune.study.schema import Study
from aqn_tune.study.space import arm_of
from aqn_tune.study.training import Lora, TrainingSpec

FORWARD_SHARE = 1 / 3
"""A row's forward pass over its training step (forward and backward), used to split a time into
steps and evaluation where the recorded trainings cannot tell them apart."""
REFERENCE = Path(__file__).parent / "reference_calibration.json"
LOCK_SECONDS = 60.0
"""How long to wait for another study that writes the calibration, which takes it a moment."""


class Workload(Spec):
    """What decides how long a training takes, on a given machine."""

    model_fingerprint: str = Field(description="The base model.")
    dtype: str = Field(description="Number type of the computation.")
    method: str = Field(description="lora or full.")
    rank: int = Field(description="LoRA rank; 0 for full.")
    batch_size: int = Field(description="Rows per step.")
    max_length: int = Field(description="Tokens per row.")
    gradient_accumulation_steps: int = Field(1, description="Microbatches per step.")
    gradient_checkpointing: bool = Field(False, description="Whether activations are recomputed.")
    compile: bool = Field(False, description="Whether the decoder layers are compiled.")
    device: str = Field("cpu", description="cpu or cuda.")


class Rate(Spec):
    """Measured cost of one workload at one pack size."""

    workload: Workload = Field(description="What was measured.")
    pack_size: int = Field(description="Replicates in lockstep, in one forward pass.")
    trainings: int = Field(description="Trainings measured.")
    seconds_per_step: float = Field(gt=0, description="Seconds per step of one replicate.")
    seconds_per_row: float = Field(gt=0, description="Seconds per evaluated row of one replicate.")
    compile_seconds: float = Field(
        0.0,
        ge=0,
        exclude_if=lambda seconds: not seconds,
        description="Seconds that a pack waited for its compiled layers, the longest that was measured here. "
        "Not part of the seconds per step.",
    )


class Calibration(Spec):
    """The recorded costs of one machine."""

    version: int = Field(1, description="Format of the file.")
    machine: str = Field(description="Machine they were measured on.")
    rates: tuple[Rate, ...] = Field((), description="One per workload and pack size.")
    bytes_per_training: float | None = Field(
        None, description="Disk per training beside its adapter: ledger, curves, report."
    )
    bytes_per_adapter: float | None = Field(None, description="Disk per exported adapter.")


class Costs(NamedTuple):
    """What a workload is expected to cost here, and where that comes from."""

    seconds_per_step: float
    seconds_per_row: float
    bytes_per_training: float | None
    bytes_per_adapter: float | None
    source: str
    pack_size: int
    """That of the rate."""
    compile_seconds: float = 0.0
    """Of one shape of pack; see `Rate`."""


class Sample(NamedTuple):
    """One measured training."""

    steps: int
    rows: int
    """Rows evaluated, over all evaluations and their draws."""
    seconds: float
    eval_seconds: float = 0.0
    """What of it the evaluations took; 0 where that was not measured."""
    compile_seconds: float = 0.0
    """What its pack waited for compiled layers beside it."""


def calibration_file(output: str) -> Path:
    """Return where the calibration of an output folder lies."""
    return Path(output).expanduser().resolve() / "calibration.json"


def workload_of(setting: Setting, training: TrainingSpec) -> Workload:
    """Return the workload of a training."""
    method = training.method
    return Workload(
        model_fingerprint=setting.model_fingerprint,
        dtype=setting.model.dtype,
        method=method.kind,
        rank=method.rank if isinstance(method, Lora) else 0,
        batch_size=training.batch_size,
        max_length=training.max_length,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        gradient_checkpointing=training.gradient_checkpointing,
        compile=training.compile,
        device=setting.device,
    )


def read_calibration(file: Path) -> Calibration | None:
    """Return a recorded calibration, None where there is none."""
    if not file.exists():
        return None
    try:
        return Calibration.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{file}: not a calibration of this version ({error.errors()[0]['msg']}); delete it, the next "
            "study that trains something here writes a new one"
        ) from None


def find_costs(output: str, workload: Workload, pack_size: int) -> Costs | None:
    """Return the expected costs of a workload, None when it was never measured.

    Looks at the calibration of the output folder, then at the one shipped for the embedded model;
    the nearest pack size is taken where this one was not measured, and `source` says all of it.
    """
    for file, where in _sources(output):
        costs = _costs_in(file, where, workload, pack_size)
        if costs is not None:
            return costs
    return None


def find_both_costs(
    output: str, one: Workload, other: Workload, pack_size: int
) -> tuple[Costs, Costs] | None:
    """Return the expected costs of two workloads, None where they were never measured side by side.

    That is on one machine, with the same pack size as the nearest: packs of different sizes differ by what
    lockstep gains, not by what tells the workloads apart.
    """
    for file, where in _sources(output):
        first, second = (_costs_in(file, where, each, pack_size) for each in (one, other))
        if first is not None and second is not None and first.pack_size == second.pack_size:
            return first, second
    return None


def _sources(output: str) -> tuple[tuple[Path, str], ...]:
    return (calibration_file(output), "here"), (REFERENCE, "on another machine")


def _costs_in(file: Path, where: str, workload: Workload, pack_size: int) -> Costs | None:
    calibration = read_calibration(file)
    rates = [r for r in calibration.rates if r.workload == workload] if calibration else []
    if calibration is None or not rates:
        return None
    rate = min(rates, key=lambda r: abs(math.log(r.pack_size / pack_size)))
    source = f"measured {where} ({calibration.machine})"
    if rate.pack_size != pack_size:
        source += f", at {rate.pack_size} replicates per trial in place of {pack_size}"
    return Costs(
        rate.seconds_per_step,
        rate.seconds_per_row,
        calibration.bytes_per_training,
        calibration.bytes_per_adapter,
        source,
        rate.pack_size,
        # The first shape takes longest, whichever it was.
        max(r.compile_seconds for r in rates),
    )


def update_calibration(study: Study, setting: Setting, folder: StudyFolder) -> None:
    """Record what the finished trainings of a study cost, in the calibration of its output folder.

    Rates of workloads that this study did not run are kept, those that another study writes meanwhile too.

    Raises UserError for a file that is no calibration, OSError where it cannot be locked or written.
    """
    from filelock import FileLock

    ledger = Ledger(folder.ledger)
    groups = _samples(study, setting, ledger)
    if not groups:
        return
    file = calibration_file(study.output)
    with FileLock(file.with_name(f".{file.name}.lock"), timeout=LOCK_SECONDS):
        calibration = _updated(read_calibration(file), groups, folder, len(ledger.trainings))
        text = json.dumps(calibration.model_dump(mode="json"), indent=1)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(file)


def _updated(
    known: Calibration | None,
    groups: Mapping[tuple[Workload, int], Sequence[Sample]],
    folder: StudyFolder,
    trainings: int,
) -> Calibration:
    rates = {(r.workload, r.pack_size): r for r in known.rates} if known else {}
    for (workload, pack_size), samples in groups.items():
        per_step, per_row = split_cost(samples, workload.batch_size)
        before = rates.get((workload, pack_size))
        rates[workload, pack_size] = Rate(
            workload=workload,
            pack_size=pack_size,
            trainings=len(samples),
            seconds_per_step=per_step,
            seconds_per_row=per_row,
            # What the cache has spared this time it will not spare on a fresh machine.
            compile_seconds=max(
                before.compile_seconds if before else 0.0, *(s.compile_seconds for s in samples)
            ),
        )
    adapters = list(folder.adapters.rglob("adapter_model.safetensors"))
    adapter_bytes = _size(folder.adapters)
    per_adapter = adapter_bytes / len(adapters) if adapters else None
    return Calibration(
        machine=machine(),
        rates=tuple(rates.values()),
        bytes_per_training=(_size(folder.root) - adapter_bytes) / max(trainings, 1),
        bytes_per_adapter=per_adapter or (known.bytes_per_adapter if known else None),
    )


def split_cost(samples: Iterable[Sample], batch_size: int) -> tuple[float, float]:
    """Return seconds per step and seconds per evaluated row.

    Where the samples say what their evaluations took, that is divided among their rows. Else least
    squares of seconds = a * steps + b * rows; where the samples have all the same mix of the two, or the
    fit is not positive, a row is taken to cost `FORWARD_SHARE` of a training row.
    """
    samples = list(samples)
    steps, rows = sum(s.steps for s in samples), sum(s.rows for s in samples)
    if rows and all(0 < s.eval_seconds < s.seconds for s in samples):
        evaluating = math.fsum(s.eval_seconds for s in samples)
        return (math.fsum(s.seconds for s in samples) - evaluating) / steps, evaluating / rows
    ss = math.fsum(s.steps * s.steps for s in samples)
    rr = math.fsum(s.rows * s.rows for s in samples)
    sr = math.fsum(s.steps * s.rows for s in samples)
    st = math.fsum(s.steps * s.seconds for s in samples)
    rt = math.fsum(s.rows * s.seconds for s in samples)
    determinant = ss * rr - sr * sr
    if determinant > 0.01 * ss * rr:
        per_step = (st * rr - rt * sr) / determinant
        per_row = (rt * ss - st * sr) / determinant
        if per_step > 0 and per_row > 0:
            return per_step, per_row
    share = FORWARD_SHARE / batch_size
    per_step = math.fsum(s.seconds for s in samples) / math.fsum(
        s.steps + share * s.rows for s in samples
    )
    return per_step, share * per_step


def _samples(
    study: Study, setting: Setting, ledger: Ledger
) -> dict[tuple[Workload, int], list[Sample]]:
    rows: dict[str, int] = {}
    for evaluation in ledger.evaluations.values():
        passed = evaluation.rows * evaluation.draws
        rows[evaluation.training_key] = rows.get(evaluation.training_key, 0) + passed
    params = {(r.scenario, r.config): r.params for r in ledger.search if r.event == "asked"}
    trainings = {
        cell.training_key: _training(study, cell.arm, params.get((cell.scenario, cell.config)))
        for cell in ledger.cells.values()
    }
    groups: dict[tuple[Workload, int], list[Sample]] = {}
    for key, row in ledger.trainings.items():
        training = trainings.get(key)
        if training is None or row.status != "finished" or not ledger.seconds[key] > 0:
            continue
        # Writing answers is no evaluation of a row: how long it takes depends on what is written.
        compiling = ledger.compile_seconds[key]
        seconds = ledger.seconds[key] - ledger.generate_seconds[key] - compiling
        sample = Sample(
            row.step_reached,
            rows.get(key, 0),
            seconds,
            ledger.eval_seconds[key],
            compiling * row.lockstep,
        )
        groups.setdefault((workload_of(setting, training), row.lockstep), []).append(sample)
    return groups


def _training(study: Study, arm: str, params: Mapping[str, Any] | None) -> TrainingSpec | None:
    """Return the training of an arm, None for one that is neither named nor a recorded config."""
    named = named_arms(study)
    if arm in named:
        return training_of(study, named[arm])
    return training_of(study, arm_of(dict(params))) if params else None


def machine() -> str:
    """Return a short description of this machine: processor, cores, system."""
    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
