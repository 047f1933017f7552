"""Exact match by generation: answers that each run writes by itself, on the device of each condition.

The teacher-forced exact match of `aqn_tune.training.evaluate` asks whether every answer token is the
most likely one behind the true tokens before it. Greedy generation goes the same way until the first
token that is not, so that row by row both agree, as long as a token does not depend on what else is in
its forward pass. It does where a reference is taken over the whole batch (`tensor_max`, the scale of
NVFP4), where faulty places are tokens or single activations, and where errors are drawn: a batch of
prompts and then one token per row is another batch there, and the two may differ.

Nothing is ever padded. A batch begins with as many tokens as its shortest prompt has; then rows that
are still in their prompt are given its next token, and the others write. So every row is at the same
position, no model needs a mask, and no window of attention holds anything but a row's own tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aqn_tune.errors import UserError
from aqn_tune.injection.fold import Entry
from aqn_tune.injection.injection import Injection
from aqn_tune.study.runs import Condition
from aqn_tune.study.seeds import stream_seed
from aqn_tune.tasks.base import extract_answer
from aqn_tune.training.data import TokenSet
from aqn_tune.training.evaluate import EVAL_SEED
from aqn_tune.training.pack import ReplicaPack
from aqn_tune.training.passes import Pass, disagreement, folded, living_passes

FOLD_TOKENS = 16384
"""Most tokens whose keys and values are kept at a time, as long as one (run, condition) pair fits. Most
forward passes are of one token per row, and cost little more for several pairs than for one."""
ROWS_OF_A_FOLD = 16
"""Batches are filled up to a multiple of this with rows that are over: a pass has one token per row, and
in other numbers of rows products round by what else is in the fold."""
EXTRA_TOKENS = 8
"""An answer that is not over this many tokens after the longest reference is broken off."""

Tokens = tuple[int, ...]


class Generated(NamedTuple):
    """What one run wrote under one condition."""

    replica: int
    condition: Condition
    written: tuple[tuple[Tokens, ...], ...]
    """The tokens of each draw and row, up to the end token where it came."""
    exact: tuple[tuple[bool, ...], ...]
    """Whether they are the reference answer, worked solution and end token included."""
    solved: tuple[tuple[bool, ...], ...]
    """Whether the task reads the reference's final answer in them."""
    error: str
    """What of the device was not as the condition says; the answers do not count then."""

    @property
    def exact_match(self) -> float:
        """Share of rows written exactly, the mean over the draws."""
        return _share(self.exact)

    @property
    def answer_match(self) -> float:
        """Share of rows with the right final answer, the mean over the draws."""
        return _share(self.solved)


class _Written(NamedTuple):
    rows: tuple[Tokens, ...]
    error: str


def generated_exact_match(
    pack: ReplicaPack,
    data: TokenSet,
    batch_size: int,
    *,
    stream: str,
    decode: Callable[[Sequence[int]], str],
) -> Iterator[Generated]:
    """Yield what every living run of `pack` writes behind each prompt of `data`, under each condition.

    Greedy, with noise off, in batches of `batch_size` rows of like prompt length. An answer ends with
    the end token, or `EXTRA_TOKENS` tokens beyond the longest reference of the split, or where the model
    has no more positions. Rows that are over stay in the batch as padding does: they enter no reference
    and no count. Faults draw anew for every token, from `stream`, apart from the teacher-forced
    evaluation. What the device did must agree with the condition, else the result has an `error`.

    Args:
        pack: Runs to evaluate.
        data: A split; its prompts are what lies before the answers.
        batch_size: Rows per forward pass.
        stream: A word of its own for each split.
        decode: Makes text of tokens, as `tokenizer.decode` does; the task reads its final answer there.
    """
    data = data.to(pack.device)
    passes = living_passes(pack)
    size = max(FOLD_TOKENS // (batch_size * data.tokens.shape[1]), 1)
    written: dict[Pass, _Written] = {}
    for merged in (False, True):
        alike = [one for one in passes if one.is_merged == merged]
        for start in range(0, len(alike), size):
            fold = alike[start : start + size]
            for one, rows in zip(
                fold, _run_fold(pack, fold, data, batch_size, stream), strict=True
            ):
                written[one] = rows
    references = _references(data)
    answers = [extract_answer(decode(reference[:-1])) for reference in references]
    for first in passes:
        if first.draw:
            continue
        own = [written[first._replace(draw=draw)] for draw in range(first.condition.draws)]
        end = references[0][-1]
        yield Generated(
            first.replica,
            first.condition,
            tuple(one.rows for one in own),
            tuple(
                tuple(row == wanted for row, wanted in zip(one.rows, references, strict=True))
                for one in own
            ),
            tuple(
                tuple(
                    wanted is not None and _read(row, end, decode) == wanted
                    for row, wanted in zip(one.rows, answers, strict=True)
                )
                for one in own
            ),
            next((one.error for one in own if one.error), ""),
        )


def _read(row: Tokens, end: int, decode: Callable[[Sequence[int]], str]) -> str | None:
    return extract_answer(decode(row[:-1] if row[-1:] == (end,) else row))


def _references(data: TokenSet) -> list[Tokens]:
    """Return the answer tokens of each row, the end token last."""
    rows = zip(data.tokens, data.answer, strict=True)
    return [tuple(tokens[answer].tolist()) for tokens, answer in rows]


def _share(draws: Sequence[Sequence[bool]]) -> float:
    return sum(map(sum, draws)) / sum(map(len, draws))


def _run_fold(
    pack: ReplicaPack, fold: Sequence[Pass], data: TokenSet, batch_size: int, stream: str
) -> Iterator[_Written]:
    folds = len(fold)
    batch_number = 0
    token_number = 0
    forwards = 0

    def seed_of(index: int, path: tuple[str | int, ...]) -> int:
        place = (fold[index].draw, batch_number, token_number)
        return stream_seed(EVAL_SEED, "generate", stream, *place, *path)

    injection = Injection(
        pack.book,
        [Entry(one.device(), skip=pack.runs[one.replica].skip) for one in fold],
        seed_of=seed_of,
        measure=True,
    )

    def announce(valid: Tensor) -> None:
        nonlocal token_number, forwards
        injection.begin(valid.reshape(folds, -1))
        token_number += 1
        forwards += 1

    bound = int(data.answer.sum(dim=1).max()) + EXTRA_TOKENS
    lengths = prompt_lengths(data)
    rows: list[dict[int, Tokens]] = [{} for _ in fold]
    is_finite = [True] * folds
    with (
        folded(pack, [one.replica for one in fold]),
        injection,
        torch.inference_mode(),
    ):
        in_order = lengths.argsort(stable=True)
        for first in range(0, len(in_order), batch_size):
            numbers = in_order[first : first + batch_size]
            filled = torch.cat([numbers, numbers[-1:].expand(-len(numbers) % ROWS_OF_A_FOLD)])
            is_fill = torch.arange(len(filled), device=filled.device) >= len(numbers)
            token_number = 0
            answers, finite = greedy(
                pack.model,
                data.batch(filled.repeat(folds)),
                bound,
                announce,
                is_over=is_fill.repeat(folds),
            )
            for index, own in enumerate(rows):
                part = slice(index * len(filled), index * len(filled) + len(numbers))
                own.update(zip(numbers.tolist(), answers[part], strict=True))
                is_finite[index] &= bool(finite[part].all())
            batch_number += 1
    for index, one in enumerate(fold):
        error = disagreement(
            injection, index, one.condition, forwards, strayed="", is_finite=is_finite[index]
        )
        yield _Written(tuple(rows[index][number] for number in range(len(data.tokens))), error)


def prompt_lengths(data: TokenSet) -> Tensor:
    """Return how many tokens lie before the answer of each row, int64 [rows]."""
    return data.answer.int().argmax(dim=1)


def greedy(
    model: nn.Module,
    batch: TokenSet,
    bound: int,
    announce: Callable[[Tensor], None],
    *,
    is_over: Tensor | None = None,
) -> tuple[list[Tokens], Tensor]:
    """Return what `model` writes behind the prompts of `batch`, the most likely token each time.

    Keys and values of the tokens before are kept.

    Args:
        model: A Hugging Face causal language model.
        batch: Rows of which the prompt is read, and the end token, with which the first row ends.
        bound: Most tokens of an answer; it ends before with the end token or the model's last position.
        announce: Is called before every forward pass with a mask [rows, T] of the T tokens that each
            row puts into it: False in rows that are over.
        is_over: Boolean [rows], rows that are over from the beginning; none where it is left out.

    Returns:
        The tokens of each row, with the end token where it came; and a boolean [rows], whether every
        logit that was looked at was finite.

    Raises UserError when the model keeps no keys and values.
    """
    end = int(batch.tokens[0, int(batch.valid[0].sum()) - 1])
    lengths = prompt_lengths(batch)
    longest = int(lengths.max())
    # Positions that the rows themselves take up are there, whatever the model says of itself.
    limit = max(_position_limit(model), batch.tokens.shape[1])
    position = int(lengths.min())
    """Where the next token comes to stand, in every row."""
    tokens = batch.tokens[:, :position]
    finite = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    running = finite.clone() if is_over is None else ~is_over
    columns: list[Tensor] = []
    kept: list[Tensor] = []
    past = None
    while bool(running.any()) and position <= limit:
        announce(running.unsqueeze(1).expand_as(tokens))
        out = model(input_ids=tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = getattr(out, "past_key_values", None)
        if past is None:
            raise UserError(
                f"{type(model).__name__} hands back no keys and values of the tokens before; "
                "generation needs a model that does"
            )
        logits = out.logits[:, -1]
        finite &= logits.isfinite().all(dim=1) | ~running
        chosen = logits.argmax(dim=1)
        is_prompt = position < lengths
        writes = running & ~is_prompt
        columns.append(chosen)
        kept.append(writes)
        is_over = (chosen == end) | (position + 1 - lengths >= bound)
        running = running & ~(writes & is_over)
        if position < longest:
            chosen = torch.where(is_prompt, batch.tokens[:, position], chosen)
        tokens = chosen.unsqueeze(1)
        position += 1
    written = zip(torch.stack(columns, dim=1), torch.stack(kept, dim=1), strict=True)
    return [tuple(row[own].tolist()) for row, own in written], finite


def _position_limit(model: nn.Module) -> int:
    """Return how many positions a model says it has."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    limit = getattr(config, "max_position_embeddings", None)
    return sys.maxsize if limit is None else int(limit)
