"""A fault that is met in training alone has to change a value there, or its run is no faulty run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CLEAN, save_tiny_model, tiny_pack, tiny_run, tiny_training

from aqn_tune.faults import BitFlip, DeadZone, FaultSpec, Saturation
from aqn_tune.injection.measure import FaultTally
from aqn_tune.study.device import Device
from aqn_tune.study.runs import Run
from aqn_tune.training.pack import ReplicaPack
from aqn_tune.training.state import restore, state_of

torch.set_num_threads(1)

STEPS = 4
FULL = {"kind": "full"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def a_run(*faults: FaultSpec, seed: int = 2, **training: Any) -> Run:
    device = Device(faults=faults)
    spec = tiny_training(steps=STEPS, warmup_steps=1, **training)
    return tiny_run(seed=seed, training=spec, device=device, conditions=(CLEAN,))


def failures(folder: Path, runs: Sequence[Run], *, steps: int = STEPS) -> list[str]:
    """Return what each run fails of, "" where it does not."""
    pack = tiny_pack(folder, runs, steps=steps)
    for replica in range(len(runs)):
        pack.audit(replica)
    return [pack.failures.get(replica, "") for replica in range(len(runs))]


def saturation(site: str = "output", limit: float = 1e9) -> Saturation:
    return Saturation.model_validate(
        {
            "layers": [1],
            "site": site,
            "reference": "absolute",
            "limit": limit,
            "modules": ["linear"],
        }
    )


DEAD = DeadZone(layers=(1,), threshold=0.1)
NEVER = DeadZone(layers=(1,), threshold=1e-30, reference="absolute")
SELDOM = BitFlip(layers=(1,), rate=1e-12, bits="mantissa")


@pytest.mark.parametrize(
    ("fault", "training", "idle"),
    [
        (saturation(), {}, "saturation at output"),
        (saturation("input"), {}, "saturation at input"),
        (saturation("weight"), {}, "saturation at weight"),
        (saturation("weight"), {"method": FULL}, "saturation at weight"),
        (saturation("grad_output"), {}, "saturation at grad_output"),
        (saturation("grad_input"), {}, "saturation at grad_input"),
        (saturation("grad_weight"), {"method": FULL}, "saturation at grad_weight"),
        (NEVER, {}, "dead_zone at output"),
        (saturation(limit=1e-3), {}, ""),
        (saturation("weight", limit=1e-3), {}, ""),
        (saturation("weight", limit=1e-3), {"method": FULL}, ""),
        (saturation("grad_output", limit=1e-9), {}, ""),
        (saturation("grad_input", limit=1e-9), {}, ""),
        (saturation("grad_weight", limit=1e-9), {"method": FULL}, ""),
        (DEAD, {"gradient_accumulation_steps": 2}, ""),
        (DEAD, {"gradient_checkpointing": True}, ""),
        (SELDOM, {}, ""),
        (DeadZone(layers=(1,), threshold=0.0), {}, ""),
    ],
    ids=lambda value: getattr(value, "site", None),
)
def test_which_faults_trained_as_if_they_were_not_there(
    folder: Path, fault: FaultSpec, training: dict[str, Any], idle: str
) -> None:
    """What may rest, or is declared at a level that changes nothing, is not asked."""
    wanted = f"fault audit: {idle} changed no value in 4 steps: it trained as without the fault"
    assert failures(folder, [a_run(fault, **training)]) == [wanted if idle else ""]


def test_of_two_runs_of_a_fault_the_one_at_whose_level_nothing_changes(folder: Path) -> None:
    """They share a slot, and in a weight fault one that acts shares nothing with one that does not."""
    for site in ("output", "weight", "grad_output"):
        runs = [a_run(saturation(site, limit)) for limit in (1e-9, 1e9, 1e-9)]
        assert [bool(text) for text in failures(folder, runs)] == [False, True, False], site


@pytest.mark.parametrize("site", ["grad_output", "grad_input"])
@pytest.mark.parametrize(("skip", "fails"), [((1,), False), ((2,), True)])
def test_the_gradient_of_a_layer_that_is_left_out_is_not_asked(
    folder: Path, site: str, skip: tuple[int, ...], fails: bool
) -> None:
    """It is zero there whatever the fault; at other layers the limit that nothing reaches shows."""
    run = a_run(saturation(site)).model_copy(update={"skip": skip})
    assert [bool(text) for text in failures(folder, [run])] == [fails]
    acting = a_run(saturation(site, limit=1e-9)).model_copy(update={"skip": skip})
    assert failures(folder, [acting]) == [""]


def test_a_fault_may_act_late(folder: Path) -> None:
    """What is idle at a rung may act before the end."""
    assert failures(folder, [a_run(saturation())], steps=STEPS - 1) == [""]


def test_an_untrained_base_is_not_asked(folder: Path) -> None:
    assert failures(folder, [a_run(saturation())], steps=0) == [""]


def test_what_was_seen_before_a_rung_is_known_after_it(folder: Path) -> None:
    runs = [a_run(DEAD), a_run(saturation(), seed=4)]
    first = tiny_pack(folder, runs, steps=2)
    states = [state_of(first, replica) for replica in range(2)]
    assert [state.faults_unseen for state in states] == [[False], [True]]
    second = tiny_pack(folder, runs[::-1], steps=0)
    restore(second, states[::-1])
    assert second.injection.layout.faults
    unseen = {
        replica
        for slot, _, tally in second.injection.layout.faults
        for replica in slot.active
        if replica in tally.unseen
    }
    assert unseen == {0}


def test_it_is_looked_at_until_it_has_acted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look in every step would cost as much as the fault."""
    watched: list[int] = []
    watch = FaultTally.watch

    def counted(self: FaultTally, *args: Any) -> None:
        watched.append(len(self.unseen))
        watch(self, *args)

    monkeypatch.setattr(FaultTally, "watch", counted)
    pack: ReplicaPack = tiny_pack(folder, [a_run(DEAD), a_run(DEAD, seed=4)], steps=STEPS)
    assert not pack.failures
    assert watched == [2, 0, 0, 0]
