"""The training engine: opens packs for the search, and reports them as ledger rows."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from aqn_tune.errors import UserError
from aqn_tune.ledger.rows import EvaluationRow, TrainingRow
from aqn_tune.models.load import base_arrays, build_model, load_tokenizer
from aqn_tune.study.engine import BaseArrays, Engine, PackTraining, RungReport, Shared
from aqn_tune.study.loading import model_widths
from aqn_tune.study.runs import Condition, Pack, Run, Setting
from aqn_tune.study.training import TrainingSpec
from aqn_tune.tasks.splitting import SplitName
from aqn_tune.training.compiled import compile_seconds
from aqn_tune.training.data import TokenSet
from aqn_tune.training.evaluate import FOLD_TOKENS, Evaluated, evaluate
from aqn_tune.training.export import export_adapter, export_full
from aqn_tune.training.generate import Generated, generated_exact_match
from aqn_tune.training.groups import Group, Groups
from aqn_tune.training.memory import Fit, cores, fitting
from aqn_tune.training.pack import ReplicaPack
from aqn_tune.training.rounding import FOLDS
from aqn_tune.training.rounding import rounds_alike as products_round_alike
from aqn_tune.training.splits import load_splits
from aqn_tune.training.stacked import obstacle
from aqn_tune.training.state import ReplicaState


class _Seconds(NamedTuple):
    """Wall time of a group on its way to a rung."""

    total: float
    """With what it took to no end, before the memory ran out."""
    evaluating: float
    writing: float
    compiling: float
    """A part of the training before the evaluation."""


class TorchPack:
    """A pack of runs in training with torch, in as few groups as can train in lockstep.

    A group shares its forward passes; one group is the rule. More come of a limit in the pack, of a
    model that cannot be stacked, or of the memory (see `Groups`), and every training row says how many
    runs shared its passes, and why it was not all of them.
    """

    def __init__(self, pack: Pack, setting: Setting, shared: Shared) -> None:
        torch.set_num_threads(1)
        self._pack = pack
        self._setting = setting
        self._shared = shared
        self._keys = [run.training_key(setting) for run in pack.runs]
        self._rung = 0
        self._reported_step = 0
        self._begun: tuple[float, float] | None = None
        """When the group under way was tried first, and how long this process had compiled by then."""
        self._device = _device(setting)
        self._check_rows()
        self._groups = Groups(pack.runs, self._open, self._fitting())

    def _fitting(self) -> Fit:
        """Return how many runs may train in lockstep, and what keeps the others apart."""
        runs, limit = self._pack.runs, self._pack.lockstep
        most = Fit(len(runs), "")
        if limit is not None and limit < len(runs):
            most = Fit(limit, f"at most {limit} were asked for")
        if most.runs == 1:
            return most
        model = build_model(self._setting.model, self._shared.base).to(self._device)
        blocked = obstacle(model) if runs[0].training.method.kind == "full" else None
        if blocked is not None:
            return Fit(1, str(blocked))
        share = self._setting.memory_share or 1 / cores()
        fit = fitting(runs, model, self._split("train"), share=share)
        return fit if fit.runs < most.runs else most

    def _open(self, runs: Sequence[Run]) -> ReplicaPack:
        model = build_model(self._setting.model, self._shared.base)
        return ReplicaPack(model, runs, self._split("train"), self._device)

    def _check_rows(self) -> None:
        wanted = self._pack.runs[0].training.max_length
        for name, arrays in self._shared.splits.items():
            if arrays.max_length != wanted:
                raise ValueError(
                    f"{name}: loaded as rows of at most {arrays.max_length} tokens, the pack wants {wanted}"
                )

    def _split(self, name: SplitName) -> TokenSet:
        return TokenSet.of(self._shared.splits[name]).to(self._device)

    def advance(self) -> RungReport:
        """Train to the next rung and evaluate there; see `PackTraining.advance`."""
        step = self._pack.rungs[self._rung]
        parts = self._groups.through(self._to_rung, last=step == self._pack.rungs[-1])
        self._rung += 1
        self._reported_step = step
        return RungReport(
            step,
            tuple(row for part in parts for row in part.evaluations),
            tuple(row for part in parts for row in part.trainings),
        )

    def _to_rung(self, group: Group) -> RungReport:
        """Take a group to the next rung and report it."""
        if self._begun is None:
            self._begun = time.perf_counter(), compile_seconds()
        begun, compiled_before = self._begun
        step, member = self._pack.rungs[self._rung], group.pack
        keys = self._keys[group.first : group.first + len(member.runs)]
        member.train_to(step)
        member.fail_where_short(step)
        unchanged = member.frozen_unchanged()
        audits = {
            replica: member.audit(replica, frozen_unchanged=unchanged)
            for replica in range(len(member.runs))
            if replica not in member.failures
        }
        trained = time.perf_counter()
        compiled = compile_seconds() - compiled_before
        before = member.weights_hash()
        evaluations = self._evaluate(member)
        evaluated = time.perf_counter()
        written = self._generate(member)
        if member.weights_hash() != before:
            for replica in range(len(member.runs)):
                error = "weight audit: weights changed during evaluation"
                member.failures.setdefault(replica, error)
        ended = time.perf_counter()
        self._begun = None
        seconds = _Seconds(ended - begun, evaluated - trained, ended - evaluated, compiled)
        rows = [
            self._evaluation_row(
                member, keys, each, written.get((each.replica, each.condition)), step
            )
            for each in evaluations
            if each.replica not in member.failures
        ]
        trainings = []
        for replica, key in enumerate(keys):
            row = self._training_row(member, replica, key, step, seconds)
            if row.status != "failed":
                row = row.model_copy(update={"audit": audits[replica]})
            trainings.append(self._exported(member, replica, row))
        return RungReport(step, tuple(rows), tuple(trainings))

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
            rows=len(self._shared.splits[self._pack.split].tokens),
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

    def _training_row(
        self, member: ReplicaPack, replica: int, key: str, step: int, seconds: _Seconds
    ) -> TrainingRow:
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
            seconds=seconds.total / len(member.runs),
            eval_seconds=seconds.evaluating / len(member.runs),
            generate_seconds=seconds.writing / len(member.runs) if self._pack.generate else 0.0,
            compile_seconds=seconds.compiling / len(member.runs),
            pack=self._pack.name,
            pack_size=len(self._pack.runs),
            lockstep=len(member.runs),
            lockstep_limit=self._groups.fit.why,
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
            export_adapter(Path(folder), self._setting, run, tensors, self._shared.base)
        else:
            export_full(Path(folder), self._setting, run, tensors, self._shared.base)
        return row.model_copy(update={"adapter": folder})

    def state(self) -> bytes:
        """Return the pack's state; see `PackTraining.state`."""
        buffer = io.BytesIO()
        runs = [one._asdict() for one in self._groups.states()]
        content = {"keys": self._keys, "rung": self._rung, "held": self._groups.held, "runs": runs}
        torch.save(content, buffer)
        return buffer.getvalue()

    def restore(self, state: bytes) -> None:
        """Continue from `state`; raises ValueError when it belongs to other runs."""
        saved = torch.load(io.BytesIO(state), weights_only=True)
        if saved["keys"] != self._keys:
            raise ValueError("the saved state belongs to a pack of other runs")
        self._rung = saved["rung"]
        self._reported_step = self._pack.rungs[self._rung - 1] if self._rung else 0
        self._groups.restore([ReplicaState(**one) for one in saved["runs"]], saved["held"])

    def close(self) -> None:
        """Give back the memory of the models; see `PackTraining.close`."""
        self._groups.release()


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


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def load_base(setting: Setting) -> BaseArrays:
    """Read the base weights; see `Engine.load_base`."""
    return base_arrays(setting.model)


def open_pack(pack: Pack, setting: Setting, shared: Shared) -> PackTraining:
    """Open a pack for training in this process, with one thread; see `Engine.open_pack`."""
    return TorchPack(pack, setting, shared)


def rounds_alike(setting: Setting, training: TrainingSpec, most: int = max(FOLDS)) -> bool:
    """Return whether a training gives the same bits in packs of up to `most`; see `Engine.rounds_alike`."""
    splits = load_splits(setting, ["train", "validation", "test"], training.max_length)
    width = splits["train"].tokens.shape[1]
    micro = -(-training.batch_size // training.gradient_accumulation_steps)
    shared = {rows * width: most for rows in (micro, training.batch_size % micro)}
    for name in ("validation", "test"):
        count, width = splits[name].tokens.shape
        folds = FOLD_TOKENS // (setting.eval_batch_size * width)
        for rows in (min(count, setting.eval_batch_size), count % setting.eval_batch_size):
            shared[rows * width] = max(folds, shared.get(rows * width, 1))
    shared = {rows: folds for rows, folds in shared.items() if rows and folds > 1}
    if not shared:
        return True
    if setting.device != "cpu" or training.compile:
        return False
    dtype = getattr(torch, setting.model.dtype)
    return products_round_alike(shared, model_widths(setting.model), dtype)


ENGINE = Engine(
    load_base=load_base, load_splits=load_splits, open_pack=open_pack, rounds_alike=rounds_alike
)
"""The engine that `aqn-tune run` uses."""
