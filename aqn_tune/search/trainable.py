"""The trainable: one pack of runs on one worker, a rung at a time."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import ray
from ray import tune

from aqn_tune.errors import UserError, storage_error
from aqn_tune.search.state import REPORT, SavedState, read_state, state_path, write_state
from aqn_tune.study.engine import Engine, PackTraining, RungReport, Shared
from aqn_tune.study.runs import Pack, Setting


class PackTrainable(tune.Trainable):  # type: ignore[misc]
    """Advances a pack by one rung per step and reports its rows.

    A worker is used for one pack after another: nothing of a pack outlives it but the read-only arrays
    of weights and tokens, which all workers of a machine share. After each rung but the last the pack is
    saved, so that a worker that died, or a study that was cut off, goes on from there.

    An exception of the engine is reported, not raised: it would be the same in every retry. Ray
    retries what it cannot report, the death of the worker.
    """

    def setup(
        self,
        config: dict[str, Any],
        *,
        shared: Shared,
        engine: Engine,
        setting: Setting,
        state_folder: str,
    ) -> None:
        """Keep what all packs share; the pack itself is built in the first step."""
        self._shared = shared
        self._engine = engine
        self._setting = setting
        if setting.memory_share is None:
            self._setting = setting.model_copy(update={"memory_share": share_of_node()})
        self._state_folder = Path(state_folder)
        self._training: PackTraining | None = None
        self._start(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Go over to another pack in the same process."""
        self.cleanup()
        self._start(new_config)
        return True

    def _start(self, config: dict[str, Any]) -> None:
        self._pack = Pack.model_validate_json(config["pack"])

    def step(self) -> dict[str, Any]:
        """Train to the next rung; return its report, or the error that prevented it."""
        try:
            report = self._advance()
        except Exception as error:
            # A full disk is no failure of this config: it ends the stage, and nothing is lost.
            mendable = error if isinstance(error, UserError) else storage_error(error)
            return {
                "pack": self._pack.name,
                "error": f"{type(error).__name__}: {error}",
                "user_error": str(mendable or ""),
                "traceback": traceback.format_exc(),
            }
        return {"pack": self._pack.name, "report": REPORT.dump_json(report).decode()}

    def _advance(self) -> RungReport:
        path = state_path(self._state_folder, self._pack)
        if self._training is None:
            self._training = self._engine.open_pack(self._pack, self._setting, self._shared)
            saved = read_state(path, self._pack)
            if saved is not None:
                self._training.restore(saved.state)
                return saved.report
        report = self._training.advance()
        if report.step < self._pack.rungs[-1]:
            write_state(path, self._pack, SavedState(report, self._training.state()))
        return report

    def cleanup(self) -> None:
        """Give the memory of the pack back."""
        if self._training is not None:
            self._training.close()
            self._training = None


def share_of_node() -> float | None:
    """Return the share of its node's CPUs that Ray has reserved for this worker; None where it has none.

    Of a cluster, the driver does not know its nodes, and a node's operating system may show more cores than
    Ray hands out.
    """
    context = ray.get_runtime_context()
    reserved = context.get_assigned_resources().get("CPU", 0.0)
    here = context.get_node_id()
    node = next((one for one in ray.nodes() if one["NodeID"] == here), None)
    there = node["Resources"].get("CPU", 0.0) if node is not None else 0.0
    return min(reserved / there, 1.0) if reserved and there else None


def report_of(result: dict[str, Any]) -> RungReport:
    """Return the report in a result of `PackTrainable.step`."""
    return REPORT.validate_json(result["report"])
