"""`aqn-tune run`: search, confirmation and report, in the folder of the study."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from aqn_tune.cli.options import (
    Json,
    NoReuse,
    Overrides,
    PackSize,
    Quiet,
    StudyFile,
    Verbose,
    with_compute,
)
from aqn_tune.cli.output import ProgressLine, set_verbosity
from aqn_tune.errors import UserError
from aqn_tune.study.difference import differences, differences_text
from aqn_tune.study.folder import StudyFolder, study_folder, study_hash
from aqn_tune.study.loading import layer_count, load_study, make_setting, resolve_scenarios
from aqn_tune.study.sweep import study_content

if TYPE_CHECKING:
    from aqn_tune.ledger import Ledger
    from aqn_tune.study.engine import Engine
    from aqn_tune.study.runs import Setting
    from aqn_tune.study.scenario import Scenario
    from aqn_tune.study.schema import Study
    from aqn_tune.tasks.splitting import SplitName

Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Start anew; the folder that is there is renamed, never deleted."),
]


class Outcome(NamedTuple):
    """What became of a run."""

    folder: StudyFolder
    failed: int
    """Failed trainings that serve a control, an own arm or a finalist."""
    failed_configs: int
    """Failed trainings of search configs: they rank last, and cost the study nothing else."""
    gaps: tuple[str, ...]
    """What keeps the report from making claims, one sentence each: runs that broke off, an untrained
    base that was not evaluated; empty when the study has its verdicts."""


def command(
    study: StudyFile,
    overrides: Overrides = None,
    fresh: Fresh = False,
    pack: PackSize = None,
    no_reuse: NoReuse = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Search, confirm and report. Interrupted or run again, it continues where it was.

    Nothing is trained twice: cells that train alike share a run, and search runs that a study beside
    this one has trained with the same code, libraries and processor are copied from its ledger
    (`status` and the report say how many, each row says from where). `--no-reuse` trains a run for
    every cell of an unfinished stage that has not trained its own; `--fresh --no-reuse` trains
    everything. `--fresh` alone may still take runs from other studies. A study may be continued with
    and without `--pack` and `--no-reuse`: it is the same one, with the same numbers
    (to rounding, see `--pack`).

    Exits with 1 when a training of an arm failed, or when the study ends without verdicts; the
    report is written all the same.
    """
    set_verbosity(verbose)
    loaded = load_study(study, with_compute(overrides, pack, no_reuse))
    run_and_report(loaded, json=json, quiet=quiet, fresh=fresh)


def run_and_report(study: Study, *, json: bool, quiet: bool, fresh: bool = False) -> None:
    """Run a study, or what is left of it, and print its results; exit with 1 as `command` says."""
    from aqn_tune.cli.report import show_results

    with ProgressLine(quiet=quiet) as progress:
        from aqn_tune.training.engine import ENGINE

        outcome = run_study(study, engine=ENGINE, progress=progress, fresh=fresh)
    show_results(outcome.folder, json=json, quiet=quiet)
    if outcome.failed_configs:
        progress.note(f"{outcome.failed_configs} trainings of search configs failed")
    if outcome.failed:
        typer.secho(f"{outcome.failed} trainings failed; see the report", fg="red", err=True)
    if outcome.gaps:
        reasons = " ".join(outcome.gaps)
        typer.secho(f"the study ended without verdicts: {reasons}", fg="red", err=True)
    if outcome.failed or outcome.gaps:
        raise typer.Exit(1)


def run_study(
    study: Study, *, engine: Engine, progress: ProgressLine, fresh: bool = False
) -> Outcome:
    """Bring a study to its report: whatever of it is not in its ledger yet is run.

    Once the confirm generation is locked the search is over: it is not run again. A study that has
    nothing left is reported by any version of the code; one that has is continued only by the code
    that it was begun with.

    Raises UserError before anything is written when the model or the data cannot be used, or when
    the folder cannot be continued; later, when the search did not become complete. Raises
    Interrupted when it was asked to end; running it again continues.
    """
    setting = make_setting(study)
    scenarios = resolve_scenarios(study)
    study.task.splits()  # a row that cannot be read ends the run here, with nothing written
    folder = study_folder(study)
    with _set_aside(folder) if fresh else nullcontext():
        return _run(study, setting, scenarios, folder, engine=engine, progress=progress)


def _run(
    study: Study,
    setting: Setting,
    scenarios: Sequence[Scenario],
    folder: StudyFolder,
    *,
    engine: Engine,
    progress: ProgressLine,
) -> Outcome:
    _check_folder(folder, study)
    if not folder.study.exists():
        changed = like_another(study, folder)
        if changed:
            progress.note(changed)
    from aqn_tune.confirm.runner import run_confirm
    from aqn_tune.confirm.standing import standing
    from aqn_tune.ledger import Ledger
    from aqn_tune.report.manifest import finish_manifest, read_manifest, write_manifest
    from aqn_tune.report.tensorboard import TensorBoardWriter
    from aqn_tune.report.write import write_report
    from aqn_tune.search.cluster import ray_session
    from aqn_tune.search.runner import run_search
    from aqn_tune.study.calibration import update_calibration

    with _locked(folder):
        layers = layer_count(study.model)
        lock, left = standing(study, setting, scenarios, folder, layer_count=layers)
        if left:
            check_last_start(folder)
            check_rows(study, setting, engine)
            check_rounding(study, setting, engine)
        with ray_session(study.compute) if left else nullcontext():
            # Nothing was written up to here: a run that is refused leaves the folder as it was.
            write_study(study, folder)
            if left:
                write_manifest(folder, study, setting)
            elif not study.compute.reuse:
                progress.note(
                    "nothing is left to train, so --no-reuse trains nothing; --fresh --no-reuse "
                    "trains the whole study again, `aqn-tune rerun` one cell of it"
                )
            board = TensorBoardWriter(folder, study)
            try:
                for stage in (run_confirm,) if lock else (run_search, run_confirm):
                    stage(
                        study,
                        setting,
                        scenarios,
                        folder,
                        layer_count=layers,
                        engine=engine,
                        listeners=(board.write,),
                        progress=progress.stage,
                        announce=progress.note,
                    )
            finally:
                board.close()
        if left or read_manifest(folder).get("finished") is None:
            finish_manifest(folder)
        write_report(folder, tensorboard=False)  # the board was written as the rows came in
        if left:
            # It is for the next plan alone: a study that has its report does not end in it.
            try:
                update_calibration(study, setting, folder)
            except (UserError, OSError) as error:
                progress.note(
                    f"what the trainings cost was not recorded for the next plan: {error}"
                )
    return count_failures(folder, Ledger(folder.ledger))


def like_another(study: Study, folder: StudyFolder) -> str:
    """Return in what `study` differs from the most alike study of its name, "" where there is none.

    A key that was changed makes another study, in a folder of its own: who meant to continue the earlier
    one is told before anything is trained.
    """
    from aqn_tune.report.results import load_study_file

    others = []
    for root in sorted(folder.root.parent.glob(f"{study.study}-*")):
        try:
            recorded = load_study_file(StudyFolder(root))
        except (UserError, OSError, ValueError):
            continue  # no study's folder, one of another version, or not ours to read
        if recorded.study == study.study:
            others.append((differences(recorded, study), root))
    if not others:
        return ""
    changed, root = min(others, key=lambda other: len(other[0]))
    if not changed:  # set aside, or another generation of the same
        return ""
    return (
        f"this is a new study, in a folder of its own: {root.name} differs in {differences_text(changed)}; "
        f"to continue that one: aqn-tune resume {shlex.quote(str(root))}"
    )


def check_rows(study: Study, setting: Setting, engine: Engine) -> None:
    """Raise UserError when rows that the study uses, now or later, cannot be turned into tokens."""
    names: list[SplitName] = ["train", "test"]
    if study.search and study.search.configs:
        names.append("validation")
    engine.load_splits(setting, names, study.training.max_length)


def check_rounding(study: Study, setting: Setting, engine: Engine) -> None:
    """Raise UserError where runs would be held to a last bit that depends on their packs."""
    from aqn_tune.study.packing import pack_size

    size = pack_size(study)
    if study.compute.reuse or engine.rounds_alike(setting, study.training, size):
        return
    way_out = "leave it out"
    if size > 1 and engine.rounds_alike(setting, study.training, 1):
        way_out = "add --pack 1"
    raise UserError(
        "compute.reuse: got false (--no-reuse), which holds every run to the last bit of the recorded "
        "one; but here (GPU, compiled layers, or a processor that adds up in another order in other "
        f"shapes) that bit depends on what shares a forward pass: {way_out}"
    )


def check_last_start(folder: StudyFolder) -> None:
    """Raise UserError when the code is not that of the study's last start, or that is not known.

    Only starts that had something to run are recorded, so the last one tells the code of all rows.
    """
    from aqn_tune.report.manifest import read_manifest
    from aqn_tune.study.code import code_hash

    if not folder.ledger.exists():
        return
    starts = read_manifest(folder).get("starts", [])
    if not starts:
        raise UserError(
            f"{folder.manifest}: missing, so that it is not known which code made the rows of "
            f"{folder.ledger}; put it back, or start anew (--fresh)"
        )
    last = starts[-1]
    if last["code_hash"] != code_hash():
        raise UserError(
            f"{folder.root}: was last run with aqn_tune {last['aqn_tune']}, code "
            f"{last['code_hash']} (which takes in the releases of its libraries); this is code "
            f"{code_hash()}. One study cannot mix two versions: finish it with the one it began "
            "with, or start anew (--fresh)"
        )


def count_failures(folder: StudyFolder, ledger: Ledger) -> Outcome:
    """Return the outcome of a study from its folder."""
    from aqn_tune.report.loading import load_results

    arms = {row.training_key for row in ledger.cells.values() if row.arm != row.config}
    failed = {key for key, row in ledger.trainings.items() if row.status == "failed"}
    return Outcome(
        folder,
        failed=len(failed & arms),
        failed_configs=len(failed - arms),
        gaps=load_results(folder).gaps,
    )


@contextmanager
def _set_aside(folder: StudyFolder) -> Iterator[None]:
    """Have a study's folder out of the way; back in its place where what follows has begun no other."""
    aside = set_aside(folder.root)
    try:
        yield
    except BaseException:
        if aside is not None:
            _put_back(folder, aside)
        raise


def _put_back(folder: StudyFolder, aside: Path) -> None:
    """Have a folder that was set aside in its place again, unless a study has begun there.

    While it was away another run may have taken the place: then both stay, and where the old one is is said.
    """
    try:
        with _locked(folder):
            if not folder.study.exists():
                shutil.rmtree(folder.root, ignore_errors=True)
                aside.rename(folder.root)
    except (UserError, OSError) as error:
        said = f"{error}; the folder that --fresh has renamed stays where it is: {aside}"
        typer.secho(said, fg="red", err=True)


def set_aside(folder: Path) -> Path | None:
    """Rename a study's folder to `<name>.old-N` and return that; None when there is none."""
    if not folder.exists():
        return None
    with _locked(StudyFolder(folder)):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(aside)
    return aside


def write_study(study: Study, folder: StudyFolder) -> None:
    """Write the resolved study into its folder, so that all else can be redone from there."""
    import yaml

    folder.root.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(study_content(study), sort_keys=False, allow_unicode=True)
    temporary = folder.study.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder.study)


def _check_folder(folder: StudyFolder, study: Study) -> None:
    """Refuse a folder that holds another study, or something that is no study at all."""
    if not folder.study.exists():
        if folder.root.exists() and any(p.name != ".lock" for p in folder.root.iterdir()):
            raise UserError(f"{folder.root}: not a study's folder; move it away, or use --fresh")
        return
    from aqn_tune.report.results import load_study_file

    recorded = load_study_file(folder)
    if study_hash(recorded) != study_hash(study):
        changed = differences_text(differences(recorded, study))
        raise UserError(
            f"{folder.root}: holds another study than this one ({changed}); use --fresh to set it aside"
        )


@contextmanager
def _locked(folder: StudyFolder) -> Iterator[None]:
    """Keep a second run out of a folder: two writers would spoil the ledger."""
    from filelock import FileLock, Timeout

    folder.root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.root / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"{folder.root}: another run works in this folder; wait for it") from None
