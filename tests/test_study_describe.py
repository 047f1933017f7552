"""Devices and arms in words, and the cautions of a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter
from synthetic import make_study

from aqn_tune.cli.app import main
from aqn_tune.faults import FAULTS, Fault
from aqn_tune.faults.base import FaultSpec
from aqn_tune.quantization import FORMATS, Quantizer
from aqn_tune.study.cautions import study_cautions
from aqn_tune.study.describe import device_text, fault_text, quantizer_text
from aqn_tune.study.plan import make_plan
from aqn_tune.study.scenario import ScenarioSpec
from aqn_tune.study.sweep import resolve_scenarios

DEAD_ZONE: dict[str, Any] = {"kind": "dead_zone", "layers": [10], "threshold": 0.1}
LINEAR_WEIGHT: dict[str, Any] = {"carrier": "linear_weight"}


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (DEAD_ZONE, "dead_zone at layers 10: threshold 0.1, reference token_max"),
        ({**DEAD_ZONE, "threshold": 0}, "dead_zone at layers 10: threshold 0.0, reference token_max"),
        ({**DEAD_ZONE, "layers": [3, "5 - 7", -1], "ste": True},
         "dead_zone at layers 3, 5-7, -1: threshold 0.1, reference token_max, ste true"),
        ({**DEAD_ZONE, "site": "weight", "modules": ["q_proj", "k_proj"], "when": "eval",
          "mask_seed": 3, "density": 0.5, "axis": "channel", "exclude": ["x"]},
         "dead_zone at layers 10: threshold 0.1, reference token_max, modules q_proj+k_proj, "
         "site weight, exclude x, when eval, density 0.5, axis channel, mask_seed 3"),
        ({**DEAD_ZONE, "persistence": "intermittent", "activation_rate": 0.2},
         "dead_zone at layers 10: threshold 0.1, reference token_max, persistence intermittent, "
         "activation_rate 0.2"),
        ({"kind": "relative_gaussian", "layers": "all"}, "relative_gaussian at all layers: scale 0.05"),
        ({"kind": "relative_gaussian", "layers": "all", "backward_scale": 0.1, "modules": ["."]},
         "relative_gaussian at all layers: scale 0.05, backward_scale 0.1, modules ."),
        ({"kind": "stuck_at", "layers": [1], "value": 0, "density": 0.01},
         "stuck_at at layers 1: value 0.0, density 0.01"),
        ({"kind": "spike", "layers": [1], "probability": 0.01},
         "spike at layers 1: probability 0.01, factor 10.0"),
        ({"kind": "spike", "layers": [1], "probability": 0.01, "persistence": "permanent"},
         "spike at layers 1: probability 0.01, factor 10.0, persistence permanent"),
        ({"kind": "bit_flip", "layers": [1], "bits": [13, 14], "format": "bf16", "count": 2},
         "bit_flip at layers 1: bits 13+14, format bf16, count 2"),
        ({"kind": "bias", "layers": [1], "scale": 0.1, "form": "gain"},
         "bias at layers 1: scale 0.1, form gain"),
    ],
)  # fmt: skip
def test_a_fault_in_words(fault: dict[str, Any], text: str) -> None:
    assert fault_text(TypeAdapter[FaultSpec](Fault).validate_python(fault)) == text


@pytest.mark.parametrize(
    ("quantizer", "text"),
    [
        ({"format": "mxfp4"}, "mxfp4 of weights and activations at all layers"),
        ({"format": "nvfp4", "operands": "weight", "layers": ["0-3"]},
         "nvfp4 of weights at layers 0-3"),
        ({"format": "mxfp4", "operands": "activation", "scale_mode": "even", "when": "eval",
          "modules": ["q_proj"]},
         "mxfp4 of activations at all layers: modules q_proj, when eval, scale_mode even"),
    ],
)  # fmt: skip
def test_a_quantizer_in_words(quantizer: dict[str, Any], text: str) -> None:
    assert quantizer_text(TypeAdapter(Quantizer).validate_python(quantizer)) == text


def test_every_kind_can_be_put_in_words() -> None:
    """A field that the text does not know how to read would end the plan of a whole study."""
    needed = {
        "dead_zone": {"threshold": 0.1}, "saturation": {"limit": 0.1}, "bias": {"scale": 0.1},
        "absolute_gaussian": {"scale": 0.1}, "stuck_at": {"value": 1, "density": 0.1},
        "spike": {"probability": 0.1}, "bit_flip": {"bits": "sign", "rate": 0.1},
    }  # fmt: skip
    for kind, model in FAULTS.items():
        fault = model.model_validate({"kind": kind, "layers": [1], **needed.get(kind, {})})
        assert fault_text(fault).startswith(f"{kind} at layers 1: ")
    for name, quantizer in FORMATS.items():
        assert name in quantizer_text(quantizer.model_validate({"format": name}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, ""),
        ({"adapter_path": "faulty", "deploy": "merged"}, "adapter_path faulty, deploy merged"),
        ({"device_seed": 4, "eval_devices": "unseen", "eval_draws": 3},
         "device_seed 4, eval_devices unseen, eval_draws 3"),
    ],
)  # fmt: skip
def test_a_device_in_words(changes: dict[str, Any], text: str) -> None:
    faults = [{**DEAD_ZONE, "density": 0.5}]
    assert device_text(ScenarioSpec.model_validate({"faults": faults, **changes})) == text


@pytest.mark.parametrize(
    ("arm", "layers", "otherwise"),
    [
        ({}, "", ""),
        ({"device": "faulty"}, "", "faulty device"),
        ({"skip": "faulty"}, "", "without layers 10"),
        ({"train_layers": "healthy"}, "", "trains layers 0-9,11-27"),
        ({"train_layers": [0, "5-6"], "rank": 4, "learning_rate": 0.001, "weight_decay": 0.1}, "",
         "trains layers 0,5-6, learning_rate 0.001, rank 4, weight_decay 0.1"),
        # layers that get their noise later are noised layers too
        ({"noise": {"targeting": {"kind": "zone", "middle": [3], "edge": [0, 27], "boundary": 0.5,
                                  "middle_multiplier": 0, "middle_multiplier_after": 1}}},
         "0,3,27", ""),
    ],
)  # fmt: skip
def test_an_arm_in_words(arm: dict[str, Any], layers: str, otherwise: str, tmp_path: Path) -> None:
    plan = make_plan(make_study(tmp_path, arms={"mine": arm}))
    (found,) = (a for a in plan.scenarios[0].arms if a.arm == "mine")
    assert (found.layers, found.otherwise) == (layers, otherwise)
    assert plan.scenarios[0].arms[0].otherwise == "healthy device", "the clean arm"


def space(**dimensions: Any) -> dict[str, Any]:
    return {"space": {"dimensions": dimensions}}


CHOICE = {"kind": "choice", "values": ["hidden", "linear_weight"]}
SIGMA = {"kind": "float", "low": 0.0005, "high": 0.02}


@pytest.mark.parametrize(
    ("changes", "cautions"),
    [
        ({}, []),
        ({"controls": LINEAR_WEIGHT}, ["controls: carrier linear_weight: an absolute sigma of 0.05"]),
        ({"controls": {"carrier": {"kind": "linear_weight", "relative": True}}}, []),
        ({"controls": {**LINEAR_WEIGHT, "include": ["clean", "fault_only"]}}, []),
        ({"controls": {**LINEAR_WEIGHT, "schedule": {"kind": "constant", "sigma": 0.001}}}, []),
        ({"arms": {"mine": {"noise": LINEAR_WEIGHT}, "other": {"noise": {}}}},
         ["arms.mine: carrier linear_weight: an absolute sigma of 0.05"]),
        # of a space the loudest corner of a carrier, once
        ({"search": space(carrier=CHOICE, sigma_start=SIGMA)},
         ["search.space: carrier linear_weight: an absolute sigma of 0.02"]),
        ({"search": space(carrier=CHOICE, sigma_start={**SIGMA, "high": 0.001})}, []),
        ({"controls": {"redraw": "forward"}}, ["controls: redraw forward is redraw step here"]),
        ({"controls": {"redraw": "forward"},
          "training": {"steps": 20, "warmup_steps": 2, "gradient_accumulation_steps": 2}}, []),
        ({"search": space(redraw={"kind": "choice", "values": ["step", "microbatch"]})},
         ["search.space: redraw microbatch is redraw step here"]),
        ({"scenario": {"faults": [DEAD_ZONE], "device_seed": 3}},
         ["scenario.device_seed: changes nothing"]),
        ({"scenario": {"faults": [{**DEAD_ZONE, "density": 0.5}], "device_seed": 3}}, []),
        ({"sweep": {"device_seed": [0, 1, 2]}}, ["sweep.device_seed: changes nothing"]),
        ({"sweep": {"adapter_path": ["exact", "faulty"]}},
         ["sweep.adapter_path: faulty changes nothing"]),
        ({"scenario": {"faults": [{**DEAD_ZONE, "modules": ["linear"]}], "adapter_path": "faulty"}},
         []),
        ({"scenario": {"faults": [DEAD_ZONE], "quantization": "mxfp4", "adapter_path": "faulty"}},
         []),
    ],
)  # fmt: skip
def test_cautions(changes: dict[str, Any], cautions: list[str], tmp_path: Path) -> None:
    study = make_study(tmp_path, **changes)
    found = study_cautions(study, resolve_scenarios(study))
    assert len(found) == len(cautions)
    for text, beginning in zip(found, cautions, strict=True):
        assert text.startswith(beginning)


@pytest.mark.parametrize("cautious", [True, False])
def test_the_plan_shows_device_and_cautions(
    cautious: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = make_study(
        tmp_path,
        scenario={
            "faults": [{**DEAD_ZONE, "density": 0.5}],
            "quantization": {"format": "mxfp4", "operands": "weight"},
            "deploy": "merged",
        },
        controls=LINEAR_WEIGHT if cautious else {},
        arms={"aware": {"device": "faulty"}},
    )
    file = tmp_path / "demo.yaml"
    file.write_text(yaml.safe_dump(study.model_dump(mode="json", exclude_unset=True)))
    for arguments in (["plan", str(file)], ["plan", str(file), "--json"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
    text, _, data = capsys.readouterr().out.partition("\n{\n")
    words = " ".join(text.split())
    for part in ("density 0.5; mxfp4 of", "at all layers; deploy merged"):
        assert part in words
    assert "aware - no noise; faulty device" in words
    assert ("caution controls: carrier linear_weight" in words) is cautious
    plan = json.loads("{" + data)
    assert len(plan["cautions"]) == cautious
    assert plan["scenarios"][0]["quantization"] == ["mxfp4 of weights at all layers"]
    assert plan["scenarios"][0]["device"] == "deploy merged"
