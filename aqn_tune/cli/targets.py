"""From what the user names to what is meant: the study and its folder, a scenario, an arm."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aqn_tune.errors import UserError, nearest
from aqn_tune.study.arms import ArmSpec
from aqn_tune.study.cells import named_arms
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.loading import load_study, resolve_scenarios
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study

_FOUND_BY_SEARCH = re.compile(r"(finalist|c)\d+(_none|_global)?")


class Target(NamedTuple):
    """A study and where its results lie."""

    study: Study
    folder: StudyFolder


def find_target(path: Path, overrides: Sequence[str] = ()) -> Target:
    """Return the study that a folder holds, or that a YAML file describes.

    Raises UserError where the path is neither, where a study has not been run yet, and where
    overrides are given for a folder, whose study is what it was.
    """
    if path.is_dir():
        if overrides:
            raise UserError(f"--set: {path} is the folder of a study, which cannot be changed")
        from aqn_tune.report.results import load_study_file

        folder = StudyFolder(path.resolve())
        return Target(load_study_file(folder), folder)
    study = load_study(path, overrides)
    folder = study_folder(study)
    if not folder.study.exists():
        raise UserError(
            f"{path}: the study has no results yet, there is no {folder.root}; "
            f"start it with `aqn-tune run {path}`"
        )
    return Target(study, folder)


def find_arm(study: Study, name: str) -> ArmSpec:
    """Return the control or own arm of that name.

    Raises UserError for an unknown one, and for finalists and configs, which a search has to find.
    """
    arms = named_arms(study)
    if name in arms:
        return arms[name]
    allowed = ", ".join(arms)
    if _FOUND_BY_SEARCH.fullmatch(name):
        raise UserError(
            f"--arm: got {name!r}, which exists only once a search has found it; allowed are "
            f"{allowed}; to look at its noise write it into the study, under `arms`"
        )
    raise UserError(f"--arm: got {name!r}; allowed are {allowed}{nearest(name, arms)}")


def find_scenario(study: Study, name: str | None) -> Scenario:
    """Return the scenario of that name, the first for None. Raises UserError for an unknown one."""
    scenarios = {scenario.name: scenario for scenario in resolve_scenarios(study)}
    if name is None:
        return next(iter(scenarios.values()))
    if name not in scenarios:
        allowed = ", ".join(scenarios)
        raise UserError(
            f"--scenario: got {name!r}; allowed are {allowed}{nearest(name, scenarios)}"
        )
    return scenarios[name]
