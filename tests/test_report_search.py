"""What the report says of a search: its map, the same in words, and which parameters mattered."""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple
from xml.etree import ElementTree

import fake_ledger
import pytest
from fake_ledger import LAYERS, make_study, write_fake

from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import EvaluationRow, SearchRow
from aqn_tune.report.loading import load_results
from aqn_tune.report.page import context, render_html, render_markdown
from aqn_tune.report.results import Results
from aqn_tune.report.search_figure import (
    AXIS,
    FAINTEST,
    LEFT,
    MIDDLE,
    RIGHT,
    ROW,
    TOP,
    search_svg,
    shades_of,
)
from aqn_tune.report.search_importance import FEWEST, SHUFFLES, importance
from aqn_tune.report.search_map import MOST_ROWS, largest_noise, noise_text, search_maps
from aqn_tune.report.search_section import Section, search_sections
from aqn_tune.report.text import number
from aqn_tune.study.arms import ArmSpec
from aqn_tune.study.space import Params

TWO = {"sweep": {"faults.0.threshold": [0.1, 0.2]}}
ONE = {"sweep": {"faults.0.threshold": [0.1]}}
NUMBERS = {
    "sigma_start": {"kind": "float", "low": 0.005, "high": 0.2, "log": True},
    "sigma_ratio": {"kind": "float", "low": 0.005, "high": 1.0, "log": True},
    "stages": {"kind": "int", "low": 3, "high": 9},
}


class Asked(NamedTuple):
    """A config to plant."""

    params: Mapping[str, Any]
    values: Sequence[float | None]
    """Loss at each rung."""
    end: str = "finished"


def plant(output: Path, dimensions: dict[str, Any], asked: Sequence[Asked], **changes: Any) -> Path:
    """Write a study whose ledger holds nothing but a search of its one scenario; return its folder."""
    search = {"space": {"dimensions": dimensions}, "configs": len(asked), "replicates": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_ledger, "make_study", functools.partial(make_study, search=search))
        fake = write_fake(output, search=False, confirm=False, **{**ONE, **changes})
    (scenario,) = load_results(fake.folder).scenarios
    rows = []
    for at, one in enumerate(asked):
        known = {"scenario": scenario.name, "config": f"c{at:03d}", "number": at}
        rows.append(SearchRow(event="asked", params=dict(one.params), **known))
        for rung, value in enumerate(one.values):
            rows.append(SearchRow(event="rung", rung=rung, value=value, **known))
        if one.end != "running":
            rows.append(SearchRow.model_validate({"event": one.end, **known}))
    Ledger(fake.folder.ledger).append(rows)
    return fake.folder.root


def planted(output: Path, *args: Any, **changes: Any) -> Results:
    from aqn_tune.study.folder import StudyFolder

    return load_results(StudyFolder(plant(output, *args, **changes)))


def drawn(rng: random.Random) -> Params:
    """Return a point of the space of `NUMBERS`."""
    return {
        "sigma_start": math.exp(rng.uniform(math.log(0.005), math.log(0.2))),
        "sigma_ratio": math.exp(rng.uniform(math.log(0.005), 0)),
        "stages": rng.randint(3, 9),
    }


def figure(section: Section) -> ElementTree.Element:
    return ElementTree.fromstring(section.figure)


def shaded(picture: ElementTree.Element, row: int) -> dict[int, float]:
    """Return the opacity of each shaded layer of a row, read from its rectangles."""
    width = (MIDDLE - LEFT) / LAYERS
    found = {}
    for box in picture.iter("rect"):
        middle = float(box.attrib["y"]) + float(box.attrib["height"]) / 2
        if box.attrib["class"] != "noise" or abs(middle - TOP - ROW * (row + 0.5)) > 1:
            continue
        first = round((float(box.attrib["x"]) - LEFT) / width)
        for layer in range(first, first + round(float(box.attrib["width"]) / width)):
            found[layer] = float(box.attrib["fill-opacity"])
    return found


def texts(picture: ElementTree.Element) -> list[str]:
    return [node.text or "" for node in picture.iter("text")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A search in which c003 wins with noise of 0.08 on layers 19-21, confirmed."""
    configs: tuple[Params, ...] = (
        *fake_ledger.CONFIGS,
        {"sigma_start": 0.08, "targeting": "window", "window_centre": 20, "window_width": 3},
    )
    search = make_study(Path()).model_dump(mode="json")["search"] | {"configs": len(configs)}
    benefit = {"c000": 0.3, "c001": 0.1, "c002": -0.5, "c003": 0.7}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_ledger, "CONFIGS", configs)
        patch.setattr(fake_ledger, "CONFIG_BENEFIT", benefit)
        patch.setattr(fake_ledger, "make_study", functools.partial(make_study, search=search))
        fake = write_fake(tmp_path_factory.mktemp("searched"), **TWO)
    return load_results(fake.folder)


def test_the_winner_stands_at_the_top_with_its_layers_shaded(results: Results) -> None:
    maps = search_maps(results)
    first, second = search_sections(results)
    assert [row.name for row in maps[0].rows] == ["c003", "c000", "c001", "c002"]
    assert [row.state for row in maps[0].rows] == ["finished"] * 3 + ["stopped"]
    assert maps[1].rows[-1].state == "failed"
    levels = maps[0].rows[0].levels
    assert levels is not None
    assert {layer: level for layer, level in enumerate(levels) if level} == {
        19: pytest.approx(0.08), 20: pytest.approx(0.08), 21: pytest.approx(0.08),
    }  # fmt: skip
    picture = figure(first)
    assert set(shaded(picture, 0)) == {19, 20, 21}
    assert set(shaded(picture, 1)) == {11, 12, 13}
    assert set(shaded(picture, 2)) == set(range(LAYERS))
    spoken = picture.attrib["aria-label"]
    loss = number(maps[0].rows[0].value)
    assert "4 configs: 3 finished, 1 stopped" in spoken
    assert re.search(
        rf"Best first: c003, loss {loss} ± 0\.\d{{4}}, noise layers 19-21, sigma 0\.08;", spoken
    )
    assert first.table.rows[0][4] == "layers 19-21, 0.08"
    assert first.summary.startswith(f"best of 4 configs: c003, loss {loss}")
    assert "failed" in texts(figure(second))


def test_more_noise_is_a_stronger_shade_in_every_picture(results: Results) -> None:
    maps = search_maps(results)
    shades = shades_of(maps)
    assert (shades.low, shades.high) == (pytest.approx(0.01), pytest.approx(0.19))
    assert shades.is_log
    for section, one in zip(search_sections(results), maps, strict=True):
        picture = figure(section)
        strength = {row.largest: shaded(picture, at) for at, row in enumerate(one.rows)}
        seen = [set(strength[largest].values()) for largest in sorted(strength)]
        assert [len(one) for one in seen] == [1] * len(seen)
        opacities = [one.pop() for one in seen]
        assert opacities == sorted(opacities)
        assert (opacities[0], opacities[-1]) == (FAINTEST, 1.0)
        middle = FAINTEST + (1 - FAINTEST) * math.log(8) / math.log(19)
        assert opacities[1] == pytest.approx(middle, abs=0.006)


def test_the_standard_error_is_that_of_the_seeds_at_the_last_step(results: Results) -> None:
    (scenario, _) = results.scenarios
    keys = [
        cell.training_key
        for cell in results.cells
        if (cell.stage, cell.scenario, cell.arm) == ("search", scenario.name, "c003")
    ]
    losses = {
        row.training_key: row.loss
        for row in results.rows
        if isinstance(row, EvaluationRow) and row.final and row.condition == "faulty"
    }
    own = [loss for key in keys if (loss := losses[key]) is not None]
    assert len(own) == 2
    best = search_maps(results)[0].rows[0]
    assert best.value == pytest.approx(fmean(own))
    assert best.error == pytest.approx(stdev(own) / math.sqrt(2))


def test_a_loss_after_fewer_steps_never_stands_beside_one_of_the_whole_training(
    tmp_path: Path,
) -> None:
    """Planted: the config that was stopped is the best one at its rung."""
    asked = [
        Asked(drawn(random.Random(0)), [0.01], "stopped"),
        Asked(drawn(random.Random(1)), [0.9, 0.8], "stopped"),
        Asked(drawn(random.Random(2)), [], "failed"),
        Asked(drawn(random.Random(3)), [0.7, 0.6], "running"),
        Asked(drawn(random.Random(4)), [0.9, 0.7, 0.5]),
        Asked(drawn(random.Random(5)), [0.9, 0.7, 0.4]),
        Asked(drawn(random.Random(6)), [0.9, None], "failed"),
    ]
    (section,) = search_sections(planted(tmp_path, NUMBERS, asked))
    lines = [(row[0], row[1], row[2]) for row in section.table.rows]
    assert lines == [
        ("c005", "finished", "0.4000"),
        ("c004", "finished", "0.5000"),
        ("c001", "stopped at rung 2 of 3: 0.8000 there", "n/a"),
        ("c000", "stopped at rung 1 of 3: 0.0100 there", "n/a"),
        ("c003", "running at rung 2 of 3: 0.6000 there", "n/a"),
        ("c006", "failed after rung 2 of 3", "n/a"),
        ("c002", "failed", "n/a"),
    ]
    markers = [n for n in figure(section).iter("circle") if n.attrib["class"] == "mean"]
    assert len(markers) == 2
    assert "stopped at rung 1 of 3: 0.0100 there" in texts(figure(section))


def test_a_config_that_went_wrong_does_not_press_the_others_together(tmp_path: Path) -> None:
    asked = [
        Asked(drawn(random.Random(n)), [0.9, 0.8, loss])
        for n, loss in enumerate((0.1332, 0.1333, 0.1366, 0.1371, 0.14, 1.9994))
    ]
    (section,) = search_sections(planted(tmp_path / "wrong", NUMBERS, asked))
    picture = figure(section)
    places = [float(n.attrib["cx"]) for n in picture.iter("circle") if n.attrib["class"] == "mean"]
    assert places == sorted(places)
    assert len(places) == 5
    assert places[-1] - places[0] > 0.8 * (RIGHT - AXIS)
    (arrow,) = picture.iter("polyline")
    assert f"{RIGHT:.1f}," in arrow.attrib["points"]
    assert {"1.9994", "mean ± standard error (>: beyond)"} <= set(texts(picture))
    (section,) = search_sections(planted(tmp_path / "well", NUMBERS, asked[:-1]))
    assert not list(figure(section).iter("polyline"))
    assert "mean ± standard error" in texts(figure(section))


def test_finalists_and_controls_are_marked(results: Results) -> None:
    one, _ = search_maps(results)
    assert {row.name: row.finalist for row in one.rows if row.finalist} == {"c000": "finalist1"}
    assert [row.name for row in one.controls] == [
        "fault_only", "global", "targeted", "healthy", "random",
    ]  # fmt: skip
    where = {row.name: noise_text(row.levels) for row in one.controls}
    assert where["fault_only"] == "none"
    assert where["global"] == f"all {LAYERS} layers, 0.05"
    assert where["targeted"] == "layer 10, 0.05"
    assert where["healthy"] == "layers 0-9,11-27, 0.05"
    section, _ = search_sections(results)
    picture = figure(section)
    said = texts(picture)
    assert "c000 finalist1" in said
    assert "went to the confirmation" in said
    assert "no noise" in said
    lines = [n for n in picture.iter("line") if n.attrib["class"] == "reference"]
    assert {line.attrib["x1"] == line.attrib["x2"] for line in lines} == {True, False}
    assert section.table.rows[1][0] == "c000 (finalist1)"
    assert [row[1] for row in section.table.rows[4:]] == ["control, finished"] * 5


def test_a_standard_error_does_not_leave_the_axis(tmp_path: Path) -> None:
    """Found: a row behind the limit of the axis, and still on it, had a whisker through its number."""
    seeds = (
        (0.13, 0.131, 0.132), (0.132, 0.135, 0.14), (0.135, 0.14, 0.15),
        (0.14, 0.15, 0.16), (0.13, 0.14, 0.30), (0.135, 0.14, 0.415),
    )  # fmt: skip
    asked = [Asked(drawn(random.Random(n)), [0.9, 0.8, fmean(one)]) for n, one in enumerate(seeds)]
    (one,) = search_maps(planted(tmp_path, NUMBERS, asked))
    rows = tuple(
        row._replace(error=stdev(own) / math.sqrt(3))
        for row, own in zip(one.rows, seeds, strict=True)
    )
    picture = ElementTree.fromstring(search_svg(one._replace(rows=rows), shades_of([one]), "map"))
    whiskers = [n for n in picture.iter("line") if n.attrib["class"] == "whisker"]
    assert len(whiskers) == 6
    assert all(AXIS <= float(n.attrib["x1"]) <= float(n.attrib["x2"]) <= RIGHT for n in whiskers)
    assert float(whiskers[-1].attrib["x2"]) == RIGHT
    assert len(list(picture.iter("polyline"))) == 1, "it says that it goes on"
    assert any("(>: beyond)" in said for said in texts(picture))


def test_without_a_confirmation_nobody_is_a_finalist(tmp_path: Path) -> None:
    results = load_results(write_fake(tmp_path, confirm=False, **TWO).folder)
    assert not any(row.finalist for one in search_maps(results) for row in one.rows)
    assert "went to the confirmation" not in render_html(context(results))


WINDOW = {"kind": "window", "centre": 12, "width": 3}
FALLING = {"kind": "geometric", "sigma_start": 0.08, "sigma_end": 0.001}
STEADY = {"kind": "constant", "sigma": 0.1}
THREE = dict.fromkeys((11, 12, 13), 0.08)


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        (None, {}),
        ({"targeting": "none"}, {}),
        ({"targeting": WINDOW, "schedule": FALLING}, THREE),
        (
            {"targeting": WINDOW, "schedule": FALLING, "normalise": "energy"},
            {layer: level * math.sqrt(LAYERS / 3) for layer, level in THREE.items()},
        ),
        ({"targeting": "targeted", "schedule": STEADY}, {10: 0.1}),
        (
            {
                "targeting": {"kind": "multipliers", "values": {0: 2.0, 27: 0.5}, "default": 0.0},
                "schedule": STEADY,
            },
            {0: 0.2, 27: 0.05},
        ),
        (
            # A part of the layers that gets its noise late counts with that noise.
            {
                "targeting": {
                    "kind": "zone", "middle": [4, 5], "edge": [0], "middle_multiplier": 0.0,
                    "boundary": 0.5, "middle_multiplier_after": 3.0,
                },
                "schedule": STEADY,
            },
            {0: 0.1, 4: 0.3, 5: 0.3},
        ),
    ],
)  # fmt: skip
def test_the_largest_noise_of_each_layer(
    noise: dict[str, Any] | None, expected: dict[int, float]
) -> None:
    arm = ArmSpec.model_validate({"noise": noise})
    levels = largest_noise(arm, steps=20, layer_count=LAYERS, fault_layers=(10,))
    assert len(levels) == LAYERS
    assert {k: v for k, v in enumerate(levels) if v} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("levels", "text"),
    [
        (None, "n/a"),
        ((0.0, 0.0), "none"),
        ((0.0, 0.08, 0.0), "layer 1, 0.08"),
        ((0.0, 0.08, 0.08), "layers 1-2, 0.08"),
        ((0.05, 0.05), "all 2 layers, 0.05"),
        ((0.01, 0.0, 0.08), "layers 0,2, 0.01 to 0.08"),
    ],
)
def test_noise_in_words(levels: tuple[float, ...] | None, text: str) -> None:
    assert noise_text(levels) == text


@pytest.mark.parametrize(
    ("carrier", "relative", "said"),
    [
        ("hidden", None, "hidden"),
        ("rmsnorm_weight", False, "rmsnorm_weight"),
        ("rmsnorm_weight", True, "rmsnorm_weight, relative"),
        ("linear_weight", True, "linear_weight, relative"),
    ],
)
def test_sigma_is_said_to_be_what_the_carrier_makes_of_it(
    tmp_path: Path, carrier: str, relative: bool | None, said: str
) -> None:
    """Found: relative and absolute noise had one name, and both the name standard deviation."""
    values = ["hidden", "linear_weight", "rmsnorm_weight"]
    dimensions: dict[str, Any] = {"carrier": {"kind": "choice", "values": values}}
    params: dict[str, Any] = {"carrier": carrier}
    if relative is not None:
        when = {"carrier": [carrier]}
        dimensions["carrier_relative"] = {"kind": "choice", "values": [False, True], "when": when}
        params["carrier_relative"] = relative
    asked = [Asked(params, [0.9, 0.8, 0.3]), Asked({"carrier": "hidden"}, [0.9, 0.8, 0.4])]
    results = planted(tmp_path, dimensions, asked)
    (section,) = search_sections(results)
    column = [one.label for one in section.table.columns].index("carrier")
    assert section.table.rows[0][column] == said
    assert (said in texts(figure(section))) is (carrier != "hidden")
    for page in (render_html(context(results)), render_markdown(context(results))):
        assert "as a share of the value it is added to" in page
        assert "largest sigma" in page
        assert "Equal shades are equal sigmas" in page
    assert "standard deviation" not in section.figure


def test_of_many_configs_the_best_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    rng = random.Random(0)
    asked = [Asked(drawn(rng), [0.9, 0.8, 0.5 + 0.01 * n]) for n in range(MOST_ROWS + 2)]
    asked += [Asked(drawn(rng), [0.9], "stopped"), Asked(drawn(rng), [], "failed")]
    results = planted(tmp_path, NUMBERS, asked)
    (one,) = search_maps(results)
    assert [row.name for row in one.rows] == [f"c{n:03d}" for n in range(MOST_ROWS)]
    note = "Not shown: 4 further configs (2 finished, 1 stopped, 1 failed)."
    assert note in render_html(context(results))
    assert note in render_markdown(context(results))
    (section,) = search_sections(results)
    assert len(section.table.rows) == MOST_ROWS


@pytest.mark.parametrize("declared", [True, False])
def test_without_a_search_there_is_no_section(tmp_path: Path, declared: bool) -> None:
    """A study that has no search, and one whose search has not begun."""
    with pytest.MonkeyPatch.context() as patch:
        if not declared:
            patch.setattr(fake_ledger, "make_study", functools.partial(make_study, search=None))
        fake = write_fake(tmp_path, search=False, **TWO)
    results = load_results(fake.folder)
    assert (results.study.search is not None) is declared
    assert search_sections(results) == ()
    for page in (render_html(context(results)), render_markdown(context(results))):
        assert "What the search looked at" not in page
        assert "Search map" not in page


def test_full_fine_tuning_and_configs_without_noise_have_their_rows(tmp_path: Path) -> None:
    dimensions = {
        "learning_rate": {"kind": "float", "low": 0.0005, "high": 0.005, "log": True},
        "targeting": {"kind": "choice", "values": ["none", "global"]},
        "carrier": {"kind": "choice", "values": ["hidden", "rmsnorm_weight"],
                    "when": {"targeting": ["global"]}},
    }  # fmt: skip
    asked = [
        Asked({"learning_rate": 0.001, "targeting": "none"}, [0.9, 0.8, 0.3]),
        Asked(
            {"learning_rate": 0.002, "targeting": "global", "carrier": "hidden"}, [0.9, 0.8, 0.4]
        ),
        Asked(
            {"learning_rate": 0.002, "targeting": "global", "carrier": "rmsnorm_weight"},
            [0.9, 0.8, None],
            "failed",
        ),
    ]
    training = {"method": {"kind": "full"}, "steps": 20, "warmup_steps": 2}
    results = planted(tmp_path, dimensions, asked, training=training)
    (section,) = search_sections(results)
    assert [row[:5] for row in section.table.rows] == [
        ("c000", "finished", "0.3000", "n/a", "none"),
        ("c001", "finished", "0.4000", "hidden", "all 28 layers, 0.05"),
        ("c002", "failed after rung 3 of 3", "n/a", "rmsnorm_weight", "all 28 layers, 0.05"),
    ]
    said = texts(figure(section))
    assert {"no noise", "hidden", "rmsnorm_weight", "failed after rung 3 of 3"} <= set(said)


def test_a_search_without_any_noise_has_its_map(tmp_path: Path) -> None:
    dimensions = {
        "learning_rate": {"kind": "float", "low": 0.0005, "high": 0.005, "log": True},
        "targeting": {"kind": "fixed", "value": "none"},
    }
    asked = [Asked({"learning_rate": 0.001, "targeting": "none"}, [], "running")]
    (section,) = search_sections(planted(tmp_path, dimensions, asked))
    assert section.summary == "1 config, none finished with a loss"
    assert {"no noise", "no noise anywhere", "running"} <= set(texts(figure(section)))


def test_a_config_that_cannot_exist_in_the_scenario_says_so(tmp_path: Path) -> None:
    everywhere = {"faults": [{"kind": "dead_zone", "layers": "all", "threshold": 0.1}]}
    dimensions = {"targeting": {"kind": "choice", "values": ["healthy", "global"]}}
    asked = [Asked({"targeting": "healthy"}, [], "failed")]
    (section,) = search_sections(planted(tmp_path, dimensions, asked, scenario=everywhere))
    assert "cannot exist here" in texts(figure(section))
    assert section.table.rows[0][4] == "n/a"


def test_a_model_that_is_elsewhere_leaves_the_table(tmp_path: Path) -> None:
    asked = [Asked(drawn(random.Random(0)), [0.9, 0.8, 0.5])]
    model = {"path": str(tmp_path / "elsewhere")}
    results = planted(tmp_path, NUMBERS, asked, model=model)
    (section,) = search_sections(results)
    assert section.figure == ""
    assert section.table.rows[0][:3] == ("c000", "finished", "0.5000")
    page = render_html(context(results))
    assert "its number of layers is not known: no map." in page
    assert "The same as a table" not in page


def test_names_of_users_cannot_leave_the_picture(tmp_path: Path) -> None:
    """A long own arm is cut in the picture, and whole in the table."""
    name = "a_very_long_name_of_an_own_arm"
    arms = {name: {"noise": {"targeting": "global"}}}
    results = load_results(write_fake(tmp_path, arms=arms, **TWO).folder)
    section, _ = search_sections(results)
    assert name not in texts(figure(section))
    assert "a_very_long_name\N{HORIZONTAL ELLIPSIS}" in texts(figure(section))
    assert section.table.rows[-1][0] == name


def searched(
    output: Path, n: int, loss: Any, *, dimensions: dict[str, Any] = NUMBERS, seed: int = 0
) -> Results:
    """Plant n configs at random whose losses are what `loss` makes of their parameters."""
    rng = random.Random(seed)
    asked = []
    for _ in range(n):
        params = drawn(rng)
        if "targeting" in dimensions:
            params["targeting"] = rng.choice(["window", "global"])
            if params["targeting"] == "window":
                params |= {"window_centre": rng.randint(0, 27), "window_width": 3}
        asked.append(Asked(params, [2.0, 1.5, loss(params, rng)]))
    return planted(output, dimensions, asked)


def scenario_of(results: Results) -> str:
    return results.scenarios[0].name


def by_log_sigma(params: Params, rng: random.Random) -> float:
    return 0.5 + abs(math.log(float(params["sigma_start"]) / 0.03))


def test_a_parameter_that_decides_everything_beside_two_that_decide_nothing(
    tmp_path: Path,
) -> None:
    results = searched(tmp_path, 60, by_log_sigma)
    found = importance(results, scenario_of(results))
    assert (found.configs, found.reason) == (60, "")
    first, *others = found.weights
    assert (first.parameter, first.configs, first.beyond_chance) == ("sigma_start", 60, True)
    assert first.share is not None
    assert first.share > 0.9
    assert {one.parameter: one.beyond_chance for one in others} == {
        "sigma_ratio": False, "stages": False,
    }  # fmt: skip
    assert math.fsum(one.share or 0.0 for one in found.weights) == pytest.approx(1.0)
    again = importance(results, scenario_of(results))
    assert again == found
    page, text = render_html(context(results)), render_markdown(context(results))
    for printed in (page, text):
        assert "What mattered in the search (exploratory)" in printed
        assert "It explores one search and makes no claims." in printed
        assert "60 finished configs" in printed
        assert "That holds for configs drawn at random: TPE gathers" in printed
        assert "the best being those of all configs" in printed


CONDITIONAL: dict[str, Any] = {
    **NUMBERS,
    "targeting": {"kind": "choice", "values": ["global", "window"]},
    "window_centre": {"kind": "int", "low": 0, "high": 27, "when": {"targeting": ["window"]}},
    "window_width": {"kind": "fixed", "value": 3, "when": {"targeting": ["window"]}},
}


def by_centre(params: Params, rng: random.Random) -> float:
    """Windows near layer 20 win, whatever else; global noise comes to the middle of the others."""
    if params["targeting"] == "global":
        return 0.5 + rng.uniform(0.0, 1.0)
    return 0.5 + abs(int(params["window_centre"]) - 20) / 20


def test_a_parameter_that_some_configs_have_is_judged_among_those(tmp_path: Path) -> None:
    results = searched(tmp_path, 160, by_centre, dimensions=CONDITIONAL)
    found = importance(results, scenario_of(results))
    weights = {one.parameter: one for one in found.weights}
    assert set(weights) == {*NUMBERS, "targeting", "window_centre"}, "what is fixed is no parameter"
    centre = weights["window_centre"]
    assert FEWEST <= centre.configs < 160
    assert found.weights[0] == centre
    assert centre.beyond_chance


def test_a_parameter_that_few_configs_have_gets_no_number(tmp_path: Path) -> None:
    results = searched(tmp_path, FEWEST + 2, by_centre, dimensions=CONDITIONAL)
    found = importance(results, scenario_of(results))
    last = found.weights[-1]
    assert last.parameter == "window_centre"
    assert last.configs < FEWEST
    assert (last.share, last.beyond_chance) == (None, False)
    assert math.fsum(one.share or 0.0 for one in found.weights) == pytest.approx(1.0)
    (section,) = search_sections(results)
    assert section.importance is not None
    assert section.importance.rows[-1] == ("window_centre", "n/a", "n/a", str(last.configs))
    assert "fewer than" in section.importance.notes[-1]


@pytest.mark.parametrize("n", [1, FEWEST - 1])
def test_too_few_finished_configs_have_a_sentence(tmp_path: Path, n: int) -> None:
    results = searched(tmp_path, n, by_log_sigma)
    (section,) = search_sections(results)
    assert section.importance is None
    assert section.unsaid.endswith(f"from {FEWEST} finished configs on; here are {n}.")
    for page in (render_html(context(results)), render_markdown(context(results))):
        assert section.unsaid in page
        assert "What mattered in the search (exploratory)" not in page


def test_only_finished_configs_count(tmp_path: Path) -> None:
    """Planted: enough configs, but half of them were stopped, with losses of fewer steps."""
    rng = random.Random(0)
    asked = [Asked(drawn(rng), [2.0, 1.5, 1.0 + rng.random()]) for _ in range(FEWEST - 1)]
    asked += [Asked(drawn(rng), [0.1], "stopped") for _ in range(FEWEST)]
    asked += [Asked(drawn(rng), [2.0, 1.5, None])]
    results = planted(tmp_path, NUMBERS, asked)
    assert importance(results, scenario_of(results)).configs == FEWEST - 1


def test_equal_losses_have_a_sentence(tmp_path: Path) -> None:
    results = searched(tmp_path, FEWEST, lambda params, rng: 0.5)
    found = importance(results, scenario_of(results))
    assert found.weights == ()
    assert found.reason == f"All {FEWEST} finished configs came to the same loss: nothing mattered."


def test_the_fewest_configs_are_enough_for_a_parameter_that_decides_most(tmp_path: Path) -> None:
    """Planted: sigma_start makes 80 % of the variance, with its best value in the middle."""

    def valley(params: Params, rng: random.Random) -> float:
        place = math.log(float(params["sigma_start"]) / 0.005) / math.log(40)
        return math.sqrt(0.8 * 180) * (place - 0.5) ** 2 + math.sqrt(0.2) * rng.gauss(0, 1)

    found = []
    for seed in range(20):
        results = searched(tmp_path / str(seed), FEWEST, valley, seed=seed)
        weights = importance(results, scenario_of(results)).weights
        found += [one for one in weights if one.parameter == "sigma_start"]
    assert len(found) == 20
    assert sum(one.beyond_chance for one in found) >= 12
    alone = sum((one.share or 0.0) > 0.999 for one in found)
    assert alone >= 6, "what decides nothing often shows no more than its shuffles do"


def test_what_decides_nothing_is_rarely_beyond_chance(tmp_path: Path) -> None:
    """Over searches in which nothing matters, about one parameter in `SHUFFLES` + 1 is beyond chance."""
    beyond = []
    for seed in range(20):
        results = searched(
            tmp_path / str(seed), FEWEST, lambda params, rng: rng.random(), seed=seed
        )
        beyond += [one.beyond_chance for one in importance(results, scenario_of(results)).weights]
    assert len(beyond) == 60
    assert sum(beyond) <= 4 * len(beyond) / (SHUFFLES + 1)
