"""`aqn-tune inspect`: what is shown is what hangs on the model, in the order in which it happens."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tiny import save_tiny_model

from aqn_tune.cli import inspected as reading
from aqn_tune.cli.app import main
from aqn_tune.cli.heat_map import BLOCKS, NOTHING, heat_map
from aqn_tune.cli.output import ProgressLine
from aqn_tune.noise import sigma_schedule
from aqn_tune.report.sigma_picture import SigmaMap, sigma_svg
from aqn_tune.study.loading import load_study

LAYERS, STEPS = 12, 20
STUDY = """\
study: demo
model: {path: MODEL}
training: {steps: 20, warmup_steps: 2, method: {kind: lora, rank: 4, alpha: 8}}
scenario:
  faults:
    - {kind: dead_zone, layers: [10], threshold: 0.2, reference: tensor_max}
sweep: {faults.0.threshold: [0.2, 0.5]}
arms:
  zoned:
    noise:
      carrier: rmsnorm_weight
      targeting: {kind: zone, edge: ["0-3"], boundary: 0.5, middle_multiplier_after: 0.25}
  skipping: {skip: [3]}
  scored: {noise: {targeting: {kind: multipliers, values: {0: 2.0, 5: 0.5}}}}
"""
SEVEN = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), layers=LAYERS)


@pytest.fixture
def study(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "demo.yaml"
    file.write_text(STUDY.replace("MODEL", str(model)))
    return file


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "demo.yaml", *arguments])
    code = stopped.value.code
    return code if isinstance(code, int) else 0


def data(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert call(*arguments, "--json") == code
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def rows(found: dict[str, Any]) -> list[tuple[int, str, int, str, str]]:
    return [(s["layer"], s["module"], s["order"], s["site"], s["kind"]) for s in found["sites"]]


# -- what hangs where ------------------------------------------------------------------------------

DEAD = (10, ".", 1, "output", "dead_zone")
DEAD_AFTER_NOISE = [(10, ".", 1, "output", "hidden"), (10, ".", 2, "output", "dead_zone")]


def noised(layers: list[int]) -> list[tuple[int, str, int, str, str]]:
    return [(layer, ".", 1, "output", "hidden") for layer in layers]


@pytest.mark.parametrize(
    ("arm", "wanted"),
    [
        ("clean", []),
        ("fault_only", [DEAD]),
        ("global", [*noised(list(range(10))), *DEAD_AFTER_NOISE, *noised([11])]),
        ("targeted", DEAD_AFTER_NOISE),
        ("healthy", [*noised(list(range(10))), DEAD, *noised([11])]),
    ],
)
@pytest.mark.usefixtures("study")
def test_the_sites_of_each_control(
    arm: str, wanted: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found = data(capsys, "--arm", arm)
    assert rows(found) == wanted
    assert found["missing"] == []
    assert {site["adapter"] for site in found["sites"]} <= {"inside"}
    for site in found["sites"]:
        if site["kind"] == "dead_zone":
            assert site["parameters"]["threshold"] == 0.2
            assert site["parameters"]["reference"] == "tensor_max"


@pytest.mark.usefixtures("study")
def test_the_random_control_noises_one_healthy_layer(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(data(capsys, "--arm", "random"))
    assert DEAD in found
    (layer,) = (row[0] for row in found if row[4] == "hidden")
    assert layer != 10


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("{format: mxfp4}", {("input", "mxfp4", "beside"): 84, ("weight", "mxfp4", "beside"): 84}),
        ("{format: int8, operands: weight}", {("weight", "int8", "beside"): 84}),
        (
            "{format: nvfp4, operands: activation, layers: [0], modules: ['*o_proj']}",
            {("input", "nvfp4", "beside"): 1},
        ),
    ],
)
@pytest.mark.usefixtures("study")
def test_quantized_operands_are_rows_of_their_own(
    override: str, wanted: dict[Any, int], capsys: pytest.CaptureFixture[str]
) -> None:
    found = data(capsys, "--arm", "fault_only", "--set", f"scenario.quantization={override}")
    counted = Counter((s["site"], s["kind"], s["adapter"]) for s in found["sites"])
    assert counted.pop(("output", "dead_zone", "inside")) == 1
    assert counted == wanted
    if len(found["sites"]) > 100:
        modules = [row[1] for row in rows(found) if row[0] == 4]
        assert modules == [name for name in SEVEN for _ in range(2)]


@pytest.mark.parametrize(("path", "place"), [("exact", "beside"), ("faulty", "inside")])
@pytest.mark.usefixtures("study")
def test_the_adapter_branch_runs_where_the_scenario_says(
    path: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = data(
        capsys, "--arm", "fault_only",
        "--set", "scenario.faults=[{kind: relative_gaussian, layers: [2]}]", "--set", "sweep={}",
        "--set", f"scenario.adapter_path={path}",
    )  # fmt: skip
    assert [(s["module"], s["site"], s["adapter"]) for s in found["sites"]] == [
        (name, "output", place) for name in SEVEN
    ]


@pytest.mark.usefixtures("study")
def test_evaluations_have_the_fault_and_no_noise(capsys: pytest.CaptureFixture[str]) -> None:
    assert rows(data(capsys, "--arm", "global", "--condition", "clean")) == []
    faulty = data(capsys, "--arm", "global", "--condition", "faulty")
    assert rows(faulty) == [DEAD]
    assert faulty["sigma"] == [0.0] * (STEPS + 1)
    assert rows(data(capsys, "--arm", "clean", "--condition", "faulty")) == [DEAD]


@pytest.mark.usefixtures("study")
def test_merged_adapters_and_left_out_layers_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found = data(
        capsys, "--arm", "skipping", "--condition", "faulty", "--set", "scenario.deploy=merged"
    )
    counted = Counter((s["what"], s["site"], s["adapter"]) for s in found["sites"])
    assert counted == {
        ("adapter", "weight", "inside"): 84,
        ("skip", "output", "inside"): 1,
        ("fault", "output", "inside"): 1,
    }
    assert (3, ".", 1, "output", "skip") in rows(found)


# -- read back, not repeated -----------------------------------------------------------------------


def test_what_is_shown_is_what_is_attached_and_not_what_was_declared(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from aqn_tune.injection.injection import Injection

    attach = Injection._attach

    def forgetful(self: Injection, site: Any) -> None:
        if site.address.layer != 10:
            attach(self, site)

    monkeypatch.setattr(Injection, "_attach", forgetful)
    found = data(capsys, "--arm", "global", code=1)
    assert 10 not in {row[0] for row in rows(found)}
    assert len(found["sites"]) == LAYERS - 1
    assert found["multipliers"][10] == 0.0
    assert [(m["layer"], m["module"], m["kind"]) for m in found["missing"]] == [
        (10, ".", "dead_zone"), (10, ".", "hidden"),
    ]  # fmt: skip
    assert call("--arm", "global") == 1
    shown = capsys.readouterr()
    assert "NOT ATTACHED  layer 10, ., output: dead_zone" in shown.out
    assert "declared and not attached: 2 sites" in shown.err
    assert study.exists()


def test_a_quantizer_that_reaches_too_few_modules_shows(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from aqn_tune.injection.layout import Layout

    def forgetful(self: Layout, slot: Any) -> None:
        for address in self._book.find(slot.spec, "quantization")[:5]:
            self._weight(address).quantizers.append((slot, None))  # type: ignore[arg-type]

    monkeypatch.setattr(Layout, "_place_quantizer", forgetful)
    found = data(capsys, "--arm", "fault_only", "--set", "scenario.quantization=mxfp4", code=1)
    assert sum(site["what"] == "quantizer" for site in found["sites"]) == 5
    assert len(found["missing"]) == 2 * 84 - 5
    assert study.exists()


def test_the_order_shown_is_the_order_that_happens(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that can act on one module, recorded while a step of full fine-tuning runs."""
    import torch

    from aqn_tune.injection import injection as hooks
    from aqn_tune.injection import weights

    fault = "{kind: relative_gaussian, layers: [1], modules: ['*down_proj'], site: SITE, scale: S}"
    sites = ("grad_input", "grad_output", "grad_weight", "output", "weight", "input", "grad_output")
    faults = [fault.replace("SITE", s).replace("S}", f"0.0{i + 1}}}") for i, s in enumerate(sites)]
    loaded = load_study(
        study,
        [
            f"scenario.faults=[{', '.join(faults)}]",
            "scenario.quantization={format: mxfp4, layers: [1], modules: ['*down_proj']}",
            "sweep={}",
            "training.method={kind: full}",
            "controls.carrier=linear_weight",
            "controls.schedule={kind: constant, sigma: 0.001}",
        ],
    )
    inspected = reading.inspect_arm(
        loaded, "global", None, "train", progress=ProgressLine(quiet=True)
    )
    shown = [
        (s.site, s.kind, s.parameters.get("scale"))
        for s in inspected.found.sites
        if (s.layer, s.module) == (1, "mlp.down_proj")
    ]
    happened: list[tuple[str, str, float | None]] = []
    for room in (hooks, weights):
        apply_fault, apply_quantizer = room.apply_fault, room.apply_quantizer

        def fault_seen(slot: Any, *rest: Any, _real: Any = apply_fault, **named: Any) -> Any:
            happened.append((slot.spec.site, slot.spec.kind, float(slot.params["scale"][0])))
            return _real(slot, *rest, **named)

        def quantizer_seen(slot: Any, x: Any, valid: Any, operand: str, *rest: Any,
                           _real: Any = apply_quantizer, **named: Any) -> Any:  # fmt: skip
            site = {"activation": "input", "weight": "weight"}[operand]
            happened.append((site, slot.spec.format, None))
            return _real(slot, x, valid, operand, *rest, **named)

        monkeypatch.setattr(room, "apply_fault", fault_seen)
        monkeypatch.setattr(room, "apply_quantizer", quantizer_seen)
    noised = hooks.Injection.noised

    def noise_seen(self: Any, address: Any, slot: Any, *rest: Any) -> Any:
        if (address.layer, address.inside) == (1, "mlp.down_proj"):
            happened.append(("weight", slot.carrier.kind, None))
        return noised(self, address, slot, *rest)

    monkeypatch.setattr(hooks.Injection, "noised", noise_seen)
    made = reading._attach(loaded, inspected.run, "train")
    with made.injection as injection:
        injection.begin(torch.ones(1, 6, dtype=torch.bool))
        out = made.book.model(input_ids=torch.arange(5, 11).view(1, 6)).logits
        injection.forward_done()
        out.square().sum().backward()
    assert happened == shown
    assert [site for site, _, _ in shown] == [
        "input", "input", "weight", "weight", "weight", "output",
        "grad_output", "grad_output", "grad_weight", "grad_input",
    ]  # fmt: skip


# -- numbers for programs --------------------------------------------------------------------------


@pytest.mark.usefixtures("study")
def test_json_has_its_keys_and_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    found = data(capsys, "--arm", "global", "--scenario", "both-threshold0.5")
    assert {"sites", "sigma", "multipliers"} <= set(found)
    assert found["scenario"] == "both-threshold0.5"
    assert found["sigma"] == list(sigma_schedule("geometric", STEPS))
    assert len(found["sigma"]) == STEPS + 1
    assert found["multipliers"] == [1.0] * LAYERS
    assert found["later"] == []
    assert set(found["sites"][0]) == {
        "layer", "module", "order", "site", "what", "kind", "parameters", "adapter",
    }  # fmt: skip
    quiet = data(capsys, "--arm", "fault_only")
    assert quiet["sigma"] == [0.0] * (STEPS + 1)
    assert quiet["multipliers"] == [0.0] * LAYERS
    assert quiet["scenario"] == "both-threshold0.2", "the first"


@pytest.mark.usefixtures("study")
def test_multipliers_that_differ_and_that_change(capsys: pytest.CaptureFixture[str]) -> None:
    scored = data(capsys, "--arm", "scored")
    assert scored["multipliers"] == [2.0, 0, 0, 0, 0, 0.5, 0, 0, 0, 0, 0, 0]
    zoned = data(capsys, "--arm", "zoned")
    assert zoned["multipliers"] == [1.0] * LAYERS
    assert zoned["later"] == [{"step": 10, "multipliers": [1.0] * 4 + [0.25] * 8}]
    norms = [s for s in zoned["sites"] if s["what"] == "noise"]
    assert len(norms) == 2 * LAYERS
    assert {s["module"] for s in norms} == {"input_layernorm", "post_attention_layernorm"}
    assert {s["adapter"] for s in norms} == {"none"}
    assert [s["parameters"]["multipliers"] for s in norms[:8:2]] == [[1.0]] * 4
    assert norms[-1]["parameters"]["multipliers"] == [1.0, 0.25]


@pytest.mark.usefixtures("study")
def test_sigma_ends_on_what_the_schedule_ends_on(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = "{kind: linear, sigma_start: 0.1, sigma_end: 0.02}"
    found = data(capsys, "--arm", "global", "--set", f"controls.schedule={schedule}")
    assert found["sigma"][0] == 0.1
    assert found["sigma"][-1] == 0.02


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--arm", "targetd"], ["--arm", "'targetd'", "did you mean 'targeted'?"]),
        (["--arm", "skiping"], ["did you mean 'skipping'?"]),
        (["--arm", "finalist1_none"], ["'finalist1_none'", "once a search has found it"]),
        (["--arm", "c003"], ["once a search has found it", "allowed are clean, fault_only"]),
        (
            ["--arm", "global", "--scenario", "both-treshold0.5"],
            ["--scenario", "did you mean 'both-threshold0.5'?"],
        ),
        (["--arm", "global", "--condition", "fauly"], ["--condition", "did you mean 'faulty'?"]),
        (
            ["--arm", "healthy", "--set", "scenario.faults.0.layers=all"],
            ["healthy cannot exist in scenario both-threshold0.2", "every layer is faulty"],
        ),
        (["--arm", "global", "--picture", "a.png"], ["--picture", "a.png", ".svg"]),
        (["--arm", "global", "--picture", "no/a.svg"], ["--picture", "there is no folder no"]),
        (["--arm", "global", "--set", "training.stps=5"], ["stps", "did you mean 'steps'?"]),
        (["--arm", "targetd", "--picture", "a.svg"], ["did you mean 'targeted'?"]),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(
    arguments: list[str], fragments: list[str], study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for fragment in fragments:
        assert fragment in captured.err
    assert list(study.parent.iterdir()) == [study]


# -- to read ---------------------------------------------------------------------------------------


def test_text_and_picture(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    quantized = "scenario.quantization={format: mxfp4}"
    assert call("--arm", "global", "--set", quantized, "--picture", "a.svg") == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "(the first of 2)" in text
    assert "181 sites in 12 layers" in text
    assert text.count("quantizer mxfp4") == 4, "two groups of layers, two operands"
    assert "layers 0-9,11\n" in text
    assert "7 each: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in text
    assert text.count("fault dead_zone") == 1
    assert re.search(r"1 +output +noise hidden .*\n.*\n? *2 +output +fault dead_zone", text)
    assert [row.split()[0] for row in text.splitlines() if BLOCKS[-1] in row][:10] == [
        str(layer) for layer in range(10)
    ]
    assert call("--arm", "global", "--set", quantized, "-v") == 0
    every = capsys.readouterr().out
    assert every.count("quantizer mxfp4") == 168
    assert sorted(file.name for file in study.parent.iterdir()) == ["a.svg", "demo.yaml"]
    check_svg((study.parent / "a.svg").read_text())


def check_svg(text: str) -> ElementTree.Element:
    """Check that an SVG is whole, has a title, and draws nothing beyond its page."""
    root = ElementTree.fromstring(text)
    space = {"s": "http://www.w3.org/2000/svg"}
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    for name in ("title", "desc"):
        element = root.find(f"s:{name}", space)
        assert element is not None
        assert element.text
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for box in root.iterfind(".//s:rect", space):
        x, y, w, h = (float(box.attrib[key]) for key in ("x", "y", "width", "height"))
        assert x >= 0
        assert y >= 0
        assert x + w <= width + 0.1
        assert y + h <= height + 0.1
    texts = [(t.text or "", t.attrib) for t in root.iterfind(".//s:text", space)]
    for content, place in texts:
        if "x" in place:
            size = re.search(r"font-size:([\d.]+)px", place.get("style", ""))
            reach = (0.6 * float(size[1]) if size else 7.0) * len(content)
            left = {"start": 0.0, "middle": 0.5, "end": 1.0}[place["text-anchor"]] * reach
            assert float(place["x"]) - left >= 0, content
            assert float(place["x"]) - left + reach <= width, content
    words = [content for content, _ in texts]
    assert "decoder layer" in words
    assert "training step" in words
    assert "href" not in text.replace("xmlns", "")
    return root


def staircase(layers: int, steps: int) -> SigmaMap:
    table = sigma_schedule({"kind": "geometric"}, steps)[:steps]
    levels = tuple(tuple(s * (1 + k / layers) for s in table) for k in range(layers))
    return SigmaMap(levels, frozenset({3}))


def drawn(picture: SigmaMap, width: int) -> list[str]:
    return [line.plain for line in heat_map(picture, width)]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(("layers", "steps"), [(28, 100), (28, 101), (4, 6), (80, 997), (1, 1)])
def test_the_heat_map_keeps_to_its_width_and_loses_nothing(
    layers: int, steps: int, width: int
) -> None:
    picture = staircase(layers, steps) if layers > 3 else SigmaMap(((0.05,),))
    lines = drawn(picture, width)
    assert max(map(len, lines)) <= width
    maps = [line for line in lines if re.match(r"^ *(x )?\d+(-\d+)? ", line)]
    together = -(-layers // 48)
    assert len(maps) == -(-layers // together)
    top = max(max(row) for row in picture.levels)
    strongest = [any(v == top for v in row) for row in picture.levels]
    for number, line in enumerate(maps):
        cells = line.split()[-1]
        assert set(cells) <= {*BLOCKS, NOTHING}
        if any(strongest[number * together : (number + 1) * together]):
            assert BLOCKS[-1] in cells
    legend = " ".join(lines[len(maps) + 1 :])
    assert f"{picture.high:.3g}" in legend
    assert f"{picture.low:.3g}" in legend
    assert ("each column" in legend) == (len(maps[0].split()[-1]) < steps)


def test_the_heat_map_has_a_column_for_each_step_where_they_fit() -> None:
    levels = ((0.0, 0.1, 0.01, 0.001), (0.0, 0.0, 0.0, 0.1))
    lines = drawn(SigmaMap(levels), 80)
    assert lines[0] == "    0 ····████▅▅▅▅▁▁▁▁"
    assert lines[1] == "    1 ············████"
    assert lines[2] == " step 0       2"


@pytest.mark.parametrize(
    ("levels", "summary"),
    [
        (((0.0, 0.0),), "1 decoder layers by 2 training steps; no layer has noise at any step."),
        (
            ((0.0, 0.05), (0.0, 0.0), (0.0, 0.01)),
            "3 decoder layers by 2 training steps; noise in layers 0,2, standard deviation 0.01 to "
            "0.05; none at step 0; a fault in layer 1.",
        ),
    ],
)
def test_the_text_alternative_says_what_the_picture_shows(
    levels: tuple[tuple[float, ...], ...], summary: str
) -> None:
    faulty = frozenset({1} if len(levels) > 1 else ())
    picture = SigmaMap(levels, faulty)
    assert picture.summary() == summary
    root = check_svg(sigma_svg(picture, "A <b> & c", "note"))
    assert root.findtext("{http://www.w3.org/2000/svg}title") == "A <b> & c"
    assert root.findtext("{http://www.w3.org/2000/svg}desc") == summary


@pytest.mark.parametrize(("layers", "steps"), [(28, 100), (128, 2000)])
def test_the_svg_stays_on_its_page(layers: int, steps: int) -> None:
    text = sigma_svg(staircase(layers, steps), "a long title " * 12, "a long note " * 15)
    check_svg(text)
    assert len(text) < 400_000


def test_more_noise_is_darker_so_that_a_grey_print_reads_the_same() -> None:
    from aqn_tune.report.sigma_picture import _colour

    def luminance(colour: str) -> float:
        red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    shades = [luminance(_colour(place / 20)) for place in range(21)]
    assert shades == sorted(shades, reverse=True)
    assert shades[0] < 235, "the least noise is told from the white of no noise"
