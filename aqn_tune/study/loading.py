"""From a study file to a checked study, its scenarios and its setting."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aqn_tune.errors import UserError
from aqn_tune.models.spec import ModelSpec
from aqn_tune.search.cluster import worker_count
from aqn_tune.study.checks import check_study
from aqn_tune.study.messages import as_user_error, located
from aqn_tune.study.resources import count_parameters, gpu_share
from aqn_tune.study.runs import Setting
from aqn_tune.study.schema import ComputeSpec, Study
from aqn_tune.study.source import Source, apply_override, dotted, read_source
from aqn_tune.study.sweep import resolve_scenarios as resolve_scenarios


def load_study(path: Path | str, overrides: Sequence[str] = ()) -> Study:
    """Read, complete and check a study.

    `search.space` may be the path of a file with `dimensions:`, relative to the study's own; its
    content takes the place of the path, so that the study is whole. Paths of data, model and output
    are relative to the working directory.

    Args:
        path: The YAML file.
        overrides: `key.of.study=value` each, values read as YAML, applied in order. An override
            of part of a choice that the file leaves out (`task.test_rows=100`) is of its default.

    Raises:
        UserError: Anything wrong with the study, one line per problem: file, line, dotted key, what
            was got, what is allowed and the nearest valid name. Nothing is written.
    """
    file = Path(path)
    source = _with_space(read_source(file), file)
    for override in overrides:
        source = _with_space(apply_override(source, override), file)
    declared = _with_kinds(source)
    source = _without_auto(declared)
    try:
        study = Study.model_validate(source.data)
    except ValidationError as error:
        raise as_user_error(error, Study, source) from None
    try:
        if source is not declared:
            study = _with_share(study)
        layers, widths = layer_count(study.model), model_widths(study.model)
        check_study(study, resolve_scenarios(study), layers, widths)
    except UserError as error:
        raise located(source, str(error)) from None
    return study


def make_setting(study: Study) -> Setting:
    """Return what all runs of a study share. Hashes the model's files; needs no torch."""
    from aqn_tune.models.locate import fingerprint

    return Setting(
        model=study.model,
        task=study.task,
        model_fingerprint=fingerprint(study.model),
        task_fingerprint=study.task.fingerprint(),
        eval_batch_size=study.eval_batch_size,
        device="cuda" if study.compute.gpus_per_worker else "cpu",
        memory_share=_memory_share(study.compute),
    )


def _memory_share(compute: ComputeSpec) -> float | None:
    """Return the share of a worker; None on a cluster, where a worker asks Ray about its node."""
    if compute.gpus_per_worker:
        return min(compute.gpus_per_worker, 1.0)
    return None if compute.address is not None else 1 / worker_count(compute)


def layer_count(model: ModelSpec) -> int:
    """Return the number of decoder layers from the model's config.json, without loading the model.

    Raises UserError where the model is neither a folder nor in the Hugging Face cache, or where its
    config does not say how many layers it has.
    """
    found = _config_numbers(model, "num_hidden_layers", "n_layer", "num_layers")
    if not found:
        raise UserError(
            f"model.path: {_config_file(model)} has no num_hidden_layers; is it a causal language model?"
        )
    return found[0]


def parameter_count(model: ModelSpec) -> int | None:
    """Return about how many parameters a model has; None where its config.json does not say.

    See `aqn_tune.study.resources.count_parameters`. Raises UserError as `layer_count` does.
    """
    return count_parameters(_config(_config_file(model)))


def model_widths(model: ModelSpec) -> tuple[int, ...]:
    """Return the features between and inside the layers of a model, as its config.json names them.

    Empty where it does not say how wide the model is.
    """
    widths = _config_numbers(model, "hidden_size", "n_embd", "d_model")
    if not widths:
        return ()
    inside = _config_numbers(model, "intermediate_size", "n_inner", "ffn_dim", "d_ff")
    heads = _config_numbers(model, "num_attention_heads", "n_head")
    size = _config_numbers(model, "head_dim") or tuple(
        width // count for width, count in zip(widths, heads, strict=False)
    )
    kept = _config_numbers(model, "num_key_value_heads") or heads
    projected = tuple(count * one for count in (*heads, *kept) for one in size)
    return tuple(dict.fromkeys((*widths, *(inside or (4 * max(widths),)), *projected)))


def _config_numbers(model: ModelSpec, *names: str) -> tuple[int, ...]:
    config = _config(_config_file(model))
    parts = (config, config.get("text_config") or {})
    return tuple(int(p[name]) for p in parts for name in names if isinstance(p.get(name), int))


def _config(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: cannot read {file}: {error}") from None


def _config_file(model: ModelSpec) -> Path:
    from aqn_tune.models.locate import EMBEDDED_FOLDER
    from aqn_tune.models.spec import EMBEDDED

    if model.path == EMBEDDED:
        return EMBEDDED_FOLDER / "config.json"
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path: {folder} holds no config.json; it is no model folder")
        return folder / "config.json"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    except HFValidationError:
        cached = None
    if not isinstance(cached, str):
        raise UserError(
            f"model.path: got {model.path!r}, which is neither 'embedded', nor a folder, nor in "
            f"the Hugging Face cache; for a hub model run `hf download {model.path}` first"
        )
    return Path(cached)


def _with_space(source: Source, file: Path) -> Source:
    """Put the content of the file that `search.space` names in its place."""
    search = source.data.get("search")
    named = search.get("space") if isinstance(search, dict) else None
    if not isinstance(named, str):
        return source
    path = file.parent / Path(named).expanduser()
    try:
        space = read_source(path)
    except UserError as error:
        raise UserError(f"{source.place(('search', 'space'))}: search.space: {error}") from None
    data = {**source.data, "search": {**source.data["search"], "space": space.data}}
    inner = {("search", "space", *key): place for key, place in space.places.items()}
    return Source(data, {**source.places, **inner})


def _without_auto(source: Source) -> Source:
    """Put a number in the place of `compute.gpus_per_worker: auto` until the study is known."""
    compute = source.data.get("compute")
    if not isinstance(compute, dict) or compute.get("gpus_per_worker") != "auto":
        return source
    data = {**source.data, "compute": {**compute, "gpus_per_worker": 1.0}}
    return Source(data, source.places)


def _with_share(study: Study) -> Study:
    """Return the study with the GPUs that `auto` stands for, so that who reads it meets a number."""
    parameters = parameter_count(study.model)
    if parameters is None:
        raise UserError(
            f"compute.gpus_per_worker: got 'auto', but {_config_file(study.model)} does not say how "
            "large the model is; write a number"
        )
    share = gpu_share(study.training.method, parameters)
    compute = study.compute.model_copy(update={"gpus_per_worker": share})
    return study.model_copy(update={"compute": compute})


def _with_kinds(source: Source) -> Source:
    """Give a choice that only overrides have begun the kind that it has by default."""
    for path, kind in _default_kinds():
        place = source.places.get(path)
        if place is None or place.line is not None:
            continue
        value: Any = source.data
        for key in path:
            value = value[key]
        if isinstance(value, dict) and "kind" not in value:
            source = apply_override(source, f"{dotted(path)}.kind={kind}")
    return source


def _default_kinds() -> Iterator[tuple[tuple[str, ...], str]]:
    for room in ("", "training", "controls", "confirm"):
        model: Any = Study.model_fields[room].default if room else Study
        for name, field in (type(model) if room else model).model_fields.items():
            kind = getattr(field.default, "kind", None)
            if kind is not None:
                yield ((room, name) if room else (name,)), kind
