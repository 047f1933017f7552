"""A scenario's device and an arm in a few words: what they declare that is not the default."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from aqn_tune.faults.base import FaultSpec, TrueGradientFault
from aqn_tune.quantization import QuantizerSpec
from aqn_tune.study.arms import ArmSpec
from aqn_tune.study.layers import Layers
from aqn_tune.study.runs import Run
from aqn_tune.study.scenario import ScenarioSpec
from aqn_tune.study.training import Full

_OPERANDS = {"weight": "weights", "activation": "activations", "both": "weights and activations"}
_DEVICE_KEYS = ("adapter_path", "deploy", "device_seed", "eval_devices", "eval_draws")


def fault_text(fault: FaultSpec) -> str:
    """Return a fault as `dead_zone at layers 10: threshold 0.2, reference token_max, site weight`.

    The parameters of its kind are all named; of what every fault has, only what is not the default.
    """
    common = {*FaultSpec.model_fields, *TrueGradientFault.model_fields}
    fields = [name for name in type(fault).model_fields if name not in ("kind", "layers")]
    own = [name for name in fields if name not in common]
    shared = [name for name in fields if name in common]
    head = f"{fault.kind} at {layers_text(fault.layers)}"
    return _joined(head, [*_values(fault, own), *_changes(fault, shared)])


def quantizer_text(quantizer: QuantizerSpec) -> str:
    """Return a quantizer as `mxfp4 of weights at all layers: scale_mode even`."""
    common = ("format", "operands", "layers")
    rest = [name for name in type(quantizer).model_fields if name not in common]
    head = f"{quantizer.format} of {_OPERANDS[quantizer.operands]} at"
    return _joined(f"{head} {layers_text(quantizer.layers)}", list(_changes(quantizer, rest)))


def device_text(spec: ScenarioSpec) -> str:
    """Return what of the device itself and of its evaluation is not the default, "" for nothing."""
    return ", ".join(_changes(spec, _DEVICE_KEYS))


def arm_text(arm: ArmSpec, run: Run) -> str:
    """Return what an arm changes beside the noise, "" for nothing.

    Args:
        arm: As declared.
        run: What it comes to in a scenario.
    """
    parts = [] if arm.device == "scenario" else [f"{arm.device} device"]
    if run.skip:
        parts.append(f"without layers {ranges(run.skip)}")
    if run.train_layers is not None:
        rest = isinstance(run.training.method, Full) and run.train_rest
        parts.append(f"trains layers {ranges(run.train_layers)}{' and the rest' * rest}")
    for name in ("learning_rate", "rank", "weight_decay"):
        value = getattr(arm, name)
        if value is not None:
            parts.append(f"{name} {value:g}")
    return ", ".join(parts)


def layers_text(layers: Layers) -> str:
    """Return layers as users write them: `all layers`, `layers 0, 14-17, -1`."""
    return (
        "all layers"
        if layers == "all"
        else f"layers {', '.join(str(part).replace(' ', '') for part in layers)}"
    )


def ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as text, runs as `first-last`: `0-9,11`."""
    parts = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(parts)


def _values(spec: BaseModel, names: Sequence[str]) -> Iterator[str]:
    """Yield each field with its value, but those that are off by default."""
    for name in names:
        value = getattr(spec, name)
        if value is None or (not value and value == type(spec).model_fields[name].default):
            continue
        yield f"{name} {_shown(value)}"


def _changes(spec: BaseModel, names: Sequence[str]) -> Iterator[str]:
    """Yield each field that is not its default, with its value."""
    for name in names:
        value = getattr(spec, name)
        if value != type(spec).model_fields[name].default:
            yield f"{name} {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _joined(head: str, parts: Sequence[str]) -> str:
    return f"{head}: {', '.join(parts)}" if parts else head
