"""The register of number formats."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from aqn_tune.kinds import by_kind
from aqn_tune.quantization.base import QuantizerSpec
from aqn_tune.quantization.fp8_e4m3 import FP8E4M3
from aqn_tune.quantization.int8 import Int8
from aqn_tune.quantization.mxfp4 import MXFP4
from aqn_tune.quantization.nvfp4 import NVFP4

Quantizer = Annotated[MXFP4 | NVFP4 | FP8E4M3 | Int8, Field(discriminator="format")]
"""The quantizer of a scenario, told apart by `format`."""

FORMATS: dict[str, type[QuantizerSpec]] = by_kind(Quantizer, key="format")
"""All of them by format."""
