"""A study of a thousand search trials gets its whole report, in a page that a browser still opens."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import fake_ledger
import pandas as pd
import pytest
from fake_ledger import Fake, make_study, write_fake

from aqn_tune.ledger.rows import CellRow, SearchRow
from aqn_tune.report.events import EVENT_FILE
from aqn_tune.report.search_map import MOST_ROWS
from aqn_tune.report.write import ReportPaths, write_report
from aqn_tune.study.space import Params

pytestmark = pytest.mark.slow

SWEEP = {"sweep": {"faults.0.threshold": [0.1, 0.2]}}
CONFIGS = 500
PAGE_BYTES = 5_000_000


def many_configs() -> tuple[Params, ...]:
    """Return the fake study's own configs and random ones of its space."""
    rng = random.Random(0)
    drawn: list[Params] = []
    while len(fake_ledger.CONFIGS) + len(drawn) < CONFIGS:
        params: dict[str, Any] = {"sigma_start": round(10 ** rng.uniform(-2.3, -0.7), 6)}
        if rng.random() < 0.5:
            params |= {"targeting": "global"}
        else:
            centre = rng.randrange(fake_ledger.LAYERS)
            params |= {"targeting": "window", "window_centre": centre, "window_width": 3}
        drawn.append(params)
    return (*fake_ledger.CONFIGS, *drawn)


def benefits() -> dict[str, float]:
    """Return what each config wins back; none of the drawn ones beats the finalist."""
    rng = random.Random(1)
    return fake_ledger.CONFIG_BENEFIT | {
        f"c{number:03d}": rng.uniform(-0.5, 0.5)
        for number in range(len(fake_ledger.CONFIGS), CONFIGS)
    }


def write_large(output: Path) -> Fake:
    """Write a study folder with 500 configs in each of two scenarios, and its confirmation."""
    search = make_study(output).model_dump(mode="json")["search"] | {"configs": CONFIGS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_ledger, "CONFIG_BENEFIT", benefits())
        patch.setattr(fake_ledger, "CONFIGS", many_configs())
        patch.setattr(fake_ledger, "make_study", functools.partial(make_study, search=search))
        return write_fake(output, **SWEEP)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fake, ReportPaths]:
    fake = write_large(tmp_path_factory.mktemp("large"))
    return fake, write_report(fake.folder)


def trials(fake: Fake) -> set[tuple[str, str]]:
    """Return scenario and config of every trial in the ledger."""
    return {
        (row.scenario, row.config)
        for row in fake.rows
        if isinstance(row, SearchRow) and row.event == "asked"
    }


def test_the_page_does_not_grow_with_the_trials(
    large: tuple[Fake, ReportPaths], tmp_path: Path
) -> None:
    """A page of a thousand trials is nearly that of six: it shows the best and counts the others."""
    fake, paths = large
    assert len(trials(fake)) == 1_000
    small = write_report(write_fake(tmp_path, **SWEEP).folder, tensorboard=False)
    assert paths.html.stat().st_size < PAGE_BYTES
    # The search maps have 16 rows instead of 3, in each of two scenarios.
    assert paths.html.stat().st_size < small.html.stat().st_size + 30_000
    assert paths.markdown.stat().st_size < small.markdown.stat().st_size + 20_000
    page = paths.markdown.read_text(encoding="utf-8")
    assert (
        page.count(f"Not shown: {CONFIGS - MOST_ROWS} further configs")
        == len(trials(fake)) / CONFIGS
    )
    assert f"{CONFIGS - 1} finished, 1 stopped" in page
    assert f"1 failed, {CONFIGS - 1} finished" in page


def test_every_trial_is_in_the_files_for_machines(large: tuple[Fake, ReportPaths]) -> None:
    fake, paths = large
    asked = trials(fake)
    runs = pd.read_parquet(paths.runs)
    cells = [row for row in fake.rows if isinstance(row, CellRow)]
    assert len(runs) == 2 * len(cells)
    configs = runs[(runs["stage"] == "search") & (runs["config"] != "")]
    assert set(zip(configs["scenario"], configs["config"], strict=True)) == asked
    assert paths.verdict is not None
    verdict = json.loads(paths.verdict.read_text(encoding="utf-8"))
    assert verdict["complete"]
    for scenario, config in asked:
        line = paths.tensorboard / "search" / scenario / config
        assert (line / EVENT_FILE).stat().st_size > 0
        assert (line / "s0" / EVENT_FILE).stat().st_size > 0
