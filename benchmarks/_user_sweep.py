"""The sweep as one would write it by hand: a Ray Tune function trainable, one trial per training.

    python benchmarks/_user_sweep.py SPEC RESULT

`sweep.py` starts it in a process of its own and times it; SPEC and RESULT are JSON. transformers loads
the model and trains it with its Trainer, peft adds the adapters, forward hooks do noise and fault, Ray
Tune runs two trials at a time, each in a process of its own as is its default, or, where it is told so,
in processes that go from one trial to the next and import everything once.

The rows are tokenized once, before the first trial, and handed to all of them.

Of the package it takes two things, both about random numbers: `keyed_generator` and `BatchOrder`. The
package pays for them too, and with them every training starts from the same adapters, sees the same rows
and gets the same noise as its counterpart in `aqn-tune run`, so that their losses can be held against each
other.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

# Imports of torch and peft stand inside functions: the driver never needs them.

SIGMA_START, SIGMA_END, STAGES = 0.05, 0.0005, 9


class Row(NamedTuple):
    """One row as tokens."""

    tokens: list[int]
    labels: list[int]
    """The same, and -100 where nothing is to be learnt."""


class Now:
    """What the hooks have to know of the moment."""

    def __init__(self) -> None:
        self.valid: Tensor | None = None
        """Boolean [B, T], False at padding."""
        self.step: Callable[[], int] | None = None
        """Gives the step of the training; None: an evaluation, without noise."""
        self.is_faulty = False


def read_rows(tokenizer: Any, file: str, max_length: int) -> list[Row]:
    """Tokenize the rows of a JSONL file: the loss is that of the answer and the end of text."""
    given = [json.loads(line) for line in Path(file).read_text().splitlines()]
    prompts = tokenizer([row["prompt"] for row in given])["input_ids"]
    texts = tokenizer([row["prompt"] + row["completion"] for row in given])["input_ids"]
    rows = []
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = [*text, tokenizer.eos_token_id]
        if len(tokens) > max_length:
            raise ValueError(f"{file}: a row needs {len(tokens)} tokens, allowed are {max_length}")
        rows.append(Row(tokens, [-100] * len(prompt) + tokens[len(prompt) :]))
    return rows


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return a batch, padded to its longest row."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tokens = [torch.tensor(row.tokens) for row in rows]
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True),
        "labels": pad_sequence(
            [torch.tensor(row.labels) for row in rows], batch_first=True, padding_value=-100
        ),
    }


def sigma_at(step: int, steps: int) -> float:
    """Return the noise level of a step: nothing at first, then a geometric staircase."""
    stage = step * (STAGES + 1) // steps - 1
    if stage < 0:
        return 0.0
    return float(SIGMA_START * (SIGMA_END / SIGMA_START) ** (stage / (STAGES - 1)))


def learning_rate_share(step: int, spec: dict[str, Any]) -> float:
    """Return the learning rate of a step as a share of the peak: linear warm-up, cosine decay."""
    warmup, floor = spec["warmup_steps"], spec["final_lr_fraction"]
    if step < warmup:
        return float((step + 1) / warmup)
    progress = min((step - warmup) / max(spec["steps"] - 1 - warmup, 1), 1.0)
    return float(floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def build(spec: dict[str, Any], seed: int) -> nn.Module:
    """Return the model with fresh adapters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from aqn_tune.training.streams import keyed_generator

    base = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    config = LoraConfig(r=spec["rank"], lora_alpha=spec["alpha"], target_modules=spec["targets"])
    model: nn.Module = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            site = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
            bound = 1 / math.sqrt(parameter.shape[1])
            torch.nn.init.uniform_(
                parameter, -bound, bound, generator=keyed_generator(seed, "init", site)
            )
    return model


def add_hooks(
    model: nn.Module, now: Now, spec: dict[str, Any], config: dict[str, Any], width: int
) -> None:
    """Add noise to the layers' outputs in training, and the dead zone to one of them."""
    import torch

    from aqn_tune.training.streams import keyed_generator

    seed, faulty_layer = spec["seeds"][config["replicate"]], spec["faulty_layer"]

    def keep_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        # Padding is on the right and attention is causal: without a mask attention is cheaper.
        now.valid = kwargs.pop("attention_mask").bool()
        return args, kwargs

    def noise(h: Tensor, layer: int, step: int) -> Tensor:
        sigma = sigma_at(step, spec["steps"])
        if not sigma:
            return h
        rows, length, size = h.shape
        generator = keyed_generator(seed, "noise", step, 0, layer, str(layer))
        # Drawn for the longest row of all, so that it is the draw that the package makes.
        z = torch.randn(rows, width, size, generator=generator)[:, :length]
        return h + z * sigma * h.detach().abs()

    def dead_zone(h: Tensor) -> Tensor:
        magnitude = h.detach().abs()
        cut = config["threshold"] * float(magnitude.amax(dim=2)[now.valid].max())
        return h.masked_fill(magnitude < cut, 0.0)

    def hook_of(layer: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        is_noised = config["arm"] == "global" or (
            config["arm"] == "targeted" and layer == faulty_layer
        )

        def hook(module: nn.Module, args: Any, h: Tensor) -> Tensor:
            if is_noised and now.step is not None:
                h = noise(h, layer, now.step())
            if layer == faulty_layer and now.is_faulty:
                h = dead_zone(h)
            return h

        return hook

    model.register_forward_pre_hook(keep_mask, with_kwargs=True)
    for number, layer in enumerate(model.get_base_model().model.layers):  # type: ignore[operator]
        layer.register_forward_hook(hook_of(number))


def train(model: nn.Module, now: Now, spec: dict[str, Any], rows: Sequence[Row], seed: int) -> None:
    """Train with transformers' Trainer."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from aqn_tune.training.streams import BatchOrder

    order = BatchOrder(len(rows), spec["batch_size"])
    chosen = torch.cat([order.indices(seed, step) for step in range(spec["steps"])])
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=spec["learning_rate"],
        betas=(spec["beta1"], spec["beta2"]),
        weight_decay=spec["weight_decay"],
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, spec)
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            max_steps=spec["steps"],
            per_device_train_batch_size=spec["batch_size"],
            train_sampling_strategy="sequential",
            max_grad_norm=spec["max_grad_norm"],
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            log_level="error",
        ),
        data_collator=collate,
        train_dataset=[rows[row] for row in chosen.tolist()],
        optimizers=(optimizer, schedule),
    )
    trainer.remove_callback(PrinterCallback)
    now.step = lambda: trainer.state.global_step
    trainer.train()
    now.step = None


def evaluate(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> tuple[float, float]:
    """Return the loss per answer token, and the share of rows whose whole answer is predicted."""
    import torch

    total, tokens, exact, rows = 0.0, 0, 0, 0
    with torch.inference_mode():
        for batch in batches:
            labels = batch["labels"][:, 1:]
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            ).logits[:, :-1]
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
            ).item()
            is_answer = labels != -100
            tokens += int(is_answer.sum())
            exact += int(((logits.argmax(dim=2) == labels) | ~is_answer).all(dim=1).sum())
            rows += len(labels)
    return total / tokens, exact / rows


def trial(
    config: dict[str, Any], spec: dict[str, Any], rows: Sequence[Row], test: Sequence[Row]
) -> None:
    """Train one arm on one seed under one threshold, evaluate it without and with the fault."""
    import torch
    from ray import tune
    from transformers.utils import logging

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    longest = max(len(row.tokens) for row in rows)
    seed = spec["seeds"][config["replicate"]]
    model = build(spec, seed)
    now = Now()
    add_hooks(model, now, spec, config, width=min(-(-longest // 8) * 8, spec["max_length"]))
    now.is_faulty = config["arm"] != "clean"
    train(model, now, spec, rows, seed)
    model.eval()
    batches = [collate(part) for part in parts(test, spec["eval_batch_size"])]
    found: dict[str, float] = {}
    for condition in ("clean", "faulty"):
        now.is_faulty = condition == "faulty"
        found[f"{condition}_loss"], found[f"{condition}_exact"] = evaluate(model, batches)
    tune.report(found)


def parts(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """Yield the rows in batches, in order."""
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def main() -> None:
    """Run all trials and write what each of them found."""
    import ray
    from ray import tune
    from transformers import AutoTokenizer

    spec = json.loads(Path(sys.argv[1]).read_text())
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    rows, test = (
        read_rows(tokenizer, spec[name], spec["max_length"]) for name in ("train", "test")
    )
    ray.init(
        address="local",
        num_cpus=spec["workers"],
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(trial, spec=spec, rows=rows, test=test), {"cpu": 1}
        ),
        param_space={
            "replicate": tune.grid_search(list(range(len(spec["seeds"])))),
            "threshold": tune.grid_search(spec["thresholds"]),
            "arm": tune.grid_search(spec["arms"]),
        },
        tune_config=tune.TuneConfig(
            max_concurrent_trials=spec["workers"], reuse_actors=spec["reuse_actors"]
        ),
        run_config=tune.RunConfig(storage_path=str(Path("ray").resolve()), verbose=0),
    )
    results = tuner.fit()
    if results.errors:
        raise results.errors[0]
    numbers = ("clean_loss", "faulty_loss", "clean_exact", "faulty_exact")
    lines = [
        {**result.config, **{name: result.metrics[name] for name in numbers}} for result in results
    ]
    Path(sys.argv[2]).write_text(json.dumps(lines))
    ray.shutdown()


if __name__ == "__main__":
    main()
