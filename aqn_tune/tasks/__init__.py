"""Tasks: where rows come from, how they become prompt and answer, which split each is in.

A new task is one file with a :class:`TaskSpec` and one line in :data:`TASKS`.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from aqn_tune.tasks.base import Example, Splits, TaskSpec, completion, extract_answer, prompt
from aqn_tune.tasks.jsonl import Jsonl
from aqn_tune.tasks.word_problems import WordProblems

__all__ = [
    "TASKS",
    "Example",
    "Jsonl",
    "Splits",
    "Task",
    "TaskSpec",
    "WordProblems",
    "completion",
    "extract_answer",
    "prompt",
]

TASKS: Final[dict[str, type[TaskSpec]]] = {
    "word_problems": WordProblems,
    "jsonl": Jsonl,
}

Task = Annotated[WordProblems | Jsonl, Field(discriminator="kind")]
"""The `task` of a study."""
