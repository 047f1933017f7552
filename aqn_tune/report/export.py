"""A study as tables for other programs."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aqn_tune.errors import UserError
from aqn_tune.report.loading import load_results
from aqn_tune.report.parquet import column_names, run_lines
from aqn_tune.report.results import Results
from aqn_tune.report.verdict_file import verdict_content
from aqn_tune.study.folder import StudyFolder


class Exported(NamedTuple):
    """A file that was written."""

    path: Path
    lines: int
    """Lines below the heading, or trials of a database."""


def export_tables(folder: StudyFolder, target: Path) -> tuple[Exported, ...]:
    """Write a study's tables into the folder `target`, which is made where it is not there.

    runs.csv       what `runs.parquet` holds (see `aqn_tune.report.parquet.COLUMNS`)
    arms.csv       one line per scenario and arm: losses and exact match, recovery
    contrasts.csv  one line per declared contrast, none before there are verdicts; the look that it was judged
                   at, the level, and whether that is the end
    configs.csv    one line per config of the search: parameters, last rung and value

    Works at any time; files that are there are replaced one by one. Numbers that do not exist are empty,
    floats are written in their shortest exact form. Without a search there is no configs.csv.

    Raises:
        UserError: no study in the folder, a target that is a file, or a storage that does not take the files.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"--to {target}: there is a file of this name; name a folder")
    results = load_results(folder)
    target.mkdir(parents=True, exist_ok=True)
    content = verdict_content(results)
    found = [
        _write(target / "runs.csv", column_names(results), run_lines(results)),
        _write(target / "arms.csv", ("scenario", "during", "regime", "arm"), _arms(content)),
        _write(target / "contrasts.csv", ("scenario", "arm", "reference"), _contrasts(content)),
    ]
    if results.searched:
        found.append(_write(target / "configs.csv", ("scenario", "config"), _configs(results)))
    return tuple(found)


def _arms(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for scenario, found in content["scenarios"].items():
        for arm, one in found["arms"].items():
            recovery = one["recovery"]
            lines.append(
                {
                    "scenario": scenario,
                    "during": found["during"],
                    "regime": found["regime"],
                    "arm": arm,
                    "config": one["config"],
                    "seeds": len(one["losses"]),
                    "failed": one["failed"],
                    "loss": one["loss"],
                    "loss_sd": one["loss_sd"],
                    "clean_loss": one["clean_loss"],
                    "exact_match": one["exact_match"],
                    "clean_exact_match": one["clean_exact_match"],
                    "recovery": recovery["value"],
                    "recovery_low": recovery["low"],
                    "recovery_high": recovery["high"],
                    "search_improvement": one["search_improvement"],
                    "confirm_improvement": one["confirm_improvement"],
                }
            )
    return lines


def _contrasts(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    lines = []
    look = content["look"]
    judged = {
        "look": look and look["number"],
        "looks": look and len(look["planned"]),
        "alpha": look["alpha"] if look else content["alpha"],
        "complete": content["complete"],
    }
    for scenario, found in content["scenarios"].items():
        for name, one in found["contrasts"].items():
            arm, _, reference = name.partition("-vs-")
            numbers = {key: value for key, value in one.items() if key != "notes"}
            margin = found["margin"]
            notes = " ".join(one.get("notes", ()))
            lines.append(
                {
                    "scenario": scenario,
                    "arm": arm,
                    "reference": reference,
                    **numbers,
                    "margin_kind": content["margin_rule"]["kind"],
                    "margin_basis": margin["basis"],
                    "margin_measured": margin["measured"],
                    "margin_reason": margin["reason"],
                    "notes": notes,
                    **judged,
                }
            )
    return lines


def _configs(results: Results) -> list[dict[str, Any]]:
    return [
        {
            "scenario": one.scenario,
            "config": one.config,
            "state": one.state,
            "rung": one.rung,
            "value": one.value,
            **{f"param_{name}": value for name, value in one.params.items()},
        }
        for one in results.searched
    ]


def _write(path: Path, names: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> Exported:
    """Write a table: the columns `names`, and what else its lines hold in the order in which they come."""
    lines = list(lines)
    columns = list(dict.fromkeys([*names, *(name for line in lines for name in line)]))
    draft = path.with_name(f"{path.name}.tmp")
    with draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(lines)
    os.replace(draft, path)
    return Exported(path, len(lines))
