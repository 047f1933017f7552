"""Other studies beside this one, and which of their trainings are what it would train itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

from pydantic import BaseModel

from aqn_tune.errors import UserError
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import EvaluationRow, MechanismRow, RecordedRow
from aqn_tune.study.code import code_hash, hardware
from aqn_tune.study.folder import StudyFolder, study_hash
from aqn_tune.study.keys import content_hash
from aqn_tune.study.resolve import conditions_of
from aqn_tune.study.runs import Condition, Run
from aqn_tune.study.schema import Study
from aqn_tune.study.sweep import resolve_scenarios

_TIMES = ("seconds", "eval_seconds", "generate_seconds", "compile_seconds")


def find_donors(
    study: Study, folder: StudyFolder, *, layer_count: int, announce: Callable[[str], None]
) -> Iterator[Donor]:
    """Yield the studies beside `folder` from which `study` may take trainings, by name.

    Every start of such a study was made with this code, these libraries and this type of processor,
    on no cluster and no GPU, and it evaluates in batches of the same size. A folder that was set
    aside (`--fresh`), renamed or copied is no such study. One whose files cannot be read is announced
    and passed over: it is not this study that is broken.
    """
    here = hardware(study.compute)
    if not here or not folder.root.parent.is_dir():
        return
    import yaml

    for root in sorted(folder.root.parent.iterdir()):
        if root == folder.root:
            continue
        try:
            donor = _open(study, StudyFolder(root), here, layer_count)
        except (UserError, ValueError, LookupError, TypeError, OSError, yaml.YAMLError) as error:
            first = (str(error).splitlines() or [""])[0]
            announce(f"{root.name}: cannot be read ({first}); none of its trainings is reused")
            continue
        if donor is not None:
            yield donor


class _Start(BaseModel):
    """What a manifest says of a start, as far as a donor needs it."""

    code_hash: str = ""
    hardware: str = ""


class _Manifest(BaseModel):
    """What a manifest says of its study, as far as a donor needs it."""

    study: str
    study_hash: str
    starts: tuple[_Start, ...]


def _open(study: Study, other: StudyFolder, here: str, layer_count: int) -> Donor | None:
    """Return the donor in a folder, None where there is no study, or a sound one that is no donor.

    Whatever is wrong with its files raises what reading them raises.
    """
    import yaml

    if not (other.manifest.is_file() and other.ledger.is_file()):
        return None
    manifest = _Manifest.model_validate_json(other.manifest.read_text(encoding="utf-8"))
    if other.root.name != f"{manifest.study}-{manifest.study_hash[:8]}":
        return None
    alike = {(start.code_hash, start.hardware) for start in manifest.starts}
    if alike != {(code_hash(), here)}:
        return None
    theirs = Study.model_validate(yaml.safe_load(other.study.read_text(encoding="utf-8")))
    if study_hash(theirs) != manifest.study_hash:
        raise ValueError(f"{other.study.name} is not the study of {other.manifest.name}")
    if theirs.eval_batch_size != study.eval_batch_size:
        return None
    conditions = _conditions(theirs, layer_count)
    return None if conditions is None else Donor(other.root.name, Ledger(other.ledger), conditions)


def _conditions(study: Study, layer_count: int) -> dict[str, tuple[str, ...]] | None:
    """Return the scenarios in which a study evaluates each condition, by the condition's content.

    None for one that names a layer which this study's model has not: its model is another.
    """
    found: dict[str, tuple[str, ...]] = {}
    for scenario in resolve_scenarios(study):
        try:
            conditions = conditions_of(scenario, layer_count)
        except UserError:
            return None
        for condition in conditions:
            names = found.get(_content(condition), ())
            if condition.scenario not in names:
                found[_content(condition)] = (*names, condition.scenario)
    return found


def _content(condition: Condition) -> str:
    """Return what an evaluation depends on: all but the name that its scenario has in a study."""
    return content_hash(condition.model_dump(mode="json", exclude={"scenario"}))


class Donor:
    """A study that trainings may be taken from, as its ledger is when it is opened.

    Args:
        name: of its folder.
        ledger: of the study.
        conditions: scenarios in which it evaluates, by the content of the condition.
    """

    def __init__(self, name: str, ledger: Ledger, conditions: Mapping[str, tuple[str, ...]]):
        self._name = name
        self._ledger = ledger
        self._conditions = conditions

    def rows(
        self, training_key: str, run: Run, rungs: Sequence[int], *, split_rows: int
    ) -> tuple[RecordedRow, ...] | None:
        """Return the rows that training `run` would give, None where they are not all there.

        There has to be a finished training of the search stage with this key, evaluated at every
        rung under every condition of the run on `split_rows` validation rows, and observed at every
        step that the run observes. The rows name our scenarios, carry their source and cost nothing.
        """
        training = self._ledger.trainings.get(training_key)
        steps = run.training.steps
        if training is None or (
            (training.stage, training.status, training.step_reached, training.seed)
            != ("search", "finished", steps, run.seed)
        ):
            return None
        losses = self._losses(training_key, steps)
        if losses is None:
            return None
        found: list[RecordedRow | None] = []
        for first, step in pairwise((0, *rungs)):
            row = self._ledger.rungs.get((training_key, step))
            if row is None or row.status == "failed":
                return None
            source = row.source or f"{self._name}/{row.pack}"
            found += (
                self._evaluation(training_key, step, condition, split_rows, step == steps, source)
                for condition in run.conditions
            )
            found += (
                self._observation(training_key, seen, source)
                for seen in run.observed_steps
                if first <= seen < step
            )
            changes = {"train_losses": losses[first:step], "source": source}
            found.append(
                row.model_copy(update={**changes, **dict.fromkeys(_TIMES, 0.0), "adapter": ""})
            )
        whole = tuple(row for row in found if row is not None)
        return whole if len(whole) == len(found) else None

    def _losses(self, training_key: str, steps: int) -> tuple[float, ...] | None:
        """Return the training loss of every step, None where the rows leave some out.

        The rungs there may be others than here: rows hold the losses since the rung before.
        """
        losses: tuple[float, ...] = ()
        while len(losses) < steps:
            row = self._ledger.rungs.get((training_key, steps - len(losses)))
            if row is None or not 0 < len(row.train_losses) <= steps - len(losses):
                return None
            losses = row.train_losses + losses
        return losses

    def _evaluation(
        self,
        training_key: str,
        step: int,
        condition: Condition,
        split_rows: int,
        final: bool,
        source: str,
    ) -> EvaluationRow | None:
        for scenario in self._conditions.get(_content(condition), ()):
            row = self._ledger.evaluation(
                training_key, step, condition.name, scenario, "validation"
            )
            if row is None:
                continue
            if (row.rows, row.draws, row.final) == (split_rows, condition.draws, final):
                return row.model_copy(update={"scenario": condition.scenario, "source": source})
        return None

    def _observation(self, training_key: str, step: int, source: str) -> MechanismRow | None:
        row = self._ledger.mechanism.get((training_key, step))
        return None if row is None else row.model_copy(update={"source": source})
