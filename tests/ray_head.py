"""A head of a Ray cluster of its own, as the shipped files start one, in processes that a test owns."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil


class Head(NamedTuple):
    """A head that runs."""

    address: str
    environment: dict[str, str]
    """With its token alone, for those who join."""
    process: psutil.Process

    def raylets(self) -> list[psutil.Process]:
        """Return the raylets of all nodes that the head has started, its own included."""
        return [one for one in self.process.children(recursive=True) if one.name() == "raylet"]


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def started_head(
    home: Path, port: int, options: Sequence[str] = (), more: dict[str, str] | None = None
) -> Iterator[Head]:
    """Start a head without CPUs that asks for a token, and end it with all that it has started."""
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("a" * 64)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"HOME": str(home), "OMP_NUM_THREADS": "1"}
    # Ray keeps sockets there, whose paths have to be short.
    folder = tempfile.mkdtemp(prefix="aqn", dir="/tmp")
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--num-cpus=0", "--num-gpus=0",
        f"--port={port}", f"--temp-dir={folder}", "--dashboard-host=127.0.0.1",
        "--disable-usage-stats", "--block", *options,
    ]  # fmt: skip
    log = home / "head.log"
    with log.open("w") as out:
        head = subprocess.Popen(
            command,
            env={**environment, "RAY_AUTH_MODE": "token", **(more or {})},
            stdout=out,
            stderr=out,
        )
    mine = psutil.Process(head.pid)
    try:
        until = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield Head(f"127.0.0.1:{port}", environment, mine)
    finally:
        family = [mine, *mine.children(recursive=True)]
        head.terminate()
        _, left = psutil.wait_procs(family, timeout=20)
        for one in left:
            one.kill()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)
