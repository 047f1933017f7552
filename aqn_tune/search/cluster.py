"""Starting Ray on this machine, or joining a cluster."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from aqn_tune.errors import UserError
from aqn_tune.study.schema import ComputeSpec

_LOG = logging.getLogger(__name__)

_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
)
_KEPT_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
}
WORKER_ENV = {**_ONE_THREAD, **_KEPT_MEMORY, "TOKENIZERS_PARALLELISM": "false"}
"""Environment of every worker. One thread: several packs share a machine, and numbers must not depend
on how many cores it has. Freed memory is kept (glibc): a step allocates what the step before it has
freed, and fetching that from the system again takes a tenth of the time of a large pack."""

QUIET_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
"""Environment of the driver while Ray runs: no usage statistics, no output of its own, no snapshots
of a state that is in the ledger already."""


@contextmanager
def ray_session(compute: ComputeSpec) -> Iterator[None]:
    """Have Ray running inside the block; within another session it does nothing.

    Without an address Ray is started on this machine with a slot per worker and ended afterwards.
    With one the cluster is joined, and left running. Raises UserError when it cannot be reached, and
    where this machine has not the GPUs that a worker asks for: its trials would wait for ever.
    """
    _set_quiet()
    import ray

    if ray.is_initialized():
        yield
        return
    for name in ("ray", "ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Ray prints what happens to its nodes to the driver's stdout, which belongs to results.
    ray._private.worker.print_to_stdstream = _log_line
    if compute.address is None:
        ray.init(
            num_cpus=_local_cpus(compute),
            num_gpus=None if compute.gpus_per_worker else 0,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            configure_logging=False,
            runtime_env={"env_vars": WORKER_ENV},
        )
    else:
        _join(compute.address)
    try:
        if compute.address is None and compute.gpus_per_worker > _in_cluster("GPU"):
            raise UserError(
                f"compute.gpus_per_worker: got {compute.gpus_per_worker:g}, but Ray finds "
                f"{_in_cluster('GPU'):g} GPUs on this machine; set it to 0, or name a cluster in "
                "compute.address"
            )
        yield
    finally:
        ray.shutdown()


def _log_line(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """Stand in for Ray's `print_to_stdstream`: to the log of this module."""
    for line in data["lines"]:
        _LOG.info("(%s) %s", data.get("pid"), line)


def _set_quiet() -> None:
    """Set what Ray reads from the environment, some of it when it is imported."""
    os.environ.update(QUIET_ENV)


def _join(address: str) -> None:
    import ray
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )

    # An explicit address is joined without the token that `ray start` made, unless told to use it, and
    # RAY_AUTH_MODE alone comes too late: Ray has read it when it was imported.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            configure_logging=False,
            runtime_env={"env_vars": WORKER_ENV},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"compute.address: cannot join the Ray cluster at {address!r} ({first}); "
            "is it running, and is its token in ~/.ray/auth_token?"
        ) from error


def worker_count(compute: ComputeSpec) -> int:
    """Return how many trials run at a time; `auto` is one per `cpus_per_worker` cores available.

    Without an address the cores are those of this machine that the process may use. With one, and
    wherever trials take GPUs, Ray has to be running: it knows what there is. Raises UserError for `auto`
    on a cluster without a core: one trial at a time would never make it grow.
    """
    if compute.workers != "auto":
        return max(1, compute.workers)
    cores = _cores(compute)
    if not cores:
        raise UserError(
            f"compute.workers: got auto, but the cluster at {compute.address!r} has no CPUs at the moment; "
            "if it grows with the work, say how far: most nodes times trials per node"
        )
    slots = cores / compute.cpus_per_worker
    if compute.gpus_per_worker:
        slots = min(slots, _in_cluster("GPU") / compute.gpus_per_worker)
    return max(1, int(slots))


def _cores(compute: ComputeSpec) -> float:
    if compute.address is not None:
        return _in_cluster("CPU")
    if hasattr(os, "sched_getaffinity"):
        return float(len(os.sched_getaffinity(0)))
    return float(os.cpu_count() or 1)


def _in_cluster(resource: str) -> float:
    import ray

    return float(ray.cluster_resources().get(resource, 0.0)) if ray.is_initialized() else math.inf


def _local_cpus(compute: ComputeSpec) -> int:
    """Return the CPUs that Ray is told this machine has: exactly enough for all workers."""
    if compute.workers == "auto" and compute.gpus_per_worker:
        return max(int(_cores(compute)), math.ceil(compute.cpus_per_worker))
    return max(1, math.ceil(worker_count(compute) * compute.cpus_per_worker))
