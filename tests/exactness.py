"""A mark for tests that hold a run in a pack to the last bit of the run alone."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)

# Known of the processor and of torch's build. Asked of the package itself, a package that no longer
# promises anything would leave out the tests of its promise.
BIT_FOR_BIT = (
    torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkl.is_available()
)
"""Whether products as small as those of tests come out the same in every pack."""

exact = pytest.mark.skipif(
    not BIT_FOR_BIT,
    reason="products of small packs are alike to the last bit with AVX-512 and MKL; here to rounding",
)
"""Elsewhere such a test is left out: packs as small as those of tests agree to rounding alone."""
