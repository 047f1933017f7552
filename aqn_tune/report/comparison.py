"""Two arms, of one study or of two, side by side: in what they differ, and by how much.

Nothing here was declared before the runs, so nothing here is a verdict.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aqn_tune.errors import UserError, nearest
from aqn_tune.evidence.assemble import contrast_of
from aqn_tune.evidence.contrasts import PairedContrast
from aqn_tune.evidence.correction import benjamini_hochberg
from aqn_tune.evidence.decisions import contrast_name
from aqn_tune.evidence.tables import CellResult
from aqn_tune.evidence.verdicts import Judged, Undetermined
from aqn_tune.report.loading import load_results
from aqn_tune.report.manifest import read_manifest
from aqn_tune.report.results import Results
from aqn_tune.report.text import Spread, spread
from aqn_tune.study.arms import ArmSpec
from aqn_tune.study.cells import named_arms, training_of, twin
from aqn_tune.study.difference import Difference, differing
from aqn_tune.study.folder import StudyFolder
from aqn_tune.study.resolve import conditions_of
from aqn_tune.study.runs import Split
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.seeds import Stage
from aqn_tune.study.space import arm_of

STAGES: tuple[Stage, ...] = ("confirm", "search")
SHOWN_PARTS = 3
"""Keys of a part that one side lacks, in words."""
CONTENTS = {"model": "files of the model", "task": "rows of the task"}
"""What a key of a study only names, so that it may change under one name."""
SHOWN_DIGITS = 12
"""Digits of a content hash that a message shows."""


class Named(NamedTuple):
    """What one side of a comparison was called: a folder, and how much of it."""

    folder: Path
    stage: Stage = "confirm"
    scenario: str = ""
    """Empty for every scenario."""
    arm: str = ""
    """Empty for every arm."""
    replicate: int | None = None
    """None for every seed."""


class Side(NamedTuple):
    """One arm in one scenario of one study."""

    results: Results
    stage: Stage
    scenario: Scenario
    arm: str
    declared: dict[str, Any]
    """What it trains, and how: the keys that are held against the other side."""
    judged: dict[str, Any]
    """What its losses are losses of; the same on both sides, or they are not comparable."""
    contents: dict[str, str]
    """Content hashes of `CONTENTS`, from the manifest; without those that it does not have."""

    @property
    def name(self) -> str:
        """The side as it is printed: scenario and arm."""
        return f"{self.scenario.name}/{self.arm}"


class Comparison(NamedTuple):
    """A pair of arms. Positive improvement: the first has the smaller loss."""

    arm: Side
    reference: Side
    differs: tuple[Difference, ...]
    """Every key in which they differ, old: the reference, new: the arm."""
    n: int
    """Seeds that both have."""
    arm_loss: Spread
    reference_loss: Spread
    contrast: PairedContrast | Undetermined
    verdict: Judged | None
    """Where the pair is a primary contrast of its study, whose confirmation is complete: what was found."""
    q: float | None = None
    """p adjusted by Benjamini-Hochberg over all pairs that are compared at a time."""
    notes: tuple[str, ...] = ()
    """What could not be checked, one sentence each."""


def parse_name(text: str, default: Path | None = None) -> Named:
    """Return what `FOLDER`, `FOLDER:ARM`, `FOLDER:[STAGE/]SCENARIO/ARM[/REPLICATE]` stands for.

    Without a folder, that of the other side (`default`) is meant.
    """
    if Path(text).is_dir():
        return Named(Path(text))
    folder, sign, name = text.rpartition(":")
    if not sign and default is None:
        raise UserError(
            f"{text}: no such folder; write FOLDER, FOLDER:ARM or FOLDER:SCENARIO/ARM, with the folder of a "
            "study"
        )
    place = Path(folder) if folder else default
    if place is None or not place.is_dir():
        raise UserError(f"{text}: {folder or 'it'} is no folder of a study")
    parts = name.split("/")
    stage: Stage = "confirm"
    if len(parts) > 2:
        if parts[0] not in STAGES:
            raise UserError(
                f"{text}: got stage {parts[0]!r}; allowed are {', '.join(STAGES)}{nearest(parts[0], STAGES)}"
            )
        stage = "search" if parts[0] == "search" else "confirm"
        parts = parts[1:]
    replicate = None
    if len(parts) > 2:
        if len(parts) > 3 or not parts[2].isdigit():
            raise UserError(
                f"{text}: got replicate {'/'.join(parts[2:])!r}; write a number from 0, as in "
                "confirm/SCENARIO/ARM/0"
            )
        replicate = int(parts[2])
    scenario, arm = ("", parts[0]) if len(parts) == 1 else (parts[0], parts[1])
    return Named(place, stage, scenario, arm, replicate)


def compare(arm: Named, reference: Named, *, confounded: bool = False) -> tuple[Comparison, ...]:
    """Return the contrast of two arms, or of every pair that two names have in common.

    Arms are paired by their seeds: those of two studies are the same where the studies have the same `seed`
    and the same generation. A name without a scenario stands for every one, one without an arm for every arm,
    and each is compared with its namesake on the other side.

    Args:
        arm: The side whose smaller loss counts as an improvement.
        reference: The other side.
        confounded: Compare arms that differ in more than one key all the same.

    Raises:
        UserError: a name that is none; nothing in common; no common seed; another number of steps, another
            model, task or way to evaluate, be it under the same name; several keys that differ, unless
            `confounded`.
    """
    if arm.stage != reference.stage:
        raise UserError(
            f"stage: got {arm.stage} and {reference.stage}; a search is judged on the validation split, a "
            "confirmation on the test split, and their losses are not comparable"
        )
    loaded = {
        path: load_results(StudyFolder(path.resolve())) for path in {arm.folder, reference.folder}
    }
    ours, theirs = loaded[arm.folder], loaded[reference.folder]
    pairs = list(_pairs(ours, arm, theirs, reference))
    if not pairs:
        raise UserError(
            f"{arm.folder} and {reference.folder} have no scenario and arm of the same name that both have "
            "run; name them: FOLDER:SCENARIO/ARM"
        )
    found = [_compare(one, other, arm, reference) for one, other in pairs]
    if not confounded:
        _refuse_confounded(found)
    tests = [None if isinstance(one.contrast, Undetermined) else one.contrast.t_p for one in found]
    adjusted = benjamini_hochberg([1.0 if p is None else p for p in tests])
    return tuple(
        one._replace(q=None if p is None else q)
        for one, p, q in zip(found, tests, adjusted, strict=True)
    )


def _pairs(
    ours: Results, arm: Named, theirs: Results, reference: Named
) -> Iterator[tuple[Side, Side]]:
    left = _sides(ours, arm)
    right = {(side.scenario.name, side.arm): side for side in _sides(theirs, reference)}
    for one in left:
        # A name that both sides leave out is the same on both.
        scenario = reference.scenario or one.scenario.name
        other = right.get((scenario, reference.arm or one.arm))
        if other is not None and (other.results is not one.results or other.name != one.name):
            yield one, other


def _sides(results: Results, named: Named) -> list[Side]:
    names = [scenario.name for scenario in results.scenarios]
    if named.scenario and named.scenario not in names:
        raise UserError(
            f"{named.folder}: got scenario {named.scenario!r}; allowed are {', '.join(names)}"
            f"{nearest(named.scenario, names)}"
        )
    sides = []
    known: dict[str, None] = {}
    for scenario in results.scenarios:
        if named.scenario not in ("", scenario.name):
            continue
        arms = results.tables.arms(
            named.stage, scenario.name, generation=_generation(results, named.stage)
        )
        known |= dict.fromkeys(arms)
        sides += [
            _side(results, named.stage, scenario, arm) for arm in arms if named.arm in ("", arm)
        ]
    if named.arm and not sides:
        there = f"allowed are {', '.join(known)}" if known else f"its {named.stage} has no runs yet"
        raise UserError(
            f"{named.folder}: got arm {named.arm!r}; {there}{nearest(named.arm, known)}"
        )
    return sides


def _generation(results: Results, stage: Stage) -> int:
    return results.study.confirm.generation if stage == "confirm" else 0


def _side(results: Results, stage: Stage, scenario: Scenario, arm: str) -> Side:
    study = results.study
    spec = _arm_spec(results, scenario, arm)
    training = training_of(study, spec).model_dump(mode="json")
    steps = training.pop("steps")
    model = study.model.model_dump(mode="json")
    from aqn_tune.study.loading import layer_count

    conditions = conditions_of(scenario, layer_count(study.model))
    changed_by_training = {"learning_rate", "rank", "weight_decay"}
    manifest = read_manifest(results.folder)
    known = {key: manifest.get(f"{key}_fingerprint") for key in CONTENTS}
    return Side(
        results=results,
        stage=stage,
        scenario=scenario,
        arm=arm,
        declared={
            "model": {"dtype": model.pop("dtype")},
            "training": training,
            "scenario": scenario.spec.model_dump(mode="json"),
            "arm": spec.model_dump(mode="json", exclude=changed_by_training),
            "compute": {"gpu": bool(study.compute.gpus_per_worker)},
        },
        judged={
            "model": model,
            "task": study.task.model_dump(mode="json"),
            "training": {"steps": steps},
            "eval_batch_size": study.eval_batch_size,
            "conditions": [
                condition.model_dump(mode="json", exclude={"scenario"}) for condition in conditions
            ],
        },
        contents={key: str(content) for key, content in known.items() if content},
    )


def _arm_spec(results: Results, scenario: Scenario, arm: str) -> ArmSpec:
    """Return what a recorded arm declares: a control, an own arm, a finalist or its twin, a config."""
    named = named_arms(results.study)
    if arm in named:
        return named[arm]
    config = next(
        (
            cell.config
            for cell in results.cells
            if (cell.scenario, cell.arm) == (scenario.name, arm)
        ),
        "",
    )
    for one in results.searched:
        if (one.scenario, one.config) == (scenario.name, config):
            found = arm_of(dict(one.params))
            which = arm.rpartition("_")[2]
            changed = twin(found, which) if which in ("none", "global") else found
            if changed is not None:
                return changed
    raise UserError(
        f"{results.folder.root}: arm {arm!r} of {scenario.name} is recorded, but the study no longer "
        "says what it is; was study.yaml changed?"
    )


def _compare(one: Side, other: Side, arm: Named, reference: Named) -> Comparison:
    incomparable = differing(other.judged, one.judged)
    if incomparable:
        shown = "; ".join(f"{d.key}: {d.old} and {d.new}" for d in incomparable[:4])
        raise UserError(
            f"{one.name} and {other.name} are not comparable: their losses are not losses of the same thing, "
            f"or not after as many steps ({shown}). Compare arms with the same model, task, steps and "
            "evaluation"
        )
    notes = _check_contents(one, other)
    cells = _paired(one, other, arm, reference)
    _check_rows(one, other, cells)
    ours, theirs = [ours for ours, _ in cells], [theirs for _, theirs in cells]
    return Comparison(
        arm=one,
        reference=other,
        differs=_differs(one, other),
        n=len(cells),
        arm_loss=spread([cell.loss for cell in ours]),
        reference_loss=spread([cell.loss for cell in theirs]),
        contrast=contrast_of(one.arm, ours, other.arm, theirs, one.results.evidence.declared),
        verdict=_declared(one, other),
        notes=notes,
    )


def _check_contents(one: Side, other: Side) -> tuple[str, ...]:
    """Refuse what has changed under the same name; return a note where the folders cannot tell."""
    ours, theirs = one.results.folder.root, other.results.folder.root
    if ours == theirs:
        return ()
    notes = []
    for key, what in CONTENTS.items():
        lacks = [s.results.folder.root for s in (one, other) if key not in s.contents]
        if lacks:
            where = " and ".join(str(root / "manifest.json") for root in lacks)
            notes.append(
                f"Not checked: whether both had the same {what}, of which {where} has no content hash."
            )
            continue
        new, old = one.contents[key], other.contents[key]
        if new != old:
            raise UserError(
                f"{one.name} and {other.name} are not comparable: between the two studies the {what} have "
                f"changed under the same name ({key}: content hash {old[:SHOWN_DIGITS]} in {theirs} and "
                f"{new[:SHOWN_DIGITS]} in {ours}). Run one of the two again (--fresh) with the {what} of the "
                "other"
            )
    return tuple(notes)


def _check_rows(one: Side, other: Side, cells: Sequence[tuple[CellResult, CellResult]]) -> None:
    """Refuse losses over different numbers of rows."""
    for ours, theirs in cells:
        new, old = _rows(one, ours), _rows(other, theirs)
        if None not in (new, old) and new != old:
            raise UserError(
                f"{one.name} and {other.name} are not comparable: with seed {ours.seed} they were evaluated "
                f"on {new} and on {old} rows. Compare arms that were evaluated on the same rows"
            )


def _rows(side: Side, cell: CellResult) -> int | None:
    """Return how many rows the loss of a cell is over; None where it has none."""
    if cell.step is None:
        return None
    split: Split = "validation" if side.stage == "search" else "test"
    scenario = side.scenario.name
    row = side.results.evaluation(cell.training_key, cell.step, "faulty", scenario, split)
    return None if row is None else row.rows


def _differs(one: Side, other: Side) -> tuple[Difference, ...]:
    """Return the keys in which two sides differ, each choice with all that comes with it as one key."""
    ours, theirs = one.declared, other.declared
    if ours["arm"]["device"] == theirs["arm"]["device"] == "healthy":
        # Neither has met the scenario in training.
        ours, theirs = ({**side, "scenario": {}} for side in (ours, theirs))
    return together(differing(theirs, ours))


def together(found: Sequence[Difference]) -> tuple[Difference, ...]:
    """Return differences with what only goes along with another one left out.

    Noise beside none is one key, and not every key of the noise; another kind (of targeting, of method) is
    one key, and not those that this kind has and the other has not.
    """
    kinds = {one.key.removesuffix("kind") for one in found if one.key.endswith(".kind")}
    wholes = {f"{one.key}." for one in found if {one.old, one.new} == {"null", "absent"}}

    def goes_along(one: Difference) -> bool:
        lacks = "absent" in (one.old, one.new)
        inside = any(one.key.startswith(whole) for whole in wholes)
        of_kind = any(one.key.startswith(kind) for kind in kinds if one.key != f"{kind}kind")
        return inside or (lacks and of_kind)

    kept = []
    for one in found:
        if goes_along(one):
            continue
        if f"{one.key}." in wholes:
            parts = [d for d in found if d.key.startswith(f"{one.key}.")]
            said = ", ".join(
                f"{d.key.removeprefix(f'{one.key}.')}: {d.new if d.old == 'absent' else d.old}"
                for d in parts[:SHOWN_PARTS]
            )
            whole = f"{{{said}{', ...' if len(parts) > SHOWN_PARTS else ''}}}"
            old, new = (whole if text == "absent" else text for text in (one.old, one.new))
            one = Difference(one.key, old, new)
        kept.append(one)
    return tuple(kept)


def _paired(
    one: Side, other: Side, arm: Named, reference: Named
) -> list[tuple[CellResult, CellResult]]:
    """Return the cells of both sides seed by seed, of the seeds that both have."""
    ours, theirs = _cells(one, arm.replicate), _cells(other, reference.replicate)
    by_seed = {cell.seed: cell for cell in theirs}
    pairs = [(cell, by_seed[cell.seed]) for cell in ours if cell.seed in by_seed]
    if not pairs:
        seeds = (one.results.study, other.results.study)
        raise UserError(
            f"{one.name} and {other.name} have no seed in common (study seeds "
            f"{' and '.join(str(study.seed) for study in seeds)}, generations "
            f"{' and '.join(str(study.confirm.generation) for study in seeds)}): runs of different seeds are "
            "no pairs. Run one study with the seed and the generation of the other"
        )
    return pairs


def _cells(side: Side, replicate: int | None) -> list[CellResult]:
    results, stage = side.results, side.stage
    where = (side.scenario.name, side.arm)
    count = sum((cell.scenario, cell.arm) == where for cell in results.stage_cells(stage))
    generation = _generation(results, stage)
    cells = results.tables.cells(stage, *where, replicates=count, generation=generation)
    if replicate is not None and replicate >= count:
        raise UserError(f"{side.name}: got replicate {replicate}; allowed are 0 to {count - 1}")
    return [cell for cell in cells if replicate is None or cell.replicate == replicate]


def _declared(one: Side, other: Side) -> Judged | None:
    results = one.results
    if other.results is not results or not results.makes_claims or one.stage != "confirm":
        return None
    if one.scenario.name != other.scenario.name:
        return None
    name = f"{one.scenario.name}/{contrast_name(one.arm, other.arm)}"
    judged = (j for scenario in results.evidence.scenarios for j in scenario.contrasts)
    return next((j for j in judged if j.name == name), None)


def _refuse_confounded(found: Sequence[Comparison]) -> None:
    for one in found:
        if len(one.differs) > 1:
            shown = "\n".join(f"  {d.key}: {d.old} -> {d.new}" for d in one.differs)
            raise UserError(
                f"{one.arm.name} and {one.reference.name} differ in {len(one.differs)} keys, so that a "
                f"difference between them has no single cause:\n{shown}\n"
                "To see it all the same: --confounded"
            )
