"""GSM8K-style files as a task: one JSON object a line, with ``question`` and ``answer``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import Field

from aqn_tune.errors import UserError
from aqn_tune.tasks.base import Example, Splits, TaskSpec, extract_answer
from aqn_tune.tasks.splitting import question_key, split_fraction

__all__ = ["Jsonl"]

_CALCULATOR: Final = re.compile(r"<<[^<>]*>>")


class Jsonl(TaskSpec):
    """Rows from JSONL files in the form of GSM8K; the task of models other than the embedded one.

    Each line is an object with the texts ``question`` and ``answer``; the answer ends in
    ``#### N``. Other keys are ignored. Paths are taken from the working directory.
    """

    kind: Literal["jsonl"] = Field(default="jsonl", description="Selects rows from JSONL files.")
    train: Path = Field(description="File of the rows to train on.")
    validation: Path | None = Field(
        default=None,
        description="File of the rows the search scores on; left out: split off from train.",
    )
    test: Path = Field(description="File of the rows that only the confirm stage scores on.")
    validation_rows: int = Field(
        default=256,
        ge=1,
        description="How many questions of train become validation where no file is named.",
    )
    train_limit: int | None = Field(
        default=None, ge=1, description="Keep only the first so many rows to train on."
    )
    validation_limit: int | None = Field(
        default=None, ge=1, description="Keep only the first so many validation rows."
    )
    test_limit: int | None = Field(
        default=None, ge=1, description="Keep only the first so many test rows."
    )
    strip_calculator: bool = Field(
        default=True, description="Take GSM8K's <<48/2=24>> calculator marks out of answers."
    )

    def splits(self) -> Splits:
        """Read the files.

        Where ``validation`` is left out, the ``validation_rows`` questions of train with the
        smallest text hash are split off: which ones depends on the texts alone, not on the order
        of the file. Limits apply last, in file order.

        Raises :class:`aqn_tune.errors.UserError` for a missing or empty file, a bad row (with file
        and line), a question text in two splits, or a train file too small to split.
        """
        train = self._read("train", self.train)
        test = self._read("test", self.test)
        if self.validation is None:
            train, validation = self._split_off(train)
        else:
            validation = self._read("validation", self.validation)
        named = (("train", train), ("validation", validation), ("test", test))
        for index, (name, rows) in enumerate(named):
            for other_name, other_rows in named[index + 1 :]:
                _refuse_overlap(name, rows, other_name, other_rows)
        return Splits(
            train=tuple(train[: self.train_limit]),
            validation=tuple(validation[: self.validation_limit]),
            test=tuple(test[: self.test_limit]),
        )

    def _split_off(self, rows: list[Example]) -> tuple[list[Example], list[Example]]:
        first: dict[str, Example] = {}
        for row in rows:
            first.setdefault(question_key(row.question), row)
        if len(first) <= self.validation_rows:
            raise UserError(
                f"task.validation_rows = {self.validation_rows}: {self.train} has only "
                f"{len(first)} different questions, and some must be left to train on"
            )
        taken = set(sorted(first, key=split_fraction)[: self.validation_rows])
        kept = [row for row in rows if question_key(row.question) not in taken]
        return kept, [row for key, row in first.items() if key in taken]

    def _read(self, key: str, path: Path) -> list[Example]:
        try:
            text = path.expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"task.{key}: cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"task.{key}: {path} is not UTF-8 text: {error.reason}") from error
        rows = [
            self._row(line, f"{path}, line {number}")
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
        if not rows:
            raise UserError(f"task.{key}: {path} holds no rows")
        return rows

    def _row(self, line: str, where: str) -> Example:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: no JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: got {type(record).__name__}, wanted an object")
        for key in ("question", "answer"):
            value = record.get(key)
            if not isinstance(value, str) or not value.strip():
                got = "no such key" if key not in record else repr(value)
                raise UserError(f"{where}: '{key}' must be a text that is not empty, got {got}")
        answer = record["answer"]
        if self.strip_calculator:
            answer = _CALCULATOR.sub("", answer)
        if extract_answer(answer) is None:
            raise UserError(f"{where}: the answer has no last line '#### N': {answer[-40:]!r}")
        return Example(record["question"], answer)


def _refuse_overlap(
    name: str, rows: Sequence[Example], other_name: str, other_rows: Sequence[Example]
) -> None:
    keys = {question_key(row.question) for row in rows}
    shared = sorted({question_key(row.question) for row in other_rows} & keys)
    if shared:
        raise UserError(
            f"{len(shared)} question(s) are in both {name} and {other_name}, for example "
            f"{shared[0][:80]!r}; what is trained on or searched on cannot be confirmed on"
        )
