"""Pretrain the embedded model: its recipe, its initial weights, its loop and its measurement.

Only the build command and its tests import this module; it needs torch at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field

from aqn_tune.tasks.base import Example
from aqn_tune.tasks.encode import Encoded, encode
from aqn_tune.tasks.word_problems import pretraining_rows

__all__ = ["Phase", "Recipe", "Scores", "initial_model", "measure", "train_phase"]


class Phase(BaseModel):
    """One stretch of pretraining with its own optimiser, learning rates and row mix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=1, description="Optimiser steps of this phase.")
    learning_rate: float = Field(gt=0, description="Learning rate after the warm-up.")
    warmup_steps: int = Field(ge=0, description="Steps over which the rate rises from zero.")
    decay_steps: int = Field(
        ge=1, description="Step at which the cosine reaches zero; beyond `steps` it is cut short."
    )
    finetuning_share: float = Field(
        ge=0, le=1, description="Share of rows that come from the fine-tuning task."
    )

    def rate(self, step: int) -> float:
        """Return the learning rate of ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.decay_steps))


class Recipe(BaseModel):
    """Everything the embedded model is a function of, apart from rounding on the CPU at hand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(default=0, ge=0, description="Seed of initial weights and of rows.")
    layers: int = Field(default=28, ge=1, description="Decoder layers.")
    hidden: int = Field(default=64, ge=8, description="Width; a multiple of 32 for MX blocks.")
    intermediate: int = Field(default=128, ge=8, description="Width inside the MLP.")
    heads: int = Field(default=2, ge=1, description="Attention heads.")
    key_value_heads: int = Field(default=1, ge=1, description="Key and value heads.")
    vocabulary: int = Field(
        default=384,
        ge=258,
        description="Rows of the embedding: 2 marks, 256 bytes, merges while any pair is left.",
    )
    initializer_range: float = Field(default=0.08, gt=0, description="Std of initial weights.")
    batch: int = Field(default=32, ge=1, description="Rows per step.")
    length: int = Field(default=64, ge=8, description="Tokens that every row must fit into.")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW weight decay.")
    clip: float = Field(default=1.0, gt=0, description="Largest gradient norm.")
    phases: tuple[Phase, ...] = Field(
        default=(
            Phase(
                steps=1200,
                learning_rate=4e-3,
                warmup_steps=100,
                decay_steps=1600,
                finetuning_share=0.0,
            ),
            Phase(
                steps=140,
                learning_rate=1e-3,
                warmup_steps=0,
                decay_steps=1600,
                finetuning_share=0.08,
            ),
            Phase(
                steps=60,
                learning_rate=5e-4,
                warmup_steps=0,
                decay_steps=70,
                finetuning_share=0.08,
            ),
        ),
        min_length=1,
        description="The phases in order; the last one makes the model half know the task.",
    )


class Scores(NamedTuple):
    """What a model does on a set of rows.

    ``exact_match`` is the share of rows whose every answer token is the arg max given the tokens
    before it, which equals greedy decoding of the whole row. ``cross_entropy`` is in nats per
    answer token.
    """

    exact_match: float
    cross_entropy: float


def initial_model(recipe: Recipe) -> Any:
    """Return a float32 Qwen2 model with seeded initial weights; no global random state is moved.

    Normal weights of std ``initializer_range``; the two projections that write to the residual
    stream are scaled by ``1 / sqrt(2 * layers)``.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=recipe.initializer_range,
        eos_token_id=0,
        pad_token_id=1,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(recipe.seed)
    residual_scale = 1 / math.sqrt(2 * recipe.layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, recipe.initializer_range, generator=generator)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.mul_(residual_scale)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def train_phase(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    index: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Run phase ``index`` of the recipe on ``model`` in place, with AdamW and answer-only loss.

    ``on_step(step, loss)`` is called after each step, ``step`` counted from 1 within the phase.
    """
    phase = recipe.phases[index]
    rows = _batches(recipe, index)
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=phase.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    model.train()
    for step in range(phase.steps):
        for group in optimiser.param_groups:
            group["lr"] = phase.rate(step)
        batch = encode(tokenizer, next(rows), recipe.length)
        loss, _, _ = _answer_loss(model, batch)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimiser.step()
        on_step(step + 1, loss.item())
    model.eval()


def _batches(recipe: Recipe, index: int) -> Iterator[tuple[Example, ...]]:
    stream = pretraining_rows(
        seed=recipe.seed * len(recipe.phases) + index,
        finetuning_share=recipe.phases[index].finetuning_share,
    )
    while True:
        yield tuple(next(stream) for _ in range(recipe.batch))


class _Loss(NamedTuple):
    mean: torch.Tensor
    total: torch.Tensor
    rows_right: torch.Tensor


def _answer_loss(model: Any, batch: Encoded) -> _Loss:
    longest = int(batch.valid.sum(axis=1).max())
    tokens = torch.from_numpy(batch.tokens[:, :longest])
    wanted = torch.from_numpy(batch.answer_mask[:, 1:longest])
    logits = model(
        input_ids=tokens, attention_mask=torch.from_numpy(batch.valid[:, :longest]).long()
    ).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    total = (each * wanted).sum()
    right = ((logits.argmax(-1) == tokens[:, 1:]) | ~wanted).all(dim=1)
    return _Loss(total / wanted.sum(), total, right)


def measure(
    model: Any, tokenizer: Any, examples: Sequence[Example], length: int, batch: int = 64
) -> Scores:
    """Score a model on rows by teacher forcing; the model is left in eval mode."""
    model.eval()
    right, total, tokens = 0, 0.0, 0
    with torch.no_grad():
        for start in range(0, len(examples), batch):
            encoded = encode(tokenizer, examples[start : start + batch], length)
            loss = _answer_loss(model, encoded)
            right += int(loss.rows_right.sum())
            total += float(loss.total)
            tokens += int(encoded.answer_mask.sum())
    return Scores(exact_match=right / len(examples), cross_entropy=total / tokens)
