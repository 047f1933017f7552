"""A KubeRay RayJob, field by field.

Fields are those of KubeRay 1.6.2 (docs.ray.io, "KubeRay CRD API reference") with `priority`,
`networkPolicy` and `tlsOptions` of later releases, and of the pods in Kubernetes as far as Ray's containers
use them. The operator's own schema passes over a misspelled field in silence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Quantity = str | int | float
"""An amount as Kubernetes writes it: 4, "500m", "16Gi"."""


class Part(BaseModel):
    """A part of the manifest. Names and meanings are KubeRay's and Kubernetes'; others are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Variable(Part):
    """An environment variable of a container."""

    name: str
    value: str | None = None
    valueFrom: Any = None


class VolumeMount(Part):
    """Where a container sees a volume."""

    name: str
    mountPath: str
    mountPropagation: str | None = None
    readOnly: bool = False
    recursiveReadOnly: str | None = None
    subPath: str | None = None
    subPathExpr: str | None = None


class Resources(Part):
    """What a container asks for, and what it gets at most."""

    limits: dict[str, Quantity] = {}
    requests: dict[str, Quantity] = {}
    claims: Any = None


class Container(Part):
    """A container; Ray runs in the first of a pod."""

    name: str
    image: str | None = None
    args: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: tuple[Variable, ...] = ()
    envFrom: Any = None
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"] | None = None
    lifecycle: Any = None
    livenessProbe: Any = None
    ports: Any = None
    readinessProbe: Any = None
    resizePolicy: Any = None
    resources: Resources = Resources()
    restartPolicy: str | None = None
    securityContext: Any = None
    startupProbe: Any = None
    stdin: bool | None = None
    stdinOnce: bool | None = None
    terminationMessagePath: str | None = None
    terminationMessagePolicy: str | None = None
    tty: bool | None = None
    volumeDevices: Any = None
    volumeMounts: tuple[VolumeMount, ...] = ()
    workingDir: str | None = None


class Claim(Part):
    """A volume that is asked for under a name of its own."""

    claimName: str
    readOnly: bool = False


class Volume(BaseModel):
    """A volume of a pod, of which Kubernetes has thirty kinds; the rules know claims."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    persistentVolumeClaim: Claim | None = None


class Pod(Part):
    """What a pod of Ray runs."""

    containers: Annotated[tuple[Container, ...], Field(min_length=1)]
    volumes: tuple[Volume, ...] = ()
    restartPolicy: Literal["Always", "OnFailure", "Never"] | None = None
    activeDeadlineSeconds: Any = None
    affinity: Any = None
    automountServiceAccountToken: Any = None
    dnsConfig: Any = None
    dnsPolicy: Any = None
    enableServiceLinks: Any = None
    hostAliases: Any = None
    hostIPC: Any = None
    hostNetwork: Any = None
    hostPID: Any = None
    hostUsers: Any = None
    hostname: Any = None
    imagePullSecrets: Any = None
    initContainers: Any = None
    nodeName: Any = None
    nodeSelector: Any = None
    os: Any = None
    overhead: Any = None
    preemptionPolicy: Any = None
    priority: Any = None
    priorityClassName: Any = None
    readinessGates: Any = None
    resourceClaims: Any = None
    resources: Any = None
    runtimeClassName: Any = None
    schedulerName: Any = None
    schedulingGates: Any = None
    securityContext: Any = None
    serviceAccount: Any = None
    serviceAccountName: Any = None
    setHostnameAsFQDN: Any = None
    shareProcessNamespace: Any = None
    subdomain: Any = None
    terminationGracePeriodSeconds: Any = None
    tolerations: Any = None
    topologySpreadConstraints: Any = None


class PodTemplate(Part):
    """A template that pods are made from."""

    spec: Pod
    metadata: Any = None


class Group(Part):
    """What the head and a group of workers have in common."""

    template: PodTemplate
    rayStartParams: dict[str, str] = {}
    resources: dict[str, str] = {}
    labels: dict[str, str] = {}

    @property
    def ray(self) -> Container:
        """The container that Ray runs in."""
        return self.template.spec.containers[0]

    def claim_at(self, path: str) -> str | None:
        """Return the claim behind the longest mount that `path` lies in, None where there is none."""
        mounts = [
            one
            for one in self.ray.volumeMounts
            if path == one.mountPath or path.startswith(one.mountPath.rstrip("/") + "/")
        ]
        if not mounts:
            return None
        name = max(mounts, key=lambda one: len(one.mountPath)).name
        claims = [
            one.persistentVolumeClaim for one in self.template.spec.volumes if one.name == name
        ]
        return claims[0].claimName if claims and claims[0] else None


class HeadGroup(Group):
    """The head."""

    enableIngress: bool | None = None
    headService: Any = None
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] | None = None


class WorkerGroup(Group):
    """A group of workers that are alike."""

    groupName: str
    replicas: int | None = None
    minReplicas: int = 0
    maxReplicas: int = 2147483647
    idleTimeoutSeconds: int | None = None
    numOfHosts: int = 1
    priority: int | None = None
    scaleStrategy: Any = None
    suspend: bool | None = None


class AuthOptions(Part):
    """How nodes and clients show that they belong."""

    mode: Literal["disabled", "token"] | None = None
    enableK8sTokenAuth: bool | None = None
    secretName: str | None = None


class AutoscalerOptions(Part):
    """How the autoscaler, a container beside the head, goes about it."""

    version: Literal["v1", "v2"] | None = None
    idleTimeoutSeconds: int | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    env: tuple[Variable, ...] = ()
    envFrom: Any = None
    image: str | None = None
    imagePullPolicy: Any = None
    resources: Resources = Resources()
    securityContext: Any = None
    volumeMounts: Any = None


class RayCluster(Part):
    """The cluster that the job runs on."""

    headGroupSpec: HeadGroup
    workerGroupSpecs: tuple[WorkerGroup, ...] = ()
    authOptions: AuthOptions = AuthOptions()
    autoscalerOptions: AutoscalerOptions = AutoscalerOptions()
    enableInTreeAutoscaling: bool = False
    gcsFaultToleranceOptions: Any = None
    headServiceAnnotations: Any = None
    managedBy: str | None = None
    networkPolicy: Any = None
    rayVersion: str = ""
    suspend: bool | None = None
    tlsOptions: Any = None
    upgradeStrategy: Any = None

    @property
    def groups(self) -> dict[str, Group]:
        """Every group, by where it stands in the manifest."""
        at = "spec.rayClusterSpec"
        found: dict[str, Group] = {f"{at}.headGroupSpec": self.headGroupSpec}
        for number, group in enumerate(self.workerGroupSpecs):
            found[f"{at}.workerGroupSpecs.{number}"] = group
        return found


class JobSpec(Part):
    """The job."""

    entrypoint: str = ""
    rayClusterSpec: RayCluster
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = (
        "K8sJobMode"
    )
    backoffLimit: int = 0
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: int = 0
    activeDeadlineSeconds: int | None = None
    clusterSelector: Any = None
    deletionStrategy: Any = None
    entrypointNumCpus: float = 0.0
    entrypointNumGpus: float = 0.0
    entrypointResources: str | None = None
    jobId: str | None = None
    managedBy: str | None = None
    metadata: Any = None
    preRunningDeadlineSeconds: int | None = None
    runtimeEnvYAML: str | None = None
    submitterConfig: Any = None
    submitterPodTemplate: Any = None
    suspend: bool = False


class RayJob(Part):
    """The whole manifest."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Any = None
    spec: JobSpec
    status: Any = None
