"""cluster.yaml, held against Ray's own checks; no network, no cloud."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

FILE = Path(__file__).parents[1] / "cluster.yaml"


def checked(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return dict(prepared)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return dict(yaml.safe_load(FILE.read_text()))


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    prepared = checked(config)
    types = prepared["available_node_types"]
    assert types[prepared["head_node_type"]]["resources"] == {"CPU": 0}
    assert all(not k or k in types for k in (prepared["head_node_type"],))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("max_worker",), 8),
        (("head_node_type",), "hed"),
        (("available_node_types", "worker", "resources", "CPU"), "4"),
        (("available_node_types", "worker", "min_workers"), 99),
        (("provider", "type"), "asw"),
    ],
)
def test_the_check_would_see_a_mistake(
    config: dict[str, Any], path: tuple[str, ...], value: object
) -> None:
    wrong = copy.deepcopy(config)
    inner: Any = wrong
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(Exception, match=r".+"):
        checked(wrong)


def test_the_head_trains_nothing_and_every_node_has_the_token(config: dict[str, Any]) -> None:
    head = " ".join(config["head_start_ray_commands"])
    worker = " ".join(config["worker_start_ray_commands"])
    assert "--num-cpus=0" in head
    assert "RAY_AUTH_MODE=token" in head
    assert "RAY_AUTH_MODE=token" in worker
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
