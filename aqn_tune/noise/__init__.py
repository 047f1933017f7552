"""Adaptive Quantization Noise: carriers, schedules, targetings, and the policy that joins them."""

from __future__ import annotations

from aqn_tune.noise.policy import EffectiveNoise as EffectiveNoise
from aqn_tune.noise.policy import NoisePolicy as NoisePolicy
