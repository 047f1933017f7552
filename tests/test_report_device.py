"""What the report says about number formats and about draws of a fault, from planted rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from fake_ledger import write_fake

from aqn_tune.ledger.rows import EvaluationRow, QuantizerMeasure
from aqn_tune.report.device_tables import device_tables, draws_table, quantizer_table
from aqn_tune.report.generated_table import generated_tables
from aqn_tune.report.loading import load_results
from aqn_tune.report.page import context, render_html, render_markdown
from aqn_tune.report.parquet import run_lines
from aqn_tune.report.results import Results
from aqn_tune.report.summary import summary_of


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("device")
    return load_results(write_fake(folder, sweep={"faults.0.threshold": [0.1, 0.2]}).folder)


def planted(results: Results, change: Callable[[EvaluationRow], dict[str, object]]) -> Results:
    """Return the results with every faulty evaluation changed."""
    rows = tuple(
        row.model_copy(update=change(row))
        if isinstance(row, EvaluationRow) and row.condition == "faulty"
        else row
        for row in results.rows
    )
    return replace(results, rows=rows)


def measure(operand: str, layer: int, sqnr: float | None, zeros: float, clipped: float):
    return QuantizerMeasure.model_validate(
        {
            "format": "mxfp4",
            "operand": operand,
            "layer": layer,
            "sqnr_db": sqnr,
            "zero_fraction": zeros,
            "clipped_fraction": clipped,
        }
    )


def test_a_study_without_formats_and_with_single_draws_has_no_such_tables(plain: Results) -> None:
    assert device_tables(plain, "both") == ()
    assert "Number formats" not in render_html(context(plain))


def test_formats_are_averaged_over_layers_and_the_worst_is_named(plain: Results) -> None:
    quantizers = (
        measure("weight", 0, 20.0, 0.1, 0.0),
        measure("weight", 1, 10.0, 0.3, 0.2),
        measure("activation", 0, None, 1.0, 0.0),
    )
    results = planted(plain, lambda row: {"quantizers": quantizers})
    table = quantizer_table(results, "both")
    assert table is not None
    assert [column.head for column in table.columns][:3] == ["scenario", "format", "operand"]
    first, second, third, fourth = table.rows
    assert [cell.replace("\u202f", " ") for cell in first[1:]] == [
        "mxfp4",
        "weight",
        "15.0",
        "10.0 (layer 1)",
        "20.0 %",
        "10.0 %",
    ]
    # A format that left nothing but zeros has no SQNR, and says so instead of taking others' mean.
    assert second[2:5] == ("activation", "n/a", "n/a")
    assert (first[0], second[0], third[0]) == ("threshold 0.1", "", "threshold 0.2")
    assert fourth[0] == ""
    assert "% of values affected, SQNR 15.0 dB" in summary_of(results).replace("\u202f", " ")
    for text in (render_html(context(results)), render_markdown(context(results))):
        assert "Number formats" in text
        assert "10.0 (layer 1)" in text


def test_the_spread_over_draws_is_pooled_over_seeds(plain: Results) -> None:
    sds = {}

    def change(row: EvaluationRow) -> dict[str, object]:
        sds.setdefault(row.training_key, 0.03 if len(sds) % 2 else 0.04)
        return {"draws": 5, "loss_sd": sds[row.training_key], "exact_match_sd": 0.02}

    results = planted(plain, change)
    table = draws_table(results, "both")
    assert table is not None
    by_arm = {row[1]: row for row in table.rows}
    assert by_arm["fault_only"][2] == "5"
    seeds = next(a for a in results.evidence.scenarios[0].arms if a.arm == "fault_only").seeds
    pooled = (sum(sds[cell.training_key] ** 2 for cell in seeds) / len(seeds)) ** 0.5
    assert by_arm["fault_only"][3] == f"{pooled:.4f}"
    assert by_arm["fault_only"][4].replace("\u202f", " ") == "2.0 %"


def test_a_draw_that_is_not_finite_leaves_no_spread(plain: Results) -> None:
    table = draws_table(planted(plain, lambda row: {"draws": 5, "loss_sd": None}), "both")
    assert table is not None
    assert {row[3] for row in table.rows} == {"n/a"}


def test_draws_are_columns_of_the_runs(plain: Results) -> None:
    results = planted(plain, lambda row: {"draws": 3, "loss_sd": 0.5, "exact_match_sd": 0.25})
    lines = run_lines(results)
    faulty = next(line for line in lines if line["condition"] == "faulty" and line["loss"])
    assert (faulty["draws"], faulty["loss_sd_over_draws"]) == (3, 0.5)
    assert faulty["exact_match_sd_over_draws"] == 0.25
    clean = next(line for line in lines if line["condition"] == "clean" and line["loss"])
    assert (clean["draws"], clean["loss_sd_over_draws"]) == (1, None)


def test_written_answers_stand_beside_the_teacher_forced(plain: Results) -> None:
    assert generated_tables(plain, "both") == ()
    shares = {"exact_match": 0.5, "generated_exact_match": 0.25, "answer_match": 0.75}
    results = planted(plain, lambda row: shares)
    (table,) = generated_tables(results, "both")
    assert table.rows[0][0] == "threshold 0.1"
    arm, *cells = table.rows[0][1:]
    assert arm in {a.arm for a in results.evidence.scenarios[0].arms}
    means = [cell.split(" ")[0] for cell in cells]
    assert means == ["50.0", "25.0", "75.0"]
    assert "Written answers" in render_html(context(results))
    assert "Written answers" in render_markdown(context(results))
    lines = [line for line in run_lines(results) if line["condition"] == "faulty" and line["loss"]]
    assert {(line["generated_exact_match"], line["answer_match"]) for line in lines} == {
        (0.25, 0.75)
    }
