"""The template grammar of the generated word problems: one or two steps of small arithmetic."""

from __future__ import annotations

from random import Random
from typing import Final, Literal, NamedTuple

from aqn_tune.tasks.base import Example

__all__ = ["Operation", "draw_example"]

Operation = Literal["add", "subtract", "double", "halve"]

NAMES: Final = ("Leo", "Mia", "Sam", "Ana", "Tom", "Zoe", "Max", "Eva")
ITEMS: Final = ("pens", "books", "coins", "cards", "shells", "apples", "stamps", "marbles")
SENTENCES: Final[dict[Operation, tuple[str, ...]]] = {
    "add": ("Finds {n}.", "Buys {n}.", "Gets {n}."),
    "subtract": ("Loses {n}.", "Sells {n}.", "Gives away {n}."),
    "double": ("Doubles them.",),
    "halve": ("Loses half.",),
}
SMALLEST_START: Final = 3
LARGEST_START: Final = 50
SMALLEST_OPERAND: Final = 2
LARGEST_OPERAND: Final = 20
TWO_STEP_SHARE: Final = 2 / 3


class _Step(NamedTuple):
    sentence: str
    equation: str
    value: int


def _take_step(rng: Random, operation: Operation, value: int, largest_total: int) -> _Step | None:
    operand = rng.randint(SMALLEST_OPERAND, LARGEST_OPERAND)
    sentence = rng.choice(SENTENCES[operation]).format(n=operand)
    if operation == "add":
        result, equation = value + operand, f"{value}+{operand}"
    elif operation == "subtract":
        result, equation = value - operand, f"{value}-{operand}"
    elif operation == "double":
        result, equation = value * 2, f"{value}*2"
    else:
        if value % 2:
            return None
        result, equation = value // 2, f"{value}/2"
    if not 0 < result <= largest_total:
        return None
    return _Step(sentence, f"{equation}={result}", result)


def draw_example(rng: Random, operations: tuple[Operation, ...], largest_total: int) -> Example:
    """Draw one word problem from ``rng``.

    One step in a third of the rows, two in the others, each operation equally likely at each step.
    All values on the way are whole and in ``1..largest_total``. Where the numbers drawn do not fit
    the operations, the numbers are drawn again and the operations stay, so that a hard operation
    does not become a rare one. ``largest_total`` must be at least 6, or nothing may fit.

    >>> draw_example(Random(4), ("add", "subtract"), 79).answer.splitlines()[-1][:5]
    '#### '
    """
    count = 2 if rng.random() < TWO_STEP_SHARE else 1
    chosen = [rng.choice(operations) for _ in range(count)]
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    while True:
        start = value = rng.randint(SMALLEST_START, min(LARGEST_START, largest_total))
        steps: list[_Step] = []
        for operation in chosen:
            step = _take_step(rng, operation, value, largest_total)
            if step is None:
                break
            steps.append(step)
            value = step.value
        if len(steps) == count:
            break
    story = " ".join(step.sentence for step in steps)
    lines = [step.equation for step in steps] + [f"#### {value}"]
    return Example(
        question=f"{name} has {start} {item}. {story} How many {item} now?",
        answer="\n".join(lines),
    )
