"""Where the gradient goes, as the report and TensorBoard show planted observations."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from fake_ledger import LAYERS, Fake, write_fake

from aqn_tune.ledger import Ledger
from aqn_tune.ledger.rows import (
    Activation,
    CellRow,
    LayerMechanism,
    MechanismRow,
    SiteActivation,
)
from aqn_tune.report.events import EVENT_FILE
from aqn_tune.report.loading import load_results
from aqn_tune.report.mechanism import MOST_STEPS, Scene, activation_table, scenes
from aqn_tune.report.mechanism_events import histogram, mean_profiles, profiles, summary
from aqn_tune.report.mechanism_figure import mechanism_sections, mechanism_svg
from aqn_tune.report.page import context, render_html, render_markdown
from aqn_tune.report.results import Results
from aqn_tune.report.tensorboard import TensorBoardWriter, rebuild
from aqn_tune.study.folder import StudyFolder

SHARED = {"sweep": {"faults.0.threshold": [0.1, 0.5], "during": ["both", "eval"]}}
MILD = "both-threshold0.1"
DEAD = 10
"""Planted: the gradient of the arms that train on the device is lost up to this layer."""


def planted(arm: str, step: int, replicate: int, *, layers: int = LAYERS) -> dict[str, Any]:
    """Return the observation of an arm: fault_only loses its gradient, targeted keeps a part."""
    lost = {"fault_only": 0.1, "global": 0.2, "targeted": 0.7}.get(arm, 1.0)
    wobble = 0.01 * (replicate % 3 - 1) if lost < 1 else 0.0
    gradients = tuple(
        LayerMechanism(
            layer=layer,
            gradient_norm=2.0 * (lost + wobble if layer <= DEAD else 1.0),
            norm_ratio=lost + wobble if layer <= DEAD else 1.0,
            cosine=(lost + wobble if step else 0.9) if layer <= DEAD else 0.95,
        )
        for layer in range(layers)
    )
    before = Activation(rms=2.0, max_abs=30.0, kurtosis=4.0, zero_fraction=0.0)
    after = Activation(rms=1.9, max_abs=30.0, kurtosis=None, zero_fraction=0.84)
    sites = [
        SiteActivation(layer=layer, module=".", site="output", injected="nothing", after=after)
        for layer in range(layers)
    ]
    if arm not in ("clean", ""):
        fault = SiteActivation(
            layer=DEAD, module=".", site="output", injected="fault", kind="dead_zone",
            before=before, after=after,
        )  # fmt: skip
        noise = fault.model_copy(update={"injected": "noise", "kind": "hidden"})
        sites[DEAD:DEAD] = [noise, fault]
    return {"step": step, "layers": gradients, "sites": tuple(sites)}


def observations(
    rows: Sequence[Any], steps: Sequence[int], stage: str = "confirm"
) -> Iterator[MechanismRow]:
    """Yield planted rows for every training of a stage, named by the first arm that uses it."""
    done = set()
    for row in rows:
        if isinstance(row, CellRow) and row.stage == stage and row.training_key not in done:
            done.add(row.training_key)
            for step in steps:
                seen = planted(row.arm, step, row.replicate)
                yield MechanismRow(training_key=row.training_key, **seen)


def observed(
    folder: Path, steps: Sequence[int] = (0, 19), *, stage: str = "confirm", **changes: Any
) -> Fake:
    fake = write_fake(folder, mechanism={"steps": list(steps)}, **{**SHARED, **changes})
    added = tuple(observations(fake.rows, steps, stage))
    Ledger(fake.folder.ledger).append(added)
    return fake._replace(rows=(*fake.rows, *added))


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Fake:
    return observed(tmp_path_factory.mktemp("observed"))


@pytest.fixture(scope="module")
def results(fake: Fake) -> Results:
    return load_results(fake.folder)


@pytest.fixture(scope="module")
def markdown(results: Results) -> str:
    return render_markdown(context(results))


def scene_of(results: Results, title: str) -> Scene:
    return next(scene for scene in scenes(results) if scene.title.startswith(title))


# -- the page --------------------------------------------------------------------------------------


def test_a_study_that_observes_nothing_has_no_such_section(tmp_path: Path) -> None:
    results = load_results(write_fake(tmp_path, **SHARED).folder)
    assert mechanism_sections(results) == ()
    values = context(results)
    assert "Where the gradient goes" not in render_markdown(values)
    assert "Where the gradient goes" not in render_html(values)


def test_evidence_and_verdicts_do_not_see_observations(fake: Fake, tmp_path: Path) -> None:
    plain = load_results(write_fake(tmp_path, mechanism={"steps": [0, 19]}, **SHARED).folder)
    seen = load_results(fake.folder)
    assert seen.rows == plain.rows
    assert seen.evidence == plain.evidence
    assert seen.gaps == ()


def test_the_reading_names_the_layers_that_lose_the_gradient(results: Results) -> None:
    assert scene_of(results, "threshold 0.1").reading() == (
        "The cosine to the clean gradient falls below 0.5 "
        "at step 0 nowhere (every arm); "
        "at step 19 in layers 0-10 (fault_only, global), "
        "nowhere (clean, targeted, healthy, random, finalist1)."
    )


def test_numbers_are_means_over_seeds(results: Results) -> None:
    profile = scene_of(results, "threshold 0.1").profile("fault_only", 19)
    assert set(profile) == set(range(LAYERS))
    wobble = sum(0.01 * (replicate % 3 - 1) for replicate in range(8)) / 8
    assert profile[DEAD].ratio == pytest.approx(0.1 + wobble)
    assert profile[DEAD].cosine == pytest.approx(0.1 + wobble)
    assert profile[DEAD + 1] == pytest.approx((1.0, 0.95))


def test_scenarios_of_the_same_trainings_share_a_figure(results: Results) -> None:
    """On a healthy device every threshold at deployment is the same training."""
    titles = [section.title for section in mechanism_sections(results)]
    assert titles == [
        "threshold 0.1, fault in training and at deployment (confirm seeds)",
        "threshold 0.1; threshold 0.5, fault at deployment only (confirm seeds)",
        "threshold 0.5, fault in training and at deployment (confirm seeds)",
    ]


def test_the_text_holds_the_reading_and_the_table(markdown: str) -> None:
    section = markdown.split("## Where the gradient goes")[1].split("\n## ")[0]
    assert "same weights and the same batch" in section
    assert "### threshold 0.5, fault in training and at deployment (confirm seeds)" in section
    assert r"in layers 0-10 (fault\_only, global)" in section
    line = next(x for x in section.splitlines() if x.startswith(r"| dead\_zone | 10 |"))
    assert line == (
        r"| dead\_zone | 10 | layer output | fault\_only | 2 | 1.9 | 30 | 30 | 4.0 | n/a | "
        "0.0\u202f% | 84.0\u202f% |"
    )
    assert "hidden" not in section  # noise is no fault


def test_the_page_draws_every_arm_by_layer_and_step(results: Results) -> None:
    html = render_html(context(results))
    section = html.split("Where the gradient goes</h2>")[1].split("<h2>")[0]
    figures = re.findall(r"<svg.*?</svg>", section, flags=re.S)
    assert len(figures) == 3
    for figure in figures:
        root = ElementTree.fromstring(figure)
        name = root.attrib["aria-label"]
        assert "falls below 0.5" in name
        assert root.find("title").text == name  # type: ignore[union-attr]
        texts = [element.text for element in root.iter("text")]
        assert {"step 0", "step 19", "decoder layer", "norm / clean norm"} <= set(texts)
        assert {"clean", "fault_only", "targeted", "finalist1"} <= set(texts)
        assert not {"finalist1_none", "c000"} & set(texts)
        means = [e for e in root.iter() if "mean" in e.attrib.get("class", "").split()]
        arms = 7
        assert len(means) == arms + arms * 2 * 2 * LAYERS  # legend; quantities x steps x layers
        width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
        for element in means:
            if element.tag == "circle":
                assert 0 <= float(element.attrib["cx"]) <= width
                assert 0 <= float(element.attrib["cy"]) <= height


def test_arms_look_as_in_the_curves(results: Results) -> None:
    """Colour and shape of an arm are the same in every chart of a page."""
    html = render_html(context(results))
    curve, gradient = (html.split(f"<h2>{name}")[1] for name in ("Fault in tr", "Where the gr"))

    def legend(section: str) -> dict[str, str]:
        found = re.findall(r'class="mean (s\d)"/><text[^>]*"small">([^<]*)</text>', section)
        return {name.partition(" (")[0]: css for css, name in reversed(found)}

    assert legend(gradient).items() <= legend(curve).items()
    assert len(legend(gradient)) == 7


def test_a_layer_without_a_number_breaks_the_line(results: Results) -> None:
    whole = scene_of(results, "threshold 0.1")
    rows = {
        (arm, step): tuple(
            row and row.model_copy(update={"layers": tuple(x for x in row.layers if x.layer != 5)})
            for row in seeds
        )
        for (arm, step), seeds in whole.rows.items()
    }
    holed = Scene(whole.title, whole.stage, whole.steps, whole.arms, rows)
    lines = [figure.count("<polyline") for figure in (mechanism_svg(whole), mechanism_svg(holed))]
    assert lines[1] == 2 * lines[0]
    assert 5 not in holed.profile("clean", 0)


def test_a_large_ratio_stays_on_the_page(results: Results) -> None:
    whole = scene_of(results, "threshold 0.1")
    key = ("global", 19)
    layers = [LayerMechanism(layer=0, gradient_norm=9e6, norm_ratio=5e4, cosine=-0.8)]
    rows = {**whole.rows, key: tuple(
        row and row.model_copy(update={"layers": (*layers, *row.layers[1:])})
        for row in whole.rows[key]
    )}  # fmt: skip
    figure = mechanism_svg(Scene(whole.title, whole.stage, whole.steps, whole.arms, rows))
    root = ElementTree.fromstring(figure)
    texts = [element.text or "" for element in root.iter("text")]
    assert max(int(text) for text in texts if text.isdigit()) >= 1000
    for element in root.iter("circle"):
        assert 0 <= float(element.attrib["cy"]) <= float(root.attrib["viewBox"].split()[3])


def test_a_failed_seed_leaves_no_mean_behind_its_failure(tmp_path: Path) -> None:
    """Planted: seven seeds with good gradients, the eighth failed before its last step."""
    fake = write_fake(
        tmp_path, mechanism={"steps": [0, 19]}, fail=[(MILD, "fault_only", 3)], **SHARED
    )
    lost = next(
        row.training_key
        for row in fake.rows
        if isinstance(row, CellRow)
        and (row.stage, row.scenario, row.arm, row.replicate) == ("confirm", MILD, "fault_only", 3)
    )
    rows = [
        row
        for row in observations(fake.rows, (0, 19))
        if (row.training_key, row.step) != (lost, 19)
    ]
    Ledger(fake.folder.ledger).append(rows)
    scene = scene_of(load_results(fake.folder), "threshold 0.1")
    assert scene.profile("fault_only", 0)[0].cosine is not None
    assert set(scene.profile("fault_only", 19).values()) == {(None, None)}
    assert "in no layer that is known (fault_only)" in scene.reading()
    assert scene.profile("global", 19)[0].cosine is not None


def test_seeds_that_are_still_to_come_do_not_hide_those_that_are_there(tmp_path: Path) -> None:
    fake = write_fake(tmp_path, mechanism={"steps": [0]}, first=2, **SHARED)
    rows = [
        row
        for row in observations(fake.rows, (0,))
        if any(
            isinstance(cell, CellRow)
            and (cell.training_key, cell.stage) == (row.training_key, "confirm")
            and cell.replicate < 2
            for cell in fake.rows
        )
    ]
    Ledger(fake.folder.ledger).append(rows)
    scene = scene_of(load_results(fake.folder), "threshold 0.1")
    assert scene.profile("fault_only", 0)[0].ratio == pytest.approx(0.1 - 0.005)


def test_before_the_confirmation_the_controls_of_the_search_are_shown(tmp_path: Path) -> None:
    fake = observed(tmp_path, stage="search", confirm=False)
    found = scenes(load_results(fake.folder))
    assert [scene.stage for scene in found] == ["search"] * 3
    assert set(found[0].arms) == {"clean", "fault_only", "global", "targeted", "healthy", "random"}
    assert "(search seeds)" in render_markdown(context(load_results(fake.folder)))


def test_of_many_steps_the_first_and_the_last_are_among_those_shown(tmp_path: Path) -> None:
    fake = observed(tmp_path, tuple(range(0, 20, 3)), sweep={"faults.0.threshold": [0.1]})
    [scene] = scenes(load_results(fake.folder))
    assert scene.steps == (0, 6, 12, 18)
    assert len(scene.steps) == MOST_STEPS


def test_many_places_of_a_fault_are_pooled(results: Results) -> None:
    whole = scene_of(results, "threshold 0.1")

    def everywhere(row: MechanismRow | None) -> MechanismRow | None:
        if row is None:
            return None
        fault = next((site for site in row.sites if site.injected == "fault"), None)
        if fault is None:
            return row
        copies = [
            fault.model_copy(update={"layer": layer, "module": module})
            for layer in range(3, 9)
            for module in ("mlp.up_proj", "mlp.down_proj")
        ]
        return row.model_copy(update={"sites": tuple(copies)})

    rows = {key: tuple(map(everywhere, seeds)) for key, seeds in whole.rows.items()}
    table = activation_table(Scene(whole.title, whole.stage, whole.steps, whole.arms, rows))
    assert table is not None
    assert [row[:4] for row in table.rows][:2] == [
        ("dead_zone", "3-8", "modules output", "fault_only"),
        ("dead_zone", "3-8", "modules output", "global"),
    ]


def test_the_section_needs_neither_torch_nor_ray(fake: Fake) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from aqn_tune.report.loading import load_results\n"
        "from aqn_tune.report.page import context, render_html\n"
        "from aqn_tune.study.folder import StudyFolder\n"
        f"results = load_results(StudyFolder(Path({str(fake.folder.root)!r})))\n"
        "assert 'Where the gradient goes' in render_html(context(results))\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# -- TensorBoard -----------------------------------------------------------------------------------


Histograms = dict[tuple[str, str, int], list[tuple[float, float, float]]]


def read_events(root: Path) -> tuple[Histograms, dict[tuple[str, str], list[tuple[int, float]]]]:
    """Return the histograms by run, tag and step, and the scalars of the section by run and tag."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    histograms: Histograms = {}
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for path in root.rglob(EVENT_FILE):
        run = path.parent.relative_to(root).as_posix()
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if not value.tag.startswith("mechanism/"):
                    continue
                if value.tensor.float_val:
                    point = (event.step, value.tensor.float_val[0])
                    curves.setdefault((run, value.tag), []).append(point)
                    continue
                buckets = tensor_util.make_ndarray(value.tensor)
                assert buckets.shape[1] == 3
                key = (run, value.tag, event.step)
                assert key not in histograms
                histograms[key] = [tuple(map(float, bucket)) for bucket in buckets]
    return histograms, curves


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Fake:
    return observed(
        tmp_path_factory.mktemp("small"),
        sweep={"faults.0.threshold": [0.1], "during": ["both"]},
        confirm_spec={"finalists": 1, "replicates": 6},
    )


@pytest.fixture(scope="module")
def events(small: Fake) -> Any:
    rebuild(small.folder, small.study)
    return read_events(small.folder.tensorboard)


def test_each_seed_and_the_mean_have_a_histogram_over_layers_at_each_step(events: Any) -> None:
    histograms, _ = events
    arm = f"confirm/{MILD}/fault_only"
    for run in (f"{arm}/s0", f"{arm}/s5", f"{arm}/mean"):
        for tag in ("mechanism/grad_norm", "mechanism/grad_cosine"):
            assert [step for r, t, step in histograms if (r, t) == (run, tag)] == [0, 19]
    [first, *_, last] = histograms[f"{arm}/s0", "mechanism/grad_norm", 19]
    assert first == (-0.5, 0.5, pytest.approx(0.18))
    assert last == (LAYERS - 1.5, LAYERS - 0.5, 2.0)
    mean = histograms[f"{arm}/mean", "mechanism/grad_cosine", 19]
    assert mean[DEAD][2] == pytest.approx(0.1)


def test_every_layer_has_its_scalars(events: Any) -> None:
    _, curves = events
    run = f"confirm/{MILD}/fault_only/s0"
    tags = {tag for r, tag in curves if r == run}
    layers = [f"layer{layer:02d}" for layer in range(LAYERS)]
    named = ("grad_ratio", "grad_cosine", "rms", "max_abs", "zero_fraction")
    assert tags == {f"mechanism/{name}/{layer}" for name in named for layer in layers}
    assert curves[run, "mechanism/rms/layer03"] == [
        (0, pytest.approx(1.9)),
        (19, pytest.approx(1.9)),
    ]
    assert (f"confirm/{MILD}/fault_only/mean", "mechanism/grad_ratio/layer00") in curves


@pytest.mark.parametrize("order", ["as recorded", "observations first"])
def test_rows_written_live_give_what_the_ledger_gives(
    small: Fake, events: Any, tmp_path: Path, order: str
) -> None:
    rows = list(small.rows)
    if order == "observations first":
        rows.sort(key=lambda row: not isinstance(row, MechanismRow))
    folder = StudyFolder(tmp_path)
    writer = TensorBoardWriter(folder, small.study)
    for start in range(0, len(rows), 50):
        writer.write(rows[start : start + 50])
    found, curves = read_events(tmp_path / "tensorboard")
    assert found.keys() == events[0].keys()
    assert {key: sorted(points) for key, points in curves.items()} == events[1]
    for key, buckets in found.items():
        assert buckets == [pytest.approx(bucket) for bucket in events[0][key]]


def test_a_mean_has_the_layers_that_all_seeds_have() -> None:
    one, other = {"rms": {0: 1.0, 1: 2.0}}, {"rms": {1: 4.0, 2: 5.0}}
    assert mean_profiles((one, other)) == {"rms": {1: 3.0}}


def test_a_negative_cosine_is_a_bucket_without_height() -> None:
    from tensorboard.util import tensor_util

    value = histogram("t", {3: -0.5, 4: 0.5})
    buckets = tensor_util.make_ndarray(value.tensor).tolist()
    assert buckets == [[2.5, 3.5, 0.0], [3.5, 4.5, 0.5]]


def test_what_is_not_finite_is_left_out() -> None:
    nothing = LayerMechanism(layer=0, gradient_norm=None, norm_ratio=None, cosine=None)
    row = MechanismRow(training_key="k", step=0, layers=(nothing,), sites=())
    assert not any(profiles(row).values())
    assert list(summary(profiles(row)).value) == []
