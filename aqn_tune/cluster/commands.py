"""What the shell commands in a cluster file do, as far as it can be read off them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from aqn_tune.cluster.findings import listing, mapping

_MOUNTS = re.compile(r"\b(mount|mountpoint|mount\.\w+|s3fs|sshfs|\w*fuse)\b")
_PATH = re.compile(r"(?<![\w:./~-])(/[\w./-]+)")
_INSTALL = re.compile(r"\bpip3?\s+install\s+([^;&|]*)")
_QUOTES = "'\""


def texts(value: Any) -> list[str]:
    """Return the commands of a list; what is none is left out."""
    return [one for one in listing(value) if isinstance(one, str)]


def setup_commands(data: dict[str, Any], *names: str) -> list[str]:
    """Return the commands under several keys of a file for `ray up`, in order."""
    return [one for name in names for one in texts(data.get(name))]


def ray_starts(commands: Iterable[str]) -> list[str]:
    """Return the commands that start Ray."""
    return [one for one in commands if re.search(r"\bray start\b", one)]


def option(command: str, name: str) -> str | None:
    """Return what a command gives for the option `--name`, None where it does not."""
    found = re.search(rf"(?<!\S)--{name}(?:=|\s+)(\S+)", command)
    return found.group(1).strip(_QUOTES) if found else None


def installs(commands: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each `pip install` as the command that it is part of, and its own words."""
    for command in commands:
        for found in _INSTALL.finditer(command):
            yield command, [word.strip(_QUOTES) for word in found.group(1).split()]


def pinned(words: Sequence[str], package: str) -> Iterator[str | None]:
    """Yield the version of every mention of `package` among the words of a `pip install`.

    None is a mention without `==`. Extras and local parts (`+cpu`) are passed over.
    """
    pattern = re.compile(rf"{package}(?:\[[^\]]*\])?(?:==([^+,;]+)\S*|[<>~!=].*)?", re.IGNORECASE)
    for word in words:
        found = pattern.fullmatch(word)
        if found:
            yield found.group(1)


def mounted(data: dict[str, Any], commands: Iterable[str]) -> list[str]:
    """Return the paths that commands mount something at, or that docker mounts into the container."""
    paths = [
        path
        for command in map(_without_question, commands)
        if _MOUNTS.search(command)
        for path in _PATH.findall(command)
        if not path.startswith(("/etc/", "/dev/", "/proc/"))
    ]
    docker = mapping(data.get("docker"))
    for name in ("run_options", "head_run_options", "worker_run_options"):
        volumes = re.findall(
            r"(?:-v|--volume)[ =]\S+?:(/[^:\s]+)", " ".join(texts(docker.get(name)))
        )
        paths.extend(volumes)
    return paths


def _without_question(command: str) -> str:
    """Leave `mountpoint PATH ||` out of a command: it asks whether something is mounted, and goes on."""
    return re.sub(r"\bmountpoint\b[^|;&]*\|\|", "", command)


def inside(path: str, folders: Iterable[str]) -> bool:
    """Return whether an absolute path is one of `folders` or lies in one; "/" holds nothing."""
    whole = PurePosixPath(path)
    return any(
        folder.rstrip("/") and PurePosixPath(folder) in (whole, *whole.parents)
        for folder in folders
    )
