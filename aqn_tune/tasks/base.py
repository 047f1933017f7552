"""What every task gives: rows in GSM8K form, three splits, one prompt format, one answer rule.

Torch-free and numpy-free, so that ``plan`` can read a study without loading a numerical library.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

__all__ = ["Example", "Splits", "TaskSpec", "completion", "extract_answer", "prompt"]

_FINAL_ANSWER = re.compile(r"#### (-?[\d,.]+)")


class Example(NamedTuple):
    """One row of a task, in the row form of GSM8K.

    ``answer`` is the worked solution whose last line is ``#### N``.
    """

    question: str
    answer: str


class Splits(NamedTuple):
    """The three sets of rows of a task; no question text is in more than one of them.

    ``train`` is what training sees, ``validation`` is what the search stage scores and ``test`` is
    what only the confirm stage scores.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of every row of every split, in order."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()


class TaskSpec(BaseModel):
    """Base of all tasks: a frozen description in the study that can produce its rows.

    A new task is one file with one subclass that sets ``kind: Literal["its_name"]`` and implements
    :meth:`splits`, and its name in :data:`aqn_tune.tasks.Task`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def splits(self) -> Splits:
        """Return the rows of the task.

        The result is a function of the spec (and of the files it names) alone, and no question
        text is in two splits. Raises :class:`aqn_tune.errors.UserError` where the rows cannot be
        had as asked for.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say which rows it has")

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of every row of every split, in order.

        Use it in hashes of configurations: a file that changed under the same path is another
        task. Raises what :meth:`splits` raises.
        """
        return self.splits().fingerprint()


def prompt(question: str) -> str:
    """Return the text the model reads before it answers.

    It ends in a colon and :func:`completion` begins with a space: every pre-tokenizer in use cuts
    there, so the tokens of the prompt are a prefix of the tokens of prompt and completion.
    """
    return f"Question: {question}\nAnswer:"


def completion(answer: str) -> str:
    """Return the text the model has to write after :func:`prompt`, without the end-of-text mark."""
    return f" {answer}"


def extract_answer(text: str) -> str | None:
    """Return the final answer ``N`` of the first ``#### N`` in ``text``, without thousands commas.

    Use it on generated text and on reference answers alike. The first mark counts: a model that
    writes on after its answer is judged by the answer. ``None`` where there is no such mark, or
    where what follows it holds no digit.
    """
    found = _FINAL_ANSWER.search(text)
    if found is None:
        return None
    number = found.group(1).replace(",", "").rstrip(".")
    return number if any(character.isdigit() for character in number) else None
