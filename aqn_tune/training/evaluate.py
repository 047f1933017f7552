"""Evaluation: runs x conditions, folded into shared forward passes, each with the fault it names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from aqn_tune.errors import TrainingFailed
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


def evaluate(pack: ReplicaPack, data: TokenSet, batch_size: int) -> Iterator[Evaluated]:
    """Yield every living run of `pack` under each of its conditions, on all rows of `data`.

    Noise is off. Rows are taken in order in batches of `batch_size` (part of a tensor_max fault). The
    fault counters must agree with the condition's name, else TrainingFailed is raised: a clean
    evaluation in which a fault acted, or a faulty one in which none did, is not a number.
    """
    pairs = [
        (replica, condition)
        for replica, run in enumerate(pack.runs)
        if replica not in pack.failures
        for condition in run.conditions
    ]
    size = max(FOLD_TOKENS // (batch_size * data.tokens.shape[1]), 1)
    for start in range(0, len(pairs), size):
        yield from _evaluate_fold(pack, pairs[start : start + size], data, batch_size)


def _evaluate_fold(
    pack: ReplicaPack,
    pairs: Sequence[tuple[int, Condition]],
    data: TokenSet,
    batch_size: int,
) -> Iterator[Evaluated]:
    folds = len(pairs)
    normal = KeyedNormal()
    batch_number = 0
    injection = Injection(
        pack.book,
        [Entry(condition.faults) for _, condition in pairs],
        draw=lambda _, path, out: normal.fill(out, EVAL_SEED, "eval", batch_number, *path),
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
        measures = _checked(injection, fold, condition, batch_number)
        loss = totals[fold] / tokens[fold]
        yield Evaluated(replica, condition, loss, exact[fold] / len(data.tokens), measures)


def _checked(
    injection: Injection, fold: int, condition: Condition, batches: int
) -> tuple[FaultMeasure, ...]:
    measures = tuple(
        tally.measure(fold)
        for (slot, _), tally in zip(injection.fault_sites, injection.tallies, strict=True)
        if slot.active[fold]
    )
    declared = len(condition.faults)
    acted = sum(int(tally.calls[fold] > 0) for tally in injection.tallies)
    if acted != declared or any(m.calls != batches * m.sites for m in measures):
        raise TrainingFailed(
            f"evaluation audit: condition {condition.name!r} {condition.scenario} declares {declared} "
            f"faults, {acted} acted in {batches} batches"
        )
    return measures
