"""Running the work of a stage as trials of Ray Tune."""

from __future__ import annotations

import shlex
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from aqn_tune.errors import Interrupted, storage_error
from aqn_tune.search.cluster import ray_session, worker_count
from aqn_tune.search.progress import ProgressMeter, ProgressSink
from aqn_tune.search.work import Work
from aqn_tune.study.engine import Engine
from aqn_tune.study.folder import StudyFolder
from aqn_tune.study.resources import trial_request
from aqn_tune.study.runs import Setting, Split
from aqn_tune.study.schema import ComputeSpec
from aqn_tune.study.seeds import Stage


def execute(
    work: Work,
    *,
    stage: Stage,
    compute: ComputeSpec,
    setting: Setting,
    engine: Engine,
    split: Split,
    max_length: int,
    folder: StudyFolder,
    progress: ProgressSink | None,
) -> None:
    """Run all of `work` and return when it is done.

    Its packs are evaluated on `split` and hold rows of at most `max_length` tokens. Weights and rows are
    loaded here, before the first trial, and shared with all workers.

    Raises Interrupted on SIGINT or SIGTERM, after the trials have ended and with a ledger that the
    next call continues; UserError for what the user can mend, wherever it was raised; RuntimeError
    when Ray came to an end with work left.
    """
    with ray_session(compute):
        from ray import tune

        from aqn_tune.search.driver import (
            Driver,
            DriverCallback,
            DriverStopper,
            LedgerScheduler,
            StudySearcher,
        )
        from aqn_tune.search.trainable import PackTrainable

        driver = Driver(work, ProgressMeter(stage, work, progress))
        scratch = folder.root / "ray"
        shutil.rmtree(scratch, ignore_errors=True)
        trainable = tune.with_resources(
            tune.with_parameters(
                PackTrainable,
                shared=engine.load(setting, split, max_length),
                engine=engine,
                setting=setting,
                state_folder=str(folder.state),
            ),
            {name.lower(): amount for name, amount in trial_request(compute).items()},
        )
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=StudySearcher(driver),
                scheduler=LedgerScheduler(driver),
                num_samples=-1,
                max_concurrent_trials=worker_count(compute),
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=stage,
                storage_path=str(scratch),
                verbose=0,
                callbacks=[DriverCallback(driver)],
                stop=DriverStopper(driver),
                failure_config=tune.FailureConfig(max_failures=compute.max_failures),
                checkpoint_config=tune.CheckpointConfig(
                    checkpoint_frequency=0, checkpoint_at_end=False
                ),
            ),
        )
        try:
            with _signals(driver):
                tuner.fit()
        except Exception as error:
            if driver.fatal is None:
                mendable = storage_error(error)
                if mendable is None:
                    raise
                raise mendable from error
            # Ray ends in a TuneError because the driver refused to go on: say why it did.
            raise driver.fatal from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if driver.fatal is not None:
            raise driver.fatal
        if driver.stop_asked:
            again = f"aqn-tune resume {shlex.quote(str(folder.root))}"
            raise Interrupted(f"the {stage} was interrupted; to continue it: {again}")
        check_done(work, stage)


def check_done(work: Work, stage: Stage) -> None:
    """Raise RuntimeError when a stage that nobody interrupted left some of its work undone."""
    tally = work.tally()
    if tally.left:
        raise RuntimeError(
            f"the {stage} came to an end with {tally.left} of {tally.total} trials left; what was "
            "reported is in the ledger, run the study again to continue"
        )


def _trial_name(trial: Any) -> str:
    return str(trial.trial_id)


@contextmanager
def _signals(driver: Any) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the stage in order; a second one acts as it always would."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in caught}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        driver.stop_asked = True
        restore()

    for number in caught:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()
