"""The decision matrix: from the verdicts of a scenario to the sentence that was agreed beforehand.

It is written before the results are known, as rows that are read from the top. As `parse_decisions`
takes them (a study names its contrasts once and gives the verdicts by position, see `matrix_of`):

    - when: {targeted-vs-fault_only: ">", targeted-vs-global: ">"}
      say: noise helps, and targeting helps on top
    - when: {targeted-vs-fault_only: ">", targeted-vs-global: ["~", "<"]}
      say: noise helps; targeting adds nothing
    - when: {targeted-vs-fault_only: ["~", "<"]}
      say: no benefit at this margin

The first row that fits wins. `any`, or leaving a contrast out, fits all four symbols. Verdicts with
a `?` that no row fits are "not decided"; verdicts without a `?` must all be answered.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, field_validator

from aqn_tune.errors import UserError, nearest
from aqn_tune.evidence.verdicts import Verdict
from aqn_tune.study.base import Spec

if TYPE_CHECKING:
    from aqn_tune.study.schema import DecisionSpec

NOT_DECIDED = "not decided"
"""The conclusion where a contrast is inconclusive and no row speaks of that."""

MOST_CONTRASTS = 6
"""A matrix over more contrasts than this (4^6 cases) is refused: nobody can have thought it out."""

SYMBOLS = tuple(verdict.value for verdict in Verdict)


class DecisionRow(Spec):
    """One line of the matrix: the verdicts it speaks of, and what it concludes."""

    when: dict[str, tuple[Verdict, ...]] = Field(
        description='Contrast name -> symbol ">", "<", "~" or "?", a list of them, or "any".'
    )
    say: str = Field(min_length=1, description="The conclusion, as it is printed in the report.")

    @field_validator("when", mode="before")
    @classmethod
    def _symbols(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: _parse_symbols(str(name), got) for name, got in value.items()}

    def fits(self, verdicts: Mapping[str, Verdict]) -> bool:
        """Return whether every contrast named in `when` has one of its verdicts."""
        return all(verdicts[name] in allowed for name, allowed in self.when.items())


class DecisionMatrix(Spec):
    """The rows in their order; the first that fits wins. Build it with `parse_decisions`."""

    rows: tuple[DecisionRow, ...] = Field(min_length=1, description="The rows, read from the top.")

    @property
    def contrasts(self) -> tuple[str, ...]:
        """Names of the contrasts that the rows speak of, in order of first mention."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.when))


@dataclass(frozen=True)
class Decision:
    """What the matrix concludes from one tuple of verdicts."""

    say: str
    """The sentence of the row, or "not decided"."""
    row: int | None
    """Position of the row from 1, or `None` when not decided."""


def _parse_symbols(name: str, got: Any) -> tuple[Verdict, ...]:
    if got == "any":
        return tuple(Verdict)
    items = got if isinstance(got, list | tuple) else [got]
    for item in items:
        if item is None:
            raise UserError(
                f"decisions: contrast '{name}': got an empty value; an unquoted ~ means 'nothing' "
                'in YAML, write "~" in quotes'
            )
        if item not in SYMBOLS:
            raise UserError(
                f"decisions: contrast '{name}': got {item!r}, allowed: any, or one or a list of "
                + ", ".join(f'"{symbol}"' for symbol in SYMBOLS)
            )
    if not items:
        raise UserError(f"decisions: contrast '{name}': got an empty list, so the row never fits")
    return tuple(Verdict(item) for item in items)


def parse_decisions(
    rows: Sequence[Mapping[str, Any]], *, contrasts: Sequence[str] | None = None
) -> DecisionMatrix:
    """Build a matrix from plain data and check that it answers every case exactly.

    Args:
        rows: `{when: {contrast: symbol(s)}, say: sentence}` from the top.
        contrasts: the contrasts a scenario has; `None` takes those that the rows name.

    Raises:
        UserError: an unknown key, contrast or symbol; a row that can never be reached; verdicts
            without `?` that no row answers; more than six contrasts.
    """
    try:
        matrix = DecisionMatrix.model_validate({"rows": list(rows)})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"decisions: {where}: {first['msg']}, got {first['input']!r}") from error
    check_decisions(matrix, contrasts=contrasts)
    return matrix


def contrast_name(arm: str, reference: str) -> str:
    """Return the name under which a contrast of a scenario is judged and decided upon."""
    return f"{arm}-vs-{reference}"


def matrix_of(spec: DecisionSpec) -> DecisionMatrix:
    """Return the checked matrix of a study, whose rows give one verdict per contrast by position.

    Raises:
        UserError: a row with too many or too few verdicts; what `parse_decisions` says.
    """
    names = [contrast_name(arm, reference) for arm, reference in spec.contrasts]
    rows = []
    for position, row in enumerate(spec.rows, start=1):
        if len(row.when) != len(names):
            raise UserError(
                f"decisions: row {position}: got {len(row.when)} verdict(s) for "
                f"{len(names)} contrast(s): {', '.join(names)}"
            )
        rows.append({"when": dict(zip(names, row.when, strict=True)), "say": row.say})
    return parse_decisions(rows, contrasts=names)


def check_decisions(matrix: DecisionMatrix, *, contrasts: Sequence[str] | None = None) -> None:
    """Check a matrix against every possible tuple of verdicts.

    Raises:
        UserError: a contrast that is not declared, too many contrasts, a row that is never the
            first to fit, or verdicts without `?` that nothing answers.
    """
    names = tuple(matrix.contrasts if contrasts is None else contrasts)
    for position, row in enumerate(matrix.rows, start=1):
        for name in row.when:
            if name not in names:
                raise UserError(
                    f"decisions: row {position}: unknown contrast '{name}', declared: "
                    f"{', '.join(names)}{nearest(name, names)}"
                )
    # Only the contrasts that some row names can make a difference.
    names = matrix.contrasts
    if len(names) > MOST_CONTRASTS:
        raise UserError(
            f"decisions: {len(names)} contrasts in one matrix, at most {MOST_CONTRASTS} are allowed"
        )
    reached: set[int] = set()
    for combination in itertools.product(Verdict, repeat=len(names)):
        verdicts = dict(zip(names, combination, strict=True))
        row_number = decide(matrix, verdicts).row
        if row_number is not None:
            reached.add(row_number)
        elif Verdict.INCONCLUSIVE not in combination:
            missing = ", ".join(f'{name} "{verdict}"' for name, verdict in verdicts.items())
            raise UserError(f"decisions: no row answers {missing}; add one, or a last row with any")
    for position in range(1, len(matrix.rows) + 1):
        if position not in reached:
            raise UserError(
                f"decisions: row {position} ('{matrix.rows[position - 1].say}') is never reached, "
                "the rows above it answer all of its cases"
            )


def decide(matrix: DecisionMatrix, verdicts: Mapping[str, Verdict]) -> Decision:
    """Return the conclusion of the first row that fits, or "not decided".

    Args:
        matrix: a checked matrix.
        verdicts: contrast name -> verdict, for at least the contrasts that the matrix names.

    Raises:
        KeyError: a contrast of the matrix without a verdict.
    """
    for name in matrix.contrasts:
        if name not in verdicts:
            raise KeyError(f"no verdict for contrast '{name}' of the decision matrix")
    for position, row in enumerate(matrix.rows, start=1):
        if row.fits(verdicts):
            return Decision(row.say, position)
    return Decision(NOT_DECIDED, None)
