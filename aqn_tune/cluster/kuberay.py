"""Rules about a KubeRay RayJob, as far as they can be held without a Kubernetes cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from pydantic import ValidationError

from aqn_tune.cluster import ray_schema
from aqn_tune.cluster.command_rules import no_output
from aqn_tune.cluster.document import Checked
from aqn_tune.cluster.findings import Note, mapping, shown
from aqn_tune.cluster.manifest import RayCluster, RayJob, WorkerGroup
from aqn_tune.cluster.node_rules import LONGEST_IDLE, SHORTEST_IDLE, NodeType
from aqn_tune.cluster.pins import required
from aqn_tune.study.messages import as_user_error

CLUSTER = "spec.rayClusterSpec"
SHARED = "ReadWriteMany"


class Job(NamedTuple):
    """A RayJob whose fields are in order, and the file that it stands in."""

    manifest: RayJob
    checked: Checked

    @property
    def cluster(self) -> RayCluster:
        """The cluster that the job runs on."""
        return self.manifest.spec.rayClusterSpec


def fields(checked: Checked) -> Iterator[str]:
    """Yield every field that KubeRay does not have, and every value that it would not take."""
    try:
        RayJob.model_validate(checked.data)
    except ValidationError as error:
        places = checked.file.source.places
        for line in str(as_user_error(error, RayJob, checked.file.source)).splitlines():
            # The message begins with file and line, which a finding has beside it.
            yield re.sub(rf"^{re.escape(places[()].file)}:\d+: ", "", line)


def worker_types(checked: Checked) -> list[NodeType]:
    """Return the worker groups of a RayJob with what Ray's autoscaler takes each pod to have."""
    found, _ = ray_schema.node_types(checked)
    return [
        NodeType(name, mapping(one.get("resources")), one["min_workers"], one["max_workers"])
        for name, one in found.items()
        if name != "headgroup"
    ]


def ray(job: Job) -> Iterator[str]:
    """Yield what Ray's autoscaler objects to."""
    _, complaint = ray_schema.node_types(job.checked)
    if complaint:
        yield complaint


def head(job: Job) -> Iterator[str]:
    """Yield what lets trials run on the head."""
    group, key = job.cluster.headGroupSpec, f"{CLUSTER}.headGroupSpec"
    why = "the search and the ledger live there, and a trial beside them slows both"
    cpus = group.rayStartParams.get("num-cpus", group.resources.get("CPU"))
    if cpus != "0":
        yield f'{key}.rayStartParams: got {shown(cpus)} for num-cpus; write num-cpus: "0": {why}'
    asked = [name for name in group.ray.resources.limits if name.endswith("gpu")]
    if asked and group.rayStartParams.get("num-gpus") != "0":
        yield f"{key}.template: got {asked[0]} for the head; leave it out: {why}"
    for place, one in job.cluster.groups.items():
        twice = {"num-cpus", "num-gpus", "memory", "resources"} & set(one.rayStartParams)
        if one.resources and twice:
            yield (
                f"{place}.resources: got resources here and {', '.join(sorted(twice))} in "
                "rayStartParams; the operator refuses both, keep one"
            )


def workers(job: Job) -> Iterator[str]:
    """Yield worker groups that Ray or Kubernetes has to guess about."""
    if not job.cluster.workerGroupSpecs:
        yield f"{CLUSTER}.workerGroupSpecs: got none; name a group that trains"
    for place, one in job.cluster.groups.items():
        limits = one.ray.resources.limits
        for name in ("cpu", "memory"):
            if name not in limits:
                yield (
                    f"{place}.template.spec.containers.0.resources: got no limit of {name}; set one: "
                    "without it Ray takes what the whole machine has"
                )


def counts(job: Job) -> Iterator[str]:
    """Yield numbers of replicas that contradict each other."""
    for place, one in _workers(job):
        if one.minReplicas > one.maxReplicas:
            yield (
                f"{place}.minReplicas: got {one.minReplicas}, more than maxReplicas {one.maxReplicas}; "
                "write the smaller number first"
            )
        if not 1 <= one.maxReplicas < 2147483647:
            yield f"{place}.maxReplicas: got {one.maxReplicas}; write how many you will pay for, 1 or more"


def _workers(job: Job) -> list[tuple[str, WorkerGroup]]:
    return [(p, one) for p, one in job.cluster.groups.items() if isinstance(one, WorkerGroup)]


def idle(job: Job) -> Iterator[str]:
    """Yield idle times that are too short to be worth a start, or too long to be meant."""
    times = {f"{CLUSTER}.autoscalerOptions": job.cluster.autoscalerOptions.idleTimeoutSeconds}
    times |= {place: one.idleTimeoutSeconds for place, one in _workers(job)}
    for place, seconds in times.items():
        if seconds is not None and not SHORTEST_IDLE <= seconds / 60 <= LONGEST_IDLE:
            yield (
                f"{place}.idleTimeoutSeconds: got {seconds}; write {60 * SHORTEST_IDLE:g} to "
                f"{60 * LONGEST_IDLE:g}: a pod that goes too soon is started again"
            )


def token(job: Job) -> Iterator[str]:
    """Yield what leaves the cluster without token authentication."""
    options = job.cluster.authOptions
    if options.mode != "token":
        yield (
            f"{CLUSTER}.authOptions.mode: got {shown(options.mode)}; write token: the operator then makes "
            "one and hands it to every pod, without it whoever reaches a port could run code"
        )
    if options.enableK8sTokenAuth:
        yield (
            f"{CLUSTER}.authOptions.enableK8sTokenAuth: got true, which KubeRay refuses for a RayJob; "
            "leave it out"
        )
    for place, one in job.cluster.groups.items():
        for variable in one.ray.env:
            if variable.name == "RAY_AUTH_MODE" and variable.value != "token":
                yield f"{place}.template: got RAY_AUTH_MODE {variable.value!r}; leave it to authOptions"


def package(job: Job) -> Iterator[str]:
    """Yield images without this package, or that differ between the nodes."""
    images = {place: one.ray.image or "" for place, one in job.cluster.groups.items()}
    for place, image in images.items():
        if not image or image.rpartition(":")[0].endswith("rayproject/ray"):
            yield (
                f"{place}.template.spec.containers.0.image: got {image!r}, which has no aqn_tune; build "
                "one from cluster/Dockerfile"
            )
    if len(set(images.values())) > 1:
        yield (
            f"{CLUSTER}: got {len(set(images.values()))} images ({', '.join(sorted(set(images.values())))}); "
            "run one on all nodes, or their code differs"
        )


def versions(job: Job) -> Iterator[str]:
    """Yield another Ray, or another Python, than the package asks for."""
    wanted, got = required()["ray"], job.cluster.rayVersion
    if got != wanted:
        yield f"{CLUSTER}.rayVersion: got {got!r}; write {wanted!r}, the release that pyproject.toml asks for"
    for place, one in job.cluster.groups.items():
        image, key = one.ray.image or "", f"{place}.template.spec.containers.0.image"
        tag = image.rpartition("/")[2].partition(":")[2]
        release = re.search(r"ray[:_-]?(\d+\.\d+\.\d+)", tag) or re.search(r"^(\d+\.\d+\.\d+)", tag)
        if release is None or release.group(1) != wanted:
            yield (
                f"{key}: got {image!r}; name Ray {wanted} in the tag, such as aqn_tune:0.1.0-ray{wanted}-"
                "py311: nodes of two releases do not join"
            )
        python = re.search(r"py3\.?(\d+)", tag)
        if python is None or int(python.group(1)) < 11:
            yield f"{key}: got {image!r}; name its Python in the tag, py311 or later: all nodes need one"


def autoscaling(job: Job) -> Iterator[str]:
    """Yield what keeps Ray's autoscaler v2 from running."""
    cluster = job.cluster
    if not cluster.enableInTreeAutoscaling:
        yield f"{CLUSTER}.enableInTreeAutoscaling: got false; write true, or no worker is ever started"
    if cluster.autoscalerOptions.version == "v1":
        yield f"{CLUSTER}.autoscalerOptions.version: got 'v1'; write v2: v1 is no longer developed"
    for place, one in cluster.groups.items():
        policy = one.template.spec.restartPolicy
        if policy not in (None, "Never"):
            yield (
                f"{place}.template.spec.restartPolicy: got {policy!r}; write Never: with autoscaler v2 the "
                "operator refuses the other policies"
            )
    if any(one.name == "RAY_enable_autoscaler_v2" for one in cluster.headGroupSpec.ray.env):
        yield f"{CLUSTER}.headGroupSpec.template: got RAY_enable_autoscaler_v2; leave it to autoscalerOptions"


def dashboard(job: Job) -> Iterator[str]:
    """Yield a dashboard that is reachable from outside, or not by the one who submits the job."""
    group, key = job.cluster.headGroupSpec, f"{CLUSTER}.headGroupSpec"
    if group.serviceType not in (None, "ClusterIP"):
        yield f"{key}.serviceType: got {group.serviceType!r}; write ClusterIP and use `kubectl port-forward`"
    if group.enableIngress:
        yield f"{key}.enableIngress: got true; write false and use `kubectl port-forward`"
    host = group.rayStartParams.get("dashboard-host")
    if host in ("127.0.0.1", "localhost"):
        yield (
            f"{key}.rayStartParams: got dashboard-host {host!r}; leave it out: the operator submits the job "
            "through the dashboard, with the token"
        )


def storage(job: Job) -> Iterator[str]:
    """Yield nodes that do not see the output folder on a volume which all may write to."""
    yield from no_output(job.checked)
    output = job.checked.output
    if output is None:
        return
    claims = {
        str(mapping(one.get("metadata")).get("name")): mapping(one.get("spec")).get("accessModes")
        or []
        for one in job.checked.file.others
        if one.get("kind") == "PersistentVolumeClaim"
    }
    used: dict[str, str] = {}
    for place, group in job.cluster.groups.items():
        claim = group.claim_at(output)
        if claim is None:
            yield (
                f"{place}.template: got no persistentVolumeClaim mounted where the output {output!r} lies; "
                "mount the shared one: workers leave the state of unfinished trainings in the study's folder"
            )
        else:
            used[place] = claim
    for claim in dict.fromkeys(used.values()):
        if claim not in claims:
            yield Note(f"{CLUSTER}: the claim {claim!r} is not in this file; it has to be {SHARED}")
        elif SHARED not in claims[claim]:
            yield (
                f"accessModes: got {claims[claim]} for the claim {claim!r}; write [{SHARED}]: pods of "
                "several machines write to it"
            )
    if len(set(used.values())) > 1:
        yield f"{CLUSTER}: got the output on several claims ({', '.join(used.values())}); use one for all"


def ending(job: Job) -> Iterator[str]:
    """Yield what keeps the job from running through, or the cluster from going away afterwards."""
    spec = job.manifest.spec
    if "aqn-tune" not in spec.entrypoint:
        yield f"spec.entrypoint: got {spec.entrypoint[:60]!r}; write `aqn-tune run STUDY --set ...`"
    if spec.backoffLimit < 1:
        yield (
            f"spec.backoffLimit: got {spec.backoffLimit}; write 1 or more: a study whose head is lost goes "
            "on from its ledger in another cluster"
        )
    if not spec.shutdownAfterJobFinishes:
        yield "spec.shutdownAfterJobFinishes: got false; write true: the cluster stays, and costs, without it"
    if spec.submissionMode == "InteractiveMode":
        yield "spec.submissionMode: got 'InteractiveMode', which waits for somebody; write K8sJobMode"
    for name in ("entrypointNumCpus", "entrypointNumGpus"):
        if getattr(spec, name):
            yield (
                f"spec.{name}: got {getattr(spec, name):g}; leave it out: the driver would run on a worker, "
                "which may be taken away"
            )
