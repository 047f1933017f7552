"""Rules about the nodes in a file for `ray up`: what they have, and how many there may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from aqn_tune.cluster.commands import option, ray_starts, texts
from aqn_tune.cluster.document import Checked
from aqn_tune.cluster.findings import listing, mapping, number, shown

SHORTEST_IDLE = 1.0
"""Minutes. A rung of the embedded model takes seconds, and a machine takes longer to start."""
LONGEST_IDLE = 60.0
"""Minutes. What is idle for longer is forgotten, and paid for."""


class NodeType(NamedTuple):
    """Nodes of one kind."""

    name: str
    resources: dict[str, Any]
    """What Ray is told that a node has, by name: CPU, GPU."""
    least: float
    most: float


def is_local(data: dict[str, Any]) -> bool:
    """Return whether the nodes are machines that are there already (provider.type local)."""
    return bool(mapping(data.get("provider")).get("type") == "local")


def worker_types(data: dict[str, Any]) -> list[NodeType]:
    """Return the node types that trials run on; none for provider local, whose file names none."""
    most = number(data.get("max_workers"), float("inf"))
    return [
        NodeType(
            str(name),
            mapping(mapping(spec).get("resources")),
            number(mapping(spec).get("min_workers"), 0),
            number(mapping(spec).get("max_workers"), most),
        )
        for name, spec in mapping(data.get("available_node_types")).items()
        if name != data.get("head_node_type")
    ]


def head(checked: Checked) -> Iterator[str]:
    """Yield what lets trials run on the head."""
    data, local = checked.data, is_local(checked.data)
    why = "the search and the ledger live there, and a trial beside them slows both"
    name = str(data.get("head_node_type"))
    if not local:
        spec = mapping(mapping(data.get("available_node_types")).get(name))
        resources = mapping(spec.get("resources"))
        key = f"available_node_types.{name}.resources"
        if resources.get("CPU") != 0:
            yield f"{key}.CPU: got {shown(resources.get('CPU'))} on the head; write 0: {why}"
        if resources.get("GPU"):
            yield f"{key}.GPU: got {shown(resources['GPU'])} on the head; leave it out: {why}"
    needed = ["num-cpus", *(["num-gpus"] if local else [])]
    for command in ray_starts(texts(data.get("head_start_ray_commands"))):
        for flag in needed:
            got = option(command, flag)
            if got != "0":
                yield (
                    f"head_start_ray_commands: got {shown(got)} for --{flag} of `ray start --head`; "
                    f"write --{flag}=0: {why}"
                )


def workers(checked: Checked) -> Iterator[str]:
    """Yield worker types of which Ray cannot know what they have."""
    data = checked.data
    if is_local(data):
        return
    types = worker_types(data)
    if not types:
        yield "available_node_types: got no type beside the head's; name one that trains"
    for one in types:
        if number(one.resources.get("CPU"), 0) <= 0:
            yield (
                f"available_node_types.{one.name}.resources: got {one.resources!r}; say what a node "
                "has, such as {CPU: 4}: a type without resources is never scaled up"
            )


def counts(checked: Checked) -> Iterator[str]:
    """Yield numbers of nodes that contradict each other."""
    data = checked.data
    if is_local(data):
        return
    most = data.get("max_workers")
    types = worker_types(data)
    if most is not None and number(most, 1) < 1:
        yield f"max_workers: got {most!r}; write 1 or more: nothing would train"
    for one in types:
        key = f"available_node_types.{one.name}"
        if one.least > one.most:
            yield (
                f"{key}.min_workers: got {one.least:g}, more than max_workers {one.most:g}; "
                "write the smaller number first"
            )
        if one.most < 1:
            yield f"{key}.max_workers: got {one.most:g}; write 1 or more, or leave the type out"
    least = sum(one.least for one in types)
    if least > number(most, least):
        yield (
            f"max_workers: got {most!r}, but the types start at least {least:g} nodes together; "
            "raise it, or lower their min_workers"
        )
    name = str(data.get("head_node_type"))
    spec = mapping(mapping(data.get("available_node_types")).get(name))
    for key in ("min_workers", "max_workers"):
        if number(spec.get(key), 0) > 0:
            yield (
                f"available_node_types.{name}.{key}: got {spec[key]!r}; write 0: further nodes of the "
                "head's type have no CPUs for trials"
            )


def static(checked: Checked) -> Iterator[str]:
    """Yield what keeps machines of an on-prem cluster from being used."""
    data = checked.data
    if not is_local(data):
        return
    provider = mapping(data.get("provider"))
    machines = listing(provider.get("worker_ips"))
    why = (
        "autoscaler v2, the default of `ray up`, never starts a node whose resources it does not "
        "know, and a local file names none"
    )
    if not machines:
        yield f"provider.worker_ips: got {shown(provider.get('worker_ips'))}; list the machines that train"
        return
    for name in ("min_workers", "max_workers"):
        got = data.get(name, len(machines))
        if got != len(machines):
            yield (
                f"{name}: got {got!r} for {len(machines)} worker_ips; write {len(machines)}, or leave "
                f"it out: {why}"
            )
    if len({str(one) for one in machines}) < len(machines):
        yield "provider.worker_ips: got an address twice; list each machine once"
    if provider.get("head_ip") in machines:
        yield (
            f"provider.worker_ips: got the head's own address {provider['head_ip']}; leave it out: Ray "
            "would be started twice there"
        )


def idle(checked: Checked) -> Iterator[str]:
    """Yield idle times that are too short to be worth a start, or too long to be meant."""
    data = checked.data
    allowed = f"write {SHORTEST_IDLE:g} to {LONGEST_IDLE:g} minutes"
    got = data.get("idle_timeout_minutes")
    if got is not None and not SHORTEST_IDLE <= number(got, -1) <= LONGEST_IDLE:
        yield f"idle_timeout_minutes: got {got!r}; {allowed}: a node that goes too soon is started again"
    for name, spec in mapping(data.get("available_node_types")).items():
        seconds = mapping(spec).get("idle_timeout_s")
        if seconds is not None and not SHORTEST_IDLE <= number(seconds, -1) / 60 <= LONGEST_IDLE:
            yield f"available_node_types.{name}.idle_timeout_s: got {seconds!r} seconds; {allowed}"
