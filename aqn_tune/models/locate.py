"""From a model spec to a folder that is fit to be loaded, and to the hash of what is in it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from aqn_tune.errors import UserError
from aqn_tune.models.spec import EMBEDDED, ModelSpec

__all__ = ["EMBEDDED_FOLDER", "fingerprint", "folder_fingerprint", "model_folder"]

EMBEDDED_FOLDER: Final = Path(__file__).parent / "embedded"

_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TOKENIZER_FILES: Final = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_WANTED_FROM_HUB: Final = ["config.json", "*.safetensors", "model.safetensors.index.json"]


def model_folder(spec: ModelSpec) -> Path:
    """Return the folder that holds config, weights and tokenizer of ``spec``.

    A local folder is used as it is, with no network attempt. A hub name is fetched into (or found
    in) the Hugging Face cache, safetensors only; ``HF_HUB_OFFLINE=1`` is respected.

    Raises :class:`aqn_tune.errors.UserError` where there is no such folder or name, where it has
    no ``config.json`` or no safetensors, where it needs code of its own, or where a revision is
    given for a folder.
    """
    if spec.path == EMBEDDED:
        folder = EMBEDDED_FOLDER
    else:
        folder = Path(spec.path).expanduser()
        if not folder.is_dir():
            return _checked(_from_hub(spec), spec)
    if spec.revision is not None:
        raise UserError(
            f"model.revision = {spec.revision!r}: a revision belongs to a hub name, and "
            f"model.path {spec.path!r} is a folder; leave revision out"
        )
    return _checked(folder, spec)


def _from_hub(spec: ModelSpec) -> Path:
    if _HUB_NAME.fullmatch(spec.path) is None:
        raise UserError(
            f"model.path: no folder {spec.path!r}; allowed are 'embedded', a Hugging Face model "
            "folder, or a hub name like 'Qwen/Qwen2.5-1.5B'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(
            spec.path,
            revision=spec.revision,
            allow_patterns=[*_WANTED_FROM_HUB, *_TOKENIZER_FILES],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.path: {spec.path!r} is no folder here and cannot be had from the hub "
            f"({reason}); allowed are 'embedded', a Hugging Face model folder, or a hub name"
        ) from error
    return Path(snapshot)


def _checked(folder: Path, spec: ModelSpec) -> Path:
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(
            f"model.path: {spec.path!r} holds no config.json; a Hugging Face model folder has "
            "config.json, model.safetensors and the tokenizer's files"
        )
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model.path: {config} is no JSON: {error}") from error
    if "auto_map" in settings:
        raise UserError(
            f"model.path: {spec.path!r} brings code of its own (auto_map in config.json), and code "
            "from a model folder is never run; use an architecture that transformers has built in"
        )
    if not any(folder.glob("*.safetensors")):
        other = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only {', '.join(other)}" if other else "no weights"
        raise UserError(
            f"model.path: {spec.path!r} holds {found}; weights are read from safetensors files "
            "alone, so save the model again with save_pretrained"
        )
    return folder


def fingerprint(spec: ModelSpec) -> str:
    """Return the SHA-256 (hex) of config, weights and tokenizer of ``spec``.

    Use it in hashes of configurations: the same fingerprint is the same base model, wherever it
    lies. The dtype it is loaded in is not part of it. For the embedded model this reads one line
    of its manifest, which a test holds to the files; for any other model it reads every byte.
    """
    folder = model_folder(spec)
    if spec.path == EMBEDDED:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return str(manifest["fingerprint"])
    return folder_fingerprint(folder)


def folder_fingerprint(folder: Path) -> str:
    """Return the SHA-256 (hex) over names and contents of a folder's model files, name by name."""
    whole = hashlib.sha256()
    for path in _model_files(folder):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.name} {content}\n".encode())
    return whole.hexdigest()


def _model_files(folder: Path) -> Iterator[Path]:
    names = {"config.json", *_TOKENIZER_FILES}
    for path in sorted(folder.iterdir()):
        if path.name in names or path.suffix == ".safetensors":
            yield path
