"""A mark for tests that hold a run in a pack to the last bit of the run alone."""

from __future__ import annotations

import pytest
import torch

from aqn_tune.training.rounding import rounds_alike

torch.set_num_threads(1)

exact = pytest.mark.skipif(
    not all(
        rounds_alike((16, 32, 48, 64, 96, 128), (32, 64), dtype)
        for dtype in (torch.float32, torch.float64)
    ),
    reason="on this processor products of small packs differ by rounding",
)
"""Elsewhere such a test is left out: packs as small as those of tests agree to rounding alone."""
