"""The TensorBoard logs: curves, means, and the HParams table as TensorBoard itself reads it."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_ledger import CONFIGS, STEPS, Fake, confirm_rows, make_study, write_fake

from aqn_tune.errors import UserError
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import CellRow, EvaluationRow
from aqn_tune.report.custom_scalars import CHARTS
from aqn_tune.report.hparams import arm_params, columns, config_params, session_start
from aqn_tune.report.tensorboard import TensorBoardWriter, rebuild
from aqn_tune.study.arms import ArmSpec
from aqn_tune.study.cells import named_arms
from aqn_tune.study.checks import check_study
from aqn_tune.study.folder import StudyFolder
from aqn_tune.study.space import SpaceSpec
from aqn_tune.study.space_checks import corners
from aqn_tune.study.sweep import resolve_scenarios

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


@pytest.mark.parametrize(("first", "second"), [(8, 6), (6, 8)])
def test_each_generation_has_the_mean_of_its_own_seeds(
    tmp_path: Path, first: int, second: int
) -> None:
    """Planted: generation 0 with 8 seeds got the mean of the first 6, for generation 1 has 6."""
    confirm = {"finalists": 1, "replicates": first}
    fake = write_fake(tmp_path, confirm_spec=confirm, **SMALL)
    again = make_study(
        tmp_path, confirm_spec={"finalists": 1, "replicates": second, "generation": 1}, **SMALL
    )
    Ledger(fake.folder.ledger).append(list(confirm_rows(again, resolve_scenarios(again))))
    rebuild(fake.folder, again)
    curves = read_curves(fake.folder.tensorboard)
    for stage, seeds in (("confirm", first), ("confirm-g1", second)):
        arm = f"{stage}/both-threshold0.1/targeted"
        ends = [curves[f"{arm}/s{seed}"]["loss/faulty"][-1][1] for seed in range(seeds)]
        assert f"{arm}/s{seeds}" not in curves
        ((step, mean),) = curves[f"{arm}/mean"]["loss/faulty"]
        assert (step, mean) == (STEPS, pytest.approx(sum(ends) / seeds, rel=1e-6))
        assert curves[arm]["final/loss_faulty"] == [(step, mean)]


def read_hparams(root: Path, run: str) -> dict[str, Any]:
    """Return the parameters of one line of the HParams table."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    for path in (root / run).glob("*tfevents*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == metadata.SESSION_START_INFO_TAG:
                    data = plugin_data_pb2.HParamsPluginData.FromString(
                        value.metadata.plugin_data.content
                    )
                    found = data.session_start_info.hparams
                    return {
                        name: getattr(found[name], found[name].WhichOneof("kind")) for name in found
                    }
    raise AssertionError(f"{run}: no line")


def test_the_hparams_tell_arms_and_twins_apart(tmp_path: Path) -> None:
    """Planted: `targeted` and `targeted_energy` in one and the same words."""
    energy = {"noise": {"targeting": "targeted", "normalise": "energy"}}
    fake = write_fake(tmp_path, arms={"targeted_energy": energy}, **SMALL)
    rows = [
        row.model_copy(update={"config": "c000"})
        if isinstance(row, CellRow) and row.arm.startswith("finalist1")
        else row
        for row in fake.rows
    ]
    folder = StudyFolder(tmp_path / "live")
    TensorBoardWriter(folder, fake.study).write(rows)

    def line(arm: str) -> dict[str, Any]:
        shown = read_hparams(folder.tensorboard, f"confirm/both-threshold0.1/{arm}")
        assert set(shown) <= set(columns(fake.study, resolve_scenarios(fake.study)))
        assert shown.pop("arm") == arm
        return shown

    shared = {"stage": "confirm", "scenario": "both-threshold0.1", "threshold": 0.1}
    policy = {
        "carrier": "hidden", "schedule": "geometric", "sigma_start": 0.05, "sigma_ratio": 0.01,
        "stages": 9.0, "warmup_fraction": 0.1, "targeting": "targeted", "normalise": "none",
    }  # fmt: skip
    assert line("targeted") == shared | policy
    assert line("targeted_energy") == shared | policy | {"normalise": "energy"}
    assert line("fault_only") == shared | {"targeting": "none"}
    finalist = shared | policy | CONFIGS[0]
    assert line("finalist1") == finalist
    without_window = {k: v for k, v in finalist.items() if not k.startswith("window")}
    assert line("finalist1_global") == without_window | {"targeting": "global"}
    assert line("finalist1_none") == shared | {"targeting": "none"}


@pytest.mark.parametrize(
    ("noise", "shown"),
    [
        ({"schedule": {"kind": "constant", "sigma": 0.2}},
         {"schedule": "constant", "sigma_start": 0.2, "sigma_ratio": 1.0, "stages": 1,
          "warmup_fraction": 0.0}),
        ({"schedule": {"kind": "geometric", "stages": 4, "warmup_fraction": 0.3}},
         {"stages": 4, "warmup_fraction": 0.3}),
        ({"carrier": "rmsnorm_weight"}, {"carrier": "rmsnorm_weight"}),
        ({"carrier": {"kind": "rmsnorm_weight", "relative": True}},
         {"carrier": "rmsnorm_weight", "carrier_relative": "true"}),
        ({"targeting": {"kind": "targeted", "layers": [3, "5-7"]}},
         {"targeting": "targeted", "layers": "3,5-7"}),
        ({"targeting": {"kind": "healthy", "layers": "all"}},
         {"targeting": "healthy", "layers": "all"}),
        ({"targeting": {"kind": "window", "centre": 4, "width": 2}},
         {"targeting": "window", "window_centre": 4, "window_width": 2}),
        ({"targeting": {"kind": "random", "count": 3, "seed": 5}},
         {"targeting": "random", "random_count": 3, "random_seed": 5}),
        ({"targeting": {"kind": "multipliers", "values": {2: 0.5}, "default": 0.25}},
         {"targeting": "multipliers", "multiplier_2": 0.5, "multiplier_default": 0.25}),
        ({"targeting": {"kind": "multipliers", "values": [1, 0.5]}},
         {"targeting": "multipliers", "multipliers": "1,0.5"}),
        ({"schedule": {"kind": "geometric", "stop_fraction": 0.2}}, {"stop_fraction": 0.2}),
        ({"schedule": {"kind": "constant", "sigma": 0.2, "stop_fraction": 0.2}},
         {"schedule": "constant", "sigma_start": 0.2, "sigma_ratio": 1.0, "stages": 1,
          "warmup_fraction": 0.0, "stop_fraction": 0.2}),
        ({"schedule": {"kind": "linear", "sigma_start": 0.1, "sigma_end": 0.0}},
         {"schedule": "linear", "sigma_start": 0.1, "sigma_ratio": 0.0, "warmup_fraction": 0.0,
          "stages": None}),
        ({"schedule": {"kind": "epoch_aware", "epochs": 3, "stop_fraction": 0.1}},
         {"schedule": "epoch_aware", "epochs": 3, "stages_per_epoch": 5, "stop_fraction": 0.1,
          "stages": None, "warmup_fraction": None}),
        ({"carrier": {"kind": "linear_weight", "relative": True}, "redraw": "microbatch"},
         {"carrier": "linear_weight", "carrier_relative": "true", "redraw": "microbatch"}),
        ({"targeting": {"kind": "scores", "values": {0: 1, 1: 2.5}, "ceiling": True}},
         {"targeting": "scores", "score_0": 1.0, "score_1": 2.5, "scores_map": "power",
          "scores_alpha": 1.0, "scores_ceiling": "true"}),
        ({"targeting": {"kind": "scores", "values": [1, 2.5], "map": "inverse_linear"}},
         {"targeting": "scores", "scores": "1,2.5", "scores_map": "inverse_linear",
          "scores_ceiling": "false"}),
        ({"targeting": {"kind": "scores", "file": "s.json", "alpha": -2}},
         {"targeting": "scores", "scores_file": "s.json", "scores_map": "power",
          "scores_alpha": -2.0, "scores_ceiling": "false"}),
        ({"targeting": {"kind": "zone", "edge": [0, "26-27"], "edge_multiplier": 0.5}},
         {"targeting": "zone", "zone_edge_layers": "0,26-27", "zone_edge": 0.5, "zone_middle": 1.0,
          "zone_boundary": 1.0}),
        ({"targeting": {"kind": "zone", "middle": ["9-11"], "boundary": 0.5,
                        "middle_multiplier_after": 0.25}},
         {"targeting": "zone", "layers": "9-11", "zone_edge": 1.0, "zone_middle": 1.0,
          "zone_boundary": 0.5, "zone_middle_after": 0.25}),
        ({"targeting": "depth"}, {"targeting": "depth", "depth_low": 0.4, "depth_high": 0.6}),
    ],
)  # fmt: skip
def test_every_part_of_a_policy_has_its_column(
    noise: dict[str, Any], shown: dict[str, Any], tmp_path: Path
) -> None:
    plain = arm_params(ArmSpec.model_validate({"noise": {}}))
    arm = {"noise": noise}
    expected = {name: value for name, value in (plain | shown).items() if value is not None}
    assert arm_params(ArmSpec.model_validate(arm)) == expected
    study = make_study(tmp_path, arms={"own": arm}, **SMALL)
    table = columns(study, resolve_scenarios(study))
    for name, value in arm_params(named_arms(study)["own"]).items():
        assert table[name] is not isinstance(value, str)


@pytest.mark.parametrize(
    ("arm", "shown"),
    [
        ({}, {}),
        ({"device": "faulty", "weight_decay": 0.1}, {"device": "faulty", "weight_decay": 0.1}),
        ({"skip": "faulty", "train_layers": "healthy"},
         {"skip": "faulty", "train_layers": "healthy"}),
        ({"skip": [3, "5-7"], "train_layers": [0], "rank": 4, "learning_rate": 0.01},
         {"skip": "3,5-7", "train_layers": "0", "rank": 4, "learning_rate": 0.01}),
    ],
)  # fmt: skip
def test_what_an_arm_changes_beside_the_noise_has_its_column(
    arm: dict[str, Any], shown: dict[str, Any], tmp_path: Path
) -> None:
    assert arm_params(ArmSpec.model_validate(arm)) == {"targeting": "none"} | shown
    study = make_study(tmp_path, arms={"own": arm}, **SMALL)
    table = columns(study, resolve_scenarios(study))
    beside = {"device", "skip", "train_layers", "rank", "learning_rate", "weight_decay"}
    assert beside & set(table) == set(shown)
    for name, value in shown.items():
        assert table[name] is not isinstance(value, str)


SPACES: dict[str, dict[str, Any]] = {
    "schedules": {
        "schedule": {"kind": "choice", "values": ["geometric", "linear", "epoch_aware"]},
        "sigma_start": {"kind": "float", "low": 0.01, "high": 0.1},
        "epochs": {"kind": "int", "low": 1, "high": 3, "when": {"schedule": ["epoch_aware"]}},
        "stop_fraction": {"kind": "float", "low": 0.0, "high": 0.5, "when": {"schedule": ["linear"]}},
    },
    "carriers": {
        "carrier": {"kind": "choice", "values": ["hidden", "linear_weight"]},
        "carrier_relative": {
            "kind": "choice", "values": [True, False], "when": {"carrier": ["linear_weight"]},
        },
        "redraw": {"kind": "choice", "values": ["step", "forward"]},
    },
    "targetings": {
        "targeting": {
            "kind": "choice", "values": ["none", "scores", "zone", "depth", "multipliers"],
        },
        "score_3": {"kind": "float", "low": 0.5, "high": 1.0, "when": {"targeting": ["scores"]}},
        "layers": {"kind": "choice", "values": ["9-11", "10"], "when": {"targeting": ["zone"]}},
        "zone_middle": {"kind": "float", "low": 0.0, "high": 1.0, "when": {"targeting": ["zone"]}},
        "depth_low": {"kind": "fixed", "value": 0.3, "when": {"targeting": ["depth"]}},
        "multiplier_3": {"kind": "fixed", "value": 0.3, "when": {"targeting": ["multipliers"]}},
    },
}  # fmt: skip


def test_a_folder_whose_space_is_refused_today_still_has_its_columns(tmp_path: Path) -> None:
    """Its draws were arms. That others would be none is a reason to refuse a study, not a report."""
    search = {"space": {"dimensions": {"rank": {"kind": "int", "low": 2, "high": 4}}}, "configs": 3}
    study = make_study(tmp_path, search=search, **SMALL)
    assert study.search is not None
    crossing = {
        "targeting": {"kind": "fixed", "value": "depth"},
        "depth_low": {"kind": "float", "low": 0.0, "high": 0.6},
        "depth_high": {"kind": "float", "low": 0.4, "high": 1.0},
    }
    space = SpaceSpec.model_validate({"dimensions": crossing})
    old = study.model_copy(update={"search": study.search.model_copy(update={"space": space})})
    with pytest.raises(UserError):
        check_study(old, resolve_scenarios(old), 28)
    assert set(crossing) <= set(columns(old, resolve_scenarios(old)))


@pytest.mark.parametrize("name", SPACES)
def test_every_config_of_a_conditional_space_has_all_its_columns(name: str, tmp_path: Path) -> None:
    """A column that only some configs have, and what a config has beside its dimensions."""
    search = {"space": {"dimensions": SPACES[name]}, "configs": 3, "replicates": 2}
    study = make_study(tmp_path, search=search, **SMALL)
    assert study.search is not None
    table = columns(study, resolve_scenarios(study))
    assert set(SPACES[name]) <= set(table)
    points = list(corners(study.search.space))
    for params in points:
        for targeting in (None, "none", "global"):
            shown = config_params(params, targeting=targeting)
            assert set(shown) <= set(table)
            for column, value in shown.items():
                assert table[column] is (type(value) in (int, float)), column
    covered = {column for params in points for column in config_params(params)}
    assert set(SPACES[name]) <= covered


def shown_line(values: dict[str, Any], study: Any) -> dict[str, Any]:
    """Return what a line of the HParams table holds when it is opened with `values`."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    summary = session_start("line", values, columns(study, resolve_scenarios(study)))
    content = summary.value[0].metadata.plugin_data.content
    found = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(found[name], found[name].WhichOneof("kind")) for name in found}


def test_a_parameter_that_some_touch_shows_in_all_lines_that_have_it(tmp_path: Path) -> None:
    """Planted: True and true in one column, and blanks where others have the default."""
    arms = {
        "absolute": {"noise": {"carrier": "linear_weight"}},
        "stopped": {"noise": {"schedule": {"kind": "linear", "stop_fraction": 0.25}}},
        "aware": {"device": "faulty", "skip": [3]},
    }
    search = {"space": {"dimensions": SPACES["carriers"]}, "configs": 3, "replicates": 2}
    study = make_study(tmp_path, arms=arms, search=search, **SMALL)
    seldom = ("carrier_relative", "redraw", "stop_fraction", "device", "skip")

    def line(params: dict[str, Any]) -> tuple[Any, ...]:
        shown = shown_line(params, study)
        return tuple(shown.get(name) for name in seldom)

    named = {name: line(arm_params(arm)) for name, arm in named_arms(study).items()}
    assert named["clean"] == (None, None, None, "healthy", "none")
    assert named["fault_only"] == (None, None, None, "scenario", "none")
    assert named["global"] == (None, "step", 0.0, "scenario", "none")
    assert named["absolute"] == ("false", "step", 0.0, "scenario", "none")
    assert named["stopped"] == (None, "step", 0.25, "scenario", "none")
    assert named["aware"] == (None, None, None, "faulty", "3")
    config = {"carrier": "linear_weight", "carrier_relative": True, "redraw": "forward"}
    assert line(config_params(config)) == ("true", "forward", 0.0, "scenario", "none")
    assert line(config_params(config, targeting="global"))[:2] == ("true", "forward")
    config = {"carrier": "linear_weight", "carrier_relative": False, "redraw": "step"}
    assert line(config_params(config))[:2] == ("false", "step")
    assert line(config_params(config, targeting="global"))[:2] == ("false", "step")
    assert line(config_params(config, targeting="none"))[:2] == (None, None)
    assert "train_layers" not in shown_line(config_params(config), study), "nobody touches it"


def test_a_config_keeps_the_numbers_that_were_sampled() -> None:
    params = {"sigma_start": 0.037, "sigma_ratio": 0.0123, "targeting": "window",
              "window_centre": 3, "window_width": 2, "learning_rate": 0.003}  # fmt: skip
    assert config_params(params).items() >= params.items()
    assert config_params(params, targeting="global")["sigma_ratio"] == 0.0123
    assert config_params(params, targeting="none") == {"targeting": "none", "learning_rate": 0.003}
    assert config_params({"targeting": "none"}, targeting="global") == {}


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

    def get(self, route: str, ready: Callable[[Any], bool]) -> Any:
        """Return the answer to a question without a body, once TensorBoard has loaded all it is about."""
        for _ in range(240):
            if self.process.poll() is not None:
                raise RuntimeError(f"TensorBoard ended with {self.process.returncode}")
            try:
                with urllib.request.urlopen(
                    f"{self.url}/data/plugin/{route}", timeout=20
                ) as answer:
                    found = json.load(answer)
                if ready(found):
                    return found
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass
            time.sleep(0.25)
        raise RuntimeError(f"TensorBoard has nothing at {route}")

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
        "stage", "scenario", "arm", "threshold", "carrier", "schedule", "sigma_start",
        "sigma_ratio", "stages", "warmup_fraction", "targeting", "normalise", "window_centre",
        "window_width",
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


# -- custom scalars --------------------------------------------------------------------------------


def test_the_charts_of_a_scenario_have_a_line_per_arm_with_its_interval(
    fake: Fake, curves: Curves
) -> None:
    from scipy.stats import t

    for arm in ("clean", "fault_only", "targeted"):
        found = curves[f"by_arm/{arm}"]
        tag = "confirm/both-threshold0.1/loss_faulty"
        mean = curves[f"confirm/both-threshold0.1/{arm}/mean"]["loss/faulty"]
        assert found[tag] == mean
        seeds = [
            curves[f"confirm/both-threshold0.1/{arm}/s{number}"]["loss/faulty"][-1][1]
            for number in range(fake.study.confirm.replicates)
        ]
        low, high = t.interval(
            0.95, len(seeds) - 1, np.mean(seeds), np.std(seeds, ddof=1) / len(seeds) ** 0.5
        )
        assert found[f"{tag}_low"][-1][1] == pytest.approx(low, rel=1e-5)
        assert found[f"{tag}_high"][-1][1] == pytest.approx(high, rel=1e-5)
    # A seed of it failed: no mean, and no interval over the others, of what it has no number for.
    failed = [tag for tag in curves["by_arm/targeted"] if "threshold0.5" in tag]
    assert failed == ["confirm/both-threshold0.5/train_loss"]


@pytest.mark.slow
def test_tensorboard_lays_the_charts_out_by_scenario(server: Server, curves: Curves) -> None:
    sections = 2 * 2  # of two stages, each with two scenarios
    layout = server.get(
        "custom_scalars/layout", lambda found: len(found.get("category", ())) >= sections
    )
    assert sorted(section["title"] for section in layout["category"]) == [
        f"{stage}: both-threshold{level}" for stage in ("confirm", "search") for level in (0.1, 0.5)
    ]
    tags = {tag for run, found in curves.items() if run.startswith("by_") for tag in found}
    for section in layout["category"]:
        *lines, band = section["chart"]
        assert len(lines) == len(CHARTS)
        for chart in lines:
            (pattern,) = chart["multiline"]["tag"]
            assert any(re.fullmatch(pattern, tag) for tag in tags), pattern
        (series,) = band["margin"]["series"]
        assert {series["value"], series["lower"], series["upper"]} <= tags
