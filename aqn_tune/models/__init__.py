"""Base models: the one shipped with the package and any other Hugging Face causal model.

Importing this loads neither torch nor transformers; the loading functions do.
"""

from __future__ import annotations

from aqn_tune.models.load import base_arrays, build_model, decoder_layers, load_tokenizer
from aqn_tune.models.locate import fingerprint, model_folder
from aqn_tune.models.spec import EMBEDDED, ModelSpec

__all__ = [
    "EMBEDDED",
    "ModelSpec",
    "base_arrays",
    "build_model",
    "decoder_layers",
    "fingerprint",
    "load_tokenizer",
    "model_folder",
]
