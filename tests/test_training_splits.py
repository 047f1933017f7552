"""Rows as tokens: encoded once for all packs and workers, in memory that nothing writes into."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import make_study, ray_two
from tiny import (
    CLEAN,
    LAYERS,
    noise,
    one_pack,
    save_tiny_model,
    tiny_setting,
    tiny_training,
)

from aqn_tune.cli.output import ProgressLine
from aqn_tune.cli.run import run_study
from aqn_tune.errors import UserError
from aqn_tune.faults import DeadZone
from aqn_tune.ledger import Ledger
from aqn_tune.models.load import load_tokenizer
from aqn_tune.models.spec import ModelSpec
from aqn_tune.search.runner import run_search
from aqn_tune.study.device import Device
from aqn_tune.study.engine import PackTraining, Shared, SplitArrays
from aqn_tune.study.folder import study_folder
from aqn_tune.study.loading import make_setting, resolve_scenarios
from aqn_tune.study.runs import Condition, Pack, Run, Setting
from aqn_tune.study.schema import Study
from aqn_tune.tasks import Example, Jsonl, WordProblems
from aqn_tune.tasks.encode import encode
from aqn_tune.tasks.splitting import SplitName
from aqn_tune.training import data as data_module
from aqn_tune.training.data import TokenSet, load_tokens
from aqn_tune.training.engine import ENGINE
from aqn_tune.training.splits import load_splits

__all__ = ["ray_two"]

torch.set_num_threads(1)
NAMES: tuple[SplitName, ...] = ("train", "validation", "test")
FAULT = DeadZone(layers=(1,), threshold=0.2)
FAULTY = Condition(name="faulty", scenario="s", device=Device(faults=(FAULT,)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def write_rows(path: Path, rows: Sequence[Example]) -> Path:
    path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows), encoding="utf-8")
    return path


def files(root: Path) -> Jsonl:
    """Return a task of two files, validation split off the first."""
    rows = WordProblems(train_rows=30, test_rows=9).splits()
    return Jsonl(
        train=write_rows(root / "train.jsonl", rows.train),
        test=write_rows(root / "test.jsonl", rows.test),
        validation_rows=7,
    )


# -- the same splits -------------------------------------------------------------------------------


def tokens_as_before(tokenizer: Any, rows: Sequence[Example], max_length: int) -> TokenSet:
    """Return a split as every worker made it for itself, with torch, before it was shared."""
    encoded = encode(tokenizer, rows, max_length)
    answer = torch.from_numpy(encoded.answer_mask)
    valid = torch.from_numpy(encoded.valid)
    first = max(int(answer.int().argmax(dim=1).min()) - 1, 0) // 8 * 8
    longest = int(valid.sum(dim=1).max())
    width = min(-(-longest // 8) * 8, max_length)
    tokens = torch.from_numpy(encoded.tokens)[:, :width].contiguous()
    return TokenSet(tokens, answer[:, :width].contiguous(), valid[:, :width].contiguous(), first)


@pytest.mark.parametrize("max_length", [53, 60, 64, 200])
@pytest.mark.parametrize("kind", ["word_problems", "jsonl"])
def test_the_splits_are_what_each_worker_made(tmp_path: Path, kind: str, max_length: int) -> None:
    task = WordProblems(train_rows=48) if kind == "word_problems" else files(tmp_path)
    setting = Setting(model=ModelSpec(), task=task, model_fingerprint="m")
    loaded = load_splits(setting, NAMES, max_length)
    assert tuple(loaded) == NAMES
    for name, arrays in loaded.items():
        rows = getattr(task.splits(), name)
        before = tokens_as_before(load_tokenizer(setting.model), rows, max_length)
        for now in (
            TokenSet.of(arrays),
            load_tokens(load_tokenizer(setting.model), rows, max_length),
        ):
            assert now.first == before.first
            for tensor, expected in zip(now[:3], before[:3], strict=True):
                assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
                assert tensor.is_contiguous()
                assert torch.equal(tensor, expected)


def test_tensors_lie_on_the_memory_of_read_only_arrays(folder: Path) -> None:
    (arrays,) = load_splits(tiny_setting(folder), ["train"], 64).values()
    split = TokenSet.of(arrays)
    for tensor, array in zip(split[:3], arrays[:3], strict=True):
        assert tensor.data_ptr() == array.ctypes.data
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1


def test_the_fingerprint_of_a_task_is_that_of_its_rows(tmp_path: Path) -> None:
    """Studies are named by it: it must not move."""
    task = WordProblems(train_rows=3, validation_rows=2, test_rows=2)
    assert task.fingerprint() == task.splits().fingerprint()
    assert task.fingerprint() == "a2ef762370d9b51947620029ed777189b99bc204b7727a39a4f841dec6712943"


# -- encoded once, and never written to ------------------------------------------------------------


def run_of(**changes: Any) -> Run:
    training = tiny_training(**changes)
    policy = {"targeting": "global", "carrier": {"kind": "hidden"}}
    return Run(
        training=training,
        device=Device(faults=(FAULT,)),
        noise=noise(training, policy),
        seed=2,
        conditions=(CLEAN, FAULTY),
        observed_steps=(1,),
    )


def bytes_of(splits: dict[SplitName, SplitArrays]) -> list[bytes]:
    return [array.tobytes() for name in sorted(splits) for array in splits[name][:3]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": {"kind": "full"}},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    ],
    ids=["lora", "full", "microbatches"],
)
def test_a_pack_writes_into_no_split(folder: Path, changes: dict[str, Any]) -> None:
    """Trained, observed, evaluated and generating: on a worker the first write would end the process."""
    shared = ENGINE.load(tiny_setting(folder), "test", 64)
    before = bytes_of(dict(shared.splits))
    pack = one_pack(run_of(**changes), rungs=(0, 3, 6), generate=True)
    opened = ENGINE.open_pack(pack, tiny_setting(folder), shared)
    for _ in pack.rungs:
        report = opened.advance()
    assert report.trainings[0].error == ""
    assert report.evaluations[0].generated_exact_match is not None
    assert bytes_of(dict(shared.splits)) == before


OpenPack = Callable[[Pack, Setting, Shared], PackTraining]


def tokenising(pack: Pack, setting: Setting, shared: Shared) -> PackTraining:
    """Open a pack as it was: rows encoded by each process, whatever it was given."""
    rows = setting.task.splits()
    tokenizer = load_tokenizer(setting.model)
    max_length = pack.runs[0].training.max_length
    own = {
        name: data_module.encode_split(tokenizer, getattr(rows, name), max_length)
        for name in ("train", pack.split)
    }
    return ENGINE.open_pack(pack, setting, shared._replace(splits=own))


def encoded_by(folder: Path, open_pack: OpenPack) -> Counter[int]:
    """Open and advance three packs; return how often splits were encoded, by their number of rows."""
    calls: Counter[int] = Counter()

    def counting(tokenizer: Any, rows: Sequence[Example], max_length: int) -> Any:
        calls[len(rows)] += 1
        return encode(tokenizer, rows, max_length)

    # Rows that no other test has: what a process has encoded before is not encoded again.
    setting = tiny_setting(folder, rows=41 if open_pack is tokenising else 43)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module, "encode", counting)
        shared = ENGINE.load(setting, "test", 64)
        for seed in (2, 4, 6):
            run = Run(training=tiny_training(), seed=seed, conditions=(CLEAN,))
            opened = open_pack(one_pack(run, rungs=(0, 1)), setting, shared)
            opened.advance()
            opened.advance()
        ENGINE.load(setting, "validation", 64)
    return calls


def test_each_split_is_encoded_once_for_all_packs_and_stages(folder: Path) -> None:
    assert encoded_by(folder, ENGINE.open_pack) == {43: 1, 32: 1, 16: 1}


def test_a_pack_that_tokenises_by_itself_would_be_seen(folder: Path) -> None:
    assert encoded_by(folder, tokenising) == {41: 4, 32: 4, 16: 1}


# -- workers ---------------------------------------------------------------------------------------


def tokenless(pack: Pack, setting: Setting, shared: Shared, *, log: str) -> PackTraining:
    """Open a pack in a process that has no encoder, on arrays that are not its own memory."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("a worker encodes rows")

    data_module.encode = refuse  # type: ignore[assignment]
    for arrays in (*(one[:3] for one in shared.splits.values()), shared.base.values()):
        for array in arrays:
            if array.flags.owndata or array.flags.writeable:
                raise AssertionError("an array was copied")
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {sorted(shared.splits)}\n")
    return ENGINE.open_pack(pack, setting, shared)


def study_on(folder: Path, output: Path, **changes: Any) -> Study:
    """Return a study of controls and one config on the tiny model."""
    content: dict[str, Any] = {
        "model": {"path": str(folder)},
        "task": {"kind": "word_problems", "train_rows": 45, "validation_rows": 16, "test_rows": 32},
        "training": {"steps": 4, "batch_size": 4, "warmup_steps": 1},
        "eval_batch_size": 16,
        "scenario": {"faults": [{"kind": "dead_zone", "threshold": 0.2, "layers": [1]}]},
        "search": {
            "space": {"dimensions": {"sigma_start": {"kind": "float", "low": 0.01, "high": 0.1}}},
            "configs": 1,
            "rungs": (1.0,),
        },
        "compute": {"workers": 2, "pack_replicas": 2},
    }
    return make_study(output, **{**content, **changes})


@pytest.mark.slow
def test_two_workers_train_on_what_the_driver_has_encoded(
    ray_two: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.cloudpickle

    # Workers do not have the tests on their path.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    encoded: list[int] = []

    def counting(tokenizer: Any, rows: Sequence[Example], max_length: int) -> Any:
        encoded.append(len(rows))
        return encode(tokenizer, rows, max_length)

    monkeypatch.setattr(data_module, "encode", counting)
    study, log = study_on(folder, tmp_path / "out"), tmp_path / "log"
    run_search(
        study,
        make_setting(study),
        resolve_scenarios(study),
        study_folder(study),
        layer_count=LAYERS,
        engine=ENGINE._replace(open_pack=functools.partial(tokenless, log=str(log))),
    )
    assert encoded == [45, 16]
    rows = Ledger(study_folder(study).ledger).trainings.values()
    assert {(row.status, row.error) for row in rows} == {("finished", "")}
    opened = [line.split(maxsplit=1) for line in log.read_text().splitlines()]
    assert len(opened) > 4
    assert len({process for process, _ in opened} - {str(os.getpid())}) == 2
    assert {splits for _, splits in opened} == {"['train', 'validation']"}


# -- errors ----------------------------------------------------------------------------------------


def test_rows_of_another_length_are_refused(folder: Path) -> None:
    shared = ENGINE.load(tiny_setting(folder), "test", 60)
    pack = one_pack(run_of(), rungs=(1,))
    with pytest.raises(ValueError, match="rows of at most 60 tokens, the pack wants 64"):
        ENGINE.open_pack(pack, tiny_setting(folder), shared)


def test_rows_that_have_changed_since_the_start_are_refused(tmp_path: Path) -> None:
    task = files(tmp_path)
    setting = Setting(
        model=ModelSpec(), task=task, model_fingerprint="m", task_fingerprint=task.fingerprint()
    )
    rows = task.splits()
    write_rows(task.train, (*rows.train[1:], *rows.validation))
    with pytest.raises(UserError, match="not those that the study started with"):
        load_splits(setting, ["train"], 64)


@pytest.mark.parametrize("split", NAMES)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_row_that_is_too_long_ends_a_run_with_nothing_written(
    folder: Path, tmp_path: Path, split: str, fresh: bool
) -> None:
    """Also one that only the confirmation would have come to, hours later."""
    rows = WordProblems(train_rows=20, validation_rows=8, test_rows=8).splits()
    paths = {}
    for name in NAMES:
        own = list(getattr(rows, name))
        if name == split:
            own[3] = own[3]._replace(question="Now then. " * 20 + own[3].question)
        paths[name] = str(write_rows(tmp_path / f"{name}.jsonl", own))
    study = study_on(folder, tmp_path / "out", task={"kind": "jsonl", **paths})
    kept = study_folder(study).root / "study.yaml"
    if fresh:
        kept.parent.mkdir(parents=True)
        kept.write_text("from before\n")
    with pytest.raises(UserError, match=r"row 3 needs .* rows are never cut, so set training.max_"):
        run_study(study, engine=ENGINE, progress=ProgressLine(quiet=True), fresh=fresh)
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [path for path in left if path.name != ".lock"] == ([kept] if fresh else [])


def test_arrays_hold_what_their_fields_say(folder: Path) -> None:
    arrays = load_splits(tiny_setting(folder), ["test"], 64)["test"]
    assert (arrays.tokens.dtype, arrays.answer.dtype, arrays.valid.dtype) == (np.int64, bool, bool)
    assert len(arrays.tokens) == 32
    assert arrays.max_length == 64
    assert not (arrays.answer & ~arrays.valid).any()
    assert not arrays.answer[:, : arrays.first + 1].any()
