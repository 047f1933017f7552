"""Adaptive Quantization Noise: carriers, schedules, targetings, and the policy that joins them."""

from __future__ import annotations

from aqn_tune.noise.effective import EffectiveNoise as EffectiveNoise
from aqn_tune.noise.effective import LaterMultipliers as LaterMultipliers
from aqn_tune.noise.policy import NoisePolicy as NoisePolicy
from aqn_tune.noise.sigma import sigma_schedule as sigma_schedule
