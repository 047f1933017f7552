"""Which split a question belongs to: decided by its text, so that splits cannot overlap."""

from __future__ import annotations

from hashlib import blake2b
from typing import Final, Literal

__all__ = ["SplitName", "question_key", "split_fraction", "split_of"]

SplitName = Literal["train", "validation", "test"]

TEST_SHARE: Final = 0.10
"""Share of all question texts that belong to the test split of a generated task."""

VALIDATION_SHARE: Final = 0.10
"""Share of all question texts that belong to the validation split of a generated task."""

_HASH_KEY: Final = b"aqn_tune/splits/1"


def question_key(question: str) -> str:
    """Return the text by which two questions count as the same one: runs of white space are one."""
    return " ".join(question.split())


def split_fraction(question: str) -> float:
    """Return the fixed place of a question in ``[0, 1)``, uniform over texts.

    It is a keyed BLAKE2b hash of :func:`question_key` and depends on nothing else: no seed, size,
    order or generator can move a question.
    """
    digest = blake2b(question_key(question).encode(), digest_size=8, key=_HASH_KEY).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_of(question: str) -> SplitName:
    """Return the one split a generated question may appear in.

    Use it wherever rows are generated, pretraining rows included: a generator that keeps only the
    questions of its own split can never leak into another one.
    """
    fraction = split_fraction(question)
    if fraction < TEST_SHARE:
        return "test"
    if fraction < TEST_SHARE + VALIDATION_SHARE:
        return "validation"
    return "train"
