"""Reading study files: places, overrides, sweeps, and what load_study makes of good ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from aqn_tune.errors import UserError
from aqn_tune.models.spec import ModelSpec
from aqn_tune.study.folder import study_hash
from aqn_tune.study.loading import layer_count, load_study, make_setting
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study
from aqn_tune.study.source import apply_override, parse_source
from aqn_tune.study.sweep import resolve_scenarios, study_content

STUDY = """\
study: demo
scenario:
  faults:
    - kind: dead_zone
      layers: [10]
      threshold: 0.2
sweep:
  during: [both, eval]
  faults.0.threshold: [0.01, 1e-1]
search:
  space: space.yaml
  configs: 4
confirm: {replicates: 6}
"""
SPACE = """\
dimensions:
  sigma_start: {kind: float, low: 5e-3, high: 0.2, log: true}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "space.yaml").write_text(SPACE)
    path = tmp_path / "demo.yaml"
    path.write_text(STUDY)
    return path


def test_a_study_is_read_whole_with_its_space_and_its_sweep(file: Path) -> None:
    study = load_study(file)
    assert study.search is not None
    low = study.search.space.dimensions["sigma_start"].model_dump()["low"]
    assert low == 0.005
    assert [(s.name, s.values, s.spec.during) for s in resolve_scenarios(study)] == [
        ("both-threshold0.01", {"during": "both", "threshold": 0.01}, "both"),
        ("both-threshold0.1", {"during": "both", "threshold": 0.1}, "both"),
        ("eval-threshold0.01", {"during": "eval", "threshold": 0.01}, "eval"),
        ("eval-threshold0.1", {"during": "eval", "threshold": 0.1}, "eval"),
    ]


def test_overrides_apply_in_order_and_reach_into_the_space(file: Path) -> None:
    study = load_study(
        file,
        [
            "training.steps=50",
            "training.steps=60",
            "sweep.faults.0.threshold=[0.3]",
            "scenario.faults.0.layers=['14-17']",
            "search.space.dimensions.sigma_start.low=0.01",
        ],
    )
    assert study.training.steps == 60
    assert study.search is not None
    assert study.scenario.faults[0].layers == ("14-17",)
    assert len(resolve_scenarios(study)) == 2
    assert study.search.space.dimensions["sigma_start"].model_dump()["low"] == 0.01


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("task.test_rows=100", "task", {"kind": "word_problems", "test_rows": 100}),
        ("training.method.rank=4", "training.method", {"kind": "lora", "rank": 4}),
        ("controls.schedule.stages=5", "controls.schedule", {"kind": "geometric", "stages": 5}),
        ("confirm.margin.share=0.1", "confirm.margin", {"kind": "gain", "share": 0.1}),
    ],
)
def test_part_of_a_choice_that_is_left_out_is_part_of_its_default(
    file: Path, override: str, key: str, value: dict[str, object]
) -> None:
    found: Any = load_study(file, [override])
    for name in key.split("."):
        found = getattr(found, name)
    assert value.items() <= found.model_dump().items()


def test_a_choice_in_the_file_says_its_kind(file: Path) -> None:
    file.write_text(STUDY + "task: {test_rows: 100}\n")
    with pytest.raises(UserError, match=r"demo.yaml:14: task: the key `kind` is missing"):
        load_study(file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),  # text in YAML 1.1, so that a choice would hold words in place of numbers
        ("5e-4", 0.0005),
        ("010", 10),  # 8 in YAML 1.1
        ("no", "no"),  # false in YAML 1.1
        ("14-17", "14-17"),
        ("2026-01-01", "2026-01-01"),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("TRUE", True),
        ("~", None),
        ("", None),
        ("true", True),
        ("'0.1'", "0.1"),
    ],
)
def test_scalars(text: str, value: object) -> None:
    found = parse_source(f"a: {text}", "f").data["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", [".nan", ".NaN", ".NAN"])
def test_not_a_number_is_read_in_whichever_letters(text: str) -> None:
    """The original bug: `.NaN` ended in a traceback."""
    assert math.isnan(parse_source(f"a: {text}", "f").data["a"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!int abc", "got 'abc', which cannot be read as a whole number (!!int)"),
        ("!!int 0.5", "got '0.5', which cannot be read as a whole number (!!int)"),
        ("!!float high", "got 'high', which cannot be read as a number (!!float)"),
        ("!!bool yes", "got 'yes', which cannot be read as true or false (!!bool)"),
        ("9" * 5000, f"got '{'9' * 40}', which cannot be read as a whole number (!!int)"),
        ("!!timestamp 2026-01-01", "the YAML tag"),
    ],
)
def test_a_scalar_that_is_not_what_its_tag_says_is_refused(text: str, message: str) -> None:
    for document in (f"b: 1\na: {text}", f"b: 1\n? {text}\n: 1"):
        with pytest.raises(UserError) as raised:
            parse_source(document, "f")
        assert str(raised.value).startswith(f"f:2: {message}")


def test_every_key_knows_its_line() -> None:
    source = parse_source(STUDY, "f.yaml")
    key = ("scenario", "faults", 0, "threshold")
    assert str(source.place(key)) == "f.yaml:6"
    assert str(source.place(("sweep", "faults.0.threshold"))) == "f.yaml:9"
    assert str(source.place((*key, "deeper", "still"))) == "f.yaml:6"
    changed = apply_override(source, "scenario.faults.0.threshold=1")
    assert str(changed.place(key)) == "--set scenario.faults.0.threshold=1"


def test_a_merge_keeps_what_is_written_beside_it() -> None:
    source = parse_source("base: &b {x: 1, y: 2}\nmine:\n  <<: *b\n  y: 3\n", "f")
    assert source.data["mine"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f:3: a: the key is there twice, first in line 1"),
        ("x: {b: 1, b: 2}", "f:1: x.b: the key is there twice"),
        ("a: &x [*x]", "alias that contains itself"),
        ("a: [1, 2", "f:1: not valid YAML"),
        ("a: 1\n  b: 2", "f:2: not valid YAML"),
        ("- 1", "got a sequence; a mapping"),
        ("", "got an empty file"),
        ("a: !!python/name:os.system ''", "tag .* is not allowed"),
    ],
)
def test_documents_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_source(text, "f")


DEAD_ZONE = {"kind": "dead_zone", "layers": [1], "threshold": 0.2}


def swept(**changes: Any) -> tuple[Scenario, ...]:
    scenario = {"faults": [DEAD_ZONE], "quantization": "mxfp4"}
    study = Study.model_validate({"study": "s", "scenario": scenario, **changes})
    return resolve_scenarios(study)


def scenarios_of(**changes: Any) -> tuple[str, ...]:
    return tuple(scenario.name for scenario in swept(**changes))


def test_a_swept_format_keeps_what_was_written_and_leaves_the_defaults_of_the_other() -> None:
    quantization = {"format": "mxfp4", "operands": "weight", "layers": [3]}
    scenarios = swept(
        scenario={"faults": [DEAD_ZONE], "quantization": quantization},
        sweep={"quantization.0.format": ["mxfp4", "nvfp4"]},
    )
    assert [s.values for s in scenarios] == [{"format": "mxfp4"}, {"format": "nvfp4"}]
    for scenario, name in zip(scenarios, ("mxfp4", "nvfp4"), strict=True):
        (found,) = scenario.spec.quantization
        assert (found.format, found.operands, found.layers) == (name, "weight", (3,))
        assert ("scale_mode" in type(found).model_fields) is (name == "mxfp4")


def test_a_swept_kind_of_fault_keeps_the_parameters_that_both_have() -> None:
    scenarios = swept(
        scenario={"faults": [{"kind": "relative_gaussian", "layers": [3], "scale": 0.1}]},
        sweep={"faults.0.kind": ["relative_gaussian", "absolute_gaussian"]},
    )
    assert [s.name for s in scenarios] == ["both-relative_gaussian", "both-absolute_gaussian"]
    faults = [scenario.spec.faults[0].model_dump() for scenario in scenarios]
    assert [fault["scale"] for fault in faults] == [0.1, 0.1]
    assert [fault["modules"] for fault in faults] == [("linear",), (".",)], "each its own default"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ("both",)),
        ({"sweep": {"faults.0.threshold": [0.1, 0.2]}}, ("both-threshold0.1", "both-threshold0.2")),
        ({"sweep": {"during": ["train"]}}, ("train",)),
        (
            {"sweep": {"faults.0.threshold": [1], "during": ["both", "eval"]}},
            ("both-threshold1", "eval-threshold1"),
        ),
        (
            {"sweep": {"faults.0.layers": [[3], ["14-17", 20], "all"]}},
            ("both-layers3", "both-layers14-17+20", "both-layersall"),
        ),
        ({"sweep": {"device_seed": [0, 3]}}, ("both-device_seed0", "both-device_seed3")),
        ({"sweep": {"faults.0.density": [0.1, 1]}}, ("both-density0.1", "both-density1")),
        (
            {"sweep": {"adapter_path": ["exact", "faulty"]}},
            ("both-adapter_path_exact", "both-adapter_path_faulty"),
        ),
        ({"sweep": {"deploy": ["merged"], "during": ["eval"]}}, ("eval-deploy_merged",)),
        ({"sweep": {"faults.0.ste": [True, False]}}, ("both-ste_true", "both-ste_false")),
        (
            {"sweep": {"faults.0.modules": [["linear"], ["q_proj", "k_proj"]]}},
            ("both-modules_linear", "both-modules_q_proj+k_proj"),
        ),
        # a number format and a kind of fault stand for themselves
        (
            {"sweep": {"quantization.0.format": ["mxfp4", "int8"], "faults.0.threshold": [0.1]}},
            ("both-mxfp4-threshold0.1", "both-int8-threshold0.1"),
        ),
        (
            {"sweep": {"quantization": ["nvfp4", {"format": "mxfp4", "operands": "weight"}, []]}},
            ("both-quantization_nvfp4", "both-quantization_mxfp4", "both-quantization_none"),
        ),
        # whole entries go by what they differ in
        (
            {
                "sweep": {
                    "faults.0": [
                        {"kind": "dead_zone", "layers": [1], "threshold": 0.1},
                        {"kind": "dead_zone", "layers": [1], "threshold": 0.2},
                        {"kind": "saturation", "layers": [1], "limit": 0.5},
                    ]
                }
            },
            (
                "both-faults.0_dead_zone+threshold0.1",
                "both-faults.0_dead_zone+threshold0.2",
                "both-faults.0_saturation+limit0.5",
            ),
        ),
    ],
)
def test_names_of_scenarios(changes: dict[str, Any], names: tuple[str, ...]) -> None:
    assert scenarios_of(**changes) == names


def test_equal_last_keys_are_written_out() -> None:
    dead_zone = {"kind": "dead_zone", "layers": [1], "threshold": 0.2}
    names = scenarios_of(
        scenario={"faults": [dead_zone, {**dead_zone, "layers": [2]}]},
        sweep={"faults.0.threshold": [0.1], "faults.1.threshold": [0.1]},
    )
    assert names == ("both-faults.0.threshold0.1-faults.1.threshold0.1",)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"faults.0.treshold": [1]}, "did you mean 'faults.0.threshold'"),
        ({"faults.1.threshold": [1]}, "the scenario has no key 'faults.1.threshold'"),
        ({"faults.0.kind": ["relative_gaussian"]}, r"sweep.faults.0"),
        ({"faults.0.threshold": []}, "empty list"),
        ({"faults.0.threshold": [0.2, 0.20]}, "2 combinations give the same scenario"),
        ({"faults.0.threshold": [-0.1]}, r"sweep\.faults\.0\.threshold: got -0.1; allowed"),
        ({"during": ["never"]}, r"sweep\.during: got 'never'; allowed: 'both', 'train' or 'eval'"),
        (
            {"faults.0.kind": ["saturation"]},
            r"sweep\.faults\.0\.kind: .*\.limit: the key is missing",
        ),
        (
            {"quantization.0.format": ["mxfp5"]},
            r"sweep\.quantization\.0\.format: .*unknown format 'mxfp5'.*did you mean 'mxfp4'",
        ),
        ({"quantization.1.format": ["mxfp4"]}, "did you mean 'quantization.0.format'"),
        ({"faults.0.density": [0]}, r"sweep\.faults\.0\.density: got 0; allowed: greater than 0"),
        ({"device_seed": [-1]}, r"sweep\.device_seed: got -1"),
        ({"eval_draws": [1, 3]}, r"sweep\.eval_draws: .*nothing is drawn"),
        ({"faults.0": [DEAD_ZONE, dict(DEAD_ZONE)]}, "2 combinations give the same scenario"),
    ],
)
def test_sweeps_that_cannot_be(sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scenarios_of(sweep=sweep)


def test_a_format_whose_own_parameter_was_written_cannot_be_another_format() -> None:
    quantization = {"format": "mxfp4", "scale_mode": "even"}
    with pytest.raises(UserError, match=r"quantization\.0\.scale_mode: unknown key"):
        swept(
            scenario={"quantization": quantization},
            sweep={"quantization.0.format": ["mxfp4", "nvfp4"]},
        )


@pytest.mark.parametrize(
    ("written", "formats"),
    [
        ("mxfp4", ["mxfp4"]),
        (["mxfp4", {"format": "int8"}], ["mxfp4", "int8"]),
        ({"format": "nvfp4", "layers": [3]}, ["nvfp4"]),
        ([], []),
    ],
)
def test_quantization_is_a_name_a_mapping_or_a_list(written: Any, formats: list[str]) -> None:
    (scenario,) = swept(scenario={"faults": [DEAD_ZONE], "quantization": written})
    assert [quantizer.format for quantizer in scenario.spec.quantization] == formats


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 24}, 24),
        ({"n_layer": 12}, 12),
        ({"text_config": {"num_hidden_layers": 30}}, 30),
    ],
)
def test_layers_are_counted_from_the_config(
    tmp_path: Path, config: dict[str, Any], expected: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert layer_count(ModelSpec(path=str(tmp_path))) == expected


def test_the_embedded_model_has_28_layers() -> None:
    assert layer_count(ModelSpec()) == 28


def test_a_model_that_is_not_there_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"neither 'embedded', nor a folder.*hf download"):
        layer_count(ModelSpec(path="some-one/some-model"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no num_hidden_layers"):
        layer_count(ModelSpec(path=str(tmp_path)))


def test_what_changes_no_number_changes_no_folder(file: Path) -> None:
    first = load_study(file)
    for same in (
        "compute.workers=1",
        "description=x",
        "confirm.replicates=7",
        "confirm={replicates: 9, looks: [6, 9]}",
        "output=x",
    ):
        assert study_hash(load_study(file, [same])) == study_hash(first)
    for other in (
        "seed=1",
        "training.steps=99",
        "confirm.alpha=0.1",
        "eval_batch_size=32",
        "compute.gpus_per_worker=0.5",
    ):
        assert study_hash(load_study(file, [other])) != study_hash(first)


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["search=null"],
        ["mechanism.steps=[0, -1]"],
        ["confirm={replicates: 9, looks: [6, 9]}"],
    ],
)
def test_the_resolved_study_reads_back_as_the_same_study(file: Path, changes: list[str]) -> None:
    """Without a search too, though the default contrasts, written out, name finalists."""
    import yaml

    study = load_study(file, changes)
    text = yaml.safe_dump(study.model_dump(mode="json"))
    assert Study.model_validate(yaml.safe_load(text)) == study


def test_the_setting_names_the_model_by_its_content(file: Path) -> None:
    setting = make_setting(load_study(file))
    assert len(setting.model_fingerprint) == 64
    assert setting.eval_batch_size == 64


@pytest.mark.parametrize("name", ["quick", "aqn_basic", "aqn_full"])
def test_shipped_spaces_fit_the_embedded_model(file: Path, name: str) -> None:
    space = Path(__file__).parents[1] / "search_spaces" / f"{name}.yaml"
    study = load_study(file, [f"search.space={space}"])
    assert study.search is not None
    first = space.read_text().splitlines()[0]
    assert first.startswith("# "), "a space begins with what it is for"
    assert "To launch:" in space.read_text()
    searched = {"learning_rate", "rank"} & set(study.search.space.dimensions)
    assert bool(searched) is (name == "aqn_full"), "off in the shipped sweeps"


@pytest.mark.parametrize(
    ("during", "arm", "refused"),
    [
        ("both", "{}", True),
        ("train", "{}", True),
        ("eval", "{}", False),
        ("eval", "{device: faulty}", True),
    ],
)
def test_layers_are_compiled_where_training_leaves_them_as_they_are(
    tmp_path: Path, during: str, arm: str, refused: bool
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(
        f"study: compiled\noutput: {tmp_path}\ntraining: {{compile: true}}\n"
        f"scenario: {{quantization: [{{format: mxfp4}}], during: {during}}}\narms: {{mine: {arm}}}\n"
    )
    if refused:
        with pytest.raises(UserError, match=r"training\.compile: .*mxfp4 acts inside"):
            load_study(study)
    else:
        load_study(study)


@pytest.mark.parametrize(
    ("scenario", "sweep"),
    [
        ({"quantization": ["mxfp4"]}, {"quantization.0.format": ["mxfp4", "nvfp4", "int8"]}),
        (
            {"quantization": [{"format": "mxfp4", "operands": "weight"}], "faults": [DEAD_ZONE]},
            {"quantization.0.format": ["nvfp4", "mxfp4"], "faults.0.threshold": [0.1, 0.2]},
        ),
        (
            {"faults": [DEAD_ZONE, {"kind": "relative_gaussian", "layers": [1], "scale": 0.1}]},
            {
                "faults.1.kind": ["relative_gaussian", "absolute_gaussian"],
                "during": ["both", "eval"],
            },
        ),
    ],
)
def test_a_study_whose_kinds_are_swept_reads_back_as_it_was_written(
    scenario: dict[str, Any], sweep: dict[str, Any]
) -> None:
    """Spelled out in the folder, the defaults of one format were unknown keys of another: no report."""
    study = Study.model_validate({"study": "s", "scenario": scenario, "sweep": sweep})
    again = Study.model_validate(json.loads(json.dumps(study_content(study))))
    assert resolve_scenarios(again) == resolve_scenarios(study)
    assert study_hash(again) == study_hash(study)
    assert study_content(again) == study_content(study)
    spelled_out = Study.model_validate(study.model_dump(mode="json"))
    with pytest.raises(UserError, match="unknown key"):
        resolve_scenarios(spelled_out)
