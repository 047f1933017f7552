"""Quantizers: number formats with few bits. A new one is one file here and its name in `Quantizer`."""

from __future__ import annotations

from aqn_tune.quantization.base import Quantized as Quantized
from aqn_tune.quantization.base import QuantizerSpec as QuantizerSpec
from aqn_tune.quantization.fake import fake_quantize as fake_quantize
from aqn_tune.quantization.formats import FORMATS as FORMATS
from aqn_tune.quantization.formats import Quantizer as Quantizer
from aqn_tune.quantization.fp8_e4m3 import FP8E4M3 as FP8E4M3
from aqn_tune.quantization.int8 import Int8 as Int8
from aqn_tune.quantization.mxfp4 import MXFP4 as MXFP4
from aqn_tune.quantization.nvfp4 import NVFP4 as NVFP4
from aqn_tune.quantization.straight_through import straight_through as straight_through
