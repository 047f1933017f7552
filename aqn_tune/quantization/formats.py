"""The register of number formats."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from aqn_tune.quantization.base import QuantizerSpec
from aqn_tune.quantization.fp8_e4m3 import FP8E4M3
from aqn_tune.quantization.int8 import Int8
from aqn_tune.quantization.mxfp4 import MXFP4
from aqn_tune.quantization.nvfp4 import NVFP4

FORMATS: dict[str, type[QuantizerSpec]] = {
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
    "fp8_e4m3": FP8E4M3,
    "int8": Int8,
}

Quantizer = Annotated[MXFP4 | NVFP4 | FP8E4M3 | Int8, Field(discriminator="format")]
"""The quantizer of a scenario, told apart by `format`."""
