"""The folder of a study: `<output>/<study>-<hash8>/`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from aqn_tune.study.keys import content_hash
from aqn_tune.study.schema import Study

NOT_IDENTITY: dict[str, bool | set[str]] = {
    "compute": True,
    "output": True,
    "description": True,
    "confirm": {"generation", "replicates", "looks"},
}
"""Keys of a study that change no recorded number but for its rounding, so that changing them continues the
same folder; but see `study_hash`.

A new generation of confirm seeds, of another size or with other looks, is such a change: it adds to the
search and the generations before it, which the lock keeps apart.
"""


def study_hash(study: Study) -> str:
    """Return the 16-digit content hash of everything in `study` that can change a number.

    Of `compute` that is whether trainings run on a GPU, which draws other random numbers.
    """
    content = study.model_dump(mode="json", exclude=NOT_IDENTITY)
    if study.compute.gpus_per_worker:
        content["computed_on"] = "cuda"
    return content_hash(content)


class StudyFolder(NamedTuple):
    """Where the files of a study lie."""

    root: Path

    @property
    def study(self) -> Path:
        """The resolved study, as YAML."""
        return self.root / "study.yaml"

    @property
    def manifest(self) -> Path:
        """Versions and hashes."""
        return self.root / "manifest.json"

    @property
    def ledger(self) -> Path:
        """Every row, append-only."""
        return self.root / "ledger.jsonl"

    @property
    def lock(self) -> Path:
        """What the confirmation was fixed to before its first run."""
        return self.root / "confirm.lock"

    @property
    def runs(self) -> Path:
        """One line per cell and condition, for pandas."""
        return self.root / "runs.parquet"

    @property
    def report(self) -> Path:
        """The report page."""
        return self.root / "report.html"

    @property
    def report_markdown(self) -> Path:
        """The report as text."""
        return self.root / "report.md"

    @property
    def verdict(self) -> Path:
        """The verdicts, for machines."""
        return self.root / "verdict.json"

    @property
    def tensorboard(self) -> Path:
        """Root of the TensorBoard logs."""
        return self.root / "tensorboard"

    @property
    def adapters(self) -> Path:
        """Exported PEFT adapter folders."""
        return self.root / "adapters"

    @property
    def state(self) -> Path:
        """Packs that have not finished yet; empty when the study is done."""
        return self.root / "state"

    @property
    def optuna(self) -> Path:
        """The Optuna studies, exported for optuna-dashboard."""
        return self.root / "optuna.sqlite"


def study_folder(study: Study) -> StudyFolder:
    """Return the folder of `study`, absolute (Ray refuses relative storage); nothing is created."""
    return StudyFolder(
        Path(study.output).expanduser().resolve() / f"{study.study}-{study_hash(study)[:8]}"
    )
