"""The whole check of a cluster file: every rule, each a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from aqn_tune.cluster import command_rules, kuberay, node_rules, ray_schema, study_rules
from aqn_tune.cluster.document import Checked, ClusterFile, read_cluster_file
from aqn_tune.cluster.findings import Finding, Rule, judge
from aqn_tune.cluster.manifest import RayJob
from aqn_tune.cluster.node_rules import NodeType
from aqn_tune.errors import UserError
from aqn_tune.study.schema import Study

_STORAGE = "the output lies on storage that every node mounts"
_HEAD = "the head runs no trials"
_COUNTS = "smallest and largest numbers of nodes agree"
_IDLE = "idle nodes go after a sensible time"
_WORKERS = "Ray is told what each worker has"

RAY_UP: tuple[Rule[Checked], ...] = (
    Rule("ray", "Ray's own validator accepts it", ray_schema.look),
    Rule("head", _HEAD, node_rules.head),
    Rule("workers", _WORKERS, node_rules.workers),
    Rule("counts", _COUNTS, node_rules.counts),
    Rule("static", "machines that are there already are all used", node_rules.static),
    Rule("idle", _IDLE, node_rules.idle),
    Rule("token", "every node has the token and asks for it", command_rules.token),
    Rule(
        "package", "nodes install the working tree, and torch by its version", command_rules.package
    ),
    Rule("versions", "nodes get the Ray that the package asks for", command_rules.versions),
    Rule("autoscaling", "the head starts and ends workers", command_rules.autoscaling),
    Rule("address", "workers look for the head where it listens", command_rules.address),
    Rule("dashboard", "the dashboard is reachable on the head alone", command_rules.dashboard),
    Rule("storage", _STORAGE, command_rules.storage),
    Rule("placeholders", "what only you know is looked for", command_rules.placeholders),
)
"""The rules about a file for `ray up`."""

RAY_JOB: tuple[Rule[kuberay.Job], ...] = (
    Rule("ray", "Ray's autoscaler can read the cluster", kuberay.ray),
    Rule("head", _HEAD, kuberay.head),
    Rule("workers", _WORKERS, kuberay.workers),
    Rule("counts", _COUNTS, kuberay.counts),
    Rule("idle", _IDLE, kuberay.idle),
    Rule("token", "the cluster asks for a token", kuberay.token),
    Rule("package", "all nodes run one image, with the package in it", kuberay.package),
    Rule("versions", "the image has the Ray that the package asks for", kuberay.versions),
    Rule("autoscaling", "autoscaler v2 starts and ends workers", kuberay.autoscaling),
    Rule("dashboard", "the dashboard stays inside the Kubernetes cluster", kuberay.dashboard),
    Rule("storage", _STORAGE, kuberay.storage),
    Rule("job", "a failed driver is tried again, and the cluster goes at the end", kuberay.ending),
)
"""The rules about a RayJob whose fields are in order."""

_FIELDS = Rule("fields", "KubeRay has all of its fields", kuberay.fields)


def check_file(path: Path, study: Study | None = None) -> tuple[ClusterFile | None, list[Finding]]:
    """Hold a cluster file against every rule, without a network and without starting anything.

    Loads Ray, whose own validators are the first rule. Relative folders in `file_mounts` are looked up
    from the working directory, as `ray up` does.

    Args:
        path: The file: one for `ray up`, or a manifest with a RayJob.
        study: The study that is to run there; without it, rules about its trials are passed over.

    Returns:
        The file, None where it cannot be read, and a finding or more per rule.
    """
    try:
        file = read_cluster_file(path)
    except UserError as error:
        return None, [Finding("readable", "wrong", "", str(error))]
    checked = Checked(file, study)
    found = [Finding("readable", "ok", "", f"a file for {file.kind}, in order as YAML")]
    found += _ray_job(checked) if file.kind == "RayJob" else _ray_up(checked)
    return file, found


def _ray_up(checked: Checked) -> Iterator[Finding]:
    yield from judge(RAY_UP, checked, checked.file.place)
    yield from _about_study(checked, node_rules.worker_types(checked.data))


def _ray_job(checked: Checked) -> Iterator[Finding]:
    yield from judge((_FIELDS,), checked, checked.file.place)
    try:
        manifest = RayJob.model_validate(checked.data)
    except ValidationError:
        text = "the other rules are looked at once the fields are in order"
        yield Finding("fields", "note", "", text)
        return
    yield from judge(RAY_JOB, kuberay.Job(manifest, checked), checked.file.place)
    yield from _about_study(checked, kuberay.worker_types(checked))


def _about_study(checked: Checked, types: Sequence[NodeType]) -> Iterator[Finding]:
    rules = [
        Rule[Checked](
            "launch",
            "the study joins the cluster, and lets it grow",
            lambda one: study_rules.launch(one, types),
        )
    ]
    if checked.study is not None:
        rules.append(
            Rule(
                "requests",
                "every trial fits a worker type",
                lambda one: study_rules.requests(one, types),
            )
        )
    yield from judge(rules, checked, checked.file.place)
