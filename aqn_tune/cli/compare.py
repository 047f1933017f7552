"""`aqn-tune compare`: two arms side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqn_tune.cli.options import Json
from aqn_tune.cli.output import console, print_json, table

if TYPE_CHECKING:
    from aqn_tune.report.comparison import Comparison

Arm = Annotated[
    str,
    typer.Argument(
        metavar="A",
        help="FOLDER, FOLDER:ARM, FOLDER:SCENARIO/ARM, or one run: FOLDER:STAGE/SCENARIO/ARM/REPLICATE.",
    ),
]
Reference = Annotated[
    str,
    typer.Argument(metavar="B", help="The same; a name without a folder is in the folder of A."),
]
Confounded = Annotated[
    bool, typer.Option("--confounded", help="Compare arms that differ in more than one key.")
]


def command(
    arm: Arm, reference: Reference, confounded: Confounded = False, json: Json = False
) -> None:
    """Say in what two arms differ, and by how much, paired seed by seed. Positive: A is better.

    Two folders are compared arm by arm. Arms that differ in more than one key are refused, as a difference
    between them has no single cause; so are arms whose losses are not comparable: another model, task, number
    of steps, or other faults in the evaluation, also where model files or rows have changed under one name.
    What was not declared before the runs has no verdict.
    """
    from aqn_tune.report.comparison import compare
    from aqn_tune.report.side import parse_name

    first = parse_name(arm)
    found = compare(first, parse_name(reference, first.folder), confounded=confounded)
    if json:
        print_json({"pairs": [_content(one) for one in found]})
    else:
        _show(found)


def _content(one: Comparison) -> dict[str, Any]:
    from dataclasses import asdict

    from aqn_tune.evidence.verdicts import Undetermined

    contrast = one.contrast
    return {
        "arm": {"folder": str(one.arm.results.folder.root), "name": one.arm.name},
        "reference": {"folder": str(one.reference.results.folder.root), "name": one.reference.name},
        "stage": one.arm.stage,
        "differs": [each._asdict() for each in one.differs],
        "n": one.n,
        "loss": one.arm_loss._asdict(),
        "reference_loss": one.reference_loss._asdict(),
        "contrast": None if isinstance(contrast, Undetermined) else asdict(contrast),
        "undetermined": contrast.reason if isinstance(contrast, Undetermined) else None,
        "q": one.q,
        "notes": list(one.notes),
        "verdict": None if one.verdict is None else one.verdict.verdict.value,
    }


def _show(found: tuple[Comparison, ...]) -> None:
    from aqn_tune.evidence.verdicts import Undetermined
    from aqn_tune.report.text import NONE, confidence, interval, number, p_value, signed

    out = console()
    keys = dict.fromkeys(each for one in found for each in one.differs)
    if keys:
        out.print(table("In what they differ", ("key", "B", "A"), list(keys)))
    else:
        out.print("They differ in no key that was declared.")
    many = len(found) > 1
    pairs = {(one.arm.arm, one.reference.arm) for one in found}
    title = "Paired by seed" + (
        ": {} (A) and {} (B)".format(*pairs.pop()) if len(pairs) == 1 else ""
    )
    rows = []
    notes: dict[str, None] = {}
    for one in found:
        notes |= dict.fromkeys(one.notes)
        name = _name(one, title)
        head = (name, one.n, number(one.arm_loss.mean), number(one.reference_loss.mean))
        mark = one.verdict.verdict.value if one.verdict is not None else ""
        if isinstance(one.contrast, Undetermined):
            rows.append((*head, *[NONE] * (6 if many else 5), mark))
            notes[f"{name}: {one.contrast.reason}."] = None
            continue
        c = one.contrast
        q = (p_value(one.q),) if many else ()
        record = f"{c.wins}/{c.ties}/{c.losses}"
        rows.append(
            (*head, signed(c.improvement), interval(c.low, c.high), p_value(c.t_p), *q,
             p_value(c.sign_flip_p), record, mark)
        )  # fmt: skip
        notes |= dict.fromkeys(f"{name}: {note}." for note in c.notes)
    level = confidence(found[0].arm.results.evidence.declared.alpha)
    columns = (
        "scenario", "#n", "#A", "#B", "#B \N{MINUS SIGN} A", f"#{level} interval", "#p",
        *(("#q",) if many else ()), "#flip p", "#w/t/l", "verdict",
    )  # fmt: skip
    out.print(table(title, columns, rows))
    for note in notes:
        out.print(note, markup=False, soft_wrap=True)
    out.print(_legend(many=many), markup=False, soft_wrap=True)


def _legend(*, many: bool) -> str:
    adjusted = "; q is p adjusted for all of these (Benjamini-Hochberg)" if many else ""
    return (
        "A, B: mean loss under the faults, nats per answer token. p is the paired t-test's, of one contrast "
        f"alone{adjusted}; flip p is the sign-flip test's; w/t/l: seeds on which A is better, equal, worse. "
        "The verdict is the study's, where it declared the contrast before the runs; nothing else has one. "
        "Intervals hold over training seeds given this test set."
    )


def _name(one: Comparison, title: str) -> str:
    """Return what tells a line apart: its scenario, and the arms where the title does not name them."""
    if ":" in title:
        same = one.arm.scenario.name == one.reference.scenario.name
        return one.arm.scenario.name + ("" if same else f" and {one.reference.scenario.name}")
    return (
        one.arm.name
        if one.arm.name == one.reference.name
        else f"{one.arm.name} and {one.reference.name}"
    )
