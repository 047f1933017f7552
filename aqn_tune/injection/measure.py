"""What was really injected: counters and audits, kept per replica."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aqn_tune.ledger.rows import FaultMeasure, NoiseMeasure

STANDARD_ERRORS = 6.0
"""Allowed distance of a measured standard deviation: one false alarm in 10^9 looks."""


def within_sampling_error(realised: float, scheduled: float, draws: int) -> bool:
    """Return whether a standard deviation measured on `draws` normal draws can be the scheduled one."""
    if draws == 0:
        return False
    tolerance = STANDARD_ERRORS / math.sqrt(2 * draws) + 2e-3  # the latter for rounding in float32
    return abs(realised - scheduled) <= tolerance * scheduled


@dataclass
class FaultTally:
    """What one fault slot did to each of K replicas."""

    kind: str
    calls: Tensor
    sites: int = 0
    affected: Tensor = field(init=False)
    values: Tensor = field(init=False)
    error_energy: Tensor = field(init=False)
    energy: Tensor = field(init=False)

    def __post_init__(self) -> None:
        zeros = torch.zeros(len(self.calls), dtype=torch.float64)
        self.affected, self.values = zeros.clone(), zeros.clone()
        self.error_energy, self.energy = zeros.clone(), zeros.clone()

    def add(self, x: Tensor, values: Tensor, affected: Tensor, valid: Tensor) -> None:
        """Add one call: `x` and `values` [K, N, D], `affected` [K, N, D], `valid` [K, N, 1]."""
        with torch.no_grad():
            keep = valid.to(torch.float64)
            self.affected += affected.sum(dim=(1, 2)).double().cpu()
            self.values += (valid.sum(dim=(1, 2)) * x.shape[2]).double().cpu()
            delta = ((values - x).double() * keep).square().sum(dim=(1, 2))
            self.error_energy += delta.cpu()
            self.energy += (x.double() * keep).square().sum(dim=(1, 2)).cpu()

    def measure(self, replica: int) -> FaultMeasure:
        """Return what happened to one replica."""
        values = float(self.values[replica])
        energy, error = float(self.energy[replica]), float(self.error_energy[replica])
        finite = math.isfinite(energy) and math.isfinite(error)
        return FaultMeasure(
            kind=self.kind,
            calls=int(self.calls[replica]),
            sites=self.sites,
            affected_fraction=float(self.affected[replica]) / values if values else 0.0,
            relative_error=(math.sqrt(error / energy) if energy else 0.0) if finite else None,
        )


class NoiseAudit:
    """Compares the noise that went in with the noise that was scheduled, layer by layer.

    It measures the noise on the carrier itself, (noised - plain) / scale, so that a schedule that is
    never read, a multiplier that nobody applies or a wrong scale shows as a mismatch.
    """

    def __init__(self, replicas: int) -> None:
        self.sums: list[dict[int, list[float]]] = [{} for _ in range(replicas)]
        """By replica and layer: looks, draws, and the summed squares of scheduled and measured noise."""
        self.calls = [0] * replicas
        """Noise injections of each replica, audited or not."""
        self.failures: dict[int, str] = {}
        """Replicas whose noise was not what was scheduled, with the first mismatch."""

    def add(self, replica: int, layer: int, scheduled: float, noise: Tensor) -> None:
        """Record the measured noise of one site call; `noise` holds (noised - plain) / scale."""
        record = self.sums[replica].setdefault(layer, [0.0, 0.0, 0.0, 0.0])
        count = noise.numel()
        squares = float(noise.double().square().sum())
        record[0] += 1
        record[1] += count
        record[2] += count * scheduled**2
        record[3] += squares
        realised = math.sqrt(squares / count) if count else 0.0
        if not within_sampling_error(realised, scheduled, count):
            self.failures.setdefault(
                replica,
                f"noise audit: layer {layer} was scheduled a standard deviation of {scheduled:.6g} "
                f"and got {realised:.6g} ({count} draws)",
            )

    def measures(self, replica: int) -> tuple[NoiseMeasure, ...]:
        """Return one row per noised layer, pooled over the audited steps."""
        rows = []
        for layer, (looks, count, scheduled, realised) in sorted(self.sums[replica].items()):
            if (
                not count
            ):  # activations of zero or NaN: there was nothing that noise could scale with
                continue
            rows.append(
                NoiseMeasure(
                    layer=layer,
                    looks=int(looks),
                    scheduled=math.sqrt(scheduled / count),
                    realised=math.sqrt(realised / count),
                    draws=int(count),
                )
            )
        return tuple(rows)
