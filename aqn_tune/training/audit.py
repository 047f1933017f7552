"""The audit of a training: what the run declares, held against what was attached, measured and learnt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from aqn_tune.injection.address import AddressBook
from aqn_tune.injection.injection import Injection
from aqn_tune.injection.measure import within_sampling_error
from aqn_tune.ledger.rows import Audit, NoiseMeasure
from aqn_tune.study.runs import Run
from aqn_tune.training.arena import Arena


class Audited(NamedTuple):
    """The audit of one run, and where it does not hold."""

    audit: Audit
    mismatches: tuple[str, ...]
    """One sentence each; a run with any is failed."""


def is_audited(run: Run, step: int) -> bool:
    """Return whether a step's noise is measured: the first and the last of every sigma.

    A wrong stage, layer or scale shows at the first, a schedule that stops being read at the last.
    """
    if run.noise is None or run.noise.sigma[step] == 0:
        return False
    sigma = run.noise.sigma
    begins = step == 0 or sigma[step] != sigma[step - 1]
    ends = step + 1 == len(sigma) or sigma[step] != sigma[step + 1]
    return begins or ends


def audit_run(
    run: Run,
    injection: Injection,
    book: AddressBook,
    *,
    replica: int,
    steps: int,
    trainable_parameters: int,
    weights_unchanged: bool,
) -> Audited:
    """Return the audit of `run`, which has taken `steps` steps as a replica of `injection`.

    What should have been is read from the run and the model, what was from the attached hooks, their
    counters and the measured noise, so that a declaration lost on the way between them shows.
    """
    attached = [
        address.name
        for slot, addresses in injection.fault_sites
        if slot.active[replica]
        for address in addresses
    ]
    fault_sites = [address.name for fault in run.faults for address in book.find(fault)]
    noise_sites = _noise_sites(run, book)
    noisy_steps = sum(sigma > 0 for sigma in run.noise.sigma[:steps]) if run.noise else 0
    fault_calls = sum(int(tally.calls[replica]) for tally in injection.tallies)
    noise_calls = injection.audit.calls[replica]
    measures = injection.audit.measures(replica)
    mismatches: list[str] = []
    for what, got, wanted in (
        ("fault", sorted(attached), sorted(fault_sites)),
        ("fault", fault_calls, steps * len(fault_sites)),
        ("noise", noise_calls, noisy_steps * len(noise_sites)),
    ):
        if got != wanted:
            mismatches.append(f"{what} audit: declared {wanted}, happened {got}")
    mismatches += [f"noise audit: {text}" for text in _noise_mismatches(run, steps, measures)]
    if not weights_unchanged:
        mismatches.append("weight audit: frozen weights changed during training")
    audit = Audit(
        fault_sites=tuple(attached),
        noise_sites=tuple(noise_sites),
        noise=measures,
        noise_calls=noise_calls,
        fault_calls=fault_calls,
        trainable_parameters=trainable_parameters,
        weights_unchanged=weights_unchanged,
    )
    return Audited(audit, tuple(mismatches))


def layers_without_gradient(book: AddressBook, arena: Arena, replica: int) -> Iterator[int]:
    """Yield each decoder layer none of whose trainable tensors gets a gradient: it would learn nothing.

    Ask after step 1: in step 0 only one factor of each adapter has a gradient, the other is zero.
    """
    for layer in range(book.layer_count):
        prefix = f"{book.layer_output(layer).name}."
        names = [name for name in arena.names() if name.startswith(prefix)]
        if names and not any(arena.view(arena.gradients, name)[replica].any() for name in names):
            yield layer


def _noise_sites(run: Run, book: AddressBook) -> list[str]:
    if run.noise is None:
        return []
    return [
        address.name
        for layer, multiplier in enumerate(run.noise.multipliers)
        if multiplier > 0
        for address in book.carrier_sites(run.noise.carrier, layer)
    ]


def _noise_mismatches(run: Run, steps: int, measures: Sequence[NoiseMeasure]) -> Iterator[str]:
    """Yield each layer whose measured noise is not what the run declares."""
    sigma = run.noise.sigma[:steps] if run.noise else ()
    looked_at = [value for step, value in enumerate(sigma) if is_audited(run, step)]
    rms = math.sqrt(math.fsum(value * value for value in looked_at) / max(len(looked_at), 1))
    realised = {measure.layer: measure for measure in measures}
    for layer, multiplier in enumerate(run.noise.multipliers if run.noise and looked_at else ()):
        measure = realised.pop(layer, None)
        wanted = rms * multiplier
        if measure is None and wanted > 0:
            yield f"layer {layer} was scheduled {wanted:.6g} and got none"
        elif measure is not None and not within_sampling_error(
            measure.realised, wanted, measure.draws
        ):
            yield f"layer {layer} was scheduled {wanted:.6g} and got {measure.realised:.6g}"
    for layer in realised:
        yield f"layer {layer} was scheduled none and got noise"
