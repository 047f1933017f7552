"""How much memory a pack plans with is what its worker was given, or an equal part of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import one_pack, save_tiny_model, tiny_run, tiny_setting, tiny_training

from aqn_tune.training import engine as engine_module
from aqn_tune.training.engine import ENGINE
from aqn_tune.training.memory import Fit

torch.set_num_threads(1)


@pytest.mark.parametrize(("given", "planned"), [(0.25, 0.25), (1.0, 1.0), (None, 0.125)])
def test_a_pack_plans_with_the_share_of_its_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: float | None, planned: float
) -> None:
    seen: list[float] = []

    def fitting(runs: tuple[Any, ...], *_: Any, share: float) -> Fit:
        seen.append(share)
        return Fit(len(runs), "")

    monkeypatch.setattr(engine_module, "fitting", fitting)
    monkeypatch.setattr(engine_module, "cores", lambda: 8)
    setting = tiny_setting(save_tiny_model(tmp_path)).model_copy(update={"memory_share": given})
    pack = one_pack(tiny_run(seed=2), tiny_run(seed=4), rungs=(6,))
    shared = ENGINE.load(setting, "test", tiny_training().max_length)
    ENGINE.open_pack(pack, setting, shared).close()
    assert seen == [planned]
