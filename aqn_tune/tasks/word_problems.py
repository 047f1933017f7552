"""The embedded task: generated word problems in GSM8K row form, and the rows to pretrain on."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator

from aqn_tune.errors import UserError
from aqn_tune.tasks.base import Example, Splits, TaskSpec
from aqn_tune.tasks.grammar import Operation, draw_example
from aqn_tune.tasks.splitting import SplitName, split_of

__all__ = ["WordProblems", "pretraining_rows"]

PRETRAINING_OPERATIONS: Final[tuple[Operation, ...]] = ("add", "subtract")
PRETRAINING_LARGEST_TOTAL: Final = 79
_DRAWS_PER_NEW_ROW: Final = 20_000


class WordProblems(TaskSpec):
    """Short word problems with two-digit arithmetic, generated; the task of the embedded model.

    Use it for everything that has to run on a small machine without downloads. The embedded model
    was pretrained on ``add`` and ``subtract`` with a small share of all four operations, so it
    half knows this task before fine-tuning.

    Splits are disjoint by question text whatever the seed and sizes (see
    :func:`aqn_tune.tasks.splitting.split_of`), also against the pretraining rows, and no question
    is twice in one split. A larger split of the same seed begins with the smaller one.
    """

    kind: Literal["word_problems"] = Field(
        default="word_problems", description="Selects the generated word problems."
    )
    train_rows: int = Field(
        default=3000, ge=1, description="How many rows training draws its batches from."
    )
    validation_rows: int = Field(
        default=256, ge=1, description="How many rows the search stage scores a config on."
    )
    test_rows: int = Field(
        default=600, ge=1, description="How many rows the confirm stage scores an arm on."
    )
    seed: int = Field(
        default=0, ge=0, description="Data seed: which rows are drawn; not a replicate seed."
    )
    operations: tuple[Operation, ...] = Field(
        default=("add", "subtract", "double", "halve"),
        min_length=1,
        description="Operations a problem may ask for, each equally likely at each step.",
    )
    largest_total: Annotated[int, Field(ge=20, le=999)] = Field(
        default=99, description="Largest value that may occur on the way to an answer."
    )

    @field_validator("operations")
    @classmethod
    def _each_operation_once(cls, value: tuple[Operation, ...]) -> tuple[Operation, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"names an operation twice: {', '.join(value)}")
        return value

    def splits(self) -> Splits:
        """Generate the rows: ``train_rows``, ``validation_rows`` and ``test_rows`` of them.

        Raises :class:`aqn_tune.errors.UserError` where the grammar has too few different
        questions for a split of the size asked for.
        """
        return Splits(
            train=self._draw("train", self.train_rows),
            validation=self._draw("validation", self.validation_rows),
            test=self._draw("test", self.test_rows),
        )

    def _draw(self, split: SplitName, rows: int) -> tuple[Example, ...]:
        rng = Random(f"aqn_tune/word_problems/{self.seed}/{split}")
        drawn: dict[str, Example] = {}
        draws_without_news = 0
        while len(drawn) < rows:
            example = draw_example(rng, self.operations, self.largest_total)
            if split_of(example.question) == split and example.question not in drawn:
                drawn[example.question] = example
                draws_without_news = 0
                continue
            draws_without_news += 1
            if draws_without_news > _DRAWS_PER_NEW_ROW:
                raise UserError(
                    f"task.{split}_rows = {rows}: operations {', '.join(self.operations)} with "
                    f"largest_total {self.largest_total} give only about {len(drawn)} different "
                    f"{split} questions; ask for fewer rows or allow more operations"
                )
        return tuple(drawn.values())


def pretraining_rows(seed: int, finetuning_share: float) -> Iterator[Example]:
    """Yield rows without end to pretrain the embedded model on.

    A share ``finetuning_share`` of the rows (0 to 1) comes from the grammar of the default
    :class:`WordProblems`, the others from additions and subtractions with totals up to 79. All of
    them are questions of the train split: none can be a validation or test question.
    """
    rng = Random(f"aqn_tune/pretraining/{seed}")
    full = WordProblems()
    while True:
        if rng.random() < finetuning_share:
            example = draw_example(rng, full.operations, full.largest_total)
        else:
            example = draw_example(rng, PRETRAINING_OPERATIONS, PRETRAINING_LARGEST_TOTAL)
        if split_of(example.question) == "train":
            yield example
