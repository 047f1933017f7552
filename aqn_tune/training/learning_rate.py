"""The learning-rate schedule."""

from __future__ import annotations

import math

from aqn_tune.study.training import TrainingSpec


def learning_rate(spec: TrainingSpec, step: int) -> float:
    """Return the learning rate of training step `step` (from 0): linear warm-up, then cosine decay.

    The last step has `final_lr_fraction` of the peak.
    """
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    span = max(spec.steps - 1 - spec.warmup_steps, 1)
    progress = min((step - spec.warmup_steps) / span, 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    floor = spec.final_lr_fraction
    return spec.learning_rate * (floor + (1 - floor) * cosine)
