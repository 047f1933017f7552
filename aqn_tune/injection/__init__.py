"""Where and in what order faults and noise enter a model, and what was really injected."""

from __future__ import annotations
