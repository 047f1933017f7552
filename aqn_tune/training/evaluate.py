"""Evaluation: runs x conditions, folded into shared forward passes, each on the device it names.

Passes of one run that meet the same in the first layers go through these layers as one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from aqn_tune.injection.fold import Entry
from aqn_tune.injection.injection import Injection
from aqn_tune.injection.layout import Layout
from aqn_tune.ledger.rows import FaultMeasure, QuantizerMeasure
from aqn_tune.study.runs import Condition
from aqn_tune.study.seeds import stream_seed
from aqn_tune.training import prefix
from aqn_tune.training.data import TokenLoss, TokenSet, answer_logits, token_loss
from aqn_tune.training.pack import ReplicaPack
from aqn_tune.training.passes import Pass, disagreement, folded, living_passes, stray
from aqn_tune.training.pool import pooled_faults, pooled_quantizers

FOLD_TOKENS = 4096
"""Most tokens of one forward pass, as long as one (run, condition) pair fits: bounds the memory, and
keeps the activations of a small model in a core's cache (28,000 tokens cost a fifth more per row)."""
EVAL_SEED = 0
"""Seed of the fault draws of evaluations: the same for every arm and replicate, so that arms are paired."""
TRIAL_TOKENS = 8
"""Tokens on which a cut through a model is tried."""
_CUTS: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()
"""Whether a model can be cut at a depth, for the depths that have been tried."""


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

    Where passes of a run part, what they have come to is held in memory: hidden states of all rows.
    """
    passes = living_passes(pack)
    outcomes = _Evaluation(pack, data, batch_size, stream).outcomes(passes)
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


class _Planned(NamedTuple):
    """A pass, and what it is to meet."""

    one: Pass
    entry: Entry
    route: prefix.Route


class _Stem(NamedTuple):
    """Passes of one run that have met the same so far."""

    passes: tuple[_Planned, ...]
    behind: tuple[tuple[Injection, int], ...] = ()
    """The injections on the parts of the decoder behind them, and their replica in each."""
    source: int = 0
    """Which of the stems in the fold before it comes from."""


class _Score:
    """Adds up the batches of one stem."""

    def __init__(self) -> None:
        self.total = 0.0
        self.tokens = 0
        self.exact = 0

    def add(self, result: TokenLoss, part: slice) -> None:
        """Add the rows `part` of a batch."""
        self.total += float(result.total[part].double().sum())
        self.tokens += int(result.tokens[part].sum())
        self.exact += int(result.exact[part].sum())


class _Evaluation:
    """One evaluation of a pack: part by part of the decoder, each part once for all whose part it is."""

    def __init__(self, pack: ReplicaPack, data: TokenSet, batch_size: int, stream: str) -> None:
        self._pack = pack
        self._data = data.to(pack.device)
        self._stream = stream
        rows = len(data.tokens)
        self._batches = [
            torch.arange(first, min(first + batch_size, rows))
            for first in range(0, rows, batch_size)
        ]
        self._size = max(FOLD_TOKENS // (batch_size * data.tokens.shape[1]), 1)
        self._layers = pack.book.layers()
        self._end = len(self._layers) + 1
        self._cuts = _CUTS.setdefault(pack.model, {})
        self._outcomes: dict[Pass, _Outcome] = {}

    def outcomes(self, passes: Sequence[Pass]) -> dict[Pass, _Outcome]:
        """Return what each pass comes to."""
        for merged in (False, True):
            stems: dict[int, list[_Planned]] = {}
            for one in passes:
                if one.is_merged == merged:
                    stems.setdefault(one.replica, []).append(self._planned(one))
            self._carry_on([_Stem(tuple(own)) for own in stems.values()], 0, [])
        return self._outcomes

    def _planned(self, one: Pass) -> _Planned:
        entry = Entry(one.device(), skip=self._pack.runs[one.replica].skip)
        return _Planned(one, entry, prefix.route(Layout(self._pack.book, [entry]), one.draw))

    def _carry_on(self, stems: Sequence[_Stem], start: int, states: Sequence[Any]) -> None:
        """Run stems from depth `start` to the end; `states` came out of the part before, by batch."""
        together: dict[tuple[int, frozenset[str]], list[_Stem]] = {}
        for stem in stems:
            for branch, stop in self._branches(stem, start):
                drawn = branch.passes[0].route.drawn
                together.setdefault((stop, drawn), []).append(branch)
        for (stop, _), alike in together.items():
            for first in range(0, len(alike), self._size):
                fold = alike[first : first + self._size]
                self._run_part(fold, range(start, stop), states)

    def _branches(self, stem: _Stem, start: int) -> Iterator[tuple[_Stem, int]]:
        """Yield the parts of a stem that stay together beyond depth `start`, and how far they do."""
        routes = [planned.route for planned in stem.passes]
        stop = prefix.last_cut(routes)
        if stop == self._end or (stop > start and self._can_cut(stop)):
            yield stem, stop
            return
        parting = prefix.difference(routes)
        groups: dict[Hashable, list[_Planned]] = {}
        for number, planned in enumerate(stem.passes):
            # A model that cannot be cut there runs each pass by itself.
            key = number if stop > start else planned.route.depths[parting]
            groups.setdefault(key, []).append(planned)
        for own in groups.values():
            yield from self._branches(stem._replace(passes=tuple(own)), start)

    def _can_cut(self, depth: int) -> bool:
        if depth not in self._cuts:
            tokens, answer, valid, _ = self._data.batch(torch.tensor([0]))
            few = slice(TRIAL_TOKENS)
            row = TokenSet(tokens[:, few], answer[:, few], valid[:, few], 0)
            living = next(k for k in range(len(self._pack.runs)) if k not in self._pack.failures)
            with folded(self._pack, [living]), torch.inference_mode():
                self._cuts[depth] = prefix.can_be_cut(self._pack.model, self._layers, row, depth)
        return self._cuts[depth]

    def _run_part(self, stems: Sequence[_Stem], part: range, states: Sequence[Any]) -> None:
        """Run one pass for each stem through a part of the decoder, and what follows from there."""
        folds = len(stems)
        number = 0

        def seed_of(index: int, path: tuple[str | int, ...]) -> int:
            draws = {planned.one.draw for planned in stems[index].passes}
            if len(draws) > 1:
                raise RuntimeError(f"{path}: a fault that says it is not random asks for a draw")
            return stream_seed(EVAL_SEED, "eval", self._stream, *draws, number, *path)

        entries = [stem.passes[0].entry for stem in stems]
        injection = Injection(self._pack.book, entries, seed_of=seed_of, measure=True, part=part)
        replicas = [stem.passes[0].one.replica for stem in stems]
        scores = [_Score() for _ in stems]
        left: list[Any] = []
        with (
            folded(self._pack, replicas),
            injection,
            prefix.Stretch(self._layers, part) as stretch,
            torch.inference_mode(),
        ):
            for number, rows in enumerate(self._batches):
                batch = self._data.batch(rows.repeat(folds))
                injection.begin(batch.valid.view(folds, -1))
                if part.start:
                    own = [stem.source * len(rows) + torch.arange(len(rows)) for stem in stems]
                    stretch.entered = prefix.taken(states[number], torch.cat(own))
                if part.stop < self._end:
                    prefix.run_without_end(self._pack.model, batch)
                    left.append(stretch.left)
                    continue
                result = token_loss(answer_logits(self._pack.model, batch), batch)
                for index, score in enumerate(scores):
                    score.add(result, slice(index * len(rows), (index + 1) * len(rows)))
        if part.stop < self._end:
            onward = [
                stem._replace(behind=(*stem.behind, (injection, index)), source=index)
                for index, stem in enumerate(stems)
            ]
            self._carry_on(onward, part.stop, left)
            return
        for index, (stem, score) in enumerate(zip(stems, scores, strict=True)):
            self._conclude(stem, score, injection, index)

    def _conclude(self, stem: _Stem, score: _Score, injection: Injection, index: int) -> None:
        """Record what the passes of a stem, which have met the same to the end, come to."""
        for earlier, its in stem.behind:
            injection.inherit(index, earlier, its)
        strayed = next((found for past in stem.behind if (found := stray(*past))), "")
        loss = score.total / score.tokens
        layout = injection.layout
        for one, _, _ in stem.passes:
            self._outcomes[one] = _Outcome(
                loss,
                score.exact / len(self._data.tokens),
                tuple(f.tally.measure(index) for f in layout.faults if index in f.slot.active),
                tuple(m for q in layout.quantizers for m in q.tally.measures(index)),
                disagreement(
                    injection,
                    index,
                    one.condition,
                    len(self._batches),
                    strayed=strayed,
                    is_finite=math.isfinite(loss),
                ),
            )
