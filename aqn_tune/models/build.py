"""Build the embedded model from nothing: tokenizer, 28-layer Qwen2 of 1 M parameters, manifest.

To rebuild what the package ships (about 8 minutes on one thread of a free core)::

    OMP_NUM_THREADS=1 python -m aqn_tune.models.build --out build/embedded

The command is seeded and prints its progress and, at the end, the scores the manifest records.
Another CPU or another torch may round differently: the scores come back within their sampling
error, the bytes need not. The exit code is 1 where the scores miss the targets.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Final

from aqn_tune.errors import UserError
from aqn_tune.models.locate import folder_fingerprint
from aqn_tune.models.pretrain import Recipe, Scores, initial_model, measure, train_phase
from aqn_tune.models.spec import ModelSpec
from aqn_tune.models.tokenizer import save_tokenizer, train_tokenizer
from aqn_tune.tasks.base import completion, prompt
from aqn_tune.tasks.word_problems import (
    PRETRAINING_LARGEST_TOTAL,
    PRETRAINING_OPERATIONS,
    WordProblems,
    pretraining_rows,
)

__all__ = ["BASE_TARGET", "FINETUNING_TARGET", "build", "main", "missed_targets", "score"]

BASE_TARGET: Final = (0.95, 1.0)
"""Exact match the model must reach on the additions and subtractions it was pretrained on."""

FINETUNING_TARGET: Final = (0.40, 0.60)
"""Exact match on the default task before fine-tuning: half known, with room above."""

_TOKENIZER_ROWS: Final = 5000
_PROGRESS_STEPS: Final = 50


def score(model: Any, tokenizer: Any, rows: int = 600, length: int = 64) -> dict[str, Scores]:
    """Score a model as the build does: ``base`` task and ``finetuning`` task, before fine-tuning.

    The rows are validation rows, so that a choice made by these scores has seen no test row.
    """
    base = WordProblems(
        operations=PRETRAINING_OPERATIONS,
        largest_total=PRETRAINING_LARGEST_TOTAL,
        validation_rows=rows,
    )
    finetuning = WordProblems(validation_rows=rows)
    return {
        name: measure(model, tokenizer, task.splits().validation, length)
        for name, task in (("base", base), ("finetuning", finetuning))
    }


def missed_targets(scores: dict[str, Scores]) -> list[str]:
    """Return one sentence for each exact match outside its target; empty where all is well."""
    return [
        f"{name}: exact match {scores[name].exact_match:.3f} is outside {low:.2f}..{high:.2f}"
        for name, (low, high) in (("base", BASE_TARGET), ("finetuning", FINETUNING_TARGET))
        if not low <= scores[name].exact_match <= high
    ]


def build(
    out: Path, recipe: Recipe, say: Callable[[str], None], rows: int = 600
) -> dict[str, Scores]:
    """Train and write a model folder with its ``manifest.json``; return its scores.

    The scores are those of the folder as written: bfloat16 weights, read back to float32. Raises
    :class:`aqn_tune.errors.UserError` where ``out`` is there and not empty.
    """
    from aqn_tune.models.load import build_model, load_tokenizer

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: it is there and not empty; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    texts = (
        prompt(row.question) + completion(row.answer)
        for row in islice(pretraining_rows(recipe.seed, 0.5), _TOKENIZER_ROWS)
    )
    save_tokenizer(train_tokenizer(texts, recipe.vocabulary), out)
    model = initial_model(recipe)
    model.config.save_pretrained(out)
    spec = ModelSpec(path=str(out))
    tokenizer = _load_saved_tokenizer(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"{parameters:,} parameters, {len(tokenizer)} tokens")
    for index, phase in enumerate(recipe.phases):
        train_phase(model, tokenizer, recipe, index, _progress(index, phase.steps, started, say))
    _save_weights(model, out)
    scores = score(build_model(spec), load_tokenizer(spec), rows, recipe.length)
    for name, value in scores.items():
        say(
            f"{name}: exact match {value.exact_match:.3f}, "
            f"cross-entropy {value.cross_entropy:.4f}, {rows} validation rows"
        )
    _write_manifest(out, recipe, parameters, scores, rows)
    return scores


def _load_saved_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _save_weights(model: Any, folder: Path) -> None:
    import torch

    from aqn_tune.models.load import no_progress_bars

    with no_progress_bars():
        model.to(torch.bfloat16).save_pretrained(folder)
    # safetensors writes files only their owner may read; a package is read by everybody.
    (folder / "model.safetensors").chmod(0o644)


def _progress(
    index: int, steps: int, started: float, say: Callable[[str], None]
) -> Callable[[int, float], None]:
    recent: list[float] = []

    def on_step(step: int, loss: float) -> None:
        recent.append(loss)
        if step % _PROGRESS_STEPS == 0 or step == steps:
            mean = sum(recent) / len(recent)
            seconds = time.process_time() - started
            say(f"phase {index + 1}, step {step}/{steps}: loss {mean:.4f}, {seconds:.0f} CPU s")
            recent.clear()

    return on_step


def _write_manifest(
    out: Path, recipe: Recipe, parameters: int, scores: dict[str, Scores], rows: int
) -> None:
    manifest = {
        "format": 1,
        "fingerprint": folder_fingerprint(out),
        "parameters": parameters,
        "recipe": recipe.model_dump(mode="json"),
        "versions": {
            name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")
        },
        "scores": {
            name: {"validation_rows": rows, **value._asdict()} for name, value in scores.items()
        },
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the build command; return its exit code (0 built, 1 targets missed, 2 bad input)."""
    import torch

    parser = argparse.ArgumentParser(
        prog="python -m aqn_tune.models.build", description="Build the embedded model."
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder for the model")
    parser.add_argument("--seed", type=int, default=Recipe().seed, help="seed of the recipe")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        scores = build(given.out, Recipe(seed=given.seed), lambda line: print(line, flush=True))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    missed = missed_targets(scores)
    for sentence in missed:
        print(sentence, file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
