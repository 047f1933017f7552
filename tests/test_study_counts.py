"""A fault that hits a number of values, where a model that writes has calls with fewer."""

from __future__ import annotations

from pathlib import Path

import pytest

from aqn_tune.errors import UserError
from aqn_tune.study.loading import load_study

STUDY = """\
study: counts
scenario:
  faults: [{{kind: bit_flip, layers: [10], bits: sign, {fault}}}]
  during: {during}
confirm: {{generate: {generate}}}
"""


@pytest.mark.parametrize(
    ("fault", "during", "generate", "most"),
    [
        ("count: 64", "both", "true", None),
        ("count: 65", "both", "true", 64),
        ("count: 65", "both", "false", None),
        ("count: 65", "train", "true", None),
        ("count: 65, when: train", "both", "true", None),
        ("rate: 0.5", "both", "true", None),
        ("count: 64, modules: [linear]", "both", "true", 32),
    ],
)
def test_counts(tmp_path: Path, fault: str, during: str, generate: str, most: int | None) -> None:
    """The original bug: a confirmation ended in this after all of its trainings, and again when resumed."""
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.format(fault=fault, during=during, generate=generate))
    if most is None:
        load_study(file)
        return
    said = rf"faults\.0\.count: got 6\d with confirm\.generate.*at most {most}\b"
    with pytest.raises(UserError, match=said):
        load_study(file)
