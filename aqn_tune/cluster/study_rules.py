"""Rules about a study and the cluster that it is to run on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from aqn_tune.cluster.document import Checked, launched_with
from aqn_tune.cluster.findings import Note, number
from aqn_tune.cluster.node_rules import NodeType
from aqn_tune.study.resources import trial_request


def launch(checked: Checked, types: Sequence[NodeType]) -> Iterator[str]:
    """Yield what keeps a study from using the cluster: no address, or no number of trials at a time.

    Both are read from the study and from the launch line, the `aqn-tune run` in the file.
    """
    text, study = checked.file.launch, checked.study
    if study is None and not re.search(r"aqn-tune (run|resume)\b", text):
        yield Note(
            "the file has no launch line (`aqn-tune run` with its --set), and no study was given"
        )
        return
    address = launched_with(text, "compute.address") or (study and study.compute.address)
    if not address:
        yield (
            "compute.address: got nothing; add `--set compute.address=auto` to the launch line, or the study "
            "starts a Ray of its own on the head and trains there"
        )
    workers = launched_with(text, "compute.workers") or (study and str(study.compute.workers))
    if workers in (None, "auto") and any(one.least < one.most for one in types):
        yield (
            "compute.workers: got auto, which counts the cores of the nodes that are there at launch; write "
            "`--set compute.workers=N`, how many trials run at a time, or the cluster never grows"
        )


def requests(checked: Checked, types: Sequence[NodeType]) -> Iterator[str]:
    """Yield that the trials of the study fit no worker type, where that is so.

    Every trial of a study asks for the same. A type whose resources the file does not name (provider
    local) fits nothing and refuses nothing.
    """
    if checked.study is None:
        return
    compute = checked.study.compute
    request = trial_request(compute)
    gpus = request.get("GPU", 0.0)
    if gpus > 1 and gpus != int(gpus):
        yield f"compute.gpus_per_worker: got {gpus:g}; above 1 Ray hands out whole GPUs alone"
    if not types:
        yield Note("the file does not say what its machines have; `--live` looks at those that run")
        return
    if any(all(number(one.resources.get(k), 0) >= v for k, v in request.items()) for one in types):
        return
    key = "gpus_per_worker" if gpus and not _any_has(types, "GPU", gpus) else "cpus_per_worker"
    there = "; ".join(f"{one.name} {_written(one.resources)}" for one in types)
    yield (
        f"compute.{key}: got trials of {_written(request)}, which fit no worker type ({there}); ask for "
        "less, or give the file a larger type: such trials would wait for ever"
    )


def _any_has(types: Sequence[NodeType], name: str, amount: float) -> bool:
    return any(number(one.resources.get(name), 0) >= amount for one in types)


def _written(resources: dict[str, float]) -> str:
    shown = [
        f"{name} {number(resources[name], 0):g}" for name in ("CPU", "GPU") if name in resources
    ]
    return ", ".join(shown) or "nothing"
