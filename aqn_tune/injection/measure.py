"""What was really injected: counters and audits, kept per replica."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aqn_tune.injection.fold import FaultSlot, QuantizerSlot
from aqn_tune.ledger.rows import FaultMeasure, NoiseMeasure, Operand, QuantizerMeasure
from aqn_tune.noise.carriers import CarrierSpec
from aqn_tune.quantization import Quantized

STANDARD_ERRORS = 6.0
"""Allowed distance of a measured standard deviation: one false alarm in 10^9 looks."""


def rounding_share(dtype: torch.dtype) -> float:
    """Return how far rounding in a type may move a standard deviation, as a share of it.

    A sum that is rounded to multiples of d carries d^2 / 12 more variance. In bfloat16 d is at most 2^-7
    of the value. Where noise is relative to the value that is half of the smallest sigma that a study may
    ask for there (`BFLOAT16_SIGMA`): sqrt(1 + 1 / 48) - 1 is 1.04 %. The draws are rounded too, by at most
    2^-8 of themselves, 0.39 %. Absolute noise on weights above 2 is rounded to coarser steps, and may fail
    its audit.
    """
    return 1.5e-2 if dtype == torch.bfloat16 else 2e-3


def within_sampling_error(
    realised: float, scheduled: float, draws: int, dtype: torch.dtype
) -> bool:
    """Return whether a standard deviation measured on `draws` normal draws can be the scheduled one.

    `dtype` is the type of what carries the noise.
    """
    if draws == 0:
        return False
    tolerance = STANDARD_ERRORS / math.sqrt(2 * draws) + rounding_share(dtype)
    return abs(realised - scheduled) <= tolerance * scheduled


class _Calls:
    """Counts calls by replica: in plain integers, as adding to a tensor costs more than a small fault."""

    def __init__(self, calls: Tensor) -> None:
        self._calls = calls
        self._new = [0] * len(calls)

    def count(self, replicas: Sequence[int]) -> None:
        """Count one call for each of `replicas`."""
        for replica in replicas:
            self._new[replica] += 1

    @property
    def calls(self) -> Tensor:
        """The calls of each replica, int64 [K]."""
        if any(self._new):
            self._calls += torch.tensor(self._new)
            self._new = [0] * len(self._new)
        return self._calls

    @calls.setter
    def calls(self, calls: Tensor) -> None:
        self._calls = calls
        self._new = [0] * len(calls)


class FaultTally(_Calls):
    """What one fault slot did to each of K replicas."""

    def __init__(self, kind: str, calls: Tensor) -> None:
        super().__init__(calls)
        self.kind = kind
        self.sites = 0
        self.due = torch.zeros_like(calls)
        """Calls in which a gradient passed by, of faults that act on gradients."""
        self.unseen: set[int] = set()
        """Replicas that have the fault and in which it has not been seen to change a value (`watch`)."""
        zeros = torch.zeros(len(calls), dtype=torch.float64)
        self.affected, self.values = zeros.clone(), zeros.clone()
        self.error_energy, self.energy = zeros.clone(), zeros.clone()

    def add(self, x: Tensor, values: Tensor, valid: Tensor) -> None:
        """Add one call: `x` and `values` [K, N, D] before and after it, `valid` [K, N, 1]."""
        with torch.no_grad():
            x, values = x.detach(), values.detach()
            # NaN differs from itself: a NaN that was there before is no deed of the fault.
            changed = (x != values) & ~(x.isnan() & values.isnan()) & valid
            self.affected += changed.sum(dim=(1, 2)).double().cpu()
            self.values += (valid.sum(dim=(1, 2)) * x.shape[2]).double().cpu()
            zero = torch.zeros((), dtype=torch.float64, device=x.device)
            delta = torch.where(valid, (values - x).double(), zero).square().sum(dim=(1, 2))
            self.error_energy += delta.cpu()
            self.energy += torch.where(valid, x.double(), zero).square().sum(dim=(1, 2)).cpu()

    def watch(
        self,
        slot: FaultSlot,
        x: Tensor,
        values: Tensor,
        valid: Tensor,
        alike: Sequence[int] = (),
    ) -> None:
        """See whether a call changed a value; each replica is looked at until it has, as a look is dear.

        Args:
            slot: The fault; row `active[i]` of the tensors is that of replica `owners[i]`.
            x: The values before the call, [K, N, D].
            values: The values after it.
            valid: [K, N, 1], False at padding.
            alike: Replicas that compute with the same values.
        """
        if not self.unseen:
            return
        for row, owner in zip(slot.active, slot.owners, strict=True):
            if owner in self.unseen:
                before, after = x[row].detach(), values[row].detach()
                changed = (before != after) & ~(before.isnan() & after.isnan()) & valid[row]
                if bool(changed.any()):
                    self.unseen -= {owner, *alike}

    def absorb(self, alone: FaultTally, replicas: Sequence[int]) -> None:
        """Add what happened to the one replica of `alone` to each of `replicas`."""
        rows = list(replicas)
        self.affected[rows] += alone.affected
        self.values[rows] += alone.values
        self.error_energy[rows] += alone.error_energy
        self.energy[rows] += alone.energy

    def inherit(self, replica: int, other: FaultTally, its: int) -> None:
        """Add what happened to replica `its` of `other` to `replica`."""
        self.calls[replica] += other.calls[its]
        self.affected[replica] += other.affected[its]
        self.values[replica] += other.values[its]
        self.error_energy[replica] += other.error_energy[its]
        self.energy[replica] += other.energy[its]

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


class QuantizerTally(_Calls):
    """What one quantizer did to each of K replicas, by operand and layer.

    A call is a product that ran on a quantized operand.
    """

    def __init__(self, slot: QuantizerSlot, replicas: int) -> None:
        super().__init__(torch.zeros(replicas, dtype=torch.int64))
        self.slot = slot
        self.replicas = replicas
        self.sites = 0
        """Operands that are quantized in one pass."""
        self.strayed: set[int] = set()
        """Replicas without the quantizer whose values it changed all the same."""
        self._sums: dict[tuple[Operand, int], Tensor] = {}

    def add(
        self,
        operand: Operand,
        layer: int,
        active: Sequence[int],
        x: Tensor,
        quantized: Quantized,
        valid: Tensor,
    ) -> None:
        """Add one call for the `active` replicas: `x` [A, N, D], `valid` [A, N, 1]."""
        sums = self._sums.setdefault(
            (operand, layer), torch.zeros(self.replicas, 5, dtype=torch.float64)
        )
        with torch.no_grad():
            x, values = x.detach(), quantized.values
            zero = torch.zeros((), dtype=torch.float64, device=x.device)
            columns = (
                torch.where(valid, x.double(), zero).square(),
                torch.where(valid, (values - x).double(), zero).square(),
                (values == 0) & valid,
                (x.abs() > quantized.limit) & valid,
                valid.expand_as(x),
            )
            sums[list(active)] += torch.stack(
                [column.sum(dim=(1, 2)).double().cpu() for column in columns], dim=1
            )

    def watch(self, active: Sequence[int], x: Tensor, out: Tensor) -> None:
        """See that the replicas without the quantizer came out as they went in."""
        for replica in set(range(x.shape[0])) - set(active):
            if not torch.equal(x[replica].nan_to_num(), out[replica].nan_to_num()):
                self.strayed.add(replica)

    def absorb(self, alone: QuantizerTally, replicas: Sequence[int]) -> None:
        """Add what happened to the one replica of `alone` to each of `replicas`."""
        for key, sums in alone._sums.items():
            mine = self._sums.setdefault(key, torch.zeros(self.replicas, 5, dtype=torch.float64))
            mine[list(replicas)] += sums

    def inherit(self, replica: int, other: QuantizerTally, its: int) -> None:
        """Add what happened to replica `its` of `other` to `replica`."""
        self.calls[replica] += other.calls[its]
        for key, sums in other._sums.items():
            mine = self._sums.setdefault(key, torch.zeros(self.replicas, 5, dtype=torch.float64))
            mine[replica] += sums[its]

    def measures(self, replica: int) -> tuple[QuantizerMeasure, ...]:
        """Return one row per operand and layer."""
        rows = []
        for (operand, layer), sums in sorted(self._sums.items()):
            energy, error, zeros, clipped, count = sums[replica].tolist()
            if not count:
                continue
            finite = math.isfinite(energy) and math.isfinite(error)
            rows.append(
                QuantizerMeasure(
                    format=self.slot.spec.format,
                    operand=operand,
                    layer=layer,
                    sqnr_db=10 * math.log10(energy / error)
                    if finite and energy and error
                    else None,
                    zero_fraction=zeros / count,
                    clipped_fraction=clipped / count,
                )
            )
        return tuple(rows)


def declared_scale(carrier: CarrierSpec, x: Tensor) -> Tensor:
    """Return what the sigma of a carrier is relative to, from its declaration alone.

    Written apart from the carriers on purpose: the audit must not take the word of what it audits.
    """
    relative = carrier.site == "layer_output" or getattr(carrier, "relative", False)
    return x.abs() if relative else torch.ones_like(x)


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

    def look(
        self,
        replica: int,
        layer: int,
        scheduled: float,
        carrier: CarrierSpec,
        plain: Tensor,
        noised: Tensor,
    ) -> None:
        """Record one injection of noise: the quantity without and with it, both without gradient.

        Where the scale is 0 or NaN there is nothing to measure.
        """
        scale = declared_scale(carrier, plain)
        keep = scale > 0
        count = int(torch.count_nonzero(keep))
        # A difference of neighbours is exact in their own type, the quotient is not.
        noise = (noised - plain).to(torch.promote_types(plain.dtype, torch.float32)).div_(scale)
        if count < keep.numel():
            noise.masked_fill_(~keep, 0.0)
        # Products, not powers: those of Python raise where these are infinite, and would take the pack along.
        norm = float(torch.linalg.vector_norm(noise, dtype=torch.float64))
        squares = norm * norm
        record = self.sums[replica].setdefault(layer, [0.0, 0.0, 0.0, 0.0])
        record[0] += 1
        record[1] += count
        record[2] += count * scheduled * scheduled
        record[3] += squares
        realised = math.sqrt(squares / count) if count else 0.0
        if not within_sampling_error(realised, scheduled, count, plain.dtype):
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
