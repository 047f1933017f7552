"""`aqn-tune compare`: what two arms differ in, what is refused, and the numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from synthetic import Behaviour, make_study
from test_search_own_runs import run

from aqn_tune.cli.app import main
from aqn_tune.cli.run import write_study
from aqn_tune.errors import UserError
from aqn_tune.evidence.contrasts import PairedContrast
from aqn_tune.evidence.verdicts import Undetermined
from aqn_tune.models.locate import EMBEDDED_FOLDER
from aqn_tune.report.comparison import compare
from aqn_tune.report.loading import load_results
from aqn_tune.report.manifest import write_manifest
from aqn_tune.report.results import load_study_file
from aqn_tune.report.side import Named, parse_name
from aqn_tune.study.difference import Difference, together
from aqn_tune.study.folder import StudyFolder, study_folder
from aqn_tune.study.loading import make_setting

SWEEP = {"faults.0.threshold": [0.1, 0.3]}
SCENARIO, OTHER = "both-threshold0.1", "both-threshold0.3"


def finished(root: Path, behaviour: Behaviour | None = None, **changes: Any) -> Path:
    """Run a study to its end on the synthetic objective and return its folder."""
    base: dict[str, Any] = {"search": {"configs": 3}, "sweep": SWEEP, **changes}
    study = make_study(root, **base)
    run(study, "search confirm", **({"behaviour": behaviour} if behaviour else {}))
    folder = study_folder(study)
    write_study(study, folder)
    return folder.root


def with_manifest(root: Path) -> Path:
    """Give a study the manifest that says what model files and rows there are."""
    study = load_study_file(StudyFolder(root))
    write_manifest(StudyFolder(root), study, make_setting(study))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("one"))


def pair(folder: Path, one: str, other: str, **more: Any) -> Any:
    (found,) = compare(
        parse_name(f"{folder}:{SCENARIO}/{one}"),
        parse_name(f"{folder}:{SCENARIO}/{other}"),
        **more,
    )
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", {}),
        (":targeted", {"arm": "targeted"}),
        (":s/targeted", {"scenario": "s", "arm": "targeted"}),
        (":search/s/c001", {"stage": "search", "scenario": "s", "arm": "c001"}),
        (":confirm/s/clean/3", {"scenario": "s", "arm": "clean", "replicate": 3}),
    ],
)
def test_how_a_side_is_named(tmp_path: Path, name: str, expected: dict[str, Any]) -> None:
    assert parse_name(f"{tmp_path}{name}") == Named(tmp_path, **expected)
    if name:
        assert parse_name(name.removeprefix(":"), tmp_path) == Named(tmp_path, **expected)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{}/nowhere", "no such folder"),
        ("{}/nowhere:clean", "is no folder of a study"),
        ("{}:serch/s/c001", "got stage 'serch'.*did you mean 'search'"),
        ("{}:confirm/s/clean/x", "got replicate 'x'"),
    ],
)
def test_a_name_that_is_none(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_name(name.format(tmp_path))


@pytest.mark.parametrize(
    ("one", "other", "keys"),
    [
        ("targeted", "global", ["arm.noise.targeting.kind"]),
        ("global", "fault_only", ["arm.noise"]),
        ("fault_only", "clean", ["arm.device"]),
        ("finalist1", "finalist1_none", ["arm.noise"]),
        ("finalist1", "finalist1_global", ["arm.noise.targeting.kind"]),
    ],
)
def test_in_what_arms_differ(folder: Path, one: str, other: str, keys: list[str]) -> None:
    found = pair(folder, one, other)
    assert [each.key for each in found.differs] in (keys, []), "a finalist may be global itself"
    assert found.n == 6


def test_the_numbers_are_those_of_the_report(folder: Path) -> None:
    found = pair(folder, "targeted", "global")
    results = load_results(study_folder_of(folder))
    (judged,) = (
        one
        for scenario in results.evidence.scenarios
        for one in scenario.contrasts
        if one.name == f"{SCENARIO}/targeted-vs-global"
    )
    assert found.contrast == judged.contrast
    assert found.verdict == judged
    back = pair(folder, "global", "targeted")
    assert isinstance(back.contrast, PairedContrast)
    assert back.contrast.improvement == -found.contrast.improvement
    assert back.verdict is None, "the other way round it was not declared"


def study_folder_of(root: Path) -> Any:
    from aqn_tune.study.folder import StudyFolder

    return StudyFolder(root)


def test_arms_that_differ_in_several_keys_are_refused_unless_asked(folder: Path) -> None:
    with pytest.raises(UserError, match=r"differ in 2 keys.*single cause") as raised:
        pair(folder, "targeted", "clean")
    assert 'arm.device: "healthy" -> "scenario"' in str(raised.value)
    assert "arm.noise: null -> {" in str(raised.value)
    assert len(pair(folder, "targeted", "clean", confounded=True).differs) == 2


def test_two_studies_arm_by_arm(folder: Path, tmp_path: Path) -> None:
    other = finished(tmp_path, training={"steps": 20, "warmup_steps": 2, "learning_rate": 1e-3})
    found = compare(Named(other), Named(folder), confounded=True)
    names = {one.arm.name for one in found}
    assert {f"{SCENARIO}/clean", f"{OTHER}/targeted"} <= names
    for one in found:
        if not one.arm.arm.startswith("finalist"):
            assert [each.key for each in one.differs] == ["training.learning_rate"]
        assert one.arm.name == one.reference.name
        assert one.verdict is None
    tested = [one for one in found if isinstance(one.contrast, PairedContrast)]
    assert tested
    assert all(one.q is not None and one.q >= one.contrast.t_p for one in tested)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 8}, "no seed in common .study seeds 8 and 7"),
        ({"training": {"steps": 24, "warmup_steps": 2}}, r"training\.steps: 20 and 24"),
        ({"task": {"kind": "word_problems", "test_rows": 128}}, r"task\.test_rows"),
        ({"eval_batch_size": 32}, "eval_batch_size: 64 and 32"),
        ({"model": {"path": "embedded", "revision": "x"}}, r"model\.revision"),
    ],
)
def test_what_is_not_comparable_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    other = finished(tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        compare(
            Named(other, scenario=SCENARIO, arm="global"),
            Named(folder, scenario=SCENARIO, arm="global"),
            confounded=True,
        )


TARGETED: dict[str, Any] = {"scenario": SCENARIO, "arm": "targeted"}


def rows(word: str) -> str:
    """Return the content of a file of rows."""
    return "".join(
        json.dumps({"question": f"{word} {n}?", "answer": f"#### {n}"}) + "\n" for n in range(9)
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("", ""),
        (
            "test.jsonl",
            "the rows of the task have changed under the same name .task: content hash ",
        ),
        ("model/config.json", "the files of the model have changed under the same name .model: "),
    ],
)
def test_what_has_changed_under_one_name_is_refused(
    tmp_path: Path, changed: str, said: str
) -> None:
    """The original bug: paths were compared, so that losses on other rows came to a difference and a p."""
    shutil.copytree(EMBEDDED_FOLDER, tmp_path / "model")
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.jsonl").write_text(rows(name))
    same: dict[str, Any] = {
        "model": {"path": str(tmp_path / "model")},
        "task": {
            "kind": "jsonl",
            **{name: str(tmp_path / f"{name}.jsonl") for name in ("train", "validation", "test")},
        },
    }
    one = with_manifest(finished(tmp_path / "one", **same))
    if changed:
        path = tmp_path / changed
        path.write_text("7".join(path.read_text().rsplit("8", 1)))
    other = with_manifest(finished(tmp_path / "other", study="another", **same))
    sides = Named(other, **TARGETED), Named(one, **TARGETED)
    if not said:
        (found,) = compare(*sides)
        assert found.notes == ()
        return
    with pytest.raises(UserError, match=f"not comparable: between the two studies {said}"):
        compare(*sides)


@pytest.mark.parametrize(
    ("lacks", "keys"),
    [
        ((), []),
        (("task_fingerprint",), ["rows of the task"]),
        (("task_fingerprint", "model_fingerprint"), ["files of the model", "rows of the task"]),
    ],
)
def test_a_folder_that_does_not_know_its_rows_is_compared_with_a_note(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lacks: tuple[str, ...],
    keys: list[str],
) -> None:
    one, old = (
        with_manifest(shutil.copytree(folder, tmp_path / name / folder.name)) for name in "ab"
    )
    manifest = StudyFolder(old).manifest
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({k: v for k, v in content.items() if k not in lacks}))
    (found,) = compare(Named(one, **TARGETED), Named(old, **TARGETED))
    assert found.notes == tuple(
        f"Not checked: whether both had the same {key}, of which {manifest} has no content hash."
        for key in keys
    )
    for options in ((), ("--json",)):
        with pytest.raises(SystemExit):
            main(["compare", *(f"{side}:{SCENARIO}/targeted" for side in (one, old)), *options])
        said = capsys.readouterr().out
        assert said.count("Not checked") == len(keys)
        assert all(note in said for note in found.notes)
    assert (
        compare(Named(old, **TARGETED), Named(old, scenario=SCENARIO, arm="global"))[0].notes == ()
    )


def test_losses_over_other_numbers_of_rows_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no content hash tells."""
    monkeypatch.setattr("synthetic._rows", lambda setting, split: 99)
    other = finished(tmp_path)
    with pytest.raises(UserError, match=r"they were evaluated on 99 and on \d+ rows"):
        compare(Named(other, **TARGETED), Named(folder, **TARGETED))


def test_other_faults_in_the_evaluation_are_refused(folder: Path) -> None:
    one, other = (Named(folder, scenario=name, arm="global") for name in (SCENARIO, OTHER))
    with pytest.raises(UserError, match=r"threshold: 0\.3 and 0\.1"):
        compare(one, other)


def test_stages_are_not_mixed(folder: Path) -> None:
    one = Named(folder, "search", SCENARIO, "global")
    with pytest.raises(UserError, match="validation split"):
        compare(one, Named(folder, scenario=SCENARIO, arm="global"))
    found = compare(one, one._replace(arm="fault_only"))
    assert found[0].n == 2


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"arm": "targetted"}, "got arm 'targetted'.*did you mean 'targeted'"),
        ({"scenario": "threshold0.2", "arm": "clean"}, "got scenario 'threshold0.2'"),
        ({"scenario": SCENARIO, "arm": "clean", "replicate": 6}, "allowed are 0 to 5"),
    ],
)
def test_an_unknown_name_is_refused(folder: Path, named: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compare(Named(folder, **named), Named(folder, scenario=SCENARIO, arm="fault_only"))


def test_one_run_is_no_test(folder: Path) -> None:
    one = Named(folder, scenario=SCENARIO, arm="global", replicate=2)
    (found,) = compare(one, one._replace(arm="fault_only"))
    assert found.n == 1
    assert isinstance(found.contrast, PairedContrast)
    assert found.contrast.t_p is None


def test_a_seed_that_failed_is_no_seed_that_is_left_out(tmp_path: Path) -> None:
    folder = finished(tmp_path, Behaviour(nan_above=0.0))
    found = pair(folder, "global", "fault_only")
    assert isinstance(found.contrast, Undetermined)
    assert "6 of 6 seeds failed in arm global" in found.contrast.reason
    assert found.q is None


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        ([("a.x", "1", "2")], ["a.x"]),
        ([("noise", "null", "absent"), ("noise.kind", "absent", '"h"')], ["noise"]),
        (
            [("t.kind", '"a"', '"b"'), ("t.width", "absent", "3"), ("t.both", "1", "2")],
            ["t.kind", "t.both"],
        ),
        ([("t.width", "absent", "3")], ["t.width"]),
    ],
)
def test_what_only_goes_along_is_no_key_of_its_own(
    found: list[tuple[str, str, str]], kept: list[str]
) -> None:
    assert [one.key for one in together([Difference(*one) for one in found])] == kept


def test_the_command(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # a name must not be cut in two
    with pytest.raises(SystemExit) as stopped:
        main(["compare", f"{folder}:targeted", "global"])
    assert stopped.value.code in (0, None)
    said = capsys.readouterr().out
    assert "arm.noise.targeting.kind" in said
    assert "targeted (A) and global (B)" in said
    assert SCENARIO in said
    with pytest.raises(SystemExit):
        main(["compare", f"{folder}:targeted", "global", "--json"])
    pairs = json.loads(capsys.readouterr().out)["pairs"]
    assert [one["arm"]["name"] for one in pairs] == [
        f"{SCENARIO}/targeted",
        f"{OTHER}/targeted",
    ]
    assert all(one["n"] == 6 and one["contrast"]["t_p"] <= one["q"] for one in pairs)
    with pytest.raises(SystemExit) as stopped:
        main(["compare", f"{folder}:targeted", "clean"])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
