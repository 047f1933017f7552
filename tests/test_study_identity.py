"""Seeds, content hashes and layer addresses."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError, create_model
from synthetic import make_setting, make_study

from aqn_tune.errors import UserError
from aqn_tune.ledger.rows import Audit, NoiseMeasure
from aqn_tune.models.spec import ModelSpec
from aqn_tune.study.base import Measured, Spec
from aqn_tune.study.keys import content_hash
from aqn_tune.study.layers import Layers, resolve_layers
from aqn_tune.study.runs import Condition, Run
from aqn_tune.study.seeds import replicate_seed, stream_seed
from aqn_tune.tasks import TaskSpec


def test_search_and_confirm_seeds_are_disjoint_for_any_study_seed_index_and_generation() -> None:
    search, confirm = set(), set()
    for study_seed in (*range(40), 2**63, 2**64 - 1):
        for index in range(40):
            search.add(replicate_seed(study_seed, "search", index))
            for generation in range(3):
                confirm.add(replicate_seed(study_seed, "confirm", index, generation=generation))
    assert not search & confirm
    assert {seed % 2 for seed in search} == {0}, "the pools are told apart by parity, not by luck"
    assert {seed % 2 for seed in confirm} == {1}
    assert len(search) == 42 * 40
    assert len(confirm) == 42 * 40 * 3
    assert all(0 <= seed < 2**63 for seed in search | confirm)


def test_a_generation_of_confirm_seeds_shares_none_with_another() -> None:
    pools = [{replicate_seed(7, "confirm", i, generation=g) for i in range(50)} for g in range(4)]
    assert len(set.union(*pools)) == 200


def test_streams_do_not_run_into_each_other() -> None:
    paths = [
        (), ("noise",), ("fault",), ("noise", 0), ("noise", 1), ("noise", 0, 0), ("noise", 0, 1),
        ("noise", 1, 0), ("n", "oise"), ("0",), (0,),
    ]  # fmt: skip
    assert len({stream_seed(5, *path) for path in paths}) == len(paths)


def test_seeds_are_the_same_in_every_process() -> None:
    code = "from aqn_tune.study.seeds import stream_seed; print(stream_seed(3, 'noise', 17, 4))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": salt, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert seen == {f"{stream_seed(3, 'noise', 17, 4)}\n"}


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ((1, 2), [1, 2], True),
        (0.1, 0.10, True),
        (0.1 + 0.2, 0.3, False),
        ([1, 2], [2, 1], False),
        ({"a": None}, {}, False),
    ],
)
def test_content_hash_is_of_the_content(one: object, other: object, equal: bool) -> None:
    assert (content_hash(one) == content_hash(other)) is equal


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_content_hash_refuses_what_has_no_json(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        content_hash(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("base", "is_taken"), [(Spec, False), (TaskSpec, False), (ModelSpec, False), (Measured, True)]
)
def test_what_a_study_is_made_of_holds_finite_numbers(
    base: type[BaseModel], is_taken: bool, value: float
) -> None:
    """Else they are found by whoever hashes it, or are null in a file that does not read back."""
    made = create_model("Made", __base__=base, one=(float, 0.0), many=(tuple[float, ...], ()))
    for content in ({"one": value}, {"many": [1.0, value]}):
        if is_taken:
            made.model_validate(content)
            continue
        with pytest.raises(ValidationError, match="finite number"):
            made.model_validate(content)


def test_a_row_may_pass_on_what_is_not_finite() -> None:
    """A noise audit that fails has measured it; only the message of the failure is recorded."""
    measure = NoiseMeasure(layer=0, looks=1, scheduled=0.1, realised=float("inf"), draws=1)
    assert not math.isfinite(Audit(noise=(measure,)).noise[0].realised)


def test_the_memory_that_a_worker_may_plan_with_is_no_part_of_a_training(tmp_path: Path) -> None:
    """Else a study would train everything again with another number of workers."""
    study = make_study(tmp_path)
    run = Run(training=study.training, seed=1, conditions=(Condition(name="clean"),))
    one, other, unknown = (
        make_setting(study).model_copy(update={"memory_share": share})
        for share in (0.25, 1.0, None)
    )
    assert run.training_key(one) == run.training_key(other) == run.training_key(unknown)
    assert content_hash(one) == content_hash(other) == content_hash(unknown)
    elsewhere = one.model_copy(update={"device": "cuda"})
    assert run.training_key(elsewhere) != run.training_key(one)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", tuple(range(28))),
        ((10,), (10,)),
        ((-1, 0), (0, 27)),
        (("14-17",), (14, 15, 16, 17)),
        ((3, "1 - 2"), (1, 2, 3)),
    ],
)
def test_layers_resolve(layers: Layers, expected: tuple[int, ...]) -> None:
    assert resolve_layers(layers, 28) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((28,), "no layer 28 of 28; allowed are 0 to 27"),
        ((-29,), "no layer -1 of 28"),
        (("20-30",), "no layer 28 of 28"),
        ((5, "4-6"), "names a layer twice"),
    ],
)
def test_layers_that_do_not_exist_are_refused(layers: Layers, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_layers(layers, 28)
