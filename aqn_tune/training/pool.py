"""One row of measures from several draws of the same evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from aqn_tune.ledger.rows import FaultMeasure, QuantizerMeasure


def pooled_faults(draws: Sequence[Sequence[FaultMeasure]]) -> tuple[FaultMeasure, ...]:
    """Return each fault's measure over all draws: calls add up, shares and errors are means."""
    return tuple(
        FaultMeasure(
            kind=same[0].kind,
            calls=sum(measure.calls for measure in same),
            sites=same[0].sites,
            affected_fraction=_mean(measure.affected_fraction for measure in same) or 0.0,
            relative_error=_mean(measure.relative_error for measure in same),
        )
        for same in zip(*draws, strict=True)
    )


def pooled_quantizers(draws: Sequence[Sequence[QuantizerMeasure]]) -> tuple[QuantizerMeasure, ...]:
    """Return each quantizer's measure over all draws: means, the SQNR in dB."""
    return tuple(
        same[0].model_copy(
            update={
                "sqnr_db": _mean(measure.sqnr_db for measure in same),
                "zero_fraction": _mean(measure.zero_fraction for measure in same),
                "clipped_fraction": _mean(measure.clipped_fraction for measure in same),
            }
        )
        for same in zip(*draws, strict=True)
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean, None when a value is missing: a draw that was not finite is not left out."""
    numbers = list(values)
    known = [number for number in numbers if number is not None]
    return math.fsum(known) / len(known) if len(known) == len(numbers) else None
