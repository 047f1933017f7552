"""From what the user names, a folder or a study file, to the study and its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aqn_tune.errors import UserError
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.loading import load_study
from aqn_tune.study.schema import Study


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
