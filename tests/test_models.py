"""Base models: what is shipped, what any Hugging Face folder gives, what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from aqn_tune.errors import UserError
from aqn_tune.models import (
    ModelSpec,
    base_arrays,
    build_model,
    decoder_layers,
    fingerprint,
    load_tokenizer,
    model_folder,
)
from aqn_tune.models.build import build, main, missed_targets, score
from aqn_tune.models.locate import EMBEDDED_FOLDER, folder_fingerprint
from aqn_tune.models.pretrain import Phase, Recipe, Scores, initial_model
from aqn_tune.models.tokenizer import save_tokenizer, train_tokenizer
from aqn_tune.tasks import Example, WordProblems, completion, extract_answer, prompt
from aqn_tune.tasks.encode import encode

TINY = Recipe(
    layers=2,
    hidden=32,
    intermediate=32,
    vocabulary=300,
    batch=4,
    length=128,
    phases=(
        Phase(steps=10, learning_rate=3e-3, warmup_steps=5, decay_steps=20, finetuning_share=0.0),
        Phase(steps=10, learning_rate=1e-3, warmup_steps=0, decay_steps=20, finetuning_share=0.5),
    ),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with untied weights, saved the way transformers saves models."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(ModelSpec()).save_pretrained(folder)
    return folder


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


# The shipped folder ------------------------------------------------------------------------------


def test_the_manifest_is_that_of_the_shipped_files() -> None:
    manifest = json.loads((EMBEDDED_FOLDER / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["fingerprint"] == folder_fingerprint(EMBEDDED_FOLDER)
    assert manifest["fingerprint"] == fingerprint(ModelSpec())
    assert manifest["recipe"] == Recipe().model_dump(mode="json")
    recorded = {
        name: Scores(value["exact_match"], value["cross_entropy"])
        for name, value in manifest["scores"].items()
    }
    assert missed_targets(recorded) == []
    assert (EMBEDDED_FOLDER / "model.safetensors").stat().st_size < 2_300_000


def test_the_shipped_model_has_the_shape_the_design_speaks_of() -> None:
    model = build_model(ModelSpec())
    assert model.config.model_type == "qwen2"
    assert len(decoder_layers(model)) == 28
    assert sum(p.numel() for p in model.parameters()) == 1_064_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_shipped_model_half_knows_the_task() -> None:
    scores = score(build_model(ModelSpec()), load_tokenizer(ModelSpec()), rows=200)
    assert scores["base"].exact_match >= 0.95
    assert 0.38 <= scores["finetuning"].exact_match <= 0.62


@pytest.mark.slow
def test_the_shipped_model_scores_what_its_manifest_says() -> None:
    manifest = json.loads((EMBEDDED_FOLDER / "manifest.json").read_text(encoding="utf-8"))
    scores = score(build_model(ModelSpec()), load_tokenizer(ModelSpec()))
    assert missed_targets(scores) == []
    for name, value in scores.items():
        recorded = manifest["scores"][name]
        assert value.exact_match == pytest.approx(recorded["exact_match"], abs=0.01)
        assert value.cross_entropy == pytest.approx(recorded["cross_entropy"], rel=0.01)


def test_writing_an_answer_out_agrees_with_teacher_forcing() -> None:
    tokenizer, model = load_tokenizer(ModelSpec()), build_model(ModelSpec())
    rows = WordProblems(validation_rows=6).splits().validation
    encoded = encode(tokenizer, rows, 64)
    with torch.no_grad():
        best = model(input_ids=torch.from_numpy(encoded.tokens)).logits.argmax(-1).numpy()
    for index, row in enumerate(rows):
        mask = encoded.answer_mask[index, 1:]
        forced = bool((best[index, :-1] == encoded.tokens[index, 1:])[mask].all())
        ids = torch.tensor([tokenizer(prompt(row.question))["input_ids"]])
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
        )
        text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        assert (text == completion(row.answer)) == forced
        if forced:
            assert extract_answer(text) == extract_answer(row.answer)


# The tokenizer -----------------------------------------------------------------------------------


def strings(count: int) -> list[str]:
    """Texts of every kind: rows of the task, other languages, spaces and line ends, digits."""
    rng = Random(11)
    rows = WordProblems(train_rows=count // 2).splits().train
    texts = [prompt(row.question) + completion(row.answer) for row in rows]
    alphabet = "ab Z09.,:#-+*/=<>\n\r\t'é漢😀  ½٣"
    while len(texts) < count:
        texts.append("".join(rng.choice(alphabet) for _ in range(rng.randint(0, 40))))
    return texts


def test_auto_tokenizer_gives_the_ids_of_the_tokenizer_that_was_built(tmp_path: Path) -> None:
    """``AutoTokenizer`` puts Qwen2's own pre-tokenizer in place of a saved one, silently."""
    built = train_tokenizer(strings(200), 384)
    save_tokenizer(built, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"")
    loaded = load_tokenizer(ModelSpec(path=str(tmp_path)))
    for text in strings(500):
        assert loaded(text)["input_ids"] == built.encode(text).ids


def test_the_tokenizer_swap_is_seen(tmp_path: Path) -> None:
    """The planted bug: a tokenizer that is not Qwen2's loses its spaces on the way."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = "Question: 12+7=19\nok"
    vocabulary = {c: i for i, c in enumerate(sorted(set(text)))}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token=" ").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"")
    loaded = load_tokenizer(ModelSpec(path=str(tmp_path)))
    assert loaded(text)["input_ids"] != plain.encode(text).ids


def test_the_shipped_tokenizer_is_lossless_and_splits_digits() -> None:
    import unicodedata

    from tokenizers import Tokenizer

    loaded = load_tokenizer(ModelSpec())
    saved = Tokenizer.from_file(str(EMBEDDED_FOLDER / "tokenizer.json"))
    for text in strings(500):
        ids = loaded(text)["input_ids"]
        assert ids == saved.encode(text).ids
        assert loaded.decode(ids) == unicodedata.normalize("NFC", text)
    assert loaded.convert_ids_to_tokens(loaded("1234")["input_ids"]) == list("1234")
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (0, 1, 374)
    assert loaded.padding_side == "right"


@pytest.mark.parametrize("answer", ["5", "Natalia", "(5)", "'s", "\n5", "  5", "-5", "$5"])
def test_the_prompt_is_a_prefix_whatever_the_answer_begins_with(answer: str) -> None:
    encoded = encode(load_tokenizer(ModelSpec()), [Example("Why?", answer)], 64)
    tokenizer = load_tokenizer(ModelSpec())
    assert tokenizer.decode(encoded.tokens[encoded.answer_mask][:-1]) == completion(answer)


# Weights as arrays -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float32", "float32"), ("float64", "float64"), ("bfloat16", "uint16")]
)
def test_arrays_rebuild_the_model_and_stay_as_they_are(dtype: Any, stored: str) -> None:
    spec = ModelSpec(dtype=dtype)
    arrays = base_arrays(spec)
    assert {str(array.dtype) for array in arrays.values()} == {stored}
    assert all(a.flags["C_CONTIGUOUS"] and a.flags["OWNDATA"] for a in arrays.values())
    assert "lm_head.weight" not in arrays
    assert sum(array.size for array in arrays.values()) == 1_064_000
    before = {name: array.tobytes() for name, array in arrays.items()}
    for array in arrays.values():
        array.setflags(write=False)

    model = build_model(spec, pickle.loads(pickle.dumps(arrays)))
    other = build_model(spec, arrays)
    assert torch.equal(logits(model, [5, 6, 7]), logits(build_model(spec), [5, 6, 7]))
    assert torch.equal(logits(model, [5, 6, 7]), logits(other, [5, 6, 7]))
    assert not model.training
    assert not model.config.use_cache
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert {name: array.tobytes() for name, array in arrays.items()} == before


def test_building_moves_no_global_random_state() -> None:
    before = torch.random.get_rng_state()
    build_model(ModelSpec())
    initial_model(TINY)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_arrays_of_another_model_are_refused() -> None:
    spec = ModelSpec()
    arrays = base_arrays(spec)
    name = next(iter(arrays))
    with pytest.raises(ValueError, match=f"names in one only.*{name}"):
        build_model(spec, {key: value for key, value in arrays.items() if key != name})
    with pytest.raises(ValueError, match=r"this model has torch\.float64"):
        build_model(ModelSpec(dtype="float64"), arrays)
    with pytest.raises(ValueError, match=r"\(1,\), this model has"):
        build_model(spec, {**arrays, name: np.zeros(1, dtype=np.float32)})


# Any Hugging Face folder -------------------------------------------------------------------------


def test_a_llama_folder_loads_through_the_same_spec(llama_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    spec = ModelSpec(path=str(llama_folder))
    ours = build_model(spec, base_arrays(spec))
    theirs = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    ids = load_tokenizer(spec)("Leo has 19 pens.")["input_ids"]
    assert torch.equal(logits(ours, ids), logits(theirs, ids))
    assert decoder_layers(ours) is ours.model.layers
    assert "lm_head.weight" in base_arrays(spec)


def test_a_fingerprint_follows_content_and_not_place(llama_folder: Path, tmp_path: Path) -> None:
    import shutil

    first = fingerprint(ModelSpec(path=str(llama_folder)))
    copy = shutil.copytree(llama_folder, tmp_path / "copy")
    (copy / "README.md").write_text("not part of the model", encoding="utf-8")
    spec = ModelSpec(path=str(copy))
    assert fingerprint(spec) == first
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content + b" ")
        assert fingerprint(spec) != first, name
        (copy / name).write_bytes(content)
    assert fingerprint(spec) == first


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=30))


def mixtral() -> Any:
    """Mixture of experts: lists of experts inside layers must not be taken for the layers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            num_hidden_layers=3,
            num_local_experts=3,
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=30,
        )
    )


@pytest.mark.parametrize(("make", "path"), [(gpt2, "transformer.h"), (mixtral, "model.layers")])
def test_the_decoder_layers_are_found_by_structure(make: Any, path: str) -> None:
    with torch.random.fork_rng(devices=[]):
        model = make()
    assert decoder_layers(model) is model.get_submodule(path)
    assert decoder_layers(model)[1] is model.get_submodule(f"{path}.1")


# peft 0.21 asks transformers 5.23 by a name that transformers is about to drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_decoder_layers_are_found_through_peft() -> None:
    from peft import LoraConfig, get_peft_model

    model = build_model(ModelSpec())
    layers = decoder_layers(model)
    with torch.random.fork_rng(devices=[]):
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert decoder_layers(wrapped) is layers


def test_two_lists_that_could_be_the_layers_are_refused() -> None:
    model = build_model(ModelSpec())
    model.add_module("twin", torch.nn.ModuleList(torch.nn.Identity() for _ in range(28)))
    with pytest.raises(UserError, match=r"28 alike modules, found model\.layers, twin"):
        decoder_layers(model)
    with pytest.raises(UserError, match="found none"):
        decoder_layers(torch.nn.Linear(2, 2))


# What is refused ---------------------------------------------------------------------------------


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")


def own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "none_such"}', encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (without_weights, "holds no weights; weights are read from safetensors"),
        (only_bin, r"holds only pytorch_model\.bin; weights are read from safetensors"),
        (without_config, "holds no config.json"),
        (broken_config, "config.json is no JSON"),
        (own_code, "brings code of its own"),
        (unknown_architecture, "cannot be loaded as a causal language model: .*none_such"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(
    llama_folder: Path, tmp_path: Path, damage: Any, complaint: str
) -> None:
    import shutil

    folder = shutil.copytree(llama_folder, tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError, match=complaint):
        base_arrays(ModelSpec(path=str(folder)))


@pytest.mark.parametrize("path", ["/none/such", "./none-such", "a/b/c", "~/none-such-folder"])
def test_a_missing_folder_is_refused_without_a_look_at_the_network(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match=r"model\.path: no folder"):
        model_folder(ModelSpec(path=path))


def test_a_hub_name_that_cannot_be_had_is_a_user_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="'none/such' is no folder here and cannot be had"):
        model_folder(ModelSpec(path="none/such"))


def test_a_local_folder_makes_no_network_attempt(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("a local folder must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    spec = ModelSpec(path=str(llama_folder))
    build_model(spec)
    load_tokenizer(spec)


def test_a_revision_of_a_folder_is_refused(llama_folder: Path) -> None:
    for path in ("embedded", str(llama_folder)):
        with pytest.raises(UserError, match=r"model\.revision = 'main'"):
            model_folder(ModelSpec(path=path, revision="main"))


# The build command -------------------------------------------------------------------------------


def test_a_small_build_from_end_to_end(tmp_path: Path) -> None:
    lines: list[str] = []
    scores = build(tmp_path / "a", TINY, lines.append, rows=8)
    again = build(tmp_path / "b", TINY, lambda _: None, rows=8)
    assert scores == again
    spec = ModelSpec(path=str(tmp_path / "a"))
    assert fingerprint(spec) == fingerprint(ModelSpec(path=str(tmp_path / "b")))
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["fingerprint"] == fingerprint(spec)
    assert manifest["recipe"] == TINY.model_dump(mode="json")
    assert manifest["scores"]["base"]["cross_entropy"] == scores["base"].cross_entropy
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "phase 1, step 10/10",
        "phase 2, step 10/10",
        "base",
        "finetuning",
    ]
    # Ten steps of each phase must teach something: below the loss of a uniform guess.
    assert scores["base"].cross_entropy < np.log(TINY.vocabulary)
    assert missed_targets(scores) != []


def test_a_different_seed_gives_a_different_model(tmp_path: Path) -> None:
    recipe = TINY.model_copy(update={"phases": (TINY.phases[0].model_copy(update={"steps": 1}),)})
    build(tmp_path / "a", recipe, lambda _: None, rows=1)
    build(tmp_path / "b", recipe.model_copy(update={"seed": 1}), lambda _: None, rows=1)
    first, second = (base_arrays(ModelSpec(path=str(tmp_path / name))) for name in "ab")
    assert any(not np.array_equal(first[name], second[name]) for name in first)


def test_the_learning_rate_of_a_phase() -> None:
    phase = Phase(steps=8, learning_rate=2.0, warmup_steps=4, decay_steps=8, finetuning_share=0.0)
    rates = [phase.rate(step) for step in range(8)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, pytest.approx(1.0)]
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_the_build_command_keeps_off_a_folder_in_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert main(["--out", str(tmp_path)]) == 2
    assert "it is there and not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("base", "finetuning", "missed"),
    [(0.97, 0.5, 0), (0.94, 0.5, 1), (0.97, 0.39, 1), (0.97, 0.61, 1), (0.5, 0.9, 2)],
)
def test_targets(base: float, finetuning: float, missed: int) -> None:
    scores = {"base": Scores(base, 0.1), "finetuning": Scores(finetuning, 0.1)}
    assert len(missed_targets(scores)) == missed
