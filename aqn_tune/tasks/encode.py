"""From rows to token arrays: right padding, nothing truncated, every answer token in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from aqn_tune.errors import UserError
from aqn_tune.tasks.base import Example, completion, prompt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Encoded", "encode", "prompt_tokens"]


class Encoded(NamedTuple):
    """Rows as arrays of shape ``[rows, length]``.

    ``tokens`` (int64) holds prompt, answer, end-of-text, then padding on the right.
    ``answer_mask`` (bool) is True where the token *at* that position is part of the answer, the
    first answer token and the end-of-text token included. The token at position ``t`` is predicted
    from position ``t - 1``: compare ``logits[:, :-1]`` with ``tokens[:, 1:]`` under
    ``answer_mask[:, 1:]``. ``valid`` (bool) is False on padding.
    """

    tokens: NDArray[np.int64]
    answer_mask: NDArray[np.bool_]
    valid: NDArray[np.bool_]


def prompt_tokens(tokenizer: Any, question: str) -> list[int]:
    """Return the token ids of the prompt of ``question``, with the tokenizer's own leading marks.

    Use it to generate from the very tokens that training conditioned on.
    """
    return list(tokenizer(prompt(question))["input_ids"])


def encode(tokenizer: Any, examples: Sequence[Example], max_length: int) -> Encoded:
    """Turn rows into arrays of ``max_length`` tokens.

    A row is tokenized as one text; its prompt must come out as the same tokens as the prompt
    alone, since otherwise generation would start from other tokens than training did.

    Raises :class:`aqn_tune.errors.UserError` where a row needs more than ``max_length`` tokens (it
    is never cut), where the tokenizer has no end-of-text token, where it merges prompt and answer,
    or where there are no rows.
    """
    import numpy as np

    if not examples:
        raise UserError("no rows to encode: a split needs at least one row")
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(
            "the tokenizer has no end-of-text token (eos_token); an answer must have an end"
        )
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tokens = np.full((len(examples), max_length), pad, dtype=np.int64)
    answer_mask = np.zeros((len(examples), max_length), dtype=np.bool_)
    valid = np.zeros((len(examples), max_length), dtype=np.bool_)
    for row, example in enumerate(examples):
        head = prompt_tokens(tokenizer, example.question)
        whole = tokenizer(prompt(example.question) + completion(example.answer))["input_ids"]
        if whole[: len(head)] != head:
            raise UserError(
                f"row {row}: this tokenizer joins the end of the prompt with the start of the "
                f"answer {example.answer[:20]!r} (or ends every text with a mark of its own); "
                "prompt and answer must be separate tokens"
            )
        ids = [*whole, end]
        if len(ids) > max_length:
            raise UserError(
                f"row {row} needs {len(ids)} tokens and the length is {max_length}: "
                f"{example.question[:60]!r}; rows are never cut, so set training.max_length to at least "
                f"{_longest(tokenizer, examples)}"
            )
        tokens[row, : len(ids)] = ids
        answer_mask[row, len(head) : len(ids)] = True
        valid[row, : len(ids)] = True
    return Encoded(tokens, answer_mask, valid)


def _longest(tokenizer: Any, examples: Sequence[Example]) -> int:
    return 1 + max(
        len(tokenizer(prompt(example.question) + completion(example.answer))["input_ids"])
        for example in examples
    )
