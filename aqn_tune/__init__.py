"""aqn_tune: noise-robust fine-tuning on hardware that computes wrongly, and whether it helps.

Which layers should get Adaptive Quantization Noise, how much, on which schedule, at which fault
level, and is the difference real? `aqn-tune run STUDY.yaml` searches, confirms on fresh seeds and
reports; README.md shows how.
"""

from __future__ import annotations

__version__ = "0.1.0"
