"""Looking at every node of a running cluster, with one small task on each."""

from __future__ import annotations

import platform
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aqn_tune.cluster.findings import Finding
from aqn_tune.errors import UserError
from aqn_tune.search.cluster import ray_session
from aqn_tune.study.code import LIBRARIES, source_hash
from aqn_tune.study.schema import ComputeSpec

PATIENCE = 120.0
"""Seconds that all nodes together have to answer; the first task on a node starts Python and Ray there."""


def look_at_nodes(
    folder: Path, compute: ComputeSpec, *, model: str = "", patience: float = PATIENCE
) -> list[Finding]:
    """Run a task on every node of a cluster that runs, and say of each whether a study may run there.

    A node has to see a file that this process writes into `folder`, be able to write there, have the
    same code of aqn_tune and the same libraries as this machine, and use token authentication. Joins the
    cluster and leaves it as it was: tasks ask for no CPU, so that they run beside trials and on the head.
    Nodes that are not started yet are not seen.

    Args:
        folder: The output folder, absolute; made where it is not there.
        compute: Names the cluster; without an address it is the one that runs on this machine.
        model: Folder of the model, which every node has to have: a worker builds the model from its
            config, though the weights come from the driver. Empty for a model that is no folder.
        patience: Seconds to wait for all answers together.

    Raises UserError where the cluster cannot be joined, or the folder not be written to from here.
    """
    if compute.address is None:
        compute = compute.model_copy(update={"address": "auto"})
    with ray_session(compute):
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]
        with _marker(folder) as (name, secret):
            answers = {
                node["NodeID"]: _on_node(node["NodeID"], str(folder), name, secret, model)
                for node in nodes
            }
            ray.wait(list(answers.values()), num_returns=len(answers), timeout=patience)
            return [
                _finding(node, answers[node["NodeID"]], folder, model, patience) for node in nodes
            ]


def look(folder: str, name: str, secret: str, model: str) -> dict[str, Any]:
    """Return what a node sees; runs there. Writes a file into `folder` and removes it again."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    place, trouble = Path(folder), ""
    try:
        same = (place / name).read_text(encoding="utf-8") == secret
    except OSError:
        same = False
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=f"{name}-"):
            pass
    except OSError as error:
        trouble = error.strerror or str(error)
    return {
        "same": same,
        "trouble": trouble,
        "model": not model or (Path(model).expanduser() / "config.json").is_file(),
        "sources": source_hash(),
        "versions": _versions(),
        "token": is_token_auth_enabled(),
    }


def _on_node(node: str, *arguments: str) -> Any:
    """Start `look` on a node and return the reference to its answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    return task.options(scheduling_strategy=there).remote(*arguments)


@contextmanager
def _marker(folder: Path) -> Iterator[tuple[str, str]]:
    """Write a file that nobody could guess the content of; remove it afterwards."""
    name, secret = f".aqn-tune-check-{secrets.token_hex(4)}", secrets.token_hex(16)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(secret, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"output: cannot write to {folder} from this machine ({error.strerror}); results go there"
        ) from error
    try:
        yield name, secret
    finally:
        (folder / name).unlink(missing_ok=True)


def _finding(
    node: dict[str, Any], answer: Any, folder: Path, model: str, patience: float
) -> Finding:
    import ray

    resources = node["Resources"]
    is_head = "node:__internal_head__" in resources
    amounts = [f"{name} {resources[name]:g}" for name in ("CPU", "GPU") if name in resources]
    place = (
        f"{node['NodeManagerAddress']} ({', '.join([*['head'] * is_head, *amounts]) or 'no CPU'})"
    )
    try:
        seen = ray.get(answer, timeout=0)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(answer)
        text = f"no answer in {patience:g} s; see `ray status` and the logs of that node"
        return Finding("node", "wrong", place, text)
    except ray.exceptions.RayError as error:
        text = f"the task cannot run there: {_last_line(error)}; install this working tree on that node"
        return Finding("node", "wrong", place, text)
    wrong = list(_differences(seen, folder, model, has_gpu="GPU" in resources))
    holds = "same folder, writable; same code and libraries; token in use"
    return Finding("node", "wrong" if wrong else "ok", place, "; ".join(wrong) or holds)


def _differences(seen: dict[str, Any], folder: Path, model: str, *, has_gpu: bool) -> Iterator[str]:
    if not seen["same"]:
        yield (
            f"{folder} is another folder there: a file of this machine is not in it; mount the shared "
            "storage on every node, or name it with --set output="
        )
    elif seen["trouble"]:
        yield f"{folder} cannot be written to ({seen['trouble']}); give the user of that node the right to"
    if not seen["model"]:
        yield f"model.path: no folder {model} with a config.json there; put it on the shared storage"
    here = _versions()
    if has_gpu:
        # A CUDA build of a release beside a CPU build on the head is as it should be.
        here["torch"], _, _ = here["torch"].partition("+")
        seen["versions"]["torch"], _, _ = seen["versions"]["torch"].partition("+")
    other = [
        f"{name} {got} (here {here[name]})"
        for name, got in seen["versions"].items()
        if got != here[name]
    ]
    if seen["sources"] != source_hash():
        other.insert(0, "another state of aqn_tune")
    if other:
        yield f"numbers would differ: {', '.join(other)}; set all nodes up from one working tree"
    if not seen["token"]:
        yield "no token authentication; start Ray there with RAY_AUTH_MODE=token"


def _versions() -> dict[str, str]:
    releases = {name: version(name) for name in (*LIBRARIES, "ray")}
    return releases | {"python": platform.python_version(), "processor": platform.machine()}


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
