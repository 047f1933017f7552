"""A cluster that grows with a study, loses a node under it, and shrinks again, on one machine.

Ray's own provider for such tests starts a node as processes; everything else is the autoscaler that a
cloud would have.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from ray_head import Head, free_port, started_head
from synthetic import make_study, search_inline
from test_search_resume import work_of

from aqn_tune.ledger import Ledger
from aqn_tune.study.folder import study_folder

pytestmark = pytest.mark.slow

HEAD_NODE = "f" * 51 + "00000"
WORKERS = 3
RUNG_SECONDS = 1.5
"""Long enough that nodes are wanted while others work, and that a kill meets a trial under way."""

DRIVER = """
import sys
sys.path.insert(0, {tests!r})
from test_cluster_autoscale import drive
drive({out!r}, {address!r}, {log!r}, {nodes!r})
"""


def drive(out: str, address: str, log: str, nodes: str) -> None:
    """Run a search on the cluster and record how many nodes it has, until it has shrunk again."""
    import threading

    import ray
    from synthetic import LAYERS, Behaviour, engine, make_scenarios, make_setting

    from aqn_tune.search.cluster import ray_session
    from aqn_tune.search.runner import run_search

    study = make_study(out, search={"configs": 4}, compute={"workers": WORKERS, "address": address})
    ended = threading.Event()

    def alive() -> int:
        count = sum(node["Alive"] for node in ray.nodes())
        with open(nodes, "a", encoding="utf-8") as file:
            file.write(f"{count}\n")
        return count

    def watch() -> None:
        while not ended.wait(0.5):
            alive()

    with ray_session(study.compute):
        alive()
        watching = threading.Thread(target=watch)
        watching.start()
        run_search(
            study,
            make_setting(study),
            make_scenarios(study),
            study_folder(study),
            layer_count=LAYERS,
            engine=engine(Behaviour(sleep=RUNG_SECONDS, log=log)),
        )
        until = time.monotonic() + 60
        while alive() > 1 and time.monotonic() < until:
            time.sleep(0.5)
        ended.set()
        watching.join()


def config(port: int) -> dict[str, Any]:
    """Return the autoscaler's configuration: up to three workers of one CPU each."""
    return {
        "cluster_name": "growing",
        "max_workers": WORKERS,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": HEAD_NODE,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
        },
        "auth": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "object_store_memory": 80 << 20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": WORKERS,
            },
        },
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


class Rung(NamedTuple):
    """A line of the engine's log: a rung that a worker has trained."""

    pack: str
    step: int
    pid: int


def read_log(log: Path) -> list[Rung]:
    if not log.exists():
        return []
    lines = (line.split() for line in log.read_text().splitlines())
    return [Rung(pack, int(step), int(pid)) for pack, step, pid in lines]


def lose_a_node(head: Head, log: Path, driver: subprocess.Popen[str]) -> str:
    """Kill a node, with all that runs on it, in the middle of a trial; return the trial's pack."""
    until = time.monotonic() + 120
    while time.monotonic() < until and driver.poll() is None:
        middle = [rung for rung in read_log(log) if rung.step == 10]
        if middle:
            # Past the moment in which the worker saves its state, before it has trained the next rung.
            time.sleep(RUNG_SECONDS / 2)
            worker = psutil.Process(middle[-1].pid)
            (raylet,) = (one for one in worker.parents() if one in head.raylets())
            for process in (raylet, *raylet.children(recursive=True)):
                process.kill()
            return middle[-1].pack
        time.sleep(0.05)
    raise AssertionError(f"no trial came to its middle: {read_log(log)}")


def test_a_cluster_grows_loses_a_node_and_shrinks(tmp_path: Path) -> None:
    home, log, nodes = tmp_path / "home", tmp_path / "log", tmp_path / "nodes"
    home.mkdir()
    port, out = free_port(), tmp_path / "runs"
    (tmp_path / "autoscaler.json").write_text(json.dumps(config(port)))
    with started_head(
        home,
        port,
        [f"--autoscaling-config={tmp_path / 'autoscaler.json'}"],
        {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_NODE,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE,
        },
    ) as head:
        code = DRIVER.format(
            tests=str(Path(__file__).parent),
            out=str(out),
            address=head.address,
            log=str(log),
            nodes=str(nodes),
        )
        driver = subprocess.Popen(
            [sys.executable, "-c", code],
            env=head.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            lost = lose_a_node(head, log, driver)
            said = driver.communicate(timeout=240)
        finally:
            driver.kill()
            driver.wait()
    assert (driver.returncode, *said) == (0, "", "")

    counts = [int(line) for line in nodes.read_text().splitlines()]
    assert (counts[0], max(counts), counts[-1]) == (1, 1 + WORKERS, 1)

    rungs = read_log(log)
    repeated = [rung for rung, times in Counter(r[:2] for r in rungs).items() if times > 1]
    assert repeated == [], "a rung that had been saved was trained again"
    workers: dict[str, set[int]] = defaultdict(set)
    for rung in rungs:
        workers[rung.pack].add(rung.pid)
    assert len(workers[lost]) == 2
    assert [rung.step for rung in rungs if rung.pack == lost][:2] == [5, 10]

    study = make_study(out, search={"configs": 4})
    folder = study_folder(study)
    assert work_of(study, folder).tally().left == 0
    ledger = Ledger(folder.ledger)
    assert {row.status for row in ledger.trainings.values()} <= {"finished", "unfinished"}
    quiet = make_study(tmp_path / "quiet", search={"configs": 4})
    other = search_inline(quiet, study_folder(quiet)).evaluations
    shared = other.keys() & ledger.evaluations.keys()
    assert len(shared) > 50
    assert all(other[key] == ledger.evaluations[key] for key in shared)
