"""Evaluation: runs x conditions, folded into shared forward passes, each with the fault it names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from aqn_tune.faults import FaultSpec
from aqn_tune.injection.fold import Entry
from aqn_tune.injection.injection import Injection
from aqn_tune.ledger.rows import FaultMeasure
from aqn_tune.study.runs import Condition
from aqn_tune.training.data import TokenSet, answer_logits, token_loss
from aqn_tune.training.pack import ReplicaPack
from aqn_tune.training.streams import KeyedNormal

FOLD_TOKENS = 4096
"""Most tokens of one forward pass, as long as one (run, condition) pair fits: bounds the memory, and
keeps the activations of a small model in a core's cache (28,000 tokens cost a fifth more per row)."""
EVAL_SEED = 0
"""Seed of the fault draws of evaluations: the same for every arm and replicate, so that arms are paired."""


class Evaluated(NamedTuple):
    """One run under one condition."""

    replica: int
    condition: Condition
    loss: float
    """Answer cross-entropy, nats per answer token, over all rows; may be non-finite."""
    exact_match: float
    """Share of rows whose whole answer is predicted, teacher-forced."""
    faults: tuple[FaultMeasure, ...]
    error: str
    """What of the fault was not as the condition says; the numbers do not count then."""


def evaluate(
    pack: ReplicaPack, data: TokenSet, batch_size: int, *, stream: str
) -> Iterator[Evaluated]:
    """Yield every living run of `pack` under each of its conditions, on all rows of `data`.

    Noise is off. Rows are taken in order in batches of `batch_size` (part of a tensor_max fault), and
    faults draw from `stream`, a word of its own for each split. What the faults did must agree with
    the condition's name: a clean evaluation in which a fault changed a value, or a faulty one in which
    a fault changed none, comes with an `error` and is not a number.
    """
    pairs = [
        (replica, condition)
        for replica, run in enumerate(pack.runs)
        if replica not in pack.failures
        for condition in run.conditions
    ]
    size = max(FOLD_TOKENS // (batch_size * data.tokens.shape[1]), 1)
    for start in range(0, len(pairs), size):
        yield from _evaluate_fold(pack, pairs[start : start + size], data, batch_size, stream)


def _evaluate_fold(
    pack: ReplicaPack,
    pairs: Sequence[tuple[int, Condition]],
    data: TokenSet,
    batch_size: int,
    stream: str,
) -> Iterator[Evaluated]:
    folds = len(pairs)
    normal = KeyedNormal()
    batch_number = 0
    injection = Injection(
        pack.book,
        [Entry(condition.faults) for _, condition in pairs],
        draw=lambda _, path, out: normal.fill(out, EVAL_SEED, "eval", stream, batch_number, *path),
        measure=True,
        shared_draws=True,
    )
    totals = [0.0] * folds
    tokens = [0] * folds
    exact = [0] * folds
    replica_of_fold = torch.tensor([replica for replica, _ in pairs])
    try:
        for linear in pack.linears:
            linear.replica_of_fold = replica_of_fold
        with injection, torch.inference_mode():
            for first in range(0, len(data.tokens), batch_size):
                rows = torch.arange(first, min(first + batch_size, len(data.tokens)))
                batch = data.batch(rows.repeat(folds))
                injection.begin(batch.valid.view(folds, -1))
                result = token_loss(answer_logits(pack.model, batch), batch)
                for fold in range(folds):
                    part = slice(fold * len(rows), (fold + 1) * len(rows))
                    totals[fold] += float(result.total[part].double().sum())
                    tokens[fold] += int(result.tokens[part].sum())
                    exact[fold] += int(result.exact[part].sum())
                batch_number += 1
    finally:
        for linear in pack.linears:
            linear.replica_of_fold = None
    for fold, (replica, condition) in enumerate(pairs):
        loss = totals[fold] / tokens[fold]
        measures = tuple(
            tally.measure(fold)
            for (slot, _), tally in zip(injection.fault_sites, injection.tallies, strict=True)
            if slot.active[fold]
        )
        yield Evaluated(
            replica,
            condition,
            loss,
            exact[fold] / len(data.tokens),
            measures,
            error=_disagreement(injection, fold, condition, batch_number, math.isfinite(loss)),
        )


def _disagreement(
    injection: Injection, fold: int, condition: Condition, batches: int, finite: bool
) -> str:
    """Return how what the faults did disagrees with the condition, "" when it does not."""
    name = f"evaluation audit: condition {condition.name!r} {condition.scenario}".rstrip()
    declared = sum(not _is_off(fault) for fault in condition.faults)
    acted = 0
    for (slot, addresses), tally in zip(injection.fault_sites, injection.tallies, strict=True):
        changed = float(tally.affected[fold]) > 0 or float(tally.error_energy[fold]) > 0
        wanted = batches * len(addresses) if slot.active[fold] else 0
        if int(tally.calls[fold]) != wanted:
            return (
                f"{name}: {slot.spec.kind} was in place {int(tally.calls[fold])} times of {wanted}"
            )
        if changed and not slot.active[fold]:
            return f"{name}: {slot.spec.kind} acted, though it is not declared"
        acted += changed
    if finite and acted != declared:
        return f"{name} declares {declared} faults, {acted} changed a value in {batches} batches"
    return ""


def _is_off(fault: FaultSpec) -> bool:
    """Return whether a fault is declared at a level at which it is the identity."""
    return all(getattr(fault, name) == off for name, off in fault.per_replica.items())
