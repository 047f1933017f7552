"""Answers that are written token by token, beside the teacher-forced exact match and plain transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_injection_models import ARCHITECTURES, build
from tiny import CLEAN, LAYERS, one_pack, save_tiny_model, tiny_setting, tiny_training
from torch import Tensor, nn

from aqn_tune.errors import UserError
from aqn_tune.faults import Bias, DeadZone, FaultSpec, RelativeGaussian, Saturation, StuckAt
from aqn_tune.injection.fold import Entry
from aqn_tune.injection.injection import Injection
from aqn_tune.models.load import build_model, load_tokenizer
from aqn_tune.models.spec import ModelSpec
from aqn_tune.quantization import MXFP4
from aqn_tune.study.device import HEALTHY, Device
from aqn_tune.study.engine import RungReport
from aqn_tune.study.runs import Condition, Run
from aqn_tune.tasks import Example, WordProblems
from aqn_tune.tasks.base import prompt
from aqn_tune.training import engine as engine_module
from aqn_tune.training import generate as generate_module
from aqn_tune.training.data import TokenSet, answer_logits, load_tokens, token_loss
from aqn_tune.training.engine import ENGINE
from aqn_tune.training.generate import EXTRA_TOKENS, Generated, generated_exact_match
from aqn_tune.training.pack import ReplicaPack
from aqn_tune.training.passes import folded

torch.set_num_threads(1)

BATCH = 16
ROWS = 40
"""So that the last batch is a short one."""


def on(*faults: FaultSpec, quantized: Sequence[Any] = (), **fields: Any) -> Device:
    device = Device(faults=faults, quantization=tuple(quantized), **fields)
    return device.resolved(LAYERS, weights_trained=False)


def under(name: str, device: Device, **fields: Any) -> Condition:
    return Condition(name="faulty", scenario=name, device=device, **fields)


DEVICES = {
    "token by token": on(DeadZone(layers=(1,), threshold=0.1)),
    "clipped inputs": on(
        Saturation(layers=(1, 2), modules=("linear",), site="input", limit=0.5), adapter_path="faulty"
    ),
    "gain": on(Bias(layers=(0, 3), modules=("linear",), form="gain", scale=0.3)),
    "channels": on(StuckAt(layers=(2,), value=0.5, density=0.1, axis="channel"), seed=3),
    "weights": on(DeadZone(layers=(1, 2), modules=("linear",), site="weight", threshold=0.1)),
    "W4A4": on(quantized=[MXFP4()]),
    "merged W4": on(quantized=[MXFP4(operands="weight")], deploy="merged"),
}  # fmt: skip
CONDITIONS = (CLEAN, *(under(name, device) for name, device in DEVICES.items()))


def ignored(valid: torch.Tensor) -> None:
    pass


def no_text(tokens: Sequence[int]) -> str:
    return ""


def teacher_forced(pack: ReplicaPack, data: TokenSet, replica: int, device: Device) -> list[bool]:
    """Return row by row whether every answer token is the most likely one behind the true ones."""
    entry = Entry(device, skip=pack.runs[replica].skip)
    injection = Injection(pack.book, [entry], seed_of=lambda index, path: 0, measure=True)
    exact: list[bool] = []
    with folded(pack, [replica]), injection, torch.inference_mode():
        for rows in torch.arange(len(data.tokens)).split(BATCH):
            batch = data.batch(rows)
            injection.begin(batch.valid.view(1, -1))
            exact += token_loss(answer_logits(pack.model, batch), batch).exact.tolist()
    return exact


def plain_prompts(*, vocabulary: int = 64) -> TokenSet:
    """Return prompts of 3 to 12 tokens, each with an answer of one token that does not matter."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, vocabulary, (ROWS, 40), generator=generator)
    answer = torch.zeros_like(tokens, dtype=torch.bool)
    valid = torch.zeros_like(answer)
    for row in range(ROWS):
        length = 3 + row % 10
        answer[row, length] = True
        valid[row, : length + 1] = True
        tokens[row, length] = 2
    return TokenSet(tokens, answer, valid, 0)


def written(
    pack: ReplicaPack, data: TokenSet, batch_size: int = BATCH, **fields: Any
) -> list[Generated]:
    fields = {"stream": "test", "decode": no_text, **fields}
    return list(generated_exact_match(pack, data, batch_size, **fields))


def with_answers(prompts: TokenSet, answers: Sequence[Sequence[int]], end: int) -> TokenSet:
    """Return the prompts with other answers."""
    tokens = prompts.tokens.clone()
    answer, valid = torch.zeros_like(prompts.answer), torch.zeros_like(prompts.valid)
    for row, own in enumerate(answers):
        first = int(prompts.answer[row].int().argmax())
        last = first + len(own)
        tokens[row, first:last] = torch.tensor(own)
        tokens[row, last:] = end
        answer[row, first:last] = True
        valid[row, :last] = True
    return TokenSet(tokens, answer, valid, 0)


def ending(prompts: TokenSet, end: int) -> TokenSet:
    """Return the prompts of a language whose end token is `end`."""
    return with_answers(prompts, [[end]] * len(prompts.tokens), end)


def some_right(pack: ReplicaPack, prompts: TokenSet) -> TokenSet:
    """Return the prompts with the answers of a clean run, for one in three rows with a mistake.

    A random model has no end token; the one that ends most of what it writes stands for it.
    """
    (clean, *_) = written(pack, prompts)
    free = [row[:8] for row in clean.written[0]]
    counts = torch.bincount(torch.tensor([t for row in free for t in row[1:]]))
    end = int(counts.argmax())
    answers = []
    for number, row in enumerate(free):
        cut = row.index(end) if end in row else 4
        own = [*row[:cut], end]
        if number % 3 == 0:
            own[number % len(own) - 1] = 5 + number % 50
            own[-1] = end
        answers.append(own)
    return with_answers(prompts, answers, end)


def check_rows(pack: ReplicaPack, data: TokenSet, results: Sequence[Generated]) -> None:
    """Hold what was written against the teacher-forced evaluation, row by row."""
    for one in results:
        assert one.error == "", one.condition.scenario
        wanted = teacher_forced(pack, data, one.replica, one.condition.device)
        assert list(one.exact[0]) == wanted, one.condition.scenario
        assert one.exact_match == sum(wanted) / len(wanted)


# -- the same rows as the teacher-forced evaluation ------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_writes_what_teacher_forcing_says(name: str) -> None:
    method: dict[str, Any] = {"kind": "lora", "rank": 2, "target_modules": ("o_proj",)}
    conditions = CONDITIONS
    if name == "gpt2":
        method, conditions = {"kind": "full"}, CONDITIONS[:-1]
    run = Run(
        training=tiny_training(steps=2, method=method, learning_rate=1e-3),
        seed=2,
        conditions=conditions,
    )
    model = build(name, attention=ARCHITECTURES[name].attention[-1])
    pack = ReplicaPack(model, [run], plain_prompts())
    pack.train_to(2)
    assert not pack.failures
    data = some_right(pack, plain_prompts())
    results = written(pack, data)
    check_rows(pack, data, results)
    assert 0 < results[0].exact_match < 1
    assert len({one.exact for one in results}) > 2


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, each) for name, kind in ARCHITECTURES.items() for each in kind.attention],
)
def test_what_is_written_is_what_transformers_writes_row_by_row(name: str, attention: str) -> None:
    """One prompt at a time, without keys and values kept."""
    model = build(name, attention=attention)
    prompts = plain_prompts()
    bound = 9
    rows, finite = generate_module.greedy(model, prompts, bound, ignored)
    assert bool(finite.all())
    for row, (tokens, answer) in enumerate(zip(prompts.tokens, prompts.answer, strict=True)):
        prompt = tokens[: int(answer.int().argmax())].unsqueeze(0)
        for position in range(bound):
            with torch.no_grad():
                best = int(model(input_ids=prompt, use_cache=False).logits[0, -1].argmax())
            assert rows[row][position] == best
            prompt = torch.cat([prompt, torch.tensor([[best]])], dim=1)
            if best == 2:
                assert len(rows[row]) == position + 1
                break


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def trained(folder: Path, *runs: Run) -> ReplicaPack:
    setting = tiny_setting(folder, dtype="float64")
    data = load_tokens(load_tokenizer(setting.model), setting.task.splits().train, 64)
    pack = ReplicaPack(build_model(setting.model), runs, data)
    pack.train_to(runs[0].training.steps)
    assert not pack.failures
    return pack


def test_runs_of_a_pack_write_their_own_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In folds of several runs and conditions, one of them without a layer: what each writes alone."""
    training = tiny_training(steps=3, learning_rate=5e-2)
    runs = [
        Run(training=training, seed=2, conditions=CONDITIONS),
        Run(training=training, seed=4, conditions=CONDITIONS, skip=(2,)),
    ]
    pack = trained(folder, *runs)
    data = some_right(pack, plain_prompts(vocabulary=384))
    monkeypatch.setattr(generate_module, "FOLD_TOKENS", 10**6)
    together = written(pack, data)
    check_rows(pack, data, together)
    monkeypatch.setattr(generate_module, "FOLD_TOKENS", 1)
    assert written(pack, data) == together
    assert together[0].written != together[len(CONDITIONS)].written
    assert all(module.replica_of_fold is None for module in pack.folded)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_batches_are_filled_with_rows_that_write_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """Products over a number of rows that is no multiple of 16 round by what else is in the pass."""
    run = Run(training=tiny_training(steps=3), seed=2, conditions=CONDITIONS)
    pack = trained(folder, run)
    data = some_right(pack, plain_prompts(vocabulary=384))
    plain = written(pack, data)
    seen: list[tuple[int, int]] = []
    whole = generate_module.greedy

    def watched(
        model: nn.Module,
        batch: TokenSet,
        bound: int,
        announce: Callable[[Tensor], None],
        **over: Any,
    ) -> tuple[list[tuple[int, ...]], Tensor]:
        seen.append((len(batch.tokens), int((~over["is_over"]).sum())))
        answers, finite = whole(model, batch, bound, announce, **over)
        assert not any(answers[row] for row in over["is_over"].nonzero().flatten().tolist())
        return answers, finite

    monkeypatch.setattr(generate_module, "greedy", watched)
    assert written(pack, data, batch_size) == plain
    assert all(rows % 16 == 0 for rows, _ in seen)
    assert sum(real for _, real in seen) == ROWS * len(CONDITIONS)


@pytest.mark.parametrize("method", ["full", "checkpointed"])
def test_other_ways_to_train_write_as_well(folder: Path, method: str) -> None:
    """Layers that save activations drop keys and values while they are in training mode."""
    changes: dict[str, Any] = {"gradient_checkpointing": True}
    if method == "full":
        changes = {"method": {"kind": "full"}, "learning_rate": 1e-3}
    training = tiny_training(steps=2, **changes)
    runs = [Run(training=training, seed=seed, conditions=CONDITIONS[:2]) for seed in (2, 4)]
    pack = trained(folder, *runs)
    data = some_right(pack, plain_prompts(vocabulary=384))
    layers = [pack.book.layer_output(layer).module for layer in range(LAYERS)]
    before = [layer.training for layer in layers]
    check_rows(pack, data, written(pack, data))
    assert [layer.training for layer in layers] == before == [method != "full"] * LAYERS


@pytest.fixture(scope="module")
def embedded() -> tuple[ReplicaPack, Any]:
    model = ModelSpec(path="embedded")
    tokenizer = load_tokenizer(model)
    task = WordProblems(train_rows=8, validation_rows=ROWS, test_rows=8)
    faults = (
        DeadZone(layers=(10,), threshold=0.3),
        DeadZone(layers=(10,), modules=("linear",), site="weight", threshold=0.4),
        DeadZone(layers=(10,), threshold=0.2, reference="tensor_max"),
    )
    conditions = (
        CLEAN,
        *(
            under(f"s{n}", Device(faults=(fault,)).resolved(28, weights_trained=False))
            for n, fault in enumerate(faults)
        ),
    )
    run = Run(training=tiny_training(steps=2), seed=2, conditions=conditions)
    train = load_tokens(tokenizer, task.splits().train, 64)
    return ReplicaPack(build_model(model), [run], train), tokenizer


@pytest.mark.slow
def test_the_embedded_model_writes_what_teacher_forcing_says(
    embedded: tuple[ReplicaPack, Any],
) -> None:
    """Clean, token by token and with a worn weight; a maximum over the whole batch is another matter."""
    pack, tokenizer = embedded
    task = WordProblems(train_rows=8, validation_rows=ROWS, test_rows=8)
    data = load_tokens(tokenizer, task.splits().validation, 64)
    results = written(pack, data, decode=tokenizer.decode)
    check_rows(pack, data, results[:3])
    assert 0 < results[0].exact_match < 1
    assert len({one.written for one in results}) == 4
    for one in results:
        assert one.answer_match >= one.exact_match
    *_, batch_wide = results
    assert batch_wide.error == ""
    forced = teacher_forced(pack, data, 0, batch_wide.condition.device)
    assert list(batch_wide.exact[0]) != forced


def test_a_reference_over_the_batch_sees_another_batch_here(folder: Path) -> None:
    """The maximum of a step is over one token per row, not over all tokens: rows may come out otherwise."""
    widest = on(DeadZone(layers=(1,), threshold=0.15, reference="tensor_max"))
    own = on(DeadZone(layers=(1,), threshold=0.15))
    run = Run(
        training=tiny_training(steps=2), seed=2, conditions=(CLEAN, under("b", widest), under("t", own))
    )  # fmt: skip
    pack = trained(folder, run)
    data = plain_prompts(vocabulary=384)
    _, batch_wide, by_token = written(pack, data)
    assert batch_wide.error == by_token.error == ""
    half = data.batch(torch.arange(BATCH // 2))
    (_, other, same) = written(pack, half)
    rows = BATCH // 2
    assert same.written[0] == by_token.written[0][:rows]
    assert other.written[0] != batch_wide.written[0][:rows]


# -- what counts as right --------------------------------------------------------------------------


class Letters:
    """A tokenizer of characters."""

    eos_token_id = 1
    pad_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))


class Actor(nn.Module):
    """A model that has its lines: what it writes behind each prompt."""

    def __init__(self, model: nn.Module, lines: dict[str, str]) -> None:
        super().__init__()
        self.model = model
        self.lines = lines
        self.config = model.config

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **fields: Any) -> Any:
        """Speak the line of whoever is called upon: a question tells who is to answer."""
        text = [] if past_key_values is None else past_key_values
        text = [*text, *input_ids.unbind(dim=1)]
        out = torch.zeros(len(input_ids), 1, 256)
        for row, tokens in enumerate(torch.stack(text, dim=1).tolist()):
            said = "".join(map(chr, tokens))
            for question, line in self.lines.items():
                if said.startswith(question):
                    at = len(said) - len(question)
                    out[row, 0, ord(line[at]) if at < len(line) else 1] = 1.0
        return type("Output", (), {"logits": out, "past_key_values": text})


def test_exactly_written_and_rightly_solved_are_told_apart(folder: Path) -> None:
    questions = ["a", "bc", "def", "ghij", "klmno"]
    right = "2 + 3 = 5\n#### 5"
    lines = [
        right,
        "5 is it\n#### 5",  # solved in another way
        "2 + 3 = 6\n#### 6",
        f"{right}\nand so on and so on",  # right and not over
        "no answer",
    ]
    examples = [Example(question, right) for question in questions]
    data = load_tokens(Letters(), examples, 64)
    pack = trained(folder, Run(training=tiny_training(steps=2), seed=2, conditions=(CLEAN,)))
    said = {prompt(question): f" {line}" for question, line in zip(questions, lines, strict=True)}
    pack.model = Actor(pack.model, said)  # type: ignore[assignment]
    (result,) = generated_exact_match(pack, data, 2, stream="test", decode=Letters().decode)
    assert result.exact == ((True, False, False, False, False),)
    assert result.solved == ((True, True, False, True, False),)
    assert result.exact_match == 0.2
    assert result.answer_match == pytest.approx(0.6)
    texts = [Letters().decode(row) for row in result.written[0]]
    longest = len(right) + 2
    assert texts[:3] == [f" {line}\x01" for line in lines[:3]]
    assert texts[3] == f" {lines[3]}"[: longest + EXTRA_TOKENS]


def test_rows_end_with_the_places_of_the_model() -> None:
    """A learnt position that does not exist would be an error of the look-up."""
    model = build("gpt2")
    rows, _ = generate_module.greedy(model, ending(plain_prompts(), 999), 80, ignored)
    for row, tokens in enumerate(rows):
        assert len(tokens) == 64 - (3 + row % 10) + 1


def test_positions_that_the_rows_take_up_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary models run beyond the length that they state."""
    model = build("llama")
    wanted, _ = generate_module.greedy(model, plain_prompts(), 6, ignored)
    monkeypatch.setattr(model.config, "max_position_embeddings", 4)
    assert generate_module.greedy(model, plain_prompts(), 6, ignored)[0] == wanted


def test_what_goes_through_the_model_is_announced_and_rows_that_are_over_are_not_counted() -> None:
    """Prompts of 3 to 12 tokens: three at once, up to nine one by one, and then what is written."""
    model = build("llama")
    prompts = plain_prompts()
    seen: list[torch.Tensor] = []
    free, _ = generate_module.greedy(model, ending(prompts, 999), 6, seen.append)
    assert {len(row) for row in free} == {6}
    assert [tuple(mask.shape) for mask in seen] == [(ROWS, 3), *[(ROWS, 1)] * 14]
    assert bool(seen[0].all())
    end = free[0][2]
    seen.clear()
    rows, _ = generate_module.greedy(model, ending(prompts, end), 6, seen.append)
    for row, tokens in enumerate(rows):
        wanted = free[row][: free[row].index(end) + 1] if end in free[row] else free[row]
        assert tokens == wanted
        counted = 3 + sum(bool(mask[row, 0]) for mask in seen[1:])
        assert counted == (3 + row % 10) + len(wanted) - 1  # the last token goes nowhere
    assert len({len(row) for row in rows}) > 1


def test_a_model_without_keys_and_values_is_refused() -> None:
    model = build("llama")
    forward = model.forward

    def forgetful(**fields: Any) -> Any:
        return forward(**{**fields, "use_cache": False})

    model.forward = forgetful  # type: ignore[method-assign]
    with pytest.raises(UserError, match="hands back no keys and values"):
        generate_module.greedy(model, plain_prompts(), 2, ignored)


# -- devices ---------------------------------------------------------------------------------------


def test_errors_are_drawn_anew_for_every_token_draw_and_split(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = under("n", on(RelativeGaussian(layers=(1,), modules=(".",), scale=0.5)), draws=2)
    pack = trained(folder, Run(training=tiny_training(steps=2), seed=2, conditions=(CLEAN, drawn)))
    data = plain_prompts(vocabulary=384)
    seen: list[tuple[Any, ...]] = []
    original = generate_module.stream_seed

    def record(seed: int, *path: Any) -> int:
        seen.append((seed, *path))
        return original(seed, *path)

    monkeypatch.setattr(generate_module, "stream_seed", record)
    clean, noisy = written(pack, data)
    assert clean.error == noisy.error == ""
    assert noisy.written[0] != noisy.written[1]
    assert clean.written[0] != noisy.written[0]
    assert len(seen) == len(set(seen)) > 2 * 3 * 5
    assert {path[1:3] for path in seen} == {("generate", "test")}
    assert written(pack, data) == [clean, noisy]


def test_the_audit_is_that_of_every_evaluation(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    condition = under("d", DEVICES["token by token"])
    pack = trained(
        folder, Run(training=tiny_training(steps=2), seed=2, conditions=(CLEAN, condition))
    )
    data = plain_prompts(vocabulary=384)
    assert [one.error for one in written(pack, data)] == ["", ""]
    with monkeypatch.context() as planted:
        planted.setattr(generate_module, "Entry", lambda device, skip: Entry(HEALTHY))
        _, faulty = written(pack, data)
        assert faulty.error.endswith("'faulty' d declares 1 faults, 0 are attached")
    with monkeypatch.context() as planted:
        planted.setattr(DeadZone, "apply", lambda self, x, params, valid, draws: x)
        _, faulty = written(pack, data)
        assert "declares 1 faults, 0 changed a value in" in faulty.error
    monkeypatch.setattr(Injection, "_fault", lambda self, address, slot, tally, x: x)
    _, faulty = written(pack, data)
    assert "dead_zone was in place 0 times of" in faulty.error


def test_failed_runs_write_nothing(folder: Path) -> None:
    run = Run(training=tiny_training(steps=2), seed=2, conditions=(CLEAN,))
    pack = trained(folder, run, run.model_copy(update={"seed": 4}))
    pack.failures[0] = "diverged"
    assert [one.replica for one in written(pack, plain_prompts(vocabulary=384))] == [1]


# -- in a study ------------------------------------------------------------------------------------


def two_rungs(folder: Path, *, generate: bool) -> list[RungReport]:
    setting = tiny_setting(folder)
    runs = [
        Run(
            training=tiny_training(),
            seed=seed,
            conditions=(CLEAN, under("s", DEVICES["token by token"])),
        )
        for seed in (2, 4)
    ]
    opened = ENGINE.open_pack(
        one_pack(*runs, rungs=(3, 6), generate=generate), setting, ENGINE.load(setting, "test", 64)
    )
    return [opened.advance(), opened.advance()]


def test_a_pack_that_is_asked_to_writes_at_its_last_rung(folder: Path) -> None:
    first, last = two_rungs(folder, generate=True)
    assert {row.generated_exact_match for row in first.evaluations} == {None}
    assert len(last.evaluations) == 4
    for row in last.evaluations:
        assert row.generated_exact_match == row.exact_match, "the fault looks at its own token only"
        assert row.answer_match is not None
        assert row.answer_match >= row.generated_exact_match
    _, plain = two_rungs(folder, generate=False)
    without = {"generated_exact_match": None, "answer_match": None}
    assert [row.model_copy(update=without) for row in last.evaluations] == list(plain.evaluations)
    assert "generated_exact_match" not in plain.evaluations[0].model_dump()


def test_a_run_that_wrote_on_the_wrong_device_is_failed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(pack: ReplicaPack, *args: Any, **fields: Any) -> Any:
        for one in generated_exact_match(pack, *args, **fields):
            yield one._replace(error="not this device") if one.replica else one

    monkeypatch.setattr(engine_module, "generated_exact_match", wrong)
    _, last = two_rungs(folder, generate=True)
    assert [row.status for row in last.trainings] == ["finished", "failed"]
    assert last.trainings[1].error == "not this device"
    assert {row.training_key for row in last.evaluations} == {last.trainings[0].training_key}
