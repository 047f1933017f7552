"""`aqn-tune export`, and what `runs.parquet` says of itself."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pyarrow.parquet as pq
import pytest
from synthetic import inline_packs, make_study
from test_report_comparison import finished
from test_search_own_runs import run

from aqn_tune.cli.app import main
from aqn_tune.cli.export import export_study
from aqn_tune.cli.run import write_study
from aqn_tune.report.loading import load_results
from aqn_tune.report.parquet import COLUMNS, FORMAT, write_parquet
from aqn_tune.report.results import load_study_file
from aqn_tune.report.verdict_file import verdict_content
from aqn_tune.study.folder import StudyFolder, study_folder

DOCS = Path(__file__).parents[1] / "docs" / "results.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    return StudyFolder(finished(tmp_path_factory.mktemp("one")))


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def text(value: float | None) -> str:
    return "" if value is None else repr(value)


def test_the_tables_hold_what_the_report_does(folder: StudyFolder, tmp_path: Path) -> None:
    found = {
        one.path.name: one.lines
        for one in export_study(load_study_file(folder), folder, tmp_path / "new" / "out")
    }
    out = tmp_path / "new" / "out"
    assert set(found) == {"runs.csv", "arms.csv", "contrasts.csv", "configs.csv", "optuna.sqlite"}
    assert {path.name for path in out.iterdir()} == set(found)
    for name, count in found.items():
        if name.endswith(".csv"):
            assert len(lines(out / name)) == count > 0
    content = verdict_content(load_results(folder))
    for line in lines(out / "contrasts.csv"):
        one = content["scenarios"][line["scenario"]]["contrasts"][
            f"{line['arm']}-vs-{line['reference']}"
        ]
        assert line["verdict"] == one["verdict"]
        assert line["improvement"] == text(one.get("improvement"))
    for line in lines(out / "arms.csv"):
        arm = content["scenarios"][line["scenario"]]["arms"][line["arm"]]
        assert line["loss"] == text(arm["loss"])


def test_runs_are_the_same_as_csv_and_as_parquet(folder: StudyFolder, tmp_path: Path) -> None:
    export_study(load_study_file(folder), folder, tmp_path)
    write_parquet(load_results(folder), tmp_path / "runs.parquet")
    one = pd.read_csv(tmp_path / "runs.csv", dtype={"seed": str}, keep_default_na=False)
    other = pd.read_parquet(tmp_path / "runs.parquet")
    assert list(one) == list(other)
    assert len(one) == len(other)
    assert one["seed"].tolist() == other["seed"].tolist()
    assert pd.to_numeric(one["loss"]).equals(other["loss"])


def test_the_optuna_studies_open(folder: StudyFolder, tmp_path: Path) -> None:
    export_study(load_study_file(folder), folder, tmp_path)
    results = load_results(folder)
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'optuna.sqlite'}")
    names = {study.study_name for study in optuna.get_all_study_summaries(storage)}
    assert names == {scenario.name for scenario in results.scenarios}
    trials = [
        trial
        for name in names
        for trial in optuna.load_study(study_name=name, storage=storage).trials
    ]
    assert len(trials) == len(results.searched)
    for name in names:
        opened = optuna.load_study(study_name=name, storage=storage)
        assert opened.metric_names == ["faulty validation loss"]
        said = opened.user_attrs
        assert "(0: step 5, 1: step 10, 2: step 20)" in said["intermediate values"]
        assert "not recorded" in said["times"], "a dashboard draws them as if they were"
    storage.remove_session()
    storage.engine.dispose()


def test_a_study_under_way_has_what_there_is(tmp_path: Path) -> None:
    study = make_study(tmp_path / "runs", search={"configs": 3})
    run(study, "search", how=inline_packs(6))
    folder = study_folder(study)
    write_study(study, folder)
    found = {one.path.name: one.lines for one in export_study(study, folder, tmp_path / "out")}
    assert found["contrasts.csv"] == 0
    assert (tmp_path / "out" / "contrasts.csv").read_text() == "scenario,arm,reference\n"
    assert found["runs.csv"] > 0


def test_the_command(
    folder: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(folder.root), "--to", str(tmp_path / "out"), "--json"])
    assert stopped.value.code in (0, None)
    said: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert Path(said[0]["path"]).name == "runs.csv"
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(folder.root), "--to", str(tmp_path / "file")])
    assert stopped.value.code == 2
    assert "name a folder" in capsys.readouterr().err


def test_the_table_of_runs_says_what_it_holds(folder: StudyFolder, tmp_path: Path) -> None:
    write_parquet(load_results(folder), tmp_path / "runs.parquet")
    schema = pq.read_schema(tmp_path / "runs.parquet")
    assert schema.metadata[b"aqn_tune.format"] == str(FORMAT).encode()
    says = {field.name: field.metadata[b"description"].decode() for field in schema}
    assert {column.name: column.says for column in COLUMNS}.items() <= says.items()
    assert set(says) - {column.name for column in COLUMNS} == {"sweep_threshold"}


def test_the_documentation_has_every_column_in_its_words() -> None:
    rows = [
        [cell.strip().strip("`") for cell in line.strip().strip("|").split(" | ")]
        for line in DOCS.read_text().splitlines()
        if line.startswith("| `")
    ]
    table = {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}
    for column in COLUMNS:
        assert table[column.name] == (column.kind, column.says)
    assert f"format {FORMAT}" in DOCS.read_text()
