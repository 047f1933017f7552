"""GSM8K-style files: what is read, what is split off, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from aqn_tune.errors import UserError
from aqn_tune.tasks import Jsonl


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text(
        "".join(json.dumps({"question": q, "answer": a, "id": 1}) + "\n" for q, a in rows),
        encoding="utf-8",
    )
    return path


def rows(start: int, stop: int) -> list[tuple[str, str]]:
    return [
        (f"What is {n}+1?", f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}")
        for n in range(start, stop)
    ]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {
        "train": write(tmp_path / "train.jsonl", rows(0, 50)),
        "test": write(tmp_path / "test.jsonl", rows(50, 60)),
    }


def test_rows_are_read_and_calculator_marks_taken_out(files: dict[str, Path]) -> None:
    splits = Jsonl(**files, validation_rows=10).splits()
    assert [len(split) for split in splits] == [40, 10, 10]
    assert splits.test[0] == ("What is 50+1?", "50+1=51\n#### 51")
    kept = Jsonl(**files, validation_rows=10, strip_calculator=False).splits()
    assert kept.test[0].answer == "50+1=<<50+1=51>>51\n#### 51"


def test_a_named_validation_file_is_used_whole(files: dict[str, Path], tmp_path: Path) -> None:
    validation = write(tmp_path / "validation.jsonl", rows(60, 63))
    splits = Jsonl(**files, validation=validation).splits()
    assert [len(split) for split in splits] == [50, 3, 10]


def test_what_is_split_off_does_not_depend_on_the_order_of_the_file(
    files: dict[str, Path],
) -> None:
    first = Jsonl(**files, validation_rows=10).splits()
    shuffled = rows(0, 50)
    Random(1).shuffle(shuffled)
    write(files["train"], shuffled)
    second = Jsonl(**files, validation_rows=10).splits()
    assert set(first.validation) == set(second.validation)
    assert set(first.train) == set(second.train)


def test_a_question_that_is_there_twice_leaves_train_with_both_rows(
    files: dict[str, Path],
) -> None:
    twice = rows(0, 50) + [(f" {question} ", answer) for question, answer in rows(0, 50)]
    write(files["train"], twice)
    splits = Jsonl(**files, validation_rows=10).splits()
    assert [len(split) for split in splits] == [80, 10, 10]
    held_out = {row.question for row in splits.validation}
    assert not held_out & {row.question.strip() for row in splits.train}


def test_a_file_that_changed_under_its_name_is_another_task(files: dict[str, Path]) -> None:
    task = Jsonl(**files, validation_rows=10)
    before = task.fingerprint()
    write(files["test"], rows(50, 61))
    assert task.fingerprint() != before


def test_limits_keep_the_first_rows(files: dict[str, Path]) -> None:
    task = Jsonl(**files, validation_rows=10, train_limit=5, validation_limit=4, test_limit=3)
    splits, whole = task.splits(), Jsonl(**files, validation_rows=10).splits()
    assert splits == (whole.train[:5], whole.validation[:4], whole.test[:3])


def test_overlap_is_refused_even_where_limits_would_hide_it(
    files: dict[str, Path],
) -> None:
    write(files["test"], [*rows(50, 60), *rows(0, 3)])
    with pytest.raises(UserError, match=r"3 question\(s\) are in both train and test.*What is 0"):
        Jsonl(**files, validation_rows=1, test_limit=2).splits()


def test_overlap_of_validation_and_test_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    validation = write(tmp_path / "validation.jsonl", [("What  is 50+1? ", "#### 51")])
    with pytest.raises(UserError, match=r"1 question\(s\) are in both validation and test"):
        Jsonl(**files, validation=validation).splits()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{bad", "line 2: no JSON"),
        ("[1]", "line 2: got list, wanted an object"),
        ('{"question": "q"}', "line 2: 'answer' must be a text .* got no such key"),
        ('{"question": 3, "answer": "#### 1"}', "line 2: 'question' must be a text .* got 3"),
        ('{"question": " ", "answer": "#### 1"}', "line 2: 'question' must be a text"),
        ('{"question": "q", "answer": "5"}', "line 2: the answer has no last line '#### N': '5'"),
    ],
)
def test_bad_rows_are_refused_with_file_and_line(
    files: dict[str, Path], line: str, complaint: str
) -> None:
    good = files["train"].read_text(encoding="utf-8").splitlines()[0]
    files["train"].write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"train\.jsonl, {complaint}"):
        Jsonl(**files).splits()


def test_line_separators_inside_a_text_do_not_shift_line_numbers(files: dict[str, Path]) -> None:
    record = {"question": "a\u2028b\x85c?", "answer": "#### 1"}
    files["train"].write_text(json.dumps(record, ensure_ascii=False) + "\n{bad\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 2: no JSON"):
        Jsonl(**files).splits()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "task.test: cannot read .*No such file"),
        (b"\n\n", "task.test: .*test.jsonl holds no rows"),
        (b"\xff\xfe", "task.test: .*is not UTF-8"),
    ],
)
def test_bad_files_are_refused(
    files: dict[str, Path], content: bytes | None, complaint: str
) -> None:
    if content is None:
        files["test"].unlink()
    else:
        files["test"].write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        Jsonl(**files).splits()


def test_too_few_rows_to_split_are_refused(files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"task\.validation_rows = 50.*only 50 different"):
        Jsonl(**files, validation_rows=50).splits()
