"""Rules about what is copied to the nodes of `ray up`, and about the commands that run there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aqn_tune.cluster.commands import (
    inside,
    installs,
    mounted,
    option,
    pinned,
    ray_starts,
    setup_commands,
    texts,
)
from aqn_tune.cluster.document import Checked
from aqn_tune.cluster.findings import Note, mapping, shown
from aqn_tune.cluster.pins import required
from aqn_tune.errors import nearest

TOKEN = "~/.ray/auth_token"
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
SETUP = ("setup_commands", "head_setup_commands", "worker_setup_commands")
BOOTSTRAP = "~/ray_bootstrap_config.yaml"
"""Where `ray up` leaves the configuration on the head."""


def token(checked: Checked) -> Iterator[str]:
    """Yield what lets a node run without token authentication, or keeps it from joining with it."""
    data = checked.data
    mounts = mapping(data.get("file_mounts"))
    if not any(str(target).endswith("/.ray/auth_token") for target in mounts):
        yield (
            f"file_mounts: got no {TOKEN}; add `{TOKEN}: {TOKEN}`: a node without the token is refused"
            f"{nearest(TOKEN, mounts)}"
        )
    for name in STARTS:
        commands = texts(data.get(name))
        starts = ray_starts(commands)
        if not starts:
            yield f"{name}: got no `ray start`; write one with RAY_AUTH_MODE=token: Ray's own has none"
        for one in starts:
            if "RAY_AUTH_MODE=token" not in one.replace("'", "").replace('"', ""):
                yield (
                    f"{name}: got a `ray start` without RAY_AUTH_MODE=token; put it before the command: "
                    "joining by address does not turn the token on by itself"
                )
    for name in ("initialization_commands", *SETUP, *STARTS):
        if any("RAY_AUTH_MODE=disabled" in one for one in texts(data.get(name))):
            yield (
                f"{name}: got RAY_AUTH_MODE=disabled; write token: whoever reaches a port of the cluster "
                "could run code on it"
            )
    if not Path(TOKEN).expanduser().is_file():
        yield Note(
            f"file_mounts: there is no {TOKEN} on this machine yet; `ray get-auth-token --generate` "
            "makes one"
        )


def package(checked: Checked) -> Iterator[str]:
    """Yield what keeps the working tree from being what runs on the nodes."""
    data = checked.data
    mounts = mapping(data.get("file_mounts"))
    trees = {
        str(target).rstrip("/"): str(source)
        for target, source in mounts.items()
        if _is_tree(str(source))
    }
    if not trees:
        yield (
            "file_mounts: got no folder with a pyproject.toml, seen from this folder; add "
            "`~/aqn_tune: .` and launch from the working tree: its code is what has to run"
        )
    found = list(installs(setup_commands(data, *SETUP)))
    if trees and not any(_installs_tree(command, words, trees) for command, words in found):
        yield (
            f"setup_commands: got no `pip install` of {', '.join(trees)}; add one, such as "
            f"`cd {next(iter(trees))} && .venv/bin/pip install -c constraints.txt .`"
        )
    yield from _torch([words for _, words in found])


def _is_tree(source: str) -> bool:
    try:
        return (Path(source).expanduser() / "pyproject.toml").is_file()
    except RuntimeError:  # ~name of nobody
        return False


def _installs_tree(command: str, words: list[str], trees: dict[str, str]) -> bool:
    names = [word.partition("[")[0].rstrip("/") for word in words]
    return any(tree in names or ("." in names and f"cd {tree}" in command) for tree in trees)


def _torch(found: list[list[str]]) -> Iterator[str]:
    wanted = required()["torch"]
    versions = [version for words in found for version in pinned(words, "torch")]
    if not versions:
        yield (
            f"setup_commands: got no torch by its exact version; install torch=={wanted} first: asked "
            "for by the package alone, pip may choose a build with gigabytes of CUDA, or without any"
        )
    for version in versions:
        if version != wanted:
            yield f"setup_commands: got torch {version or 'of any version'}; write torch=={wanted}"


def autoscaling(checked: Checked) -> Iterator[str]:
    """Yield a head that is started without the configuration that it is to scale by."""
    for one in ray_starts(texts(checked.data.get("head_start_ray_commands"))):
        got = option(one, "autoscaling-config")
        if got != BOOTSTRAP:
            yield (
                f"head_start_ray_commands: got {shown(got)} for --autoscaling-config of `ray start "
                f"--head`; write --autoscaling-config={BOOTSTRAP}: no worker is ever started without it"
            )


def dashboard(checked: Checked) -> Iterator[str]:
    """Yield a dashboard that other machines can reach."""
    for one in ray_starts(texts(checked.data.get("head_start_ray_commands"))):
        got = option(one, "dashboard-host")
        if got not in (None, "127.0.0.1", "localhost", "::1"):
            yield (
                f"head_start_ray_commands: got --dashboard-host={got}; write 127.0.0.1 and look at it "
                "through `ray dashboard cluster.yaml`, which opens a tunnel"
            )


def address(checked: Checked) -> Iterator[str]:
    """Yield workers that look for the head where it does not listen."""
    data = checked.data
    ports = [
        option(one, "port") or "6379"
        for one in ray_starts(texts(data.get("head_start_ray_commands")))
    ]
    for one in ray_starts(texts(data.get("worker_start_ray_commands"))):
        got = option(one, "address")
        wanted = f"$RAY_HEAD_IP:{ports[0] if ports else '6379'}"
        if got != wanted:
            yield (
                f"worker_start_ray_commands: got {shown(got)} for --address of `ray start`; write "
                f"--address={wanted}, where the head listens"
            )


def versions(checked: Checked) -> Iterator[str]:
    """Yield another Ray than the one that the package asks for; nodes of two releases do not join."""
    data, wanted = checked.data, required()["ray"]
    mentions: list[tuple[str | None, bool]] = [
        (version, _constrained(words))
        for _, words in installs(setup_commands(data, *SETUP))
        for version in pinned(words, "ray")
    ]
    docker = mapping(data.get("docker"))
    images = [
        image for name in ("image", "head_image", "worker_image") if (image := docker.get(name))
    ]
    if not mentions and not images:
        yield (
            f'setup_commands: got no ray[default]; install "ray[default]=={wanted}": the head needs it '
            "to start workers"
        )
    for version, constrained in mentions:
        if version != wanted and not (version is None and constrained):
            yield (
                f"setup_commands: got ray {version or 'of any release'}; write "
                f'"ray[default]=={wanted}", the release that pyproject.toml asks for'
            )
    for image in images:
        if f":{wanted}" not in str(image):
            yield f"docker: got the image {image!r}; take one of Ray {wanted}, such as {_image(wanted)}"


def _constrained(words: list[str]) -> bool:
    return any(word in ("-c", "--constraint") for word in words)


def _image(version: str) -> str:
    return f"rayproject/ray:{version}-py311"


def storage(checked: Checked) -> Iterator[str]:
    """Yield an output folder that is not the same one on every node."""
    data = checked.data
    yield from no_output(checked)
    paths = mounted(data, setup_commands(data, "initialization_commands", *SETUP))
    output = checked.output
    if output is not None and not inside(output, paths):
        yield (
            f"setup_commands: got {output!r} for the output, but no command mounts a folder that it lies "
            f"in (mounted: {', '.join(dict.fromkeys(paths)) or 'nothing'}); mount the shared storage there: "
            "workers leave the state of unfinished trainings in the study's folder"
        )


def no_output(checked: Checked) -> Iterator[str]:
    """Yield that neither study nor launch line names an absolute output folder, where that is so."""
    if checked.output is None:
        got = "nothing" if checked.study is None else repr(checked.study.output)
        yield (
            f"output: got {got}, a folder that each node has for itself; name one on the shared storage, "
            "in the study or as `--set output=/mnt/...` of the launch line at the top of the file"
        )


PLACEHOLDERS = {
    "fs-00000000000000000": "the id of your EFS file system",
    "192.0.2.": "your addresses",
}
"""What stands in shipped files for what only the user knows (192.0.2.0/24 is for documentation)."""


def placeholders(checked: Checked) -> Iterator[str]:
    """Yield a note for everything that still has to be filled in."""
    for key, text in _leaves(checked.data):
        for placeholder, meaning in PLACEHOLDERS.items():
            if placeholder in text:
                yield Note(f"{key}: {placeholder} stands for {meaning}; fill it in before launch")


def _leaves(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in data.items():
        yield str(key), str(value)
