"""Tasks: the answer rule, the generated rows, splits that cannot overlap."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import islice
from random import Random

import pytest
from pydantic import ValidationError

from aqn_tune.errors import UserError
from aqn_tune.tasks import TASKS, TaskSpec, WordProblems, extract_answer
from aqn_tune.tasks.grammar import NAMES, SENTENCES, draw_example
from aqn_tune.tasks.splitting import split_fraction, split_of
from aqn_tune.tasks.word_problems import pretraining_rows


def small(**changes: object) -> WordProblems:
    return WordProblems.model_validate(
        {"train_rows": 400, "validation_rows": 60, "test_rows": 60, **changes}
    )


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("19-14=5\n#### 5", "5"),
        ("#### -12", "-12"),
        ("#### 1,234,000", "1234000"),
        ("#### 2.50", "2.50"),
        ("He has #### 7. And then some", "7"),
        ("#### 5\nQuestion: again #### 9", "5"),
        ("no mark 12", None),
        ("####12", None),
        ("#### , then", None),
        ("", None),
    ],
)
def test_the_answer_is_what_follows_the_first_mark(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_every_registered_task_is_named_by_its_kind() -> None:
    for kind, task in TASKS.items():
        assert issubclass(task, TaskSpec)
        assert task.model_fields["kind"].default == kind
        assert all(field.description for field in task.model_fields.values())


def test_tasks_and_model_specs_import_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None; "
        "import aqn_tune.models, aqn_tune.tasks, aqn_tune.tasks.encode; "
        "aqn_tune.tasks.WordProblems(train_rows=5).splits()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def story_value(question: str) -> int:
    """Work a question out from its sentences alone, with none of the generator's arithmetic."""
    numbers = re.match(r"\w+ has (\d+) \w+\. (.*) How many \w+ now\?", question)
    assert numbers is not None
    value = int(numbers.group(1))
    for sentence in re.findall(r"[^.]+\.", numbers.group(2)):
        verb, _, rest = sentence.strip(" .").partition(" ")
        if (verb, rest) == ("Doubles", "them"):
            value *= 2
        elif (verb, rest) == ("Loses", "half"):
            assert value % 2 == 0, question
            value //= 2
        elif verb in ("Finds", "Buys", "Gets"):
            value += int(rest)
        else:
            assert verb in ("Loses", "Sells", "Gives"), question
            value -= int(rest.removeprefix("away "))
        assert 0 < value <= 99, question
    return value


def test_answers_are_right_line_by_line() -> None:
    for row in small().splits().train:
        *chain, last = row.answer.splitlines()
        for line in chain:
            left, operator, right, result = re.fullmatch(  # type: ignore[union-attr]
                r"(\d+)([-+*/])(\d+)=(\d+)", line
            ).groups()
            worked = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
            assert worked[operator](int(left), int(right)) == int(result), row
        assert extract_answer(last) == str(story_value(row.question))
        assert chain[-1].endswith(f"={extract_answer(last)}")


def test_operations_are_equally_likely_at_each_step_and_a_third_has_one_step() -> None:
    rows = small(train_rows=3000).splits().train
    chains = [row.answer.splitlines()[:-1] for row in rows]
    first = [next(c for c in chain[0] if c in "+-*/") for chain in chains if len(chain) == 2]
    for operator in "+-*/":
        assert 0.21 < first.count(operator) / len(first) < 0.29
    # Rows are unique, and one-step rows run into repeats sooner: a little below a third.
    assert 0.25 < sum(len(chain) == 1 for chain in chains) / len(chains) < 0.36


def test_only_the_operations_asked_for_occur() -> None:
    rows = small(operations=("add",), largest_total=79).splits().train
    assert all(set(re.findall(r"[-*/]", row.answer)) == set() for row in rows)
    assert max(int(number) for row in rows for number in re.findall(r"\d+", row.answer)) <= 79


def test_rows_are_a_function_of_the_spec_and_grow_at_the_end() -> None:
    assert small().splits() == small().splits()
    assert small(train_rows=500).splits().train[:400] == small().splits().train
    assert small(seed=1).splits().train != small().splits().train


def test_a_fingerprint_follows_the_rows() -> None:
    assert small().fingerprint() == small().fingerprint()
    assert small(seed=1).fingerprint() != small().fingerprint()
    # One row fewer in one split and one more in the next is the same text, but another task.
    moved = [small(validation_rows=60, test_rows=61), small(validation_rows=61, test_rows=60)]
    assert moved[0].fingerprint() != moved[1].fingerprint()


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_rows_do_not_depend_on_the_interpreter(hash_seed: str) -> None:
    code = (
        "from aqn_tune.tasks import WordProblems; "
        "print(WordProblems(train_rows=1).splits().train[0].question)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.strip() == WordProblems().splits().train[0].question


def test_the_place_of_a_question_never_changes() -> None:
    assert split_fraction("Leo has 3 pens.") == split_fraction(" Leo  has 3\npens. ")
    assert f"{split_fraction('Leo has 3 pens.'):.6f}" == "0.935931"


def test_no_question_is_in_two_splits_over_many_seeds() -> None:
    """Rows of one seed must not be held-out rows of another seed, either."""
    seen: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for seed in range(40):
        splits = small(seed=seed, operations=("double", "halve", "add")).splits()
        for name, rows in splits._asdict().items():
            assert len({row.question for row in rows}) == len(rows)
            seen[name] |= {row.question for row in rows}
    seen["train"] |= {row.question for row in islice(pretraining_rows(0, 0.5), 20_000)}
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


def test_the_original_overlap_is_there_without_the_text_hash() -> None:
    """Splits drawn with different seeds alone do overlap: the bug that the hash takes away."""
    operations = WordProblems().operations
    drawn = [
        {draw_example(rng, operations, 99).question for _ in range(rows)}
        for rng, rows in ((Random(1), 3000), (Random(2), 600))
    ]
    assert drawn[0] & drawn[1]


def test_the_share_of_finetuning_rows_in_the_pretraining_mix() -> None:
    rows = list(islice(pretraining_rows(3, 0.5), 4000))
    assert all(split_of(row.question) == "train" for row in rows)
    new_skill = sum("Doubles" in row.question or "half" in row.question for row in rows)
    # A share s of rows from four uniform operations: 1/2 of the one-step, 3/4 of the two-step ones.
    assert new_skill / len(rows) == pytest.approx(0.5 * (1 / 3 * 1 / 2 + 2 / 3 * 3 / 4), abs=0.03)
    plain = islice(pretraining_rows(3, 0.0), 1000)
    assert not any("Doubles" in row.question or "half" in row.question for row in plain)


def test_too_many_rows_for_the_grammar_are_refused() -> None:
    with pytest.raises(UserError, match=r"task\.test_rows = 9000.*different test questions"):
        small(operations=("double",), test_rows=9000, largest_total=20).splits()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"train_rows": 0}, "greater than or equal to 1"),
        ({"operations": ()}, "at least 1 item"),
        ({"operations": ("add", "add")}, "names an operation twice"),
        ({"operations": ("cube",)}, "'add', 'subtract', 'double' or 'halve'"),
        ({"largest_total": 19}, "greater than or equal to 20"),
        ({"rows": 3}, "Extra inputs are not permitted"),
        ({"seed": -1}, "greater than or equal to 0"),
    ],
)
def test_bad_fields_are_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        small(**changes)


def test_the_grammar_has_no_sentence_with_two_meanings() -> None:
    sentences = [sentence for group in SENTENCES.values() for sentence in group]
    assert len(set(sentences)) == len(sentences)
    assert len(set(NAMES)) == len(NAMES)
