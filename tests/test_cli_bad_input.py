"""Bad input: one clear message, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest

from aqn_tune.cli.app import main

STUDY = """\
study: demo
output: OUTPUT
scenario:
  faults:
    - kind: dead_zone
      layers: [10]
      threshold: 0.2
sweep:
  faults.0.threshold: [0.01, 0.1]
search:
  space:
    dimensions:
      sigma_start: {kind: float, low: 0.005, high: 0.2}
      targeting: {kind: choice, values: [global, window]}
      window_centre: {kind: int, low: 0, high: 27, when: {targeting: [window]}}
      window_width: {kind: int, low: 1, high: 9, when: {targeting: [window]}}
  configs: 4
confirm: {replicates: 6}
"""

# what is changed in the text, what is overridden, fragments of the message
CASES: dict[str, tuple[tuple[str, str], str, tuple[str, ...]]] = {
    "misspelt key": (
        ("      threshold:", "      treshold:"),
        "",
        ("demo.yaml:7", "scenario.faults.0.treshold", "unknown key", "did you mean 'threshold'?"),
    ),
    "missing key": (
        ("      threshold: 0.2\n", ""),
        "",
        ("demo.yaml:5", "scenario.faults.0.threshold", "missing", "flushed to zero"),
    ),
    "unknown fault": (
        ("dead_zone", "ded_zone"),
        "",
        ("demo.yaml:5", "'ded_zone'", "dead_zone, relative_gaussian", "did you mean 'dead_zone'?"),
    ),
    "layer 28 of 28": (
        ("[10]", "[28]"),
        "",
        ("demo.yaml:6", "scenario.faults.0.layers", "no layer 28 of 28", "0 to 27"),
    ),
    "threshold is no number": (
        ("threshold: 0.2", "threshold: high"),
        "",
        ("demo.yaml:7", "scenario.faults.0.threshold", "got 'high'", "allowed: a number"),
    ),
    "negative sigma": (
        ("", ""),
        "controls.schedule={kind: geometric, sigma_start: -0.1}",
        ("--set", "controls.schedule.sigma_start", "got -0.1", "greater than or equal to 0"),
    ),
    "negative sigma in the space": (
        ("low: 0.005", "low: -0.005"),
        "",
        ("demo.yaml:13", "dimensions.sigma_start", "got -0.005", "of at least 0"),
    ),
    "not YAML": (
        ("layers: [10]", "layers: [10"),
        "",
        ("demo.yaml:7", "not valid YAML"),
    ),
    "key named twice": (
        ("      threshold: 0.2", "      threshold: 0.2\n      threshold: 0.3"),
        "",
        ("demo.yaml:8", "threshold", "twice", "line 7"),
    ),
    "unknown arm in a contrast": (
        ("{replicates: 6}", "{replicates: 6, contrasts: [[globl, fault_only]]}"),
        "",
        ("demo.yaml:18", "confirm.contrasts", "'globl'", "did you mean 'global'?"),
    ),
    "sweep of an unknown key": (
        ("faults.0.threshold: [", "faults.0.treshold: ["),
        "",
        ("demo.yaml:9", "sweep.faults.0.treshold", "did you mean 'faults.0.threshold'?"),
    ),
    "sweep value": (
        ("[0.01, 0.1]", "[0.01, -0.1]"),
        "",
        ("demo.yaml:9", "sweep.faults.0.threshold", "got -0.1"),
    ),
    "scenario twice": (("[0.01, 0.1]", "[0.1, 0.10]"), "", ("demo.yaml:8", "2 combinations")),
    "override of an unknown key": (
        ("", ""),
        "training.stps=50",
        ("--set training.stps=50", "training.stps", "did you mean 'steps'?"),
    ),
    "override without a value": (("", ""), "training.steps", ("key.of.study=value",)),
    "override past the end of a list": (
        ("", ""),
        "scenario.faults.1.threshold=0.1",
        ("is a list of 1", "'1'", "0 to 0"),
    ),
    "too few confirm seeds": (
        ("replicates: 6", "replicates: 5"),
        "",
        ("demo.yaml:18", "confirm.replicates", "got 5", "greater than or equal to 6"),
    ),
    "one look": (
        ("replicates: 6", "replicates: 6, looks: [6]"),
        "",
        ("demo.yaml:18", "confirm.looks", "got [6]", "at least two", "or [] for no looks"),
    ),
    "looks that fall": (
        ("replicates: 6", "replicates: 9, looks: [9, 6, 9]"),
        "",
        ("demo.yaml:18", "confirm.looks", "got [9, 6, 9]", "looks rise"),
    ),
    "a look at too few seeds": (
        ("replicates: 6", "replicates: 8, looks: [4, 8]"),
        "",
        ("demo.yaml:18", "confirm.looks", "got [4, 8]", "at 6 seeds or more"),
    ),
    "looks that end elsewhere": (
        ("replicates: 6", "replicates: 8, looks: [6, 9, 12]"),
        "",
        (
            "demo.yaml:18",
            "confirm.looks",
            "confirm.replicates is 8",
            "set confirm.replicates to 12",
        ),
    ),
    "a look that is no number": (
        ("replicates: 6", "replicates: 8, looks: [six, 8]"),
        "",
        ("demo.yaml:18", "confirm.looks.0", "got 'six'", "a whole number"),
    ),
    "looks without contrasts": (
        ("replicates: 6", "replicates: 8, looks: [6, 8], contrasts: []"),
        "",
        (
            "demo.yaml:18",
            "confirm.looks",
            "got [6, 8]",
            "confirm.contrasts has no contrast",
            "leave out the looks and all 8 seeds are run",
        ),
    ),
    "looks and no arm of a contrast": (
        ("replicates: 6", "finalists: 0, replicates: 8, looks: [6, 8]"),
        "controls.include=[clean, fault_only]",
        ("demo.yaml:18", "confirm.looks", "no contrast whose arms this study has"),
    ),
    "unknown dimension": (
        ("window_centre", "window_center"),
        "",
        ("demo.yaml:11", "'window_center'", "did you mean 'window_centre'?"),
    ),
    "dimension that nobody reads": (
        ("", ""),
        "search.space.dimensions.random_count={kind: fixed, value: 2}",
        ("search.space.dimensions", "random_count has no effect with targeting 'global'", "`when`"),
    ),
    "window beyond the last layer": (
        ("high: 27", "high: 28"),
        "",
        ("demo.yaml:15", "dimensions.window_centre", "got 28", "0 to 27"),
    ),
    "unknown targeting in the space": (
        ("[global, window]", "[global, windw]"),
        "",
        ("demo.yaml:14", "dimensions.targeting", "'windw'", "did you mean 'window'?"),
    ),
    "missing space file": (
        ("", ""),
        "search.space=nowhere.yaml",
        ("search.space", "nowhere.yaml", "no such file"),
    ),
    "missing data file": (
        ("", ""),
        "task={kind: jsonl, train: a.jsonl, test: b.jsonl}",
        ("task.train", "no file a.jsonl"),
    ),
    "missing model": (
        ("", ""),
        "model.path=./nowhere",
        ("model.path", "./nowhere", "nor a folder"),
    ),
    "multipliers of the wrong length": (
        ("", ""),
        "arms={mine: {noise: {targeting: {kind: multipliers, values: [1, 2]}}}}",
        ("arms.mine", "got 2 numbers for 28 layers"),
    ),
    "own arm with a control's name": (
        ("", ""),
        "arms={global: {}}",
        ("arms.global", "taken by a control"),
    ),
    "own arm with a finalist's name": (
        ("", ""),
        "arms={finalist1: {}}",
        ("arms.finalist1", "taken by a finalist or its twin; choose another"),
    ),
    "own arm with the name of the first config": (
        ("", ""),
        "arms={c000: {}}",
        ("arms.c000", "taken by a config of the search, which are c000, c001 and so on"),
    ),
    # of which a search of 101 configs has one
    "own arm with the name of a later config": (
        ("", ""),
        "arms={c100: {}}",
        ("arms.c100", "taken by a config of the search"),
    ),
    "rank without LoRA": (
        ("", ""),
        "arms={mine: {rank: 4}}",
        ("arms.mine.rank", "full fine-tuning has no rank"),
    ),
    "output is a file": (
        ("OUTPUT", "demo.yaml"),
        "",
        ("demo.yaml:2", "output", "is a file"),
    ),
    "decisions with a hole": (
        ("", ""),
        "decisions={contrasts: [[global, fault_only]], rows: [{when: ['>'], say: yes}]}",
        ("decisions", "no row answers"),
    ),
    "unquoted tilde in decisions": (
        ("", ""),
        "decisions={contrasts: [[global, fault_only]], rows: [{when: [~], say: yes}]}",
        ("decisions.rows.0.when.0", "null", "quotes"),
    ),
    "noise that injects nothing": (
        ("", ""),
        "controls.schedule={kind: constant, sigma: 0}",
        ("controls.schedule", "injects nothing"),
    ),
    "unknown quantization format": (
        ("", ""),
        "scenario.quantization=mxfp5",
        ("--set", "scenario.quantization", "unknown format 'mxfp5'", "did you mean 'mxfp4'?"),
    ),
    "quantizer without a format": (
        ("", ""),
        "scenario.quantization={layers: [3]}",
        ("scenario.quantization", "`format` is missing", "mxfp4, nvfp4, fp8_e4m3, int8"),
    ),
    "parameter of another format": (
        ("", ""),
        "scenario.quantization=[{format: nvfp4, scale_mode: floor}]",
        ("scenario.quantization.0.scale_mode", "unknown key", "format, operands"),
    ),
    "quantizer beyond the last layer": (
        ("", ""),
        "scenario.quantization=[{format: mxfp4}, {format: int8, layers: [28]}]",
        ("--set", "scenario.quantization.1.layers", "no layer 28 of 28", "0 to 27"),
    ),
    "swept quantizer beyond the last layer": (
        ("  faults.0.threshold:", "  quantization.0.layers: [[3], [28]]\n  faults.0.threshold:"),
        "scenario.quantization=mxfp4",
        ("demo.yaml:9", "sweep.quantization.0.layers", "no layer 28 of 28"),
    ),
    "swept fault beyond the last layer": (
        ("[0.01, 0.1]", "[0.1]\n  faults.0.layers: [[10], [28]]"),
        "",
        ("demo.yaml:10", "sweep.faults.0.layers", "no layer 28 of 28"),
    ),
    "weight of a whole layer": (
        ("", ""),
        "scenario.faults.0.site=weight",
        ("scenario.faults.0.site", "('.') has no weight", "modules: [linear]"),
    ),
    "gradient of a frozen weight": (
        ("      threshold:", "      modules: [linear]\n      threshold:"),
        "scenario.faults.0.site=grad_weight",
        ("scenario.faults.0.site", "method lora freezes", "site grad_input"),
    ),
    "device that never acts": (
        ("      threshold:", "      when: train\n      threshold:"),
        "scenario.during=eval",
        ("scenario.during", "got 'eval', at which no part of the device acts", "`when`"),
    ),
    "adapter path without adapters": (
        ("study: demo\n", "study: demo\ntraining: {method: {kind: full}}\n"),
        "scenario.adapter_path=faulty",
        ("scenario.adapter_path", "got 'faulty'", "no adapters", "allowed is 'exact'"),
    ),
    "merging without adapters": (
        ("study: demo\n", "study: demo\ntraining: {method: {kind: full}}\n"),
        "sweep.deploy=[unmerged, merged]",
        ("sweep.deploy", "got 'merged'", "no adapters", "allowed is 'unmerged'"),
    ),
    "compiled layers with noise inside": (
        ("study: demo\n", "study: demo\ntraining: {compile: true}\n"),
        "controls.carrier=rmsnorm_weight",
        ("training.compile", "controls has noise on rmsnorm_weight", "carrier hidden alone"),
    ),
    "compiled layers with a fault inside": (
        ("      threshold:", "      modules: [linear]\n      threshold:"),
        "training.compile=true",
        ("training.compile", "dead_zone acts inside the decoder layers"),
    ),
    "compiled layers with a quantizer inside": (
        ("      threshold: 0.2\n", "      threshold: 0.2\n  quantization: mxfp4\n"),
        "training.compile=true",
        ("training.compile", "mxfp4 acts inside the decoder layers"),
    ),
    "compiled full fine-tuning": (
        ("study: demo\n", "study: demo\ntraining: {method: {kind: full}}\n"),
        "training.compile=true",
        ("training.compile", "full fine-tuning runs its layers as they are"),
    ),
    "compiled layers that are computed again": (
        ("", ""),
        "training={compile: true, gradient_checkpointing: true}",
        ("training", "compile with gradient_checkpointing", "one of the two"),
    ),
    "skipped layer beyond the last": (
        ("", ""),
        "arms={mine: {skip: [28]}}",
        ("arms.mine.skip", "in scenario both-threshold0.01", "no layer 28 of 28"),
    ),
    "misspelt word for layers": (
        ("", ""),
        "arms={mine: {skip: fualty}}",
        ("arms.mine.skip", "got 'fualty'", "or a list", "did you mean 'faulty'?"),
    ),
    "every layer skipped": (
        ("", ""),
        "arms={mine: {skip: all}}",
        ("arms.mine.skip", "every layer would be left out"),
    ),
    "no layer left to train": (
        ("", ""),
        "arms={mine: {train_layers: faulty, skip: [10]}}",
        ("arms.mine.train_layers", "leaves no layer to train"),
    ),
    "layer skipped and trained": (
        ("", ""),
        "arms={mine: {train_layers: [9, 10], skip: faulty}}",
        ("arms.mine.train_layers", "layers 10 are left out by `skip`"),
    ),
    "noise on a skipped layer": (
        ("", ""),
        "arms={mine: {skip: faulty, noise: {}}}",
        ("arms.mine.noise", "layers 10 are left out by `skip`", "targeting healthy"),
    ),
    "faulty device of nothing": (
        ("      threshold:", "      when: eval\n      threshold:"),
        "arms={mine: {device: faulty}}",
        ("arms.mine.device", "got 'faulty'", "`when: eval`"),
    ),
    "unknown device": (
        ("", ""),
        "arms={mine: {device: broken}}",
        ("arms.mine.device", "got 'broken'", "'scenario', 'healthy' or 'faulty'"),
    ),
    "unknown redraw of the controls": (
        ("", ""),
        "controls.redraw=often",
        ("controls.redraw", "got 'often'", "'step', 'microbatch' or 'forward'"),
    ),
    "unknown kind of margin": (
        ("", ""),
        "confirm.margin={kind: gapp, share: 0.1}",
        ("confirm.margin", "unknown kind 'gapp'", "gain, gap, absolute, sd", "did you mean 'gap'?"),
    ),
    "kind of margin without a size": (
        ("", ""),
        "confirm.margin=gap",
        ("confirm.margin: got 'gap'", "without its size", "such as {kind: gap, share: 0.1}\n"),
    ),
    "misspelt kind of margin as a word": (
        ("", ""),
        "confirm.margin=gapp",
        ("got 'gapp'", "a number (share of the gain G)", "did you mean 'gap'?"),
    ),
    "share of a margin that is a number": (
        ("{replicates: 6}", "{replicates: 6, margin: 0.05}"),
        "confirm.margin.share=0.1",
        ("confirm.margin is 0.05", "no 'share'", "confirm.margin='{kind: gap, share: 0.1}'\n"),
    ),
    "key of a margin that is a word": (
        ("{replicates: 6}", "{replicates: 6, margin: gap}"),
        "confirm.margin.share=0.1",
        ("confirm.margin is 'gap'", "no 'share'", "confirm.margin='{kind: gap}'\n"),
    ),
    "key of a number": (
        ("study: demo\n", "study: demo\ntraining: {steps: 50}\n"),
        "training.steps.most=50",
        ("training.steps is 50, which has no 'most'; set training.steps as a whole\n",),
    ),
    "negative margin": (
        ("", ""),
        "confirm.margin={kind: absolute, nats: -0.01}",
        ("confirm.margin.nats", "got -0.01", "greater than 0"),
    ),
    "sd as a margin without a search": (
        ("{replicates: 6}", "{replicates: 6, margin: {kind: sd, factor: 1}}"),
        "search=null",
        ("demo.yaml:18", "confirm.margin", "there is no search", "absolute or gap"),
    ),
    "sd as a margin with one search seed": (
        ("{replicates: 6}", "{replicates: 6, margin: {kind: sd, factor: 1}}"),
        "search.replicates=1",
        ("confirm.margin", "search.replicates 1 gives no spread", "absolute or gap"),
    ),
    "sd as a margin of contrasts that the search does not have": (
        ("{replicates: 6}", "{contrasts: [[finalist1, finalist1_none]]}"),
        "confirm.margin={kind: sd, factor: 1}",
        ("confirm.margin", "no primary contrast has both of its arms in the search"),
    ),
    "share of the gap as a percentage": (
        ("", ""),
        "confirm.margin={kind: gap, share: 10}",
        ("confirm.margin.share", "got 10", "less than or equal to 1"),
    ),
    "stop fraction of the whole training": (
        ("", ""),
        "search.space.dimensions.stop_fraction={kind: float, low: 0.0, high: 1.0}",
        ("search.space.dimensions.stop_fraction", "got 1", "numbers from 0 to below 1"),
    ),
    "score of no layer": (
        ("", ""),
        "search.space.dimensions.score_28={kind: fixed, value: 1}",
        ("search.space.dimensions.score_28", "no layer 28 of 28"),
    ),
    "not a number": (
        ("", ""),
        "training.learning_rate=.NaN",
        ("--set training.learning_rate=.NaN", "got nan", "allowed: a finite number"),
    ),
    "no largest gradient norm": (
        ("study: demo\n", "study: demo\ntraining: {max_grad_norm: .inf}\n"),
        "",
        ("demo.yaml:2: training.max_grad_norm: got inf; allowed: a finite number",),
    ),
    "number beyond the range of numbers": (
        ("", ""),
        "training.weight_decay=1e999",
        ("training.weight_decay", "got inf", "allowed: a finite number"),
    ),
    "infinite scale of the adapters": (
        ("", ""),
        "training.method={kind: lora, alpha: .Inf}",
        ("training.method.alpha", "got inf", "allowed: a finite number"),
    ),
    "infinite learning rate of an own arm": (
        ("", ""),
        "arms={mine: {learning_rate: .INF}}",
        ("arms.mine.learning_rate", "got inf", "allowed: a finite number"),
    ),
    "infinite value in the space": (
        ("", ""),
        "search.space.dimensions.sigma_start={kind: choice, values: [0.1, .inf]}",
        ("search.space.dimensions.sigma_start.values.1", "got inf", "allowed: a finite number"),
    ),
    "tag of another kind": (
        ("threshold: 0.2", "threshold: !!int abc"),
        "",
        ("demo.yaml:7: got 'abc', which cannot be read as a whole number (!!int)",),
    ),
    "range of fractions of a whole number": (
        ("window_width: {kind: int", "window_width: {kind: float"),
        "",
        ("demo.yaml:16", "dimensions.window_width", "got kind float", "use kind int"),
    ),
    "depths that may cross": (
        (
            "  configs: 4\n",
            "      depth_low: {kind: float, low: 0.0, high: 0.9, when: {targeting: [depth]}}\n"
            "      depth_high: {kind: float, low: 0.1, high: 1.0, when: {targeting: [depth]}}\n"
            "  configs: 4\n",
        ),
        "search.space.dimensions.targeting={kind: choice, values: [window, depth]}",
        ("search.space.dimensions", "low 0.9 is above high 0.1", "the search may draw this"),
    ),
    "every problem at once": (
        ("      threshold: 0.2", "      threshold: x\n      limit: 3"),
        "",
        ("demo.yaml:7", "demo.yaml:8", "unknown key"),
    ),
}


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("case", CASES)
def test_bad_input(
    case: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (old, new), override, fragments = CASES[case]
    if case == "rank without LoRA":
        old, new = "study: demo\n", "study: demo\ntraining: {method: {kind: full}}\n"
    assert old in STUDY
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text(STUDY.replace(old, new, 1).replace("OUTPUT", "results"))
    before = sorted(tmp_path.rglob("*"))
    arguments = [command, "demo.yaml", *(["--set", override] if override else [])]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    for fragment in fragments:
        assert fragment in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["plan", "dmo.yaml"], ("dmo.yaml", "no such file", "did you mean 'demo.yaml'?")),
        (["plan", "elsewhere/demo.yaml"], ("the folder elsewhere does not exist",)),
        (["plan", "."], ("cannot be read",)),
        (["status", "demo.yaml"], ("no results yet", "aqn-tune run demo.yaml")),
        (["status", "."], ("no study.yaml here",)),
        (["report", "."], ("no study.yaml here",)),
        (["rerun", ".", "x"], ("no study.yaml here",)),
        (["status", ".", "--set", "a=b"], ("--set", "cannot be changed")),
        (["train", "demo.yaml", "--arm", "globl"], ("'globl'", "did you mean 'global'?")),
        (["train", "demo.yaml", "--arm", "clean", "--scenario", "x"], ("both-threshold0.01",)),
        (["plan"], ("Missing argument",)),
        (["pln", "demo.yaml"], ("No such command",)),
        (["list", "fault"], ("No such command",)),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    fragments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text(STUDY.replace("OUTPUT", "results"))
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    for fragment in fragments:
        assert fragment in captured.err
    assert "Traceback" not in captured.err
    assert [path.name for path in tmp_path.rglob("*")] == ["demo.yaml"]
