"""Evaluation: runs x conditions, folded into shared forward passes, each on the device it names."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from aqn_tune.injection.fold import Entry
from aqn_tune.injection.injection import Injection
from aqn_tune.ledger.rows import FaultMeasure, QuantizerMeasure
from aqn_tune.study.device import Device
from aqn_tune.study.runs import Condition
from aqn_tune.study.seeds import stream_seed
from aqn_tune.training.data import TokenSet, answer_logits, token_loss
from aqn_tune.training.pack import ReplicaPack
from aqn_tune.training.pool import pooled_faults, pooled_quantizers

FOLD_TOKENS = 4096
"""Most tokens of one forward pass, as long as one (run, condition) pair fits: bounds the memory, and
keeps the activations of a small model in a core's cache (28,000 tokens cost a fifth more per row)."""
EVAL_SEED = 0
"""Seed of the fault draws of evaluations: the same for every arm and replicate, so that arms are paired."""


class Evaluated(NamedTuple):
    """One run under one condition."""

    replica: int
    condition: Condition
    losses: tuple[float, ...]
    """Answer cross-entropy of each draw, nats per answer token, over all rows; may be non-finite."""
    exact_matches: tuple[float, ...]
    """Share of rows of each draw whose whole answer is predicted, teacher-forced."""
    faults: tuple[FaultMeasure, ...]
    quantizers: tuple[QuantizerMeasure, ...]
    error: str
    """What of the device was not as the condition says; the numbers do not count then."""

    @property
    def loss(self) -> float:
        """Mean loss over the draws."""
        return math.fsum(self.losses) / len(self.losses)

    @property
    def exact_match(self) -> float:
        """Mean exact match over the draws."""
        return math.fsum(self.exact_matches) / len(self.exact_matches)

    @property
    def loss_sd(self) -> float | None:
        """Standard deviation of the loss over the draws, None for one."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None

    @property
    def exact_match_sd(self) -> float | None:
        """Standard deviation of exact match over the draws, None for one."""
        return statistics.stdev(self.exact_matches) if len(self.exact_matches) > 1 else None


class _Pass(NamedTuple):
    """One run on one device: a fold of a forward pass."""

    replica: int
    condition: Condition
    draw: int

    def device(self) -> Device:
        """Return the device itself, or for unseen devices another of the same make."""
        device = self.condition.device
        if not self.condition.unseen:
            return device
        # A study's device seed is below 2^63, so an unseen device is never the one it trained on.
        seed = stream_seed(device.seed, "unseen", self.draw) | 1 << 63
        return device.model_copy(update={"seed": seed})


class _Outcome(NamedTuple):
    loss: float
    exact_match: float
    faults: tuple[FaultMeasure, ...]
    quantizers: tuple[QuantizerMeasure, ...]
    error: str


def evaluate(
    pack: ReplicaPack, data: TokenSet, batch_size: int, *, stream: str
) -> Iterator[Evaluated]:
    """Yield every living run of `pack` under each of its conditions, on all rows of `data`.

    Noise is off. Rows are taken in order in batches of `batch_size` (part of a tensor_max fault), and
    faults draw from `stream`, a word of its own for each split. What the device did must agree with
    the condition's name: a clean evaluation in which something changed a value, or a faulty one in
    which a fault changed none, comes with an `error` and is not a number.
    """
    passes = [
        _Pass(replica, condition, draw)
        for replica, run in enumerate(pack.runs)
        if replica not in pack.failures
        for condition in run.conditions
        for draw in range(condition.draws)
    ]
    size = max(FOLD_TOKENS // (batch_size * data.tokens.shape[1]), 1)
    outcomes: dict[_Pass, _Outcome] = {}
    for merged in (False, True):
        alike = [p for p in passes if (p.condition.device.deploy == "merged") == merged]
        for start in range(0, len(alike), size):
            fold = alike[start : start + size]
            outcomes.update(zip(fold, _run_fold(pack, fold, data, batch_size, stream), strict=True))
    for first in passes:
        if first.draw:
            continue
        own = [outcomes[first._replace(draw=draw)] for draw in range(first.condition.draws)]
        yield Evaluated(
            first.replica,
            first.condition,
            tuple(outcome.loss for outcome in own),
            tuple(outcome.exact_match for outcome in own),
            pooled_faults([outcome.faults for outcome in own]),
            pooled_quantizers([outcome.quantizers for outcome in own]),
            next((outcome.error for outcome in own if outcome.error), ""),
        )


def _run_fold(
    pack: ReplicaPack, fold: Sequence[_Pass], data: TokenSet, batch_size: int, stream: str
) -> Iterator[_Outcome]:
    folds = len(fold)
    batch_number = 0

    def seed_of(index: int, path: tuple[str | int, ...]) -> int:
        return stream_seed(EVAL_SEED, "eval", stream, fold[index].draw, batch_number, *path)

    injection = Injection(
        pack.book,
        [Entry(p.device(), skip=pack.runs[p.replica].skip) for p in fold],
        seed_of=seed_of,
        measure=True,
    )
    totals = [0.0] * folds
    tokens = [0] * folds
    exact = [0] * folds
    replica_of_fold = torch.tensor([p.replica for p in fold])
    try:
        for linear in pack.folded:
            linear.replica_of_fold = replica_of_fold
        with injection, torch.inference_mode():
            for first in range(0, len(data.tokens), batch_size):
                rows = torch.arange(first, min(first + batch_size, len(data.tokens)))
                batch = data.batch(rows.repeat(folds))
                injection.begin(batch.valid.view(folds, -1))
                result = token_loss(answer_logits(pack.model, batch), batch)
                for index in range(folds):
                    part = slice(index * len(rows), (index + 1) * len(rows))
                    totals[index] += float(result.total[part].double().sum())
                    tokens[index] += int(result.tokens[part].sum())
                    exact[index] += int(result.exact[part].sum())
                batch_number += 1
    finally:
        for linear in pack.folded:
            linear.replica_of_fold = None
    for index, one in enumerate(fold):
        loss = totals[index] / tokens[index]
        yield _Outcome(
            loss,
            exact[index] / len(data.tokens),
            tuple(
                tally.measure(index)
                for slot, _, tally in injection.layout.faults
                if index in slot.active
            ),
            tuple(m for q in injection.layout.quantizers for m in q.tally.measures(index)),
            _disagreement(injection, index, one, batch_number, math.isfinite(loss)),
        )


def _disagreement(injection: Injection, index: int, one: _Pass, batches: int, finite: bool) -> str:
    """Return how what the device did disagrees with the condition, "" when it does not."""
    condition = one.condition
    name = f"evaluation audit: condition {condition.name!r} {condition.scenario}".rstrip()
    for slot, addresses, tally in injection.layout.faults:
        kind, active = slot.spec.kind, index in slot.active
        changed = float(tally.affected[index]) > 0 or float(tally.error_energy[index]) > 0
        wanted = batches * len(addresses) if active else 0
        if int(tally.calls[index]) != wanted:
            return f"{name}: {kind} was in place {int(tally.calls[index])} times of {wanted}"
        if changed and not active:
            return f"{name}: {kind} acted, though it is not declared"
    for quantizer in injection.layout.quantizers:
        wanted = batches * quantizer.tally.sites if index in quantizer.slot.active else 0
        got = int(quantizer.tally.calls[index])
        if got != wanted:
            return f"{name}: {quantizer.slot.spec.format} quantized {got} operands of {wanted}"
        if index in quantizer.tally.strayed:
            return f"{name}: {quantizer.slot.spec.format} acted, though it is not declared"
    defects = injection.quantizer_defects()
    if index in defects:
        return f"{name}: {defects[index]}"
    if injection.layout.noise:
        return f"{name}: training noise is on"
    if injection.layout.is_merged != (condition.device.deploy == "merged"):
        deployed = "merged" if injection.layout.is_merged else "unmerged"
        return f"{name}: adapters are {deployed}, declared is {condition.device.deploy}"
    formats = [
        slot.spec.format for slot, _, _ in injection.layout.quantizers if index in slot.active
    ]
    if len(formats) != len(condition.device.quantization):
        return (
            f"{name} declares {len(condition.device.quantization)} quantizers, "
            f"{len(formats)} are attached"
        )
    declared = [f for f in condition.device.faults if not f.is_off() and not f.may_rest()]
    attached = [slot.spec for slot, _, _ in injection.layout.faults if index in slot.active]
    if len(attached) != len(condition.device.faults):
        return (
            f"{name} declares {len(condition.device.faults)} faults, {len(attached)} are attached"
        )
    acted = sum(
        float(tally.affected[index]) > 0 or float(tally.error_energy[index]) > 0
        for slot, _, tally in injection.layout.faults
        if index in slot.active and not slot.spec.may_rest()
    )
    if finite and acted < len(declared):
        return (
            f"{name} declares {len(declared)} faults, {acted} changed a value in {batches} batches"
        )
    return ""
