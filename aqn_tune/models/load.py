"""Tokenizer, weights and model of a spec.

Weights travel as plain numpy arrays: read once by whoever starts the workers, put once into a
shared object store, mapped read-only by every worker, and copied into each model built from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from aqn_tune.errors import UserError
from aqn_tune.models.locate import model_folder
from aqn_tune.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

__all__ = ["base_arrays", "build_model", "decoder_layers", "load_tokenizer", "no_progress_bars"]


def load_tokenizer(spec: ModelSpec) -> Any:
    """Return the tokenizer of ``spec``, which pads on the right.

    Raises :class:`aqn_tune.errors.UserError` as :func:`aqn_tune.models.locate.model_folder` does,
    and where the folder has no tokenizer.
    """
    from transformers import AutoTokenizer

    folder = model_folder(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise _unreadable(spec, "tokenizer", error) from error
    tokenizer.padding_side = "right"
    return tokenizer


def base_arrays(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Return the weights of ``spec`` by parameter name, in the dtype of the spec.

    Arrays are C-contiguous, own their memory and can be pickled, so Ray's object store hands them
    to workers without a copy. Tied weights are there once, under the name of the input embedding.
    numpy has no bfloat16: arrays of dtype ``uint16`` are bfloat16 bit patterns.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = model_folder(spec)
    try:
        with no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, spec.dtype),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
            )
    except (OSError, ValueError) as error:
        raise _unreadable(spec, "causal language model", error) from error
    return {name: _to_numpy(tensor) for name, tensor in _stored_tensors(model).items()}


def build_model(spec: ModelSpec, arrays: Mapping[str, np.ndarray] | None = None) -> PreTrainedModel:
    """Return a model with the base weights: eval mode, nothing trainable, no cache.

    ``arrays`` come from :func:`base_arrays` of the same spec and may be read-only; they are copied,
    so a model may be trained without touching them. Without them the folder is read. No global
    random state is moved. ``generate`` is told ``use_cache=True`` where it should be fast.

    Raises :class:`aqn_tune.errors.UserError` as the two functions above do, and ``ValueError``
    where the arrays are not exactly the tensors of this model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    weights = base_arrays(spec) if arrays is None else arrays
    config = AutoConfig.from_pretrained(
        model_folder(spec), trust_remote_code=False, local_files_only=True
    )
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, spec.dtype), trust_remote_code=False
        )
    _fill(model, weights)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """Return the decoder's list of layers; the position in it is the layer number of the study.

    It is found by structure: the list of alike modules, one per ``num_hidden_layers`` of the
    config, that lies outside every other such list. Works through wrappers such as PEFT's.

    Raises :class:`aqn_tune.errors.UserError` where there is no such list, or more than one.
    """
    import torch

    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config(decoder=True) if config is not None else None
    count = getattr(text_config, "num_hidden_layers", None)
    found: dict[str, torch.nn.ModuleList] = {}
    for name, module in model.named_modules():
        if (
            isinstance(module, torch.nn.ModuleList)
            and len(module) == count
            and len({type(layer) for layer in module}) == 1
            and not any(name.startswith(f"{outer}.") for outer in found)
        ):
            found[name] = module
    if len(found) != 1:
        candidates = ", ".join(found) if found else "none"
        raise UserError(
            f"{type(model).__name__}: the decoder's list of layers is not plain to see; wanted one "
            f"ModuleList with num_hidden_layers = {count} alike modules, found {candidates}"
        )
    return next(iter(found.values()))


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing its progress bars, which would tear through a live display."""
    from transformers.utils import logging

    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()


def _stored_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=True))
    everything = model.state_dict(keep_vars=True)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(parameters)
    return {name: tensor for name, tensor in everything.items() if name not in tied}


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    import numpy as np
    import torch

    plain = tensor.detach().contiguous()
    if plain.dtype == torch.bfloat16:
        plain = plain.view(torch.uint16)
    return np.array(plain.numpy(), order="C", copy=True)


def _fill(model: torch.nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    import torch

    wanted = _stored_tensors(model)
    if wanted.keys() != weights.keys():
        different = sorted(wanted.keys() ^ weights.keys())
        raise ValueError(f"these arrays belong to another model; names in one only: {different}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            source = torch.from_numpy(weights[name].copy())
            if tensor.dtype == torch.bfloat16 and source.dtype == torch.uint16:
                source = source.view(torch.bfloat16)
            if source.shape != tensor.shape or source.dtype != tensor.dtype:
                raise ValueError(
                    f"array {name} is {source.dtype} {tuple(source.shape)}, this model has "
                    f"{tensor.dtype} {tuple(tensor.shape)}"
                )
            tensor.copy_(source)


def _unreadable(spec: ModelSpec, what: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0]
    return UserError(f"model.path: {spec.path!r} cannot be loaded as a {what}: {reason}")
