"""How many trials run at a time, and how Ray is started."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
import ray
from synthetic import ray_two

from aqn_tune.errors import UserError
from aqn_tune.search.cluster import _local_cpus, ray_session, worker_count
from aqn_tune.search.trainable import share_of_node
from aqn_tune.study.schema import ComputeSpec

__all__ = ["ray_two"]


@pytest.mark.parametrize(
    ("compute", "workers", "cpus"),
    [
        ({"workers": 3}, 3, 3),
        ({"workers": 3, "cpus_per_worker": 0.5}, 3, 2),
        ({"workers": 1, "cpus_per_worker": 4}, 1, 4),
        ({"workers": "auto"}, 8, 8),
        ({"workers": "auto", "cpus_per_worker": 3}, 2, 6),
        ({"workers": "auto", "cpus_per_worker": 16}, 1, 16),
        ({"workers": "auto", "gpus_per_worker": 0.5}, 4, 8),
        ({"workers": "auto", "gpus_per_worker": 4}, 1, 8),
        ({"workers": "auto", "gpus_per_worker": 1, "cpus_per_worker": 12}, 1, 12),
        ({"workers": "auto", "address": "somewhere"}, 64, None),
    ],
)
def test_worker_count(
    monkeypatch: pytest.MonkeyPatch, compute: dict[str, Any], workers: int, cpus: int | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": 2.0})
    spec = ComputeSpec.model_validate(compute)
    assert worker_count(spec) == workers
    if cpus is not None:
        assert _local_cpus(spec) == cpus


def test_a_cluster_without_a_core_wants_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """One trial at a time, which `auto` would come to, never makes a cluster grow."""
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1e9})
    with pytest.raises(UserError, match=r"compute\.workers: got auto, but .* has no CPUs"):
        worker_count(ComputeSpec(address="somewhere"))
    assert worker_count(ComputeSpec(address="somewhere", workers=5)) == 5


def test_what_ray_says_of_its_nodes_is_logged_and_not_printed(
    ray_two: None,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What other tests have left at the root would print it.
    logger = logging.getLogger("aqn_tune.search.cluster")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    said = {"lines": ["The node with node id: f00 has been marked dead"], "pid": "raylet"}
    with caplog.at_level(logging.INFO, logger="aqn_tune.search.cluster"):
        ray._private.worker.print_to_stdstream({**said, "is_err": False}, ignore_prefix=False)
    assert capfd.readouterr() == ("", "")
    assert caplog.messages == ["(raylet) The node with node id: f00 has been marked dead"]


def test_workers_have_one_thread_each(ray_two: None) -> None:
    @ray.remote
    def threads() -> str:
        return os.environ["OMP_NUM_THREADS"]

    assert ray.get(threads.remote()) == "1"


def test_a_worker_knows_its_share_of_the_node(ray_two: None) -> None:
    """Of the CPUs that Ray hands out there, however many the operating system shows."""
    share = ray.remote(share_of_node)
    assert ray.get(share.remote()) == 0.5
    assert ray.get(share.options(num_cpus=2).remote()) == 1.0
    assert ray.get(share.options(num_cpus=0).remote()) is None


def test_a_session_inside_another_is_the_same(ray_two: None) -> None:
    with ray_session(ComputeSpec(workers=1)):
        assert ray.cluster_resources()["CPU"] == 2.0
    assert ray.is_initialized()


def test_a_cluster_that_cannot_be_joined_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nmore")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with (
        pytest.raises(UserError, match=r"cannot join the Ray cluster at '10\.0\.0\.1:6379'"),
        ray_session(ComputeSpec(address="10.0.0.1:6379")),
    ):
        pass


def test_a_gpu_that_is_not_there_is_a_user_error_and_not_a_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray would hold the trials back for ever, and say nothing."""
    calls: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(calls))
    monkeypatch.setattr(ray, "init", lambda **_: calls.append("init"))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    with (
        pytest.raises(UserError, match=r"compute\.gpus_per_worker: got 0\.5, but Ray finds 0 GPUs"),
        ray_session(ComputeSpec(gpus_per_worker=0.5)),
    ):
        pytest.fail("the session began")
    assert calls == ["init", "shutdown"]
