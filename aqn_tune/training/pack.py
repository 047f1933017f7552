"""The training loop: K replicas of one model shape advance together, step by step."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aqn_tune.injection.address import AddressBook
from aqn_tune.injection.fold import Entry
from aqn_tune.injection.injection import Injection
from aqn_tune.ledger.rows import Audit
from aqn_tune.study.runs import Run
from aqn_tune.study.training import Full, Lora
from aqn_tune.training.arena import Arena
from aqn_tune.training.audit import audit_run, is_audited, layers_without_gradient
from aqn_tune.training.data import TokenSet, answer_logits, token_loss
from aqn_tune.training.learning_rate import learning_rate
from aqn_tune.training.lora import (
    ReplicaLinear,
    adapter_shapes,
    adapter_sites,
    attach_adapters,
    initialise_adapters,
)
from aqn_tune.training.streams import BatchOrder, KeyedNormal


class PackState(NamedTuple):
    """Where a pack stands after a rung; plain tensors and numbers."""

    step: int
    rows: list[dict[str, Tensor]]
    train_losses: list[list[float]]
    failures: dict[int, str]
    noise_calls: list[int]
    noise_sums: list[dict[int, list[float]]]
    fault_calls: list[list[int]]
    seconds: float


class ReplicaPack:
    """K runs in training on one model: base frozen and shared (LoRA), or K = 1 (full fine-tuning).

    The replica axis is folded into the batch: the unchanged Hugging Face model sees [K * B, T]. Every
    reduction stays inside a replica, so a run in a pack equals the same run alone: bit for bit on a
    CPU with one thread while B * T is a multiple of 16, to rounding otherwise.

    Args:
        model: A model of its own, from the base weights, nothing trainable. Changed in place.
        runs: Runs of equal pack key.
        data: The training split.
    """

    def __init__(self, model: nn.Module, runs: Sequence[Run], data: TokenSet) -> None:
        self.model = model
        self.runs = tuple(runs)
        self.data = data
        self.step = 0
        self.seconds = 0.0
        self.failures: dict[int, str] = {}
        self.train_losses: list[list[float]] = [[] for _ in runs]
        self.book = AddressBook(model)
        self.linears: list[ReplicaLinear] = []
        spec = runs[0].training
        self._order = BatchOrder(len(data.tokens), spec.batch_size)
        self._normal = KeyedNormal()
        # Adapters of a bfloat16 model are trained in float32, as peft does: small updates would be lost.
        stored = next(model.parameters()).dtype
        dtype = torch.float32 if stored == torch.bfloat16 else stored
        if isinstance(spec.method, Lora):
            sites = adapter_sites(model, spec.method)
            shapes = adapter_shapes(sites, spec.method.rank)
            self.arena = Arena(shapes, len(runs), dtype)
            initialise_adapters(self.arena, sites, spec.method.rank, [run.seed for run in runs])
            self.frozen = dict(model.named_parameters())
            self.linears = attach_adapters(model, self.arena, sites, spec.method)
        else:
            self.arena = self._full_arena(spec.method, stored)
            self.frozen = {}
        self._frozen_hash = self._hash_frozen()
        self.arena.start_optimizers([run.training for run in runs])
        entries = [Entry(run.faults, run.noise) for run in runs]
        self.injection = Injection(self.book, entries, draw=self._draw)

    def _full_arena(self, method: Full, dtype: torch.dtype) -> Arena:
        if len(self.runs) != 1:
            raise ValueError(
                f"{method.kind} fine-tuning takes one run per pack, got {len(self.runs)}"
            )
        parameters = dict(self.model.named_parameters())
        arena = Arena({name: p.shape for name, p in parameters.items()}, 1, dtype)
        for name, parameter in parameters.items():
            view = arena.view(arena.weights, name)[0]
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.requires_grad_(True)
            arena.adopt(name, parameter)
        return arena

    # -- training ----------------------------------------------------------------------------------

    def train_to(self, step: int) -> None:
        """Take optimiser steps until `step` have been taken; failed runs are carried but not updated."""
        started = time.perf_counter()
        with self.injection:
            while self.step < step and len(self.failures) < len(self.runs):
                self._train_step()
                self.step += 1
        self.seconds += time.perf_counter() - started

    def _train_step(self) -> None:
        batch = self._next_batch()
        replicas = len(self.runs)
        self.injection.begin(
            batch.valid.view(replicas, -1), step=self.step, audited=self._audited(self.step)
        )
        before = None if self.frozen else self.arena.weights.clone()
        losses = self._replica_losses(batch)
        # A sum, not a mean: each replica's gradient must not depend on how many share the pack.
        torch.autograd.backward(torch.stack(losses).sum())
        self.arena.collect_gradients()
        if self.step == 1:
            for replica in range(len(self.runs)):
                for layer in layers_without_gradient(self.book, self.arena, replica):
                    self._fail(replica, f"gradient audit: layer {layer} gets no gradient")
        if before is not None and not torch.equal(before, self.arena.weights):
            self._fail(0, f"weight audit: weights changed before the update of step {self.step}")
        for replica, run in enumerate(self.runs):
            if replica in self.failures:
                continue
            loss = float(losses[replica].detach())
            spec = run.training
            if not math.isfinite(loss):
                self.failures[replica] = f"training loss is {loss} at step {self.step}"
                continue
            self.train_losses[replica].append(loss)
            rate = learning_rate(spec, self.step)
            norm = self.arena.clip_and_step(replica, rate, spec.max_grad_norm)
            if not math.isfinite(norm):
                self.failures[replica] = f"gradient norm is {norm} at step {self.step}"
        for replica, message in self.injection.audit.failures.items():
            self.failures.setdefault(replica, message)

    def _next_batch(self) -> TokenSet:
        rows = [self._order.indices(run.seed, self.step) for run in self.runs]
        return self.data.batch(torch.cat(rows))

    def _replica_losses(self, batch: TokenSet) -> list[Tensor]:
        result = token_loss(answer_logits(self.model, batch), batch)
        totals = result.total.chunk(len(self.runs))
        tokens = result.tokens.chunk(len(self.runs))
        # Reduced replica by replica: one sum over a [K, B] block may order its terms by K.
        return [total.sum() / count.sum() for total, count in zip(totals, tokens, strict=True)]

    def _draw(self, replica: int, path: tuple[str | int, ...], out: Tensor) -> None:
        stream, *place = path
        self._normal.fill(out, self.runs[replica].seed, stream, self.step, *place)

    def _audited(self, step: int) -> frozenset[int]:
        """Return the living replicas whose noise is measured in this step."""
        return frozenset(
            replica
            for replica, run in enumerate(self.runs)
            if replica not in self.failures and is_audited(run, step)
        )

    # -- what was injected -------------------------------------------------------------------------

    def audit(self, replica: int) -> Audit:
        """Return what was attached to and injected into one run, and mark it failed if that is not
        what it declares, or if frozen weights changed."""
        audited = audit_run(
            self.runs[replica],
            self.injection,
            self.book,
            replica=replica,
            steps=self.step,
            trainable_parameters=self.arena.size,
            weights_unchanged=self._hash_frozen() == self._frozen_hash,
        )
        for mismatch in audited.mismatches:
            self._fail(replica, mismatch)
        return audited.audit

    def _fail(self, replica: int, message: str) -> None:
        self.failures.setdefault(replica, message)

    def _hash_frozen(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.frozen.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    # -- state -------------------------------------------------------------------------------------

    def state(self) -> PackState:
        """Return everything that `restore` needs; random numbers are keyed and need no state."""
        audit = self.injection.audit
        return PackState(
            step=self.step,
            rows=[self.arena.state(replica) for replica in range(len(self.runs))],
            train_losses=self.train_losses,
            failures=self.failures,
            noise_calls=audit.calls,
            noise_sums=audit.sums,
            fault_calls=[tally.calls.tolist() for tally in self.injection.tallies],
            seconds=self.seconds,
        )

    def restore(self, state: PackState) -> None:
        """Continue from `state`, which must come from a pack of the same runs."""
        self.step = state.step
        self.train_losses = state.train_losses
        self.failures = state.failures
        self.seconds = state.seconds
        for replica, row in enumerate(state.rows):
            self.arena.restore(replica, row)
        self.injection.audit.calls = state.noise_calls
        self.injection.audit.sums = state.noise_sums
        for tally, calls in zip(self.injection.tallies, state.fault_calls, strict=True):
            tally.calls = torch.tensor(calls)
