"""`aqn-tune rerun`: train one recorded cell again and compare every loss bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aqn_tune.cli.options import Json, Quiet
from aqn_tune.cli.output import ProgressLine, console, print_json, table
from aqn_tune.cli.targets import find_target
from aqn_tune.errors import UserError
from aqn_tune.study.loading import layer_count, make_setting, resolve_scenarios

if TYPE_CHECKING:
    from aqn_tune.ledger import Ledger
    from aqn_tune.ledger.rows import EvaluationRow
    from aqn_tune.study.engine import Engine, RungReport
    from aqn_tune.study.runs import Pack, Setting
    from aqn_tune.study.schema import Study

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a study, or its YAML.")]
CellName = Annotated[
    str,
    typer.Argument(metavar="CELL", help="stage/scenario/arm/replicate, or a training key."),
]
WholePack = Annotated[
    bool, typer.Option("--whole-pack", help="Train it beside the same runs as before, not alone.")
]


@dataclasses.dataclass(frozen=True)
class Compared:
    """A recorded loss and the one that training again gave."""

    what: str
    step: int
    recorded: float | None
    again: float | None

    @property
    def same(self) -> bool:
        """Whether the two are the same number, bit for bit."""
        return self.recorded == self.again

    @property
    def mark(self) -> str:
        """What the table says of it."""
        return "=" if self.same else "DIFFERS"


def command(
    folder: Folder,
    cell: CellName,
    whole_pack: WholePack = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train one recorded cell again and print each loss beside the recorded one.

    Exits with 1 when any differs in any bit. Nothing is written.
    """
    from aqn_tune.training.engine import ENGINE

    study, place = find_target(folder)
    from aqn_tune.ledger import Ledger

    with ProgressLine(quiet=quiet or json) as progress:
        ledger = Ledger(place.ledger)
        compared = rerun(
            study, ledger, cell, engine=ENGINE, progress=progress, whole_pack=whole_pack
        )
    different = sum(not item.same for item in compared)
    if json:
        losses = [{**dataclasses.asdict(item), "same": item.same} for item in compared]
        print_json({"cell": cell, "identical": not different, "losses": losses})
    elif not quiet:
        shown = [c for c in compared if c.what != "train loss" or not c.same]
        rows = [(c.what, c.step, c.recorded, c.again, c.mark) for c in shown]
        columns = ("loss", "#step", "#recorded", "#again", "")
        out = console()
        out.print(table(f"{cell}, trained again", columns, rows))
        steps = sum(c.what == "train loss" for c in compared)
        verdict = f"{different} of {len(compared)} differ" if different else "all identical"
        out.print(f"{len(compared)} losses compared, {steps} of them training losses: {verdict}")
    if different:
        raise typer.Exit(1)


def rerun(
    study: Study,
    ledger: Ledger,
    name: str,
    *,
    engine: Engine,
    progress: ProgressLine,
    whole_pack: bool = False,
) -> list[Compared]:
    """Train the cell `name` again with `engine` and return each recorded loss beside the new one.

    Raises UserError for a cell that is not recorded or has no finished rung, and where the study no
    longer comes to the recorded training (another version of the package or of the model).
    """
    from aqn_tune.search.ranking import finalists
    from aqn_tune.study.recorded import find_cell, recorded_runs
    from aqn_tune.study.runs import Pack

    cell = find_cell(ledger, name)
    key = cell.training_key
    setting, scenarios = make_setting(study), resolve_scenarios(study)
    chosen = [each for scenario in scenarios for each in finalists(ledger, scenario, study)]
    layers = layer_count(study.model)
    runs = recorded_runs(study, setting, scenarios, ledger, chosen, layers)
    if key not in runs:
        raise UserError(
            f"{name}: the study does not come to training {key} any more; the model, the data or "
            "the version of aqn_tune differs from the one that ran (see manifest.json)"
        )
    recorded = [row for row in ledger.evaluations.values() if row.training_key == key and row.step]
    training = ledger.trainings.get(key)
    if training is None or not recorded:
        raise UserError(f"{name}: nothing to compare with, the training has reached no rung")
    members = [key]
    if whole_pack:
        members = [
            other
            for other, row in ledger.trainings.items()
            if (row.stage, row.pack, row.source) == (cell.stage, training.pack, training.source)
        ]
        if len(members) != training.pack_size:
            raise UserError(
                f"--whole-pack: pack {training.pack} had {training.pack_size} runs, of which the ledger "
                f"holds {len(members)} as its own; leave the option out"
            )
    pack = Pack(
        name="rerun",
        stage=cell.stage,
        runs=tuple(runs[k] for k in members),
        rungs=tuple(sorted({row.step for row in recorded})),
        split=recorded[0].split,
        lockstep=training.lockstep if training.lockstep < len(members) else None,
    )
    reports = _train(pack, setting, engine, progress)
    compared = _evaluations(recorded, reports)
    last = next(row for row in reports[-1].trainings if row.training_key == key)
    old = training.train_losses
    new = last.train_losses[len(last.train_losses) - len(old) :]
    first = training.step_reached - len(old)
    compared += [
        Compared("train loss", first + i, a, new[i] if i < len(new) else None)
        for i, a in enumerate(old)
    ]
    return compared


def _train(
    pack: Pack, setting: Setting, engine: Engine, progress: ProgressLine
) -> list[RungReport]:
    shared = engine.load(setting, pack.split, pack.runs[0].training.max_length)
    training = engine.open_pack(pack, setting, shared)
    reports = []
    try:
        for step in pack.rungs:
            progress(f"training again to step {step} of {pack.rungs[-1]}")
            reports.append(training.advance())
    finally:
        training.close()
    return reports


def _evaluations(recorded: list[EvaluationRow], reports: list[RungReport]) -> list[Compared]:
    again = {
        (row.training_key, row.step, row.condition, row.scenario): row
        for report in reports
        for row in report.evaluations
    }
    compared = []
    for old in recorded:
        new = again.get((old.training_key, old.step, old.condition, old.scenario))
        name = f"{old.condition} {old.scenario}".strip()
        compared.append(Compared(f"{name} loss", old.step, old.loss, new.loss if new else None))
        compared.append(
            Compared(
                f"{name} exact match", old.step, old.exact_match, new.exact_match if new else None
            )
        )
    return compared
