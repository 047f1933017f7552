"""The training engine: opens packs for the search, and reports them as ledger rows."""

from __future__ import annotations

import functools
import gc
import io
import math
import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from aqn_tune.errors import UserError
from aqn_tune.ledger.rows import EvaluationRow, TrainingRow
from aqn_tune.models.load import base_arrays, build_model, load_tokenizer
from aqn_tune.study.engine import BaseArrays, Engine, PackTraining, RungReport
from aqn_tune.study.runs import Condition, Pack, Setting, Split
from aqn_tune.training.data import TokenSet, load_tokens
from aqn_tune.training.evaluate import Evaluated, evaluate
from aqn_tune.training.export import export_adapter, export_full
from aqn_tune.training.generate import Generated, generated_exact_match
from aqn_tune.training.memory import Fit, fitting, is_out_of_memory
from aqn_tune.training.pack import ReplicaPack
from aqn_tune.training.stacked import obstacle
from aqn_tune.training.state import ReplicaState, restore, state_of


@functools.lru_cache(maxsize=8)
def _tokens(setting: Setting, max_length: int, split: str) -> TokenSet:
    """Tokenize a split once per worker process, from the very rows that the study was keyed with."""
    task = setting.task
    if setting.task_fingerprint and task.fingerprint() != setting.task_fingerprint:
        raise UserError(
            "task: the rows are not those that the study started with; start anew (--fresh)"
        )
    return load_tokens(load_tokenizer(setting.model), getattr(task.splits(), split), max_length)


class TorchPack:
    """A pack of runs in training with torch, in as few groups as can train in lockstep.

    A group shares its forward passes; groups follow one another to each rung. One group is the rule;
    more come of a limit in the pack, of a model that cannot be stacked, or of the memory, and every
    training row says how many runs shared its passes, and why it was not all of them.
    """

    def __init__(self, pack: Pack, setting: Setting, base: BaseArrays) -> None:
        torch.set_num_threads(1)
        self._pack = pack
        self._setting = setting
        self._base = base
        self._keys = [run.training_key(setting) for run in pack.runs]
        self._rung = 0
        self._eval_seconds = 0.0
        self._reported_step = 0
        self._reported_seconds = 0.0
        self._reported_eval_seconds = 0.0
        self._seconds_before = 0.0
        self._device = _device(setting)
        self._fit = self._fitting()
        self._members = self._open(self._fit.runs)

    def _fitting(self) -> Fit:
        """Return how many runs may train in lockstep, and what keeps the others apart."""
        runs, limit = self._pack.runs, self._pack.lockstep
        most = Fit(len(runs), "")
        if limit is not None and limit < len(runs):
            most = Fit(limit, f"at most {limit} were asked for")
        if most.runs == 1:
            return most
        model = build_model(self._setting.model, self._base).to(self._device)
        blocked = obstacle(model) if runs[0].training.method.kind == "full" else None
        if blocked is not None:
            return Fit(1, str(blocked))
        fit = fitting(runs, model, self._split("train"), sharers=_sharers(self._device))
        return fit if fit.runs < most.runs else most

    def _open(self, size: int) -> list[ReplicaPack]:
        """Return the runs in groups of at most `size`, as even as they come."""
        runs = self._pack.runs
        count = -(-len(runs) // size)
        cuts = [round(at * len(runs) / count) for at in range(count + 1)]
        return [
            ReplicaPack(
                build_model(self._setting.model, self._base),
                runs[first:last],
                self._split("train"),
                self._device,
            )
            for first, last in pairwise(cuts)
        ]

    def _train_to(self, step: int) -> None:
        """Train all groups to `step`; where the memory ends in the first rung, in groups of half the size."""
        while True:
            try:
                for member in self._members:
                    member.train_to(step)
                return
            except (RuntimeError, MemoryError) as error:
                size = max(len(member.runs) for member in self._members)
                # After the first rung the memory needed is that of the rungs before: another is to blame.
                if not is_out_of_memory(error) or size == 1 or self._rung:
                    raise
            self._seconds_before += sum(member.seconds for member in self._members)
            self._members.clear()
            gc.collect()
            self._fit = Fit(-(-size // 2), f"the memory did not hold {size} at a time")
            self._members = self._open(self._fit.runs)

    def _split(self, split: Split | str) -> TokenSet:
        max_length = self._pack.runs[0].training.max_length
        return _tokens(self._setting, max_length, split).to(self._device)

    def advance(self) -> RungReport:
        """Train to the next rung and evaluate there; see `PackTraining.advance`."""
        step = self._pack.rungs[self._rung]
        rows: list[EvaluationRow] = []
        trainings: list[TrainingRow] = []
        offset = 0
        self._train_to(step)
        for member in self._members:
            keys = self._keys[offset : offset + len(member.runs)]
            offset += len(member.runs)
            member.fail_where_short(step)
            audits = {
                replica: member.audit(replica)
                for replica in range(len(member.runs))
                if replica not in member.failures
            }
            started = time.perf_counter()
            before = member.weights_hash()
            evaluations = self._evaluate(member)
            written = self._generate(member)
            if member.weights_hash() != before:
                for replica in range(len(member.runs)):
                    error = "weight audit: weights changed during evaluation"
                    member.failures.setdefault(replica, error)
            self._eval_seconds += time.perf_counter() - started
            rows.extend(
                self._evaluation_row(
                    member, keys, each, written.get((each.replica, each.condition)), step
                )
                for each in evaluations
                if each.replica not in member.failures
            )
            for replica, key in enumerate(keys):
                row = self._training_row(member, replica, key, step)
                if row.status != "failed":
                    row = row.model_copy(update={"audit": audits[replica]})
                trainings.append(self._exported(member, replica, row))
        self._rung += 1
        self._reported_step, self._reported_seconds = step, self._seconds()
        self._reported_eval_seconds = self._eval_seconds
        return RungReport(step, tuple(rows), tuple(trainings))

    def _seconds(self) -> float:
        training = sum(member.seconds for member in self._members)
        return self._seconds_before + training + self._eval_seconds

    def _evaluate(self, member: ReplicaPack) -> list[Evaluated]:
        """Return the evaluations that count; a run of which one does not is marked failed."""
        split = self._pack.split
        results = list(
            evaluate(member, self._split(split), self._setting.eval_batch_size, stream=split)
        )
        for result in results:
            if result.error:
                member.failures.setdefault(result.replica, result.error)
        return [result for result in results if result.replica not in member.failures]

    def _generate(self, member: ReplicaPack) -> dict[tuple[int, Condition], Generated]:
        """Return what the living runs write, by replica and condition; nothing where none was asked for.

        A run whose device was not as declared while it wrote is marked failed.
        """
        if not self._pack.generate or self._rung < len(self._pack.rungs) - 1:
            return {}
        split = self._pack.split
        written = generated_exact_match(
            member,
            self._split(split),
            self._setting.eval_batch_size,
            stream=split,
            decode=load_tokenizer(self._setting.model).decode,
        )
        found: dict[tuple[int, Condition], Generated] = {}
        for one in written:
            if one.error:
                member.failures.setdefault(one.replica, one.error)
            found[one.replica, one.condition] = one
        return found

    def _evaluation_row(
        self,
        member: ReplicaPack,
        keys: Sequence[str],
        result: Evaluated,
        written: Generated | None,
        step: int,
    ) -> EvaluationRow:
        return EvaluationRow(
            training_key=keys[result.replica],
            step=step,
            final=step == member.runs[result.replica].training.steps,
            condition=result.condition.name,
            scenario=result.condition.scenario,
            split=self._pack.split,
            rows=len(self._split(self._pack.split).tokens),
            loss=result.loss if math.isfinite(result.loss) else None,
            exact_match=result.exact_match,
            generated_exact_match=written.exact_match if written else None,
            answer_match=written.answer_match if written else None,
            draws=len(result.losses),
            loss_sd=_finite(result.loss_sd),
            exact_match_sd=result.exact_match_sd,
            faults=result.faults,
            quantizers=result.quantizers,
        )

    def _training_row(self, member: ReplicaPack, replica: int, key: str, step: int) -> TrainingRow:
        run = member.runs[replica]
        failure = member.failures.get(replica, "")
        status = "failed" if failure else "finished" if step == run.training.steps else "unfinished"
        losses = member.train_losses[replica]
        return TrainingRow(
            training_key=key,
            stage=self._pack.stage,
            seed=run.seed,
            steps=run.training.steps,
            step_reached=len(losses),
            status=status,
            error=failure,
            seconds=(self._seconds() - self._reported_seconds) / len(self._pack.runs),
            eval_seconds=(self._eval_seconds - self._reported_eval_seconds) / len(self._pack.runs),
            pack=self._pack.name,
            pack_size=len(self._pack.runs),
            lockstep=len(member.runs),
            lockstep_limit=self._fit.why,
            train_losses=tuple(losses[self._reported_step :]),
            observations=tuple(
                seen for seen in member.observations[replica] if seen.step >= self._reported_step
            ),
        )

    def _exported(self, member: ReplicaPack, replica: int, row: TrainingRow) -> TrainingRow:
        folder = self._pack.export.get(row.training_key)
        if folder is None or row.status != "finished":
            return row
        run = member.runs[replica]
        tensors = member.arena.named_row(replica)
        if run.training.method.kind == "lora":
            export_adapter(Path(folder), self._setting, run, tensors, self._base)
        else:
            export_full(Path(folder), self._setting, run, tensors, self._base)
        return row.model_copy(update={"adapter": folder})

    def state(self) -> bytes:
        """Return the pack's state; see `PackTraining.state`."""
        buffer = io.BytesIO()
        runs = [
            state_of(member, replica)._asdict()
            for member in self._members
            for replica in range(len(member.runs))
        ]
        torch.save(
            {"keys": self._keys, "rung": self._rung, "seconds": self._seconds(), "runs": runs},
            buffer,
        )
        return buffer.getvalue()

    def restore(self, state: bytes) -> None:
        """Continue from `state`; raises ValueError when it belongs to other runs."""
        saved = torch.load(io.BytesIO(state), weights_only=True)
        if saved["keys"] != self._keys:
            raise ValueError("the saved state belongs to a pack of other runs")
        self._rung = saved["rung"]
        self._seconds_before = saved["seconds"]
        states = iter(saved["runs"])
        for member in self._members:
            restore(member, [ReplicaState(**next(states)) for _ in member.runs])
        self._reported_step = self._pack.rungs[self._rung - 1] if self._rung else 0
        self._reported_seconds = self._seconds()

    def close(self) -> None:
        """Drop the models; see `PackTraining.close`."""
        self._members.clear()


def _device(setting: Setting) -> torch.device:
    """Return the device that packs train on.

    Raises UserError where a GPU is asked for and torch finds none in this process.
    """
    if setting.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"compute.gpus_per_worker: got more than 0, but torch {torch.__version__} finds no CUDA GPU on "
            "this worker; set it to 0, or install a CUDA build of torch there"
        )
    return torch.device(setting.device)


def _sharers(device: torch.device) -> int:
    """Return how many packs may be after the free memory of a device at the same time."""
    # Workers of a GPU start one after another, and each sees what the others have left; where two
    # measure at once, the pack that finds the memory spent is halved.
    return 1 if device.type == "cuda" else os.cpu_count() or 1


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def load_base(setting: Setting) -> BaseArrays:
    """Read the base weights; see `Engine.load_base`."""
    return base_arrays(setting.model)


def open_pack(pack: Pack, setting: Setting, base: BaseArrays) -> PackTraining:
    """Open a pack for training on this process's CPU with one thread; see `Engine.open_pack`."""
    return TorchPack(pack, setting, base)


ENGINE = Engine(load_base=load_base, open_pack=open_pack)
"""The engine that `aqn-tune run` uses."""
