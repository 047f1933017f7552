"""The passes of an evaluation: each run on each device it is to meet, and whether it met that device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from aqn_tune.injection.injection import Injection
from aqn_tune.study.device import Device
from aqn_tune.study.runs import Condition
from aqn_tune.study.seeds import stream_seed
from aqn_tune.training.pack import ReplicaPack, not_in_training


class Pass(NamedTuple):
    """One run on one device: a fold of a forward pass."""

    replica: int
    condition: Condition
    draw: int

    def device(self) -> Device:
        """Return the device itself, or for unseen devices another of the same make."""
        device = self.condition.device
        if not self.condition.unseen:
            return device
        # A study's device seed is below 2^63, so an unseen device is never the one it trained on.
        seed = stream_seed(device.seed, "unseen", self.draw) | 1 << 63
        return device.model_copy(update={"seed": seed})

    @property
    def is_merged(self) -> bool:
        """Whether it is declared to run with the adapters merged into the weights."""
        return self.condition.device.deploy == "merged"


def living_passes(pack: ReplicaPack) -> list[Pass]:
    """Return every draw of every condition of every run that has not failed, in this order."""
    return [
        Pass(replica, condition, draw)
        for replica, run in enumerate(pack.runs)
        if replica not in pack.failures
        for condition in run.conditions
        for draw in range(condition.draws)
    ]


@contextmanager
def folded(pack: ReplicaPack, replicas: Sequence[int]) -> Iterator[None]:
    """Let fold f of every forward pass in the block be replica `replicas[f]`, out of training mode."""
    of_fold = torch.tensor(replicas, device=pack.device)
    try:
        for module in pack.folded:
            module.replica_of_fold = of_fold
        with not_in_training(pack.book.layers()):
            yield
    finally:
        for module in pack.folded:
            module.replica_of_fold = None


def stray(injection: Injection, replica: int) -> str:
    """Return what acted on a replica that it is not declared for, "" for nothing."""
    for slot, _, tally in injection.layout.faults:
        changed = float(tally.affected[replica]) > 0 or float(tally.error_energy[replica]) > 0
        if replica not in slot.active and (changed or int(tally.calls[replica])):
            return f"{slot.spec.kind} acted, though it is not declared"
    for quantizer in injection.layout.quantizers:
        has_strayed = replica in quantizer.tally.strayed or int(quantizer.tally.calls[replica])
        if replica not in quantizer.slot.active and has_strayed:
            return f"{quantizer.slot.spec.format} acted, though it is not declared"
    return ""


def disagreement(
    injection: Injection,
    index: int,
    condition: Condition,
    batches: int,
    *,
    strayed: str,
    is_finite: bool,
) -> str:
    """Return how what the device did disagrees with the condition, "" when it does not.

    Args:
        injection: What was injected, measured.
        index: Replica of the injection.
        condition: What it was to run under.
        batches: Forward passes.
        strayed: What acted without being declared (`stray`) where this injection was not attached.
        is_finite: Whether what came out is finite; else a fault may have found nothing to change.
    """
    name = f"evaluation audit: condition {condition.name!r} {condition.scenario}".rstrip()
    layout = injection.layout
    for slot, addresses, tally in layout.faults:
        wanted = batches * len(addresses) if index in slot.active else 0
        if int(tally.calls[index]) != wanted:
            return (
                f"{name}: {slot.spec.kind} was in place {int(tally.calls[index])} times of {wanted}"
            )
    for quantizer in layout.quantizers:
        wanted = batches * quantizer.tally.sites if index in quantizer.slot.active else 0
        got = int(quantizer.tally.calls[index])
        if got != wanted:
            return f"{name}: {quantizer.slot.spec.format} quantized {got} operands of {wanted}"
    strayed = strayed or stray(injection, index)
    if strayed:
        return f"{name}: {strayed}"
    defects = injection.quantizer_defects()
    if index in defects:
        return f"{name}: {defects[index]}"
    if layout.noise:
        return f"{name}: training noise is on"
    if layout.is_merged != (condition.device.deploy == "merged"):
        deployed = "merged" if layout.is_merged else "unmerged"
        return f"{name}: adapters are {deployed}, declared is {condition.device.deploy}"
    formats = [slot.spec.format for slot, _, _ in layout.quantizers if index in slot.active]
    if len(formats) != len(condition.device.quantization):
        return (
            f"{name} declares {len(condition.device.quantization)} quantizers, "
            f"{len(formats)} are attached"
        )
    declared = [f for f in condition.device.faults if not f.is_off() and not f.may_rest()]
    attached = [slot.spec for slot, _, _ in layout.faults if index in slot.active]
    if len(attached) != len(condition.device.faults):
        return (
            f"{name} declares {len(condition.device.faults)} faults, {len(attached)} are attached"
        )
    acted = sum(
        float(tally.affected[index]) > 0 or float(tally.error_energy[index]) > 0
        for slot, _, tally in layout.faults
        if index in slot.active and not slot.spec.may_rest()
    )
    if is_finite and acted < len(declared):
        return (
            f"{name} declares {len(declared)} faults, {acted} changed a value in {batches} batches"
        )
    return ""
