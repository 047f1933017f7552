"""The training loop: K replicas of one model shape advance together, step by step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from aqn_tune.errors import UserError
from aqn_tune.injection.address import AddressBook
from aqn_tune.injection.fold import Entry
from aqn_tune.injection.injection import Injection
from aqn_tune.injection.nonfinite import first_nonfinite
from aqn_tune.ledger.rows import Audit, Observation
from aqn_tune.study.runs import Run
from aqn_tune.study.seeds import stream_seed
from aqn_tune.training.audit import (
    audit_run,
    guards_weights,
    is_audited,
    layers_without_gradient,
)
from aqn_tune.training.compiled import CompiledLayers
from aqn_tune.training.data import TokenSet, answer_logits, answer_loss
from aqn_tune.training.learning_rate import learning_rate
from aqn_tune.training.mechanism import Mechanism
from aqn_tune.training.streams import BatchOrder
from aqn_tune.training.trained import make_trained


class ReplicaPack:
    """K runs in training on one model: base frozen and shared (LoRA), or K stacked models (full).

    The replica axis is folded into the batch: the unchanged Hugging Face model sees [K * B, T]. Every
    reduction stays inside a replica, so a run in a pack equals the same run alone: bit for bit on a
    CPU with one thread while B * T is a multiple of 16, to rounding otherwise.

    Args:
        model: A model of its own, from the base weights, nothing trainable. Changed in place.
        runs: Runs of equal pack key.
        data: The training split.
        device: Where it trains. Random draws are the device's own: numbers on a GPU are not those on a
            CPU, nor, to rounding, those of another pack.
    """

    def __init__(
        self,
        model: nn.Module,
        runs: Sequence[Run],
        data: TokenSet,
        device: str | torch.device = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.runs = tuple(runs)
        self.data = data.to(self.device)
        self.step = 0
        self.failures: dict[int, str] = {}
        self.train_losses: list[list[float]] = [[] for _ in runs]
        self.book = AddressBook(model)
        spec = runs[0].training
        self._order = BatchOrder(len(data.tokens), spec.batch_size)
        self.arena, self.folded, self.frozen = make_trained(model, runs, self.book)
        if spec.gradient_checkpointing:
            self._enable_checkpointing()
        self._frozen_hash = self._hash_frozen()
        self.arena.start_optimizers([run.training for run in runs])
        entries = [Entry(run.device, run.noise, run.skip) for run in runs]
        self.injection = Injection(self.book, entries, seed_of=self._seed_of)
        self._layers = self._compiled_layers() if spec.compile else nullcontext()
        observed = any(run.observed_steps for run in runs)
        self.mechanism = Mechanism(self.book, self.arena, self.runs) if observed else None
        self.observations: list[list[Observation]] = [[] for _ in runs]
        for replica, defect in self.injection.quantizer_defects().items():
            self._fail(replica, f"quantizer audit: {defect}")

    def _compiled_layers(self) -> AbstractContextManager[object]:
        if self.injection.layout.reaches_inside():
            raise UserError(
                "training.compile: faults, quantizers and noise inside a decoder layer need it as it is; "
                "leave compile out"
            )
        return CompiledLayers(self.book.layers())

    def _enable_checkpointing(self) -> None:
        layers = self.book.layers()
        self.model.activation_checkpointing_enable(  # type: ignore[operator]
            activation_checkpointing_kwargs={
                "use_reentrant": False,
                # While a layer computes, and while it does so again.
                "context_fn": lambda: (not_in_training(layers), not_in_training(layers)),
            }
        )
        for layer in layers:
            # It asks for checkpoints. The rest of the model stays in eval mode.
            layer.training = True

    # -- training ----------------------------------------------------------------------------------

    def train_to(self, step: int) -> None:
        """Take optimiser steps until `step` have been taken; failed runs are carried but not updated."""
        with self.injection, self._layers:
            while self.step < step and len(self.failures) < len(self.runs):
                self._train_step()
                self.step += 1

    def _train_step(self) -> None:
        before = self.arena.weights.clone() if self._guards_weights() else None
        losses = self._losses_and_gradients()
        self._observe()
        if self.step == 1:
            for replica in range(len(self.runs)):
                for layer in layers_without_gradient(
                    self.book, self.arena, replica, self.runs[replica]
                ):
                    self._fail(replica, f"gradient audit: layer {layer} gets no gradient")
        if before is not None:
            held = self.arena.holds_its_parameters()
            for replica, (was, now) in enumerate(zip(before, self.arena.weights, strict=True)):
                if not (held and torch.equal(was, now)):
                    self._fail(
                        replica,
                        f"weight audit: weights changed before the update of step {self.step}",
                    )
        for replica, run in enumerate(self.runs):
            if replica in self.failures:
                continue
            loss = losses[replica]
            spec = run.training
            if not math.isfinite(loss):
                self.failures[replica] = (
                    f"training loss is {loss} at step {self.step}; the first value that is not "
                    f"finite comes from {self._first_nonfinite(replica)}"
                )
                continue
            self.train_losses[replica].append(loss)
            rate = learning_rate(spec, self.step)
            norm = self.arena.clip_and_step(replica, rate, spec.max_grad_norm)
            if not math.isfinite(norm):
                self.failures[replica] = f"gradient norm is {norm} at step {self.step}"
        for replica, message in self.injection.audit.failures.items():
            self.failures.setdefault(replica, message)

    def _losses_and_gradients(self, injection: Injection | None = None) -> list[float]:
        """Run a step's microbatches forward and backward; return the mean loss of each replica.

        `injection`, attached already, takes the place of the pack's own.
        """
        injection = injection or self.injection
        microbatches = self._microbatches()
        counted = [_answers(batch, len(self.runs)) for batch in microbatches]
        answers = [sum(counts) for counts in zip(*counted, strict=True)]
        losses = [0.0] * len(self.runs)
        for number, batch in enumerate(microbatches):
            self._begin(batch, number, audited=self._audited(self.step), injection=injection)
            with self._watched(injection, batch, number):
                totals = self._replica_totals(batch)
            shares = [total / count for total, count in zip(totals, answers, strict=True)]
            injection.forward_done()
            # A sum, not a mean: each replica's gradient must not depend on how many share the pack.
            self.arena.backward(torch.stack(shares).sum(), add=number > 0)
            losses = [
                loss + float(share.detach()) for loss, share in zip(losses, shares, strict=True)
            ]
        return losses

    def saved_bytes(self) -> int:
        """Return the bytes that one microbatch keeps for its backward pass, beside the weights.

        It runs one forward pass, and counts as a pass that was made: use a pack of its own.
        """
        known = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        known.add(self.arena.weights.untyped_storage().data_ptr())
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            # Held to the end, so that no later tensor is given the same memory.
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        batch = self._microbatches()[0]
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with self.injection, hooks:
            self._begin(batch, 0, audited=frozenset())
            totals = self._replica_totals(batch)
        del totals
        own = (each for address, each in kept.items() if address not in known)
        return sum(tensor.untyped_storage().nbytes() for tensor in own)

    def _watched(
        self, injection: Injection, batch: TokenSet, microbatch: int
    ) -> AbstractContextManager[object]:
        """Return the context in which a forward pass shows its activations, if it is to."""
        if self.mechanism is None or injection is not self.injection or microbatch:
            return nullcontext()
        valid = batch.valid.view(len(self.runs), -1)
        return self.mechanism.watch(injection, valid, self.step, self.failures)

    def _observe(self) -> None:
        """Record what this step shows of the living runs that declare it.

        The collected gradients are as they were when it returns.
        """
        if self.mechanism is None or not self.mechanism.due(self.step, self.failures):
            return
        own = self.arena.gradients.clone()
        with self.injection.lifted(), self.mechanism.healthy as healthy:
            self._losses_and_gradients(healthy)
        clean = self.arena.gradients.clone()
        # In place: the optimisers hold views of the block.
        self.arena.gradients.copy_(own)
        for replica, seen in self.mechanism.observations(clean, self.step).items():
            self.observations[replica].append(seen)

    def _begin(
        self,
        batch: TokenSet,
        microbatch: int,
        *,
        audited: frozenset[int],
        injection: Injection | None = None,
    ) -> None:
        (injection or self.injection).begin(
            batch.valid.view(len(self.runs), -1),
            step=self.step,
            microbatch=microbatch,
            audited=audited,
        )

    def _microbatches(self) -> list[TokenSet]:
        rows = torch.stack([self._order.indices(run.seed, self.step) for run in self.runs])
        count = self.runs[0].training.gradient_accumulation_steps
        rows = rows.to(self.device)
        return [self.data.batch(part.flatten()) for part in rows.chunk(count, dim=1)]

    def _replica_totals(self, batch: TokenSet) -> list[Tensor]:
        """Return the summed loss of each replica; reduced one by one: a sum over a [K, B] block may
        order its terms by K."""
        totals = answer_loss(answer_logits(self.model, batch), batch)
        return [total.sum() for total in totals.chunk(len(self.runs))]

    def _first_nonfinite(self, replica: int) -> str:
        """Return where the first value of a replica that is not finite comes from, in this step."""

        def again(batch: TokenSet, number: int) -> None:
            self._begin(batch, number, audited=frozenset())
            self.injection.forward_done()
            answer_logits(self.model, batch)

        with not_in_training(self.book.layers()):
            for number, batch in enumerate(self._microbatches()):
                forward = partial(again, batch, number)
                name = first_nonfinite(self.model, forward, replica, len(self.runs))
                if name is not None:
                    return name
        return "the loss"

    def _seed_of(self, replica: int, path: tuple[str | int, ...]) -> int:
        stream, *place = path
        return stream_seed(self.runs[replica].seed, stream, self.step, *place)

    def _guards_weights(self) -> bool:
        """Return whether this step watches that nothing but the update changes a trained weight."""
        return not self.frozen and any(guards_weights(run, self.step) for run in self.runs)

    def _audited(self, step: int) -> frozenset[int]:
        """Return the living replicas whose noise is measured in this step."""
        return frozenset(
            replica
            for replica, run in enumerate(self.runs)
            if replica not in self.failures and is_audited(run, step)
        )

    # -- what was injected -------------------------------------------------------------------------

    def frozen_unchanged(self) -> bool:
        """Return whether the frozen weights are what they began as; it reads them all."""
        return self._hash_frozen() == self._frozen_hash

    def audit(self, replica: int, *, frozen_unchanged: bool | None = None) -> Audit:
        """Return what was attached to and injected into one run, and mark it failed if that is not
        what it declares, or if frozen weights changed.

        Give `frozen_unchanged` where several are audited: else each asks by itself.
        """
        if frozen_unchanged is None:
            frozen_unchanged = self.frozen_unchanged()
        audited = audit_run(
            self.runs[replica],
            self.injection,
            self.book,
            replica=replica,
            steps=self.step,
            trainable_parameters=self.arena.trained_size(replica),
            weights_unchanged=frozen_unchanged,
        )
        for mismatch in audited.mismatches:
            self._fail(replica, mismatch)
        return audited.audit

    def fail_where_short(self, step: int) -> None:
        """Mark every run failed that should have taken `step` steps and has taken fewer."""
        for replica, losses in enumerate(self.train_losses):
            if len(losses) < step:
                self._fail(replica, f"training ended at step {len(losses)} of {step}")

    def weights_hash(self) -> str:
        """Return the hash of every weight that the model computes with, trained or not."""
        return _hash_of(dict(self.model.named_parameters()))

    def _fail(self, replica: int, message: str) -> None:
        self.failures.setdefault(replica, message)

    def _hash_frozen(self) -> str:
        return _hash_of(self.frozen)


@contextmanager
def not_in_training(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Take decoder layers out of training mode.

    Those that save activations are in it, drop keys and values there, and some drop out values.
    """
    before = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = False
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training


def _hash_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _answers(batch: TokenSet, replicas: int) -> list[int]:
    """Return the number of answer tokens of each replica."""
    mask = batch.answer[:, batch.first + 1 :]
    return [int(part.sum()) for part in mask.chunk(replicas)]
