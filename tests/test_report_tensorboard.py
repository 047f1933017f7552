"""The TensorBoard logs: curves, means, and the HParams table as TensorBoard itself reads it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_ledger import CONFIGS, STEPS, Fake, write_fake

from aqn_tune.ledger.rows import EvaluationRow
from aqn_tune.report.tensorboard import TensorBoardWriter, rebuild
from aqn_tune.study.folder import StudyFolder

Curves = dict[str, dict[str, list[tuple[int, float]]]]

SMALL = {"sweep": {"faults.0.threshold": [0.1, 0.5]}}


def read_curves(root: Path) -> Curves:
    """Return run -> tag -> (step, value) of every scalar below `root`, and check each record."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    curves: Curves = defaultdict(lambda: defaultdict(list))
    for path in root.rglob("*tfevents*"):
        run = path.parent.relative_to(root).as_posix()
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tensor.float_val:
                    curves[run][value.tag].append((event.step, value.tensor.float_val[0]))
    return curves


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Fake:
    fake = write_fake(
        tmp_path_factory.mktemp("tb"), fail=[("both-threshold0.5", "targeted", 3)], **SMALL
    )
    rebuild(fake.folder, fake.study)
    return fake


@pytest.fixture(scope="module")
def curves(fake: Fake) -> Curves:
    return read_curves(fake.folder.tensorboard)


def test_each_replicate_has_its_curves_and_each_arm_its_mean(curves: Curves) -> None:
    one = curves["search/both-threshold0.1/c000/s0"]
    assert [step for step, _ in one["train_loss"]] == list(range(1, STEPS + 1))
    assert [step for step, _ in one["loss/faulty"]] == [5, 10, STEPS]
    assert set(one) == {
        "train_loss", "loss/clean", "loss/faulty", "exact_match/clean", "exact_match/faulty",
        "affected_fraction", "relative_error",
    }  # fmt: skip
    other = curves["search/both-threshold0.1/c000/s1"]
    mean = curves["search/both-threshold0.1/c000/mean"]["loss/faulty"]
    expected = [
        (step, (a + b) / 2)
        for (step, a), (_, b) in zip(one["loss/faulty"], other["loss/faulty"], strict=True)
    ]
    assert [step for step, _ in mean] == [step for step, _ in expected]
    assert [value for _, value in mean] == pytest.approx([value for _, value in expected])


def test_a_shared_training_shows_in_every_scenario_with_that_scenarios_fault(
    curves: Curves, fake: Fake
) -> None:
    mild = curves["confirm/both-threshold0.1/clean/s2"]
    harsh = curves["confirm/both-threshold0.5/clean/s2"]
    assert mild["loss/clean"] == harsh["loss/clean"]
    assert mild["loss/faulty"][-1][1] < harsh["loss/faulty"][-1][1]


def test_a_failed_seed_leaves_no_mean_and_no_final_value(curves: Curves) -> None:
    arm = "confirm/both-threshold0.5/targeted"
    assert "loss/faulty" not in curves[f"{arm}/s3"]
    assert "loss/faulty" not in curves[f"{arm}/mean"]
    assert "final/loss_faulty" not in curves[arm]
    assert "final/loss_faulty" in curves["confirm/both-threshold0.1/targeted"]


def test_a_stopped_config_has_no_final_value(curves: Curves) -> None:
    """Planted: a mean at the first rung in the same column as means at the last one."""
    stopped = curves["search/both-threshold0.1/c002"]
    assert "final/loss_faulty" not in stopped
    assert stopped["step_reached"] == [(5, 5.0)]
    finished = curves["search/both-threshold0.1/c000"]
    assert [step for step, _ in finished["final/loss_faulty"]] == [STEPS]


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_rows_written_live_give_what_the_ledger_gives(
    fake: Fake, curves: Curves, tmp_path: Path, chunk: int
) -> None:
    live = StudyFolder(tmp_path)
    rows = fake.rows if chunk > 1 else fake.rows[:400]
    writer = TensorBoardWriter(live, fake.study)
    for start in range(0, len(rows), chunk):
        writer.write(rows[start : start + chunk])
    writer.close()
    found = read_curves(live.tensorboard)
    if chunk > 1:
        assert found == curves
    for run, tags in found.items():
        for tag, points in tags.items():
            assert points == curves[run][tag][: len(points)]


def test_writing_the_same_rows_twice_or_again_adds_no_point(fake: Fake, tmp_path: Path) -> None:
    live = StudyFolder(tmp_path)
    writer = TensorBoardWriter(live, fake.study)
    writer.write(fake.rows[:500])
    once = read_curves(live.tensorboard)
    writer.write(fake.rows[:500])
    assert read_curves(live.tensorboard) == once


def test_a_run_that_the_ledger_does_not_know_is_removed(tmp_path: Path) -> None:
    fake = write_fake(tmp_path, confirm=False, **SMALL)
    orphan = fake.folder.tensorboard / "search" / "gone" / "events.out.tfevents.1.host"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"left by a killed run")
    rebuild(fake.folder, fake.study)
    assert not orphan.exists()


def test_a_loss_that_is_not_finite_is_no_point(tmp_path: Path, fake: Fake) -> None:
    def lost(row: EvaluationRow) -> EvaluationRow:
        return row.model_copy(update={"loss": None}) if row.condition == "faulty" else row

    rows = [lost(row) if isinstance(row, EvaluationRow) else row for row in fake.rows[:500]]
    folder = StudyFolder(tmp_path)
    TensorBoardWriter(folder, fake.study).write(rows)
    found = read_curves(folder.tensorboard)
    assert all("loss/faulty" not in tags for tags in found.values())
    assert any("loss/clean" in tags for tags in found.values())


class Server:
    """A TensorBoard of its own on the loopback interface."""

    def __init__(self, logs: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [
                sys.executable, "-W", "ignore", "-m", "tensorboard.main", "--logdir", str(logs),
                "--host", "127.0.0.1", "--port", str(port), "--load_fast=false",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def post(self, route: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.url}/data/plugin/hparams/{route}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def post_when_up(self, route: str, body: dict[str, Any], *, tries: int = 240) -> Any:
        for _ in range(tries):
            if self.process.poll() is not None:
                raise RuntimeError(f"TensorBoard ended with {self.process.returncode}")
            try:
                return self.post(route, body)
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.25)
        raise RuntimeError("TensorBoard did not come up")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Arms without a window and a failed config come too: neither may take columns away."""
    fake = write_fake(
        tmp_path_factory.mktemp("http"), fail=[("both-threshold0.5", "targeted", 3)], **SMALL
    )
    rebuild(fake.folder, fake.study)
    server = Server(fake.folder.tensorboard)
    yield server
    server.close()


ALL_STATUSES = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]


@pytest.mark.slow
def test_tensorboard_lists_every_config_with_the_right_columns(server: Server) -> None:
    def loaded() -> tuple[list[str], dict[str, Any]]:
        experiment = server.post_when_up("experiment", {"experimentName": ""})
        columns = [info["name"] for info in experiment.get("hparamInfos", [])]
        answer = server.post(
            "session_groups",
            {
                "experimentName": "",
                "allowedStatuses": ALL_STATUSES,
                "colParams": [
                    {"metric": info["name"]} for info in experiment.get("metricInfos", [])
                ],
                "startIndex": 0,
                "sliceSize": 1000,
            },
        )
        return columns, {g["name"]: g for g in answer.get("sessionGroups", [])}

    arms = 6 + 3
    expected = 2 * (6 + len(CONFIGS)) + 2 * arms
    for _ in range(120):
        columns, groups = loaded()
        if len(groups) == expected and all(g["sessions"][0].get("status") for g in groups.values()):
            break
        time.sleep(0.25)

    assert sorted(columns) == sorted([
        "stage", "scenario", "arm", "threshold", "carrier", "targeting", "sigma_start",
        "sigma_ratio", "window_centre", "window_width",
    ])  # fmt: skip
    assert len(groups) == expected
    window = groups["search/both-threshold0.1/c000"]["hparams"]
    assert window["window_centre"] == CONFIGS[0]["window_centre"]
    assert window["threshold"] == 0.1
    everywhere = groups["search/both-threshold0.1/c001"]["hparams"]
    assert everywhere["targeting"] == "global"
    assert "window_centre" not in everywhere

    status = {name: group["sessions"][0]["status"] for name, group in groups.items()}
    assert status["search/both-threshold0.1/c000"] == "STATUS_SUCCESS"
    assert status["search/both-threshold0.5/c002"] == "STATUS_FAILURE"
    assert status["confirm/both-threshold0.5/targeted"] == "STATUS_FAILURE"
    assert status["confirm/both-threshold0.1/targeted"] == "STATUS_SUCCESS"

    metrics = {
        value["name"]["tag"]: value.get("value")
        for value in groups["confirm/both-threshold0.1/targeted"]["metricValues"]
    }
    assert metrics["final/loss_faulty"] == pytest.approx(0.65, abs=0.05)
    assert metrics["step_reached"] == STEPS
