"""A study with a known answer, from search to verdict, on the synthetic objective."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import (
    LAYERS,
    Behaviour,
    make_scenarios,
    make_setting,
    make_study,
    ray_two,
    run_synthetic,
)

from aqn_tune.evidence.assemble import Evidence, assemble
from aqn_tune.evidence.declared import declare
from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import LedgerRow
from aqn_tune.study.cells import stage_cells
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.schema import Study

__all__ = ["ray_two"]


def evidence_of(study: Study, folder: StudyFolder) -> Evidence:
    """Return the evidence that the ledger of a study holds."""
    ledger = Ledger(folder.ledger)
    rows: list[LedgerRow] = [
        *ledger.cells.values(),
        *ledger.trainings.values(),
        *ledger.evaluations.values(),
        *ledger.search,
    ]
    scenarios = make_scenarios(study)
    missing = stage_cells(
        study, make_setting(study), scenarios, stage="confirm", layer_count=LAYERS
    ).missing
    return assemble(rows, declare(study, scenarios, missing, margin=None))


def verdicts(evidence: Evidence) -> dict[str, str]:
    """Return the verdict of every primary contrast by its name."""
    return {
        judged.name: str(getattr(judged.verdict, "value", judged.verdict))
        for scenario in evidence.scenarios
        for judged in scenario.contrasts
    }


@pytest.mark.parametrize("effect", [0.4, 0.0])
def test_targeting_is_found_better_where_it_is_and_nowhere_else(
    ray_two: None, tmp_path: Path, effect: float
) -> None:
    study = make_study(
        tmp_path,
        search={"configs": 6},
        confirm={"finalists": 1, "replicates": 8},
        compute={"workers": 2},
    )
    folder = study_folder(study)
    run_synthetic(study, folder, behaviour=Behaviour(effect=effect, noise_sd=0.01))
    found = verdicts(evidence_of(study, folder))
    assert len(found) == 10
    for scenario in make_scenarios(study):
        for contrast in ("targeted-vs-fault_only", "targeted-vs-global"):
            verdict = found[f"{scenario.name}/{contrast}"]
            assert verdict == ">" if effect else verdict in ("~", "?"), (contrast, found)
