"""`aqn-tune cluster check`: the shipped files, and planted mistakes that each rule has to find."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from ray_head import free_port, started_head
from synthetic import ray_two

from aqn_tune.cli.app import main
from aqn_tune.cluster import live
from aqn_tune.cluster.check import RAY_JOB, RAY_UP, check_file
from aqn_tune.cluster.pins import required
from aqn_tune.errors import UserError
from aqn_tune.search.cluster import ray_session
from aqn_tune.study.schema import ComputeSpec

__all__ = ["ray_two"]

ROOT = Path(__file__).parents[1]
CLOUD, STATIC, JOB = "cluster.yaml", "cluster/static.yaml", "cluster/kuberay.yaml"
STUDY = """\
study: demo
scenario: {faults: [{kind: dead_zone, layers: [10], threshold: 0.2}]}
"""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """`file_mounts` of the shipped files name the working tree by `.`, as seen from there."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("COLUMNS", raising=False)  # in a narrow table sentences are broken up


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["cluster", "check", *arguments])
    code = stopped.value.code
    return code if isinstance(code, int) else 0


def as_json(captured: str) -> dict[str, Any]:
    return dict(json.loads(captured))


@pytest.mark.parametrize("file", [CLOUD, STATIC, JOB])
def test_the_shipped_files_are_in_order(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("experiments/threshold_sweep.yaml", "--file", file) == 0
    captured = capsys.readouterr()
    assert "all in order" in captured.out
    assert "wrong" not in captured.out
    assert captured.err == ""
    assert call("--file", file, "--json") == 0
    said = as_json(capsys.readouterr().out)
    rules = {one["rule"] for one in said["findings"] if one["status"] == "ok"}
    assert {rule.name for rule in (RAY_JOB if file == JOB else RAY_UP)} < rules
    assert said["ok"] is True


class Mistake(NamedTuple):
    """Something wrong in a shipped file."""

    file: str
    rule: str
    old: str
    new: str
    said: tuple[str, ...]
    """What the message has to say: the key, what was got, what to do."""
    alone: bool = True
    """Whether this rule alone finds it."""


DOES_NOT_START = "--autoscaling-config=~/ray_bootstrap_config.yaml\n"
GET_TORCH = ".venv/bin/pip install -q torch==2.13.0"
MISTAKES = [
    # what Ray's own validators find, and nothing else does
    Mistake(CLOUD, "ray", "\nmax_workers: 8", "\nmax_worker: 8",
            ("cluster.yaml:19: max_worker: unknown key", "did you mean 'max_workers'?")),
    Mistake(CLOUD, "ray", "upscaling_speed: 8.0", "upscaling_speed: -1", ("upscaling_speed: got -1",)),
    Mistake(CLOUD, "ray", "type: aws", "type: asw", ("provider.type: got 'asw'", "did you mean 'aws'?")),
    Mistake(CLOUD, "ray", "initialization_commands: []", "initialization_commands: [1]",
            ("initialization_commands.0: got 1",)),
    Mistake(CLOUD, "ray", "head_node_type: head", "head_node_type: hed",
            ("head_node_type: got 'hed'", "did you mean 'head'?"), False),
    Mistake(CLOUD, "ray", "{CPU: 4}", '{CPU: "4"}', ("resources.CPU: got '4'",), False),
    Mistake(CLOUD, "ray", "provider:\n  type: aws\n", "provider:\n", ("provider: got", "{type: aws}"), False),
    Mistake(STATIC, "ray", "  head_ip: 192.0.2.10\n", "", ("provider: ", "head_ip")),
    Mistake(JOB, "ray", 'limits: {cpu: "4"', 'limits: {cpu: "four"', ("spec.rayClusterSpec: ",), False),
    # how many of what
    Mistake(CLOUD, "head", "{CPU: 0}", "{CPU: 2}",
            ("available_node_types.head.resources.CPU: got 2", "write 0")),
    Mistake(CLOUD, "head", "{CPU: 0}", "{CPU: 0, GPU: 1}", ("resources.GPU: got 1", "leave it out")),
    Mistake(CLOUD, "head", "--num-cpus=0", "--num-cpus=2", ("'2' for --num-cpus", "write --num-cpus=0")),
    Mistake(STATIC, "head", " --num-gpus=0", "", ("nothing for --num-gpus", "--num-gpus=0")),
    Mistake(JOB, "head", 'num-cpus: "0"', 'num-cpus: "2"', ("'2' for num-cpus", 'num-cpus: "0"')),
    Mistake(CLOUD, "workers", "{CPU: 4}", "{}", ("worker.resources: got {}", "{CPU: 4}")),
    Mistake(JOB, "workers", 'limits: {cpu: "4", memory: 16Gi}', 'limits: {cpu: "4"}',
            ("workerGroupSpecs.0", "no limit of memory")),
    Mistake(CLOUD, "counts", "min_workers: 0\n    max_workers: 8", "min_workers: 5\n    max_workers: 3",
            ("worker.min_workers: got 5, more than max_workers 3",)),
    Mistake(CLOUD, "counts", "min_workers: 0\n    max_workers: 8", "min_workers: 9\n    max_workers: 9",
            ("max_workers: got 8, but the types start at least 9",), False),
    Mistake(JOB, "counts", "maxReplicas: 8", "maxReplicas: 0", ("maxReplicas: got 0",)),
    Mistake(STATIC, "static", "\nmin_workers: 2", "\nmin_workers: 0",
            ("min_workers: got 0 for 2 worker_ips; write 2", "autoscaler v2")),
    Mistake(STATIC, "static", "[192.0.2.11,", "[192.0.2.10,", ("the head's own address 192.0.2.10",)),
    Mistake(STATIC, "static", "[192.0.2.11,", "[192.0.2.12,", ("an address twice",)),
    Mistake(CLOUD, "idle", "idle_timeout_minutes: 5", "idle_timeout_minutes: 0.1",
            ("idle_timeout_minutes: got 0.1; write 1 to 60 minutes",)),
    Mistake(JOB, "idle", "idleTimeoutSeconds: 300", "idleTimeoutSeconds: 5",
            ("idleTimeoutSeconds: got 5; write 60 to 3600",)),
    # the token
    Mistake(CLOUD, "token", "  ~/.ray/auth_token: ~/.ray/auth_token\n", "",
            ("file_mounts: got no ~/.ray/auth_token", "add")),
    Mistake(CLOUD, "token", "~/.ray/auth_token: ", "~/.ray/auth_tokn: ", ("'~/.ray/auth_tokn'?",)),
    Mistake(CLOUD, "token", "RAY_AUTH_MODE=token OMP", "OMP",
            ("head_start_ray_commands: got a `ray start` without RAY_AUTH_MODE=token",
             "worker_start_ray_commands: got")),
    Mistake(STATIC, "token", "RAY_AUTH_MODE=token OMP", "RAY_AUTH_MODE=disabled OMP",
            ("got RAY_AUTH_MODE=disabled; write token",)),
    Mistake(JOB, "token", "{mode: token}", "{mode: disabled}", ("authOptions.mode: got 'disabled'",)),
    Mistake(JOB, "token", "    authOptions: {mode: token}\n", "", ("authOptions.mode: got nothing",)),
    Mistake(JOB, "token", '{name: OMP_NUM_THREADS, value: "1"}', "{name: RAY_AUTH_MODE, value: disabled}",
            ("got RAY_AUTH_MODE 'disabled'",)),
    # what is installed
    Mistake(CLOUD, "package", "  ~/aqn_tune: .\n", "", ("file_mounts: got no folder", "`~/aqn_tune: .`")),
    Mistake(CLOUD, "package", "-c constraints.txt . ", "-c constraints.txt ",
            ("setup_commands: got no `pip install` of ~/aqn_tune",)),
    Mistake(CLOUD, "package", GET_TORCH, ".venv/bin/pip install -q torch",
            ("setup_commands: got torch of any version", f"torch=={required()['torch']}")),
    Mistake(STATIC, "package", GET_TORCH, ".venv/bin/pip install -q torch==2.12.0", ("torch 2.12.0",)),
    Mistake(JOB, "package", "aqn_tune:0.1.0-ray2.60.0-py311", "rayproject/ray:2.60.0-py311",
            ("'rayproject/ray:2.60.0-py311', which has no aqn_tune", "cluster/Dockerfile")),
    Mistake(CLOUD, "versions", "ray[default]==2.60.0\" boto3\nhead", "ray[default]==2.59.0\" boto3\nhead",
            ("got ray 2.59.0", '"ray[default]==2.60.0"')),
    Mistake(STATIC, "versions", ' . "ray[default]==2.60.0"\nhead', " .\nhead", ("no ray[default]",)),
    Mistake(JOB, "versions", 'rayVersion: "2.60.0"', 'rayVersion: "2.59.0"', ("rayVersion: got '2.59.0'",)),
    Mistake(JOB, "versions", "-ray2.60.0-py311", "-ray2.60.0-py310", ("py311 or later",)),
    Mistake(JOB, "versions", "-ray2.60.0-py311", "-py311", ("name Ray 2.60.0 in the tag",)),
    # how Ray is started
    Mistake(CLOUD, "autoscaling", DOES_NOT_START, "\n", ("nothing for --autoscaling-config",)),
    Mistake(JOB, "autoscaling", "enableInTreeAutoscaling: true", "enableInTreeAutoscaling: false",
            ("enableInTreeAutoscaling: got false; write true",)),
    Mistake(JOB, "autoscaling", "restartPolicy: Never", "restartPolicy: Always",
            ("restartPolicy: got 'Always'; write Never",)),
    Mistake(CLOUD, "address", "$RAY_HEAD_IP:6379", "$RAY_HEAD_IP:6380",
            ("worker_start_ray_commands: got '$RAY_HEAD_IP:6380'", "$RAY_HEAD_IP:6379")),
    Mistake(CLOUD, "dashboard", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0",
            ("got --dashboard-host=0.0.0.0; write 127.0.0.1",)),
    Mistake(JOB, "dashboard", "serviceType: ClusterIP", "serviceType: LoadBalancer",
            ("serviceType: got 'LoadBalancer'; write ClusterIP",)),
    # where results go
    Mistake(CLOUD, "storage", "amazonaws.com:/ /mnt/aqn", "amazonaws.com:/ /mnt/x",
            ("no command mounts", "/mnt/aqn/runs"), False),
    Mistake(STATIC, "storage", "mountpoint -q /mnt/aqn", "mkdir -p /mnt/aqn", ("mounted: nothing",)),
    Mistake(CLOUD, "storage", "--set output=/mnt/aqn/runs", "--set output=runs", ("output: got nothing",)),
    Mistake(JOB, "storage", "[ReadWriteMany]", "[ReadWriteOnce]",
            ("got ['ReadWriteOnce'] for the claim 'aqn-tune-runs'; write [ReadWriteMany]",)),
    Mistake(JOB, "storage", "mountPath: /mnt/aqn", "mountPath: /mnt/other", ("'/mnt/aqn/runs' lies",)),
    # the study on it
    Mistake(CLOUD, "launch", " --set compute.address=auto", "", ("compute.address: got nothing",)),
    Mistake(JOB, "launch", " --set compute.workers=32", "", ("compute.workers: got auto",)),
    Mistake(JOB, "job", "backoffLimit: 3", "backoffLimit: 0", ("spec.backoffLimit: got 0",)),
    Mistake(JOB, "job", "  shutdownAfterJobFinishes: true\n", "", ("shutdownAfterJobFinishes: got false",)),
    Mistake(JOB, "job", "aqn-tune run /home", "python /home", ("spec.entrypoint: got 'python",)),
    # the fields of a RayJob
    Mistake(JOB, "fields", "idleTimeoutSeconds", "idleTimeoutSecs",
            ("autoscalerOptions.idleTimeoutSecs: unknown key", "did you mean 'idleTimeoutSeconds'?")),
    Mistake(JOB, "fields", "maxReplicas: 8", "maxReplica: 8",
            ("workerGroupSpecs.0.maxReplica: unknown key", "did you mean 'maxReplicas'?")),
    Mistake(JOB, "fields", 'num-cpus: "0"', "num-cpus: 0", ("rayStartParams.num-cpus: got 0", "text")),
    Mistake(JOB, "fields", "mode: token", "mode: tokn", ("got 'tokn'", "did you mean 'token'?")),
    # the file itself
    Mistake(CLOUD, "readable", "\nmax_workers: 8\n", "\nmax_workers: 8\nmax_workers: 9\n",
            ("max_workers: the key is there twice",)),
    Mistake(CLOUD, "readable", "provider:", "provider: [", ("not valid YAML",)),
    Mistake(JOB, "readable", "kind: RayJob", "kind: RayJobs", ("kind: got 'RayJobs'", "'RayJob'?")),
    Mistake(CLOUD, "readable", "provider:", "---\nprovider:", ("got 2 YAML documents and no RayJob",)),
]  # fmt: skip


def planted(mistake: Mistake, folder: Path) -> Path:
    text = (ROOT / mistake.file).read_text()
    assert mistake.old in text
    path = folder / Path(mistake.file).name
    path.write_text(text.replace(mistake.old, mistake.new))
    return path


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.file}-{m.rule}-{m.new[:20]!r}")
def test_a_planted_mistake_is_found(
    mistake: Mistake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = planted(mistake, tmp_path)
    assert call("--file", str(path), "--json") == 2
    captured = capsys.readouterr()
    assert captured.err == ""
    wrong = [one for one in as_json(captured.out)["findings"] if one["status"] == "wrong"]
    rules = {one["rule"] for one in wrong}
    assert mistake.rule in rules
    if mistake.alone:
        assert rules == {mistake.rule}
    said = " ".join(
        f"{one['place']}: {one['text']}" for one in wrong if one["rule"] == mistake.rule
    )
    for fragment in mistake.said:
        assert fragment in said
    assert ": " in said, "a key comes first"


def test_every_rule_has_a_mistake_that_it_finds() -> None:
    """But `placeholders`, which only has notes."""
    found = {mistake.rule for mistake in MISTAKES}
    assert {rule.name for rule in (*RAY_UP, *RAY_JOB)} - {"placeholders"} <= found


JUNK: tuple[Any, ...] = ([1], {"a": 1}, 7, None, "x", -0.5, [], {}, True, [{}], ["a b"])


def replaced(value: Any, junk: Any) -> Iterator[Any]:
    """Yield `value` with every part of it in turn, at any depth, turned into junk."""
    yield junk
    parts: Any = value.items() if isinstance(value, dict) else ()
    for key, part in enumerate(value) if isinstance(value, list) else parts:
        for changed in replaced(part, junk):
            copy = dict(value) if isinstance(value, dict) else list(value)
            copy[key] = changed
            yield copy


def quick_load(text: Any) -> Any:
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@pytest.mark.parametrize("junk", JUNK, ids=json.dumps)
@pytest.mark.parametrize("file", [CLOUD, STATIC, JOB])
def test_no_junk_ends_in_a_traceback(
    file: str, junk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands in the place of a value: it is a finding."""
    monkeypatch.setattr(yaml, "safe_load", quick_load)  # Ray reads its defaults anew every time
    documents = list(yaml.safe_load_all((ROOT / file).read_text()))
    path = tmp_path / "junk.yaml"
    seen = 0
    for changed in replaced(documents[-1], junk):
        path.write_text("\n---\n".join(json.dumps(one) for one in (*documents[:-1], changed)))
        _, found = check_file(path)
        assert found
        seen += 1
    assert seen > 30


def test_a_file_that_is_no_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "words.yaml"
    for text, said in (
        ("just words", "got a scalar"),
        ("", "got an empty file"),
        ("# a", "an empty file"),
    ):
        path.write_text(text)
        assert call("--file", str(path)) == 2
        assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--file", "clstr.yaml"],
            "clstr.yaml: there is no such file; did you mean 'cluster.yaml'?",
        ),
        (["--set", "training.steps=3"], "--set: it changes a study; name one"),
        (["experiments/treshold_sweep.yaml"], "did you mean 'threshold_sweep.yaml'?"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    assert said in " ".join((captured.out + captured.err).split())
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("file", "override", "said"),
    [
        (CLOUD, "compute.cpus_per_worker=8",
         "compute.cpus_per_worker: got trials of CPU 8, which fit no worker type "
         "(worker CPU 4; gpu_worker CPU 4, GPU 1)"),
        (CLOUD, "compute.gpus_per_worker=2",
         "compute.gpus_per_worker: got trials of CPU 1, GPU 2, which fit no worker type"),
        (JOB, "compute.gpus_per_worker=auto",
         "compute.gpus_per_worker: got trials of CPU 1, GPU 0.25, which fit no worker type (worker CPU 4)"),
        (CLOUD, "compute.gpus_per_worker=auto", ""),
        (CLOUD, "compute.gpus_per_worker=1.5", "got 1.5; above 1 Ray hands out whole GPUs"),
        (JOB, "compute.cpus_per_worker=4.5", "got trials of CPU 4.5, which fit no worker type"),
        (JOB, "compute.gpus_per_worker=1", "got trials of CPU 1, GPU 1, which fit no worker type"),
        (CLOUD, "compute.cpus_per_worker=4", ""),
        (STATIC, "compute.cpus_per_worker=99", ""),
    ],
)  # fmt: skip
def test_trials_have_to_fit_a_worker_type(
    file: str, override: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "demo.yaml"
    study.write_text(STUDY)
    assert call(str(study), "--file", file, "--set", override, "--json") == (2 if said else 0)
    found = as_json(capsys.readouterr().out)["findings"]
    texts = [one["text"] for one in found if one["rule"] == "requests"]
    assert any(said in text for text in texts)


@pytest.mark.parametrize(
    ("output", "code"), [("/mnt/aqn/elsewhere", 0), ("/data/runs", 2), ("runs", 2)]
)
def test_the_output_of_a_study_counts_where_the_launch_line_names_none(
    output: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "demo.yaml"
    study.write_text(f"{STUDY}output: {output}\n")
    path = planted(Mistake(CLOUD, "storage", " --set output=/mnt/aqn/runs", "", ()), tmp_path)
    assert call(str(study), "--file", str(path), "--json") == code
    wrong = [f for f in as_json(capsys.readouterr().out)["findings"] if f["status"] == "wrong"]
    assert [f["rule"] for f in wrong] == (["storage"] if code else [])


def test_the_image_of_the_job_is_the_one_that_its_recipe_makes() -> None:
    recipe = (ROOT / "cluster" / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{required()['ray']}-py311\n" in recipe
    assert f"torch=={required()['torch']}" in recipe
    tag = re.search(r"--tag (\S+)", recipe)
    assert tag
    assert f"image: {tag.group(1)}\n" in (ROOT / JOB).read_text()


# A cluster that runs: the one of this process.


@pytest.fixture
def here(ray_two: None, tmp_path: Path) -> Path:
    """Return a cluster file for nodes that all see `tmp_path`."""
    text = (ROOT / STATIC).read_text().replace("/mnt/aqn", str(tmp_path))
    path = tmp_path / "static.yaml"
    path.write_text(text)
    return path


def test_every_node_is_looked_at(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    before = set(tmp_path.rglob("*"))
    assert call("--file", str(here), "--live", "--json") == 0
    nodes = [f for f in as_json(capsys.readouterr().out)["findings"] if f["rule"] == "node"]
    assert [node["status"] for node in nodes] == ["ok"]
    assert "(head, CPU 2)" in nodes[0]["place"]
    assert "same folder, writable; same code and libraries; token in use" in nodes[0]["text"]
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "runs"}, "nothing of the check stays"
    assert ray.is_initialized(), "a session that was there goes on"
    assert call("--file", str(here), "--live") == 0
    assert "1 nodes: all in order" in capsys.readouterr().out


def test_a_node_with_another_folder_is_found(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planted: this machine writes where the node does not look."""
    marker = live._marker

    @contextmanager
    def elsewhere(folder: Path) -> Iterator[tuple[str, str]]:
        with marker(folder / "of this machine") as made:
            yield made

    monkeypatch.setattr(live, "_marker", elsewhere)
    monkeypatch.setenv("COLUMNS", "250")
    assert call("--file", str(here), "--live") == 2
    said = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path / 'runs'} is another folder there" in said
    assert "mount the shared storage on every node" in said


def test_a_node_with_other_code_or_libraries_is_found(
    ray_two: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = ComputeSpec(address="auto")
    monkeypatch.setattr(live, "source_hash", lambda: "0" * 16)
    (found,) = live.look_at_nodes(tmp_path, local)
    assert found.status == "wrong"
    assert "numbers would differ: another state of aqn_tune" in found.text
    mine = {**live._versions(), "torch": "1.0"}
    monkeypatch.setattr(live, "_versions", lambda: mine)
    (found,) = live.look_at_nodes(tmp_path, local)
    assert re.search(r"aqn_tune, torch [\d.]+\S* \(here 1\.0\); set all nodes up", found.text)


def test_a_node_without_the_model_is_found(ray_two: None, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (found,) = live.look_at_nodes(tmp_path, ComputeSpec(address="auto"), model=str(folder))
    assert f"model.path: no folder {folder}" in found.text
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (found,) = live.look_at_nodes(tmp_path, ComputeSpec(address="auto"), model=str(folder))
    assert found.status == "ok"


def test_a_node_that_cannot_run_the_task_or_does_not_answer_is_found(
    ray_two: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blocked(*_: str) -> None:
        for _ in range(1200):
            time.sleep(0.05)

    monkeypatch.setattr(live, "look", blocked)
    (found,) = live.look_at_nodes(tmp_path, ComputeSpec(address="auto"), patience=0)
    assert (found.status, found.text[:16]) == ("wrong", "no answer in 0 s")

    def broken(*_: str) -> None:
        raise ModuleNotFoundError("No module named 'aqn_tune'")

    monkeypatch.setattr(live, "look", broken)
    (found,) = live.look_at_nodes(tmp_path, ComputeSpec(address="auto"))
    assert (
        "the task cannot run there: ModuleNotFoundError: No module named 'aqn_tune'" in found.text
    )


def healthy_node() -> dict[str, Any]:
    """Return what `live.look` sees on a node that is as this machine."""
    return {
        "same": True,
        "trouble": "",
        "token": True,
        "model": True,
        "sources": live.source_hash(),
        "versions": live._versions(),
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"same": False}, "is another folder there"),
        ({"trouble": "Read-only file system"}, "cannot be written to (Read-only file system)"),
        ({"token": False}, "RAY_AUTH_MODE=token"),
        ({"model": False}, "model.path: no folder /models/qwen with a config.json there"),
        ({}, ""),
    ],
)
def test_what_is_said_of_a_node(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    seen = {**healthy_node(), **change}
    text = "; ".join(live._differences(seen, tmp_path, "/models/qwen", has_gpu=False))
    assert said in text
    assert bool(text) is bool(said)


@pytest.mark.parametrize(
    ("build", "has_gpu", "alike"),
    [("1.0+cu130", True, True), ("1.0+cu130", False, False), ("1.1+cu130", True, False)],
)
def test_a_node_with_a_gpu_may_have_another_build_of_torch(
    build: str, has_gpu: bool, alike: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_versions", lambda: {"torch": "1.0+cpu"})
    seen = {**healthy_node(), "versions": {"torch": build}}
    found = list(live._differences(seen, tmp_path, "", has_gpu=has_gpu))
    assert (found == []) is alike


def test_a_folder_that_cannot_be_made_is_a_user_error(ray_two: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output: cannot write to .*file/runs from this machine"):
        live.look_at_nodes(tmp_path / "file" / "runs", ComputeSpec(address="auto"))


def test_a_cluster_is_joined_with_the_token_though_ray_has_been_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: a cluster that asks for a token. Ray reads RAY_AUTH_MODE when it is imported."""
    import ray
    from ray._private.authentication import authentication_token_setup as setup

    order: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: order.append("init"))
    monkeypatch.setattr(ray, "shutdown", lambda: order.append("shutdown"))
    monkeypatch.setattr(
        setup,
        "maybe_enable_token_auth_if_token_available",
        lambda **_: order.append("token"),
    )
    with ray_session(ComputeSpec(address="10.0.0.1:6379")):
        pass
    assert order == ["token", "init", "shutdown"]


@pytest.fixture
def head_with_token(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Start a head as the shipped files do; yield its address, and an environment with its token alone."""
    with started_head(tmp_path, free_port()) as head:
        yield head.address, head.environment


@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_is_joined_by_address(
    head_with_token: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, environment = head_with_token
    (tmp_path / "demo.yaml").write_text(STUDY)
    (tmp_path / "static.yaml").write_text(
        (ROOT / STATIC).read_text().replace("/mnt/aqn", str(tmp_path))
    )
    done = subprocess.run(
        [
            sys.executable, "-m", "aqn_tune", "cluster", "check", str(tmp_path / "demo.yaml"),
            "--file", str(tmp_path / "static.yaml"), "--set", f"compute.address={address}",
            "--set", f"output={tmp_path / 'runs'}", "--live", "--json",
        ],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    nodes = [f for f in as_json(done.stdout)["findings"] if f["rule"] == "node"]
    assert [(node["status"], "(head)" in node["place"]) for node in nodes] == [("ok", True)]
