"""A cluster file is held against the study as its launch line runs it, and what cannot be read is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aqn_tune.cli.app import main
from aqn_tune.cluster.check import check_file
from aqn_tune.cluster.document import launch_overrides, read_cluster_file

ROOT = Path(__file__).parents[1]
CLOUD, JOB = ROOT / "cluster.yaml", ROOT / "cluster" / "kuberay.yaml"
LAUNCHED = ["compute.address=auto", "compute.workers=32", "output=/mnt/aqn/runs"]
STUDY = """\
study: demo
scenario: {{faults: [{{kind: dead_zone, layers: [10], threshold: 0.2}}]}}
output: {output}
"""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("COLUMNS", raising=False)


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as stopped:
        main(["cluster", "check", *arguments, "--json"])
    said = json.loads(capsys.readouterr().out)
    return int(stopped.value.code or 0), said


@pytest.mark.parametrize("file", [CLOUD, JOB])
def test_the_launch_line_says_what_is_changed(file: Path) -> None:
    assert sorted(launch_overrides(read_cluster_file(file))) == LAUNCHED


def changed(file: Path, old: str, new: str, tmp_path: Path) -> str:
    text = file.read_text()
    assert old in text
    (tmp_path / file.name).write_text(text.replace(old, new))
    return str(tmp_path / file.name)


def test_a_comment_of_a_job_is_no_launch_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The original bug: the whole text was searched, and a comment satisfied the rule."""
    file = changed(JOB, " --set compute.address=auto", "", tmp_path)
    with Path(file).open("a") as job:
        job.write("# once: aqn-tune run study.yaml --set compute.address=auto\n")
    code, said = check(capsys, "--file", file)
    wrong = [one for one in said["findings"] if one["status"] == "wrong"]
    assert (code, [one["rule"] for one in wrong]) == (2, ["launch"])


def test_the_output_of_the_launch_line_wins_over_that_of_the_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The original bug: the rules looked at the study's own folder, which nothing mounts."""
    study = tmp_path / "study.yaml"
    study.write_text(STUDY.format(output="/somewhere/else"))
    code, said = check(capsys, str(study), "--file", str(CLOUD))
    assert (code, said["ok"]) == (0, True)
    code, said = check(capsys, str(study), "--file", str(CLOUD), "--set", "output=/elsewhere")
    wrong = [one["text"] for one in said["findings"] if one["status"] == "wrong"]
    assert code == 2
    assert len(wrong) == 1
    assert "/elsewhere" in wrong[0]


def test_the_request_is_that_of_the_launch_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(STUDY.format(output="runs"))
    added = "--set compute.workers=32 --set compute.cpus_per_worker=64"
    file = changed(JOB, "--set compute.workers=32", added, tmp_path)
    code, said = check(capsys, str(study), "--file", file)
    wrong = [one for one in said["findings"] if one["status"] == "wrong"]
    assert (code, [one["rule"] for one in wrong]) == (2, ["requests"])
    assert "CPU 64" in wrong[0]["text"]


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("cluster_name: aqn-tune", "cluster_name: 2026-13-01", "readable"),
        ("cluster_name: aqn-tune", "cluster_name: =", "readable"),
        ("~/aqn_tune: .", "~/aqn_tune: ~nobody-of-this-name/aqn_tune", "package"),
    ],
)
def test_what_ended_in_a_traceback_is_a_finding(
    tmp_path: Path, old: str, new: str, rule: str
) -> None:
    _, found = check_file(Path(changed(CLOUD, old, new, tmp_path)))
    assert rule in {one.rule for one in found if one.status == "wrong"}


def test_a_cluster_that_runs_needs_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The original bug: one started by hand was found wrong for want of a cluster.yaml."""
    looked: list[Path] = []

    def look(folder: Path, *_: Any, **__: Any) -> list[Any]:
        looked.append(folder)
        return []

    monkeypatch.setattr("aqn_tune.cluster.live.look_at_nodes", look)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY.format(output="/mnt/aqn/runs"))
    code, said = check(capsys, "study.yaml", "--live")
    assert (code, said["file"], said["findings"]) == (0, None, [])
    assert looked == [Path("/mnt/aqn/runs")]
    code, said = check(capsys, "study.yaml")
    assert (code, [one["rule"] for one in said["findings"]]) == (2, ["readable"])
