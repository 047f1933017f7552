"""`manifest.json`: what a study was run with: versions, hashes, machine, times."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import lockstep_limits
from aqn_tune.report.files import replace_text
from aqn_tune.study.code import code_hash, hardware
from aqn_tune.study.folder import StudyFolder, study_hash
from aqn_tune.study.runs import Setting
from aqn_tune.study.schema import Study

MANIFEST_FORMAT = 1
"""Raised when a key of `manifest.json` changes its meaning or goes away."""

PACKAGES = (
    "torch", "transformers", "peft", "tokenizers", "safetensors", "ray", "optuna", "numpy", "scipy",
    "pyarrow", "pydantic", "tensorboard",
)  # fmt: skip


def write_manifest(folder: StudyFolder, study: Study, setting: Setting) -> None:
    """Write the manifest of a study that begins or continues.

    The time of the first start and the versions of earlier starts stay: a study continued with
    other versions lists both.
    """
    now = _now()
    earlier = read_manifest(folder)
    content: dict[str, Any] = {
        "format": MANIFEST_FORMAT,
        "study": study.study,
        "study_hash": study_hash(study),
        "model": setting.model.model_dump(mode="json"),
        "model_fingerprint": setting.model_fingerprint,
        "task_fingerprint": setting.task_fingerprint,
        "started": earlier.get("started", now),
        "finished": None,
        "starts": [*earlier.get("starts", []), {"at": now, **_environment(study)}],
    }
    folder.root.mkdir(parents=True, exist_ok=True)
    _write(folder, content)


def finish_manifest(folder: StudyFolder) -> None:
    """Note the time at which the study ended, and how its runs shared their forward passes.

    A folder without a manifest stays without one.
    """
    content = read_manifest(folder)
    if not content:
        return
    trainings = Ledger(folder.ledger).trainings.values()
    lockstep = {
        "largest": max((row.lockstep for row in trainings), default=0),
        "limits": lockstep_limits(trainings),
    }
    _write(folder, {**content, "finished": _now(), "lockstep": lockstep})


def read_manifest(folder: StudyFolder) -> dict[str, Any]:
    """Return the manifest, empty when there is none."""
    if not folder.manifest.is_file():
        return {}
    content: dict[str, Any] = json.loads(folder.manifest.read_text(encoding="utf-8"))
    return content


def _write(folder: StudyFolder, content: dict[str, Any]) -> None:
    replace_text(folder.manifest, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _environment(study: Study) -> dict[str, Any]:
    return {
        "aqn_tune": version_of("aqn_tune"),
        "code_hash": code_hash(),
        "hardware": hardware(study.compute),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": {name: version_of(name) for name in PACKAGES},
    }


def version_of(package: str) -> str | None:
    """Return the installed version of a package without importing it, None when it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit that the package lies in, with `+` when files differ, None without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
