"""Passes that share layers: the same numbers bit for bit, fewer layers run, and audits that still see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import exact
from test_injection_devices import every_run
from test_injection_models import ARCHITECTURES, SHAPE, build
from tiny import CLEAN, LAYERS, save_tiny_model, tiny_setting, tiny_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTJConfig

from aqn_tune.faults import Bias, DeadZone, FaultSpec, RelativeGaussian, Saturation, StuckAt
from aqn_tune.injection import apply as apply_module
from aqn_tune.injection.address import AddressBook
from aqn_tune.injection.fold import Entry
from aqn_tune.injection.injection import Injection
from aqn_tune.injection.layout import Layout
from aqn_tune.models.load import build_model, decoder_layers, load_tokenizer
from aqn_tune.quantization import MXFP4, Int8
from aqn_tune.study.device import Device
from aqn_tune.study.runs import Condition, Run
from aqn_tune.training import evaluate as evaluate_module
from aqn_tune.training import prefix
from aqn_tune.training.data import TokenSet, answer_logits, load_tokens
from aqn_tune.training.evaluate import Evaluated, evaluate
from aqn_tune.training.pack import ReplicaPack

torch.set_num_threads(1)

BATCH = 16
TRAINING = tiny_training(steps=4)
END = LAYERS + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def held_out(folder: Path) -> TokenSet:
    setting = tiny_setting(folder)
    return load_tokens(load_tokenizer(setting.model), setting.task.splits().test, 64)


def on(*faults: FaultSpec, quantized: Sequence[Any] = (), **fields: Any) -> Device:
    device = Device(faults=faults, quantization=tuple(quantized), **fields)
    return device.resolved(LAYERS, weights_trained=False)


def under(name: str, device: Device, **fields: Any) -> Condition:
    return Condition(name="faulty", scenario=name, device=device, **fields)


def dead(*layers: int, threshold: float = 0.1, **fields: Any) -> DeadZone:
    return DeadZone(layers=layers, threshold=threshold, reference="tensor_max", **fields)


def linears(kind: type[FaultSpec], *layers: int, site: str = "output", **fields: Any) -> FaultSpec:
    return kind(layers=layers, modules=("linear",), site=site, **fields)


WORN = linears(DeadZone, 1, site="weight", threshold=0.1)
DRAWN = linears(RelativeGaussian, 2, scale=0.1)
DEVICES: dict[str, Device] = {
    "dead 1": on(dead(1)),
    "dead 1 harder": on(dead(1, threshold=0.3)),
    "dead 1 and 3": on(dead(1, 3)),
    "dead 3": on(dead(3)),
    "dead 3 harder": on(dead(3, threshold=0.3)),
    "dead 1, clipped 3": on(dead(1), Saturation(layers=(3,), limit=0.5)),
    "dead 1, drawn 2": on(dead(1), DRAWN),
    "into layer 2": on(dead(2, site="input")),
    "W4A4": on(quantized=[MXFP4()]),
    "W4A4 dead 1": on(dead(1), quantized=[MXFP4()]),
    "W4A4 dead 1 harder": on(dead(1, threshold=0.3), quantized=[MXFP4()]),
    "W4A4 faulty path": on(quantized=[MXFP4()], adapter_path="faulty"),
    "W4A4 from layer 2": on(quantized=[MXFP4(layers=(2, 3))]),
    "W8 dead 2": on(dead(2), quantized=[Int8(operands="weight")]),
    "keys alone": on(quantized=[MXFP4(modules=("self_attn.k_proj",))]),
    "worn": on(WORN),
    "worn 1 and 2": on(WORN.model_copy(update={"layers": (1, 2)})),
    "worn dead 3": on(WORN, dead(3)),
    "worn faulty path": on(WORN, linears(Bias, 2, scale=0.1), adapter_path="faulty"),
    "offset everywhere, dead 1": on(linears(Bias, 0, 1, 2, 3, scale=0.05), dead(1)),
    "offset everywhere, dead 2": on(linears(Bias, 0, 1, 2, 3, scale=0.05), dead(2)),
    "merged": on(dead(3), deploy="merged"),
    "merged harder": on(dead(3, threshold=0.3), deploy="merged"),
    "merged W4 dead 3": on(dead(3), quantized=[MXFP4()], deploy="merged"),
}
STUCK = StuckAt(layers=(2,), value=0.5, density=0.2, axis="channel")
MANY = (
    CLEAN,
    *(under(name, device) for name, device in DEVICES.items()),
    under("drawn", on(dead(0), DRAWN), draws=3),
    under("unseen", on(dead(0), STUCK, seed=5), unseen=True, draws=3),
    under("drawn weights", on(linears(RelativeGaussian, 1, site="weight", scale=0.1)), draws=2),
)


def open_pack(folder: Path, runs: Sequence[Run], *, steps: int = 4) -> ReplicaPack:
    setting = tiny_setting(folder)
    train = load_tokens(load_tokenizer(setting.model), setting.task.splits().train, 64)
    pack = ReplicaPack(build_model(setting.model), runs, train)
    pack.train_to(steps)
    return pack


def run_under(*conditions: Condition, seed: int = 2, **fields: Any) -> Run:
    return Run(training=TRAINING, seed=seed, conditions=conditions, **fields)


@pytest.fixture(scope="module")
def crowd(folder: Path) -> ReplicaPack:
    """Return runs under every condition, one of them with a layer left out."""
    return open_pack(
        folder, [run_under(*MANY), run_under(*MANY, seed=4), run_under(*MANY, skip=(2,))]
    )


def apart(patch: pytest.MonkeyPatch) -> None:
    """Run every pass by itself."""
    patch.setattr(evaluate_module._Evaluation, "_can_cut", lambda self, depth: False)


def evaluated(pack: ReplicaPack, data: TokenSet) -> list[Evaluated]:
    return list(evaluate(pack, data, BATCH, stream="test"))


# -- the same numbers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_themselves(folder: Path, crowd: ReplicaPack) -> list[Evaluated]:
    """Return what the passes of the crowd come to one by one, sharing neither layers nor a fold."""
    with pytest.MonkeyPatch.context() as patch:
        apart(patch)
        patch.setattr(evaluate_module, "FOLD_TOKENS", 1)
        return evaluated(crowd, held_out(folder))


@exact
@pytest.mark.parametrize("tokens", [1, 3000, 10**6], ids=["one by one", "folds", "one fold"])
def test_passes_that_share_layers_come_to_the_same_bit_for_bit(
    folder: Path,
    crowd: ReplicaPack,
    by_themselves: list[Evaluated],
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses, draws, measures of faults and quantizers, and no error, whatever is in a fold."""
    monkeypatch.setattr(evaluate_module, "FOLD_TOKENS", tokens)
    shared = evaluated(crowd, held_out(folder))
    assert [one.error for one in shared] == [""] * len(shared)
    for one, other in zip(shared, by_themselves, strict=True):
        assert one == other, (one.replica, one.condition.scenario)
    losses = {one.losses for one in shared if one.replica == 0}
    # Twice two conditions come to one number: two seeds of the path and a path that nothing tells apart.
    assert len(losses) >= len(MANY) - 3


@exact
@pytest.mark.slow
def test_every_device_shares_and_comes_to_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = every_run()
    pack = open_pack(folder, runs)
    assert not pack.failures
    data = held_out(folder)
    shared = evaluated(pack, data)
    apart(monkeypatch)
    assert shared == evaluated(pack, data)


@exact
@pytest.mark.parametrize("method", ["full", "checkpointed"])
def test_other_ways_to_train_share_as_well(
    folder: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "full":
        training = tiny_training(steps=2, method={"kind": "full"}, learning_rate=1e-3)
    else:
        training = tiny_training(steps=2, gradient_checkpointing=True)
    runs = [
        run_under(CLEAN, under("d", DEVICES["dead 1"]), under("q", DEVICES["W4A4 dead 1"]), seed=s)
        for s in (2, 4)
    ]
    runs = [run.model_copy(update={"training": training}) for run in runs]
    pack = open_pack(folder, runs, steps=2)
    data = held_out(folder)
    rows = Counter(rows_run(pack, data))
    shared = evaluated(pack, data)
    assert not any(one.error for one in shared)
    apart(monkeypatch)
    assert shared == evaluated(pack, data)
    assert sum(rows.values()) < sum(rows_run(pack, data).values())


# -- less work -------------------------------------------------------------------------------------


def rows_run(pack: ReplicaPack, data: TokenSet) -> dict[int, int]:
    """Return how many passes each layer ran for a whole split."""
    rows: Counter[int] = Counter()

    def count(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            # The trial cut runs a single row.
            rows[layer] += len(args[0]) if len(args[0]) % BATCH == 0 else 0

        return hook

    hooks = [
        layer.mlp.register_forward_hook(count(number))
        for number, layer in enumerate(decoder_layers(pack.model))
    ]
    evaluated(pack, data)
    for hook in hooks:
        hook.remove()
    return {layer: number // len(data.tokens) for layer, number in rows.items()}


@pytest.mark.parametrize(
    ("conditions", "passes"),
    [
        (["dead 1", "dead 1 harder"], (1, 1, 3, 3)),
        (["dead 1", "dead 3"], (1, 1, 2, 2)),
        (["dead 3", "dead 1", "dead 1 harder", "dead 3 harder"], (1, 1, 3, 3)),
        (["into layer 2"], (1, 1, 2, 2)),
        (["dead 1, drawn 2", "dead 1, clipped 3"], (1, 1, 3, 3)),
        (["W4A4 dead 1", "W4A4 dead 1 harder", "W4A4"], (2, 2, 4, 4)),
        (["W4A4", "W4A4 faulty path"], (3, 3, 3, 3)),
        (["W4A4 from layer 2"], (1, 1, 2, 2)),
        (["worn", "worn dead 3"], (1, 2, 2, 2)),
        (["merged", "merged harder"], (2, 2, 2, 2)),
        # The offset is one measure over all layers: these two are not cut in the middle of it.
        (["offset everywhere, dead 1", "offset everywhere, dead 2"], (3, 3, 3, 3)),
        (["drawn"], (1, 2, 4, 4)),
        (["unseen"], (1, 2, 2, 4)),
    ],
)
def test_a_layer_runs_once_for_all_that_meet_the_same_in_it(
    folder: Path, conditions: list[str], passes: tuple[int, ...]
) -> None:
    by_name = {condition.scenario: condition for condition in MANY}
    pack = open_pack(folder, [run_under(CLEAN, *(by_name[name] for name in conditions))], steps=1)
    rows = rows_run(pack, held_out(folder))
    # What has parted runs on for itself: from the last layer on there are as many as conditions and draws.
    assert tuple(rows[layer] for layer in range(LAYERS)) == passes


def test_no_cut_is_behind_a_layer_that_is_left_out(folder: Path) -> None:
    """What comes out of it is what went in, so that it parts one layer earlier."""
    conditions = (CLEAN, under("d", DEVICES["dead 1"]))
    for skip, passes in (((0,), (1, 1, 2, 2)), ((1,), (1, 2, 2, 2))):
        pack = open_pack(folder, [run_under(*conditions, skip=skip)], steps=1)
        rows = rows_run(pack, held_out(folder))
        assert tuple(rows[layer] for layer in range(LAYERS)) == passes


@exact
def test_replicas_of_a_pack_share_folds_and_nothing_else(folder: Path) -> None:
    conditions = (CLEAN, under("d", DEVICES["dead 1"]))
    runs = [run_under(*conditions, seed=seed) for seed in (2, 4, 6)]
    pack = open_pack(folder, runs)
    rows = rows_run(pack, held_out(folder))
    assert tuple(rows[layer] for layer in range(LAYERS)) == (3, 3, 6, 6)
    together = evaluated(pack, held_out(folder))
    for replica, run in enumerate(runs):
        alone = evaluated(open_pack(folder, [run]), held_out(folder))
        assert alone == [o._replace(replica=0) for o in together if o.replica == replica]


# -- where passes part -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "differs", "cut"),
    [
        ("dead 1", "dead 1", END, END),
        ("dead 1", "dead 1 harder", 2, 2),
        ("dead 1", "dead 1 and 3", 4, 2),  # one measure over both layers
        ("dead 3", "dead 3 harder", 4, 4),
        ("dead 1", "into layer 2", 2, 2),
        ("dead 1, drawn 2", "dead 1", 2, 2),
        ("W4A4", "W4A4 dead 1", 2, 2),
        ("W4A4", "W4A4 faulty path", 0, 0),
        ("worn", "worn 1 and 2", 2, 1),
        ("worn", "worn dead 3", 4, 4),
        ("offset everywhere, dead 1", "offset everywhere, dead 2", 2, 0),
        ("merged", "merged harder", 4, 4),
        ("merged", "dead 3", 0, 0),
    ],
)
def test_the_first_difference_and_the_cut_before_it(
    folder: Path, one: str, other: str, differs: int, cut: int
) -> None:
    pack = open_pack(folder, [run_under(CLEAN)], steps=0)
    routes = [prefix.route(Layout(pack.book, [Entry(DEVICES[name])]), 0) for name in (one, other)]
    assert prefix.difference(routes) == differs
    assert prefix.last_cut(routes) == cut
    assert prefix.last_cut(routes[:1]) == END


def test_a_number_of_the_draw_counts_where_something_is_drawn(folder: Path) -> None:
    book = AddressBook(build_model(tiny_setting(folder).model))
    layout = Layout(book, [Entry(on(dead(0), DRAWN))])
    routes = [prefix.route(layout, draw) for draw in (0, 1)]
    assert prefix.difference(routes) == 2
    layout = Layout(book, [Entry(on(dead(0)))])
    assert prefix.difference([prefix.route(layout, draw) for draw in (0, 1)]) == END


def test_a_fault_that_hides_that_it_draws_is_found_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws would share their random numbers."""
    pack = open_pack(folder, [run_under(CLEAN, under("d", on(DRAWN), draws=2))], steps=1)
    monkeypatch.setattr(RelativeGaussian, "is_stochastic", lambda self: False)
    with pytest.raises(RuntimeError, match="a fault that says it is not random asks for a draw"):
        evaluated(pack, held_out(folder))


# -- any model -------------------------------------------------------------------------------------


def tokens(rows: int = 4, length: int = 16) -> TokenSet:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (rows, length), generator=generator)
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[:, 9:] = True
    return TokenSet(ids, answer, torch.ones_like(answer), 8)


def tuples() -> nn.Module:
    """Return a model whose layers return tuples."""
    config = GPTJConfig(
        vocab_size=64, n_embd=32, n_layer=LAYERS, n_head=2, rotary_dim=8, n_positions=64,
        bos_token_id=1, eos_token_id=2, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def shared_keys() -> nn.Module:
    """Return a model whose last layers attend to keys and values of earlier ones."""
    from transformers import Gemma4TextConfig

    config = Gemma4TextConfig(
        **SHAPE,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=0,
        layer_types=["full_attention"] * LAYERS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def built(name: str) -> nn.Module:
    if name == "gptj":
        return tuples()
    return build(name, attention=ARCHITECTURES[name].attention[-1], dtype=torch.float32)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "gptj"])
def test_any_architecture_can_be_cut_at_any_layer(name: str) -> None:
    model, batch = built(name), tokens()
    layers = decoder_layers(model)
    with torch.inference_mode():
        for depth in range(1, LAYERS + 1):
            assert prefix.can_be_cut(model, layers, batch, depth)
    assert not any("forward" in layer.__dict__ for layer in layers)


@exact
@pytest.mark.parametrize("name", [*ARCHITECTURES, "gptj"])
def test_any_architecture_comes_to_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    last = {"gpt2": "c_proj", "gptj": "out_proj"}.get(name, "o_proj")
    adapters = {"kind": "lora", "rank": 2, "target_modules": (last,)}
    if name == "gpt2":  # its products are no torch.nn.Linear
        adapters = {"kind": "full"}
    training = tiny_training(steps=2, method=adapters)
    conditions = (
        CLEAN,
        under("d", on(dead(1))),
        under("e", on(dead(1, threshold=0.3))),
        under("q", on(quantized=[MXFP4()])),
        under("f", on(dead(2), quantized=[MXFP4()])),
    )
    runs = [Run(training=training, seed=2, conditions=conditions)]
    pack = ReplicaPack(built(name), runs, tokens(rows=16))
    pack.train_to(2)
    assert not pack.failures
    data = tokens(rows=2 * BATCH)
    shared = evaluated(pack, data)
    assert not any(one.error for one in shared)
    assert len({one.losses for one in shared}) == len(conditions)
    apart(monkeypatch)
    assert shared == evaluated(pack, data)


def test_a_model_whose_layers_share_more_than_hidden_states_is_run_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = shared_keys(), tokens()
    with torch.inference_mode():
        for depth in range(1, LAYERS + 1):
            assert not prefix.can_be_cut(model, decoder_layers(model), batch, depth)
    method = {"kind": "lora", "rank": 2, "target_modules": ("o_proj",)}
    training = tiny_training(steps=2, method=method)
    conditions = (CLEAN, under("d", on(dead(1))), under("e", on(dead(3))))
    pack = ReplicaPack(
        model, [Run(training=training, seed=2, conditions=conditions)], tokens(rows=16)
    )
    shared = evaluated(pack, tokens(rows=2 * BATCH))
    assert [one.error for one in shared] == ["", "", ""]
    assert len({one.losses for one in shared}) == 3


class Remembering(nn.Module):
    """A layer of a model that keeps something for a later layer where no argument shows it."""

    kept: Tensor

    def __init__(self, layer: nn.Module, role: str) -> None:
        super().__init__()
        self.layer = layer
        self.role = role

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.layer(*args, **kwargs)
        if self.role == "leaves":
            Remembering.kept = out
        return out + Remembering.kept if self.role == "finds" else out


def test_a_model_that_keeps_something_for_later_is_found_out() -> None:
    model, batch = built("llama"), tokens()
    layers = decoder_layers(model)
    for number, role in enumerate(("", "leaves", "finds", "")):
        layers[number] = Remembering(layers[number], role)
    with torch.inference_mode():
        found = [prefix.can_be_cut(model, layers, batch, depth) for depth in (1, 2, 3, 4)]
    assert found == [True, False, True, True]


def test_a_stretch_leaves_the_model_as_it_was() -> None:
    model, batch = built("qwen2"), tokens()
    layers = decoder_layers(model)
    layers[1].__dict__["forward"] = own = layers[1].forward
    with pytest.raises(ZeroDivisionError), prefix.Stretch(layers, range(1, 3)):
        assert all("forward" in layer.__dict__ for layer in (layers[0], layers[2], layers[3]))
        raise ZeroDivisionError
    assert layers[1].__dict__.pop("forward") is own
    assert not any("forward" in layer.__dict__ for layer in layers)
    assert answer_logits(model, batch).isfinite().all()


# -- the audit sees what it saw --------------------------------------------------------------------


def errors(pack: ReplicaPack, data: TokenSet) -> dict[tuple[int, str], str]:
    return {(one.replica, one.condition.scenario): one.error for one in evaluated(pack, data)}


SHARED = on(dead(0), dead(2))
HARDER = on(dead(0), dead(2, threshold=0.3))


def test_a_fault_in_the_shared_layers_that_reaches_another_run_is_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs in one fold of shared layers: only one of them has a fault there."""
    monkeypatch.setattr(evaluate_module, "FOLD_TOKENS", 10**6)
    runs = [
        run_under(under("a", SHARED), under("b", HARDER)),
        run_under(CLEAN, under("c", on(dead(2))), seed=4),
    ]
    pack, data = open_pack(folder, runs, steps=1), held_out(folder)
    assert set(errors(pack, data).values()) == {""}
    original = apply_module.put_back

    def everywhere(x: Tensor, values: Tensor, active: Sequence[int]) -> Tensor:
        return values[:1].repeat(2, 1, 1) if len(x) == 2 else original(x, values, active)

    monkeypatch.setattr(apply_module, "put_back", everywhere)
    found = errors(pack, data)
    assert found[0, "a"] == found[0, "b"] == ""
    for scenario in ("", "c"):
        assert found[1, scenario].endswith("dead_zone acted, though it is not declared")


@pytest.mark.parametrize("forgotten", ["0", "2"])
def test_a_fault_that_a_hook_forgets_is_missed_for_all(
    folder: Path, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [run_under(CLEAN, under("a", SHARED), under("b", HARDER))]
    pack, data = open_pack(folder, runs, steps=1), held_out(folder)
    original = Injection._fault

    def forgetful(self: Injection, address: Any, slot: Any, tally: Any, x: Tensor) -> Tensor:
        if address.name == f"model.layers.{forgotten}":
            return x
        return original(self, address, slot, tally, x)

    monkeypatch.setattr(Injection, "_fault", forgetful)
    found = errors(pack, data)
    assert found[0, ""] == ""
    for scenario in ("a", "b"):
        assert found[0, scenario].endswith("dead_zone was in place 0 times of 2")


def test_a_fault_planted_where_none_is_declared_is_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the layers that clean and faulty share, and nowhere else."""
    runs = [run_under(CLEAN, under("a", on(dead(2))))]
    pack, data = open_pack(folder, runs, steps=1), held_out(folder)

    def planted(device: Device, skip: tuple[int, ...]) -> Entry:
        return Entry(device.model_copy(update={"faults": (dead(0), *device.faults)}))

    monkeypatch.setattr(evaluate_module, "Entry", planted)
    found = errors(pack, data)
    assert found[0, ""].endswith("'clean' declares 0 faults, 1 are attached")
    assert found[0, "a"].endswith("'faulty' a declares 1 faults, 2 are attached")


@pytest.mark.parametrize(
    ("deeper", "message"),
    [
        (3, "dead_zone was in place 0 times of 2"),
        (END, "declares 1 faults, 0 are attached"),
    ],
)
def test_passes_that_share_too_much_are_no_numbers(
    folder: Path, deeper: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken for alike where one has a fault and the other has none."""
    runs = [run_under(CLEAN, under("a", on(dead(1))))]
    pack, data = open_pack(folder, runs, steps=1), held_out(folder)
    cut = prefix.last_cut
    monkeypatch.setattr(
        prefix, "last_cut", lambda routes: deeper if cut(routes) == 2 else cut(routes)
    )
    found = errors(pack, data)
    assert found[0, "a"].endswith(message)


def test_levels_that_are_taken_for_one_are_no_numbers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A milder fault stands for a harsher one: what it did is not the harsher one's to inherit."""
    runs = [run_under(CLEAN, under("a", on(dead(1))), under("b", on(dead(1, threshold=0.3))))]
    pack, data = open_pack(folder, runs, steps=1), held_out(folder)
    cut = prefix.last_cut
    monkeypatch.setattr(prefix, "last_cut", lambda routes: 3 if cut(routes) == 2 else cut(routes))
    found = errors(pack, data)
    assert {name: bool(error) for (_, name), error in found.items()} == {
        "": False, "a": True, "b": True
    }  # fmt: skip


# -- measures do not depend on the fold ------------------------------------------------------------


def test_equal_weight_faults_of_two_slots_keep_tallies_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one fold: elsewhere as well, or with an adapter path that the weight does not see."""
    monkeypatch.setattr(evaluate_module, "FOLD_TOKENS", 10**6)
    names = ("worn", "worn 1 and 2", "worn faulty path")
    run = run_under(CLEAN, *(under(name, DEVICES[name]) for name in names))
    results = evaluated(open_pack(folder, [run], steps=1), held_out(folder))
    assert [one.error for one in results] == [""] * 4
    worn, longer, other = (one.faults[0] for one in results[1:])
    assert worn.calls == other.calls == 14
    assert longer.calls == 28
    assert worn.affected_fraction == other.affected_fraction > 0


def test_an_input_of_several_products_is_measured_once_whatever_is_beside_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module, "FOLD_TOKENS", 10**6)
    data = held_out(folder)
    names = ("W4A4", "keys alone", "W4A4 faulty path")
    alone = [
        evaluated(open_pack(folder, [run_under(under(name, DEVICES[name]))], steps=1), data)[0]
        for name in names
    ]
    run = run_under(*(under(name, DEVICES[name]) for name in names))
    assert evaluated(open_pack(folder, [run], steps=1), data) == alone
