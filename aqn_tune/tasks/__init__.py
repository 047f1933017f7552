"""Tasks: where rows come from, how they become prompt and answer, which split each is in.

A new task is one file with a :class:`TaskSpec` and its name in :data:`Task`.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from aqn_tune.kinds import by_kind
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

Task = Annotated[WordProblems | Jsonl, Field(discriminator="kind")]
"""The `task` of a study."""

TASKS: Final[dict[str, type[TaskSpec]]] = by_kind(Task)
"""All of them by kind."""
