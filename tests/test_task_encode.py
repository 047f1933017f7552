"""Token arrays: known arrays, the first answer token in the loss, nothing cut."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from aqn_tune.errors import UserError
from aqn_tune.tasks import Example, WordProblems, completion, prompt
from aqn_tune.tasks.encode import Encoded, encode


class Characters:
    """A tokenizer of one token per character; ``glue`` makes it join two characters into one."""

    eos_token_id: int | None = 1
    pad_token_id: int | None = 0

    def __init__(self, glue: str = "\0") -> None:
        self.glue = glue

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) + 10 for c in text.replace(self.glue, "@")]}


def one_answer_token() -> Encoded:
    return encode(Characters(), [Example("1+1?", "2")], 32)


def test_known_arrays() -> None:
    encoded = one_answer_token()
    text = "Question: 1+1?\nAnswer: 2"
    assert encoded.tokens.dtype == np.int64
    assert encoded.tokens.tolist() == [[ord(c) + 10 for c in text] + [1] + [0] * 7]
    assert encoded.valid.tolist() == [[True] * 25 + [False] * 7]
    assert np.flatnonzero(encoded.answer_mask[0]).tolist() == [22, 23, 24]


def test_padding_is_end_of_text_where_there_is_no_padding_token() -> None:
    tokenizer = Characters()
    tokenizer.pad_token_id = None
    encoded = encode(tokenizer, [Example("1+1?", "2")], 32)
    assert encoded.tokens[0, 24:].tolist() == [1] * 8
    assert encoded.answer_mask.sum() == 3
    assert encoded.valid.sum() == 25


def predicted_tokens(encoded: Encoded, mask: np.ndarray) -> list[int]:
    """The tokens a next-token loss is asked for, under a mask over ``tokens[:, 1:]``."""
    return encoded.tokens[:, 1:][mask].tolist()


def test_the_first_answer_token_is_in_the_loss() -> None:
    """With ``logits[:, prompt:-1]`` against ``tokens[:, prompt + 1:]`` it was not."""
    encoded = one_answer_token()
    head = len("Question: 1+1?\nAnswer:")
    assert predicted_tokens(encoded, encoded.answer_mask[:, 1:]) == [
        ord(" ") + 10,
        ord("2") + 10,
        1,
    ]

    original = encoded.valid[:, 1:].copy()
    original[:, :head] = False
    assert predicted_tokens(encoded, original) == [ord("2") + 10, 1]


@pytest.mark.parametrize(
    ("tokenizer", "examples", "length", "complaint"),
    [
        (Characters(), [Example("1+1?", "2")], 24, "row 0 needs 25 tokens and the length is 24"),
        (Characters(), [Example("a", "1"), Example("b" * 9, "1")], 24, "row 1 .*at least 30"),
        (Characters(glue=": 2"), [Example("1+1?", "2")], 32, "row 0: this tokenizer joins"),
        (Characters(), [], 32, "no rows to encode"),
    ],
)
def test_rows_that_cannot_be_encoded_are_refused(
    tokenizer: Characters, examples: list[Example], length: int, complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        encode(tokenizer, examples, length)


def test_a_row_of_just_the_length_is_kept_whole() -> None:
    encoded = encode(Characters(), [Example("1+1?", "2")], 25)
    assert encoded.valid.all()
    assert encoded.tokens[0, -1] == 1


def test_a_tokenizer_without_end_of_text_is_refused() -> None:
    tokenizer = SimpleNamespace(eos_token_id=None)
    with pytest.raises(UserError, match="no end-of-text token"):
        encode(tokenizer, [Example("a", "1")], 32)


def test_the_embedded_tokenizer_encodes_every_default_row_in_64_tokens() -> None:
    from aqn_tune.models import ModelSpec, load_tokenizer

    tokenizer = load_tokenizer(ModelSpec())
    for rows in WordProblems().splits():
        encoded = encode(tokenizer, rows, 64)
        for row, tokens, mask, valid in zip(rows, *encoded, strict=True):
            assert tokenizer.decode(tokens[mask][:-1]) == completion(row.answer)
            assert tokenizer.decode(tokens[valid & ~mask]) == prompt(row.question)
