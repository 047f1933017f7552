"""The audit of a training: what the run declares, held against what was attached, measured and learnt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch

from aqn_tune.faults.base import GRADIENT_SITES
from aqn_tune.injection.address import AddressBook
from aqn_tune.injection.injection import Injection
from aqn_tune.injection.measure import within_sampling_error
from aqn_tune.ledger.rows import Audit, NoiseMeasure
from aqn_tune.noise.effective import EffectiveNoise
from aqn_tune.study.runs import Run
from aqn_tune.training.arena import Arena
from aqn_tune.training.stacked import computes_in


class Audited(NamedTuple):
    """The audit of one run, and where it does not hold."""

    audit: Audit
    mismatches: tuple[str, ...]
    """One sentence each; a run with any is failed."""


MOST_SHORT = 20
"""Steps audited of those whose noise is that of no neighbour: all of a linear schedule would be too dear."""


def is_audited(run: Run, step: int) -> bool:
    """Return whether a step's noise is measured.

    A wrong stage, layer or scale shows at the first step of a sigma, a schedule that stops being read
    at the last: both are measured of every stretch with the same noise, and so are the first and the
    last noised step of each phase of the multipliers. Of stretches of a single step, as in a linear
    schedule, `MOST_SHORT` are, evenly spaced, the first and the last among them.
    """
    return run.noise is not None and step in _audited_steps(run.noise)


def guards_weights(run: Run, step: int) -> bool:
    """Return whether a step watches that nothing but its update changes a trained weight.

    The first step does, and the first and the last noised one: noise that is written into weights and
    left there shows in both, and a copy of all weights in every step would be dear.
    """
    noised = _audited_steps(run.noise) if run.noise is not None else ()
    return step == 0 or (bool(noised) and step in (min(noised), max(noised)))


@lru_cache(maxsize=64)
def _audited_steps(noise: EffectiveNoise) -> frozenset[int]:
    steps = range(len(noise.sigma))
    stretches = (
        list(group)
        for (sigma, _), group in groupby(steps, lambda t: (noise.sigma[t], noise.multipliers_at(t)))
        if sigma > 0
    )
    chosen: set[int] = set()
    short: list[int] = []
    for stretch in stretches:
        if len(stretch) > 1:
            chosen |= {stretch[0], stretch[-1]}
        else:
            short += stretch
    for _, phase in groupby((t for t in steps if noise.sigma[t] > 0), noise.multipliers_at):
        noised = list(phase)
        chosen |= {noised[0], noised[-1]}
    gaps = min(len(short), MOST_SHORT) - 1
    chosen |= {short[round(i * (len(short) - 1) / max(gaps, 1))] for i in range(gaps + 1)}
    return frozenset(chosen)


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
        for slot, addresses, _ in injection.layout.faults
        if replica in slot.active
        for address in addresses
    ]
    fault_sites = [address.name for fault in run.device.faults for address in book.find(fault)]
    noise_sites = _noise_sites(run, book)
    passes = steps * run.training.gradient_accumulation_steps
    fault_calls, due = _fault_calls(run, injection, book, replica, passes)
    noise_calls = injection.audit.calls[replica]
    quantizer_calls = sum(int(q.tally.calls[replica]) for q in injection.layout.quantizers)
    measures = injection.audit.measures(replica)
    mismatches: list[str] = []
    for what, got, wanted in (
        ("fault", sorted(attached), sorted(fault_sites)),
        ("fault", fault_calls, due),
        ("quantizer", quantizer_calls, passes * _quantized_operands(run, book)),
        ("noise", noise_calls, _noise_calls_due(run, book, steps)),
    ):
        if got != wanted:
            mismatches.append(f"{what} audit: declared {wanted}, happened {got}")
    mismatches += [f"fault audit: {text}" for text in _idle_faults(run, injection, replica, steps)]
    dtype = computes_in(book.model)
    mismatches += [
        f"noise audit: {text}" for text in _noise_mismatches(run, steps, measures, dtype)
    ]
    if not weights_unchanged:
        mismatches.append("weight audit: frozen weights changed during training")
    audit = Audit(
        fault_sites=tuple(attached),
        noise_sites=tuple(noise_sites),
        noise=measures,
        noise_calls=noise_calls,
        fault_calls=fault_calls,
        quantizer_calls=quantizer_calls,
        trainable_parameters=trainable_parameters,
        weights_unchanged=weights_unchanged,
    )
    return Audited(audit, tuple(mismatches))


def _fault_calls(
    run: Run, injection: Injection, book: AddressBook, replica: int, passes: int
) -> tuple[int, int]:
    """Return how often the faults of a run acted, and how often they should have.

    A gradient that reaches a site must meet its fault, and at least one must reach it in every pass:
    nothing flows back into the first layer's input when the embeddings are frozen.
    """
    got = sum(int(fault.tally.calls[replica]) for fault in injection.layout.faults)
    due = 0
    for slot, addresses, tally in injection.layout.faults:
        if replica not in slot.active:
            continue
        if slot.spec.site in GRADIENT_SITES:
            due += max(int(tally.due[replica]), passes)
        else:
            due += passes * len(addresses)
    return got, due


def _idle_faults(run: Run, injection: Injection, replica: int, steps: int) -> Iterator[str]:
    """Yield each fault of a run that was in place at every step and changed nothing at any.

    An evaluation says so of the faults that it meets; those of training alone are met here only. A fault may
    act late, as gradients and activations grow, so ask at the end.
    """
    if steps < run.training.steps:
        return
    for slot, addresses, tally in injection.layout.faults:
        # The gradient of a layer that is left out is zero, and zero stays zero.
        reaches = slot.spec.site not in GRADIENT_SITES or any(
            address.layer not in run.skip for address in addresses
        )
        if replica in tally.unseen and reaches and not slot.spec.may_rest():
            place = f"{slot.spec.kind} at {slot.spec.site}"
            yield f"{place} changed no value in {steps} steps: it trained as without the fault"


def _quantized_operands(run: Run, book: AddressBook) -> int:
    return sum(
        len(book.find(quantizer, "quantization")) * (2 if quantizer.operands == "both" else 1)
        for quantizer in run.device.quantization
    )


def _noise_calls_due(run: Run, book: AddressBook, steps: int) -> int:
    if run.noise is None:
        return 0
    sites = [
        len(book.carrier_sites(run.noise.carrier, layer)) for layer in run.noise.noised_layers()
    ]
    of_layer = dict(zip(run.noise.noised_layers(), sites, strict=True))
    calls = sum(
        of_layer[layer]
        for step, sigma in enumerate(run.noise.sigma[:steps])
        for layer, multiplier in enumerate(run.noise.multipliers_at(step))
        if sigma * multiplier > 0
    )
    return calls * run.training.gradient_accumulation_steps


def layers_without_gradient(
    book: AddressBook, arena: Arena, replica: int, run: Run
) -> Iterator[int]:
    """Yield each decoder layer none of whose trained tensors gets a gradient: it would learn nothing.

    Layers that the run leaves out or does not train are not asked. Ask after step 1: in step 0 only
    one factor of each adapter has a gradient, the other is zero.
    """
    for layer in range(book.layer_count):
        if layer in run.skip:
            continue
        prefix = f"{book.layer_output(layer).name}."
        names = [
            name
            for name in arena.names()
            if name.startswith(prefix) and arena.is_trained(replica, name)
        ]
        if names and not any(arena.view(arena.gradients, name)[replica].any() for name in names):
            yield layer


def _noise_sites(run: Run, book: AddressBook) -> list[str]:
    if run.noise is None:
        return []
    return [
        address.name
        for layer in run.noise.noised_layers()
        for address in book.carrier_sites(run.noise.carrier, layer)
    ]


class _Scheduled(NamedTuple):
    """A layer's declared noise over the steps that were looked at."""

    rms: float
    """Root mean square over those with any noise."""
    weight: float
    """Share of the draws that a root mean square rests on: steps of a large sigma outweigh the others."""


def _scheduled(run: Run, layer: int, steps: Sequence[int]) -> _Scheduled:
    noise = run.noise
    levels = [noise.sigma[s] * noise.multipliers_at(s)[layer] for s in steps] if noise else []
    noised = [level for level in levels if level > 0]
    if not noised:
        return _Scheduled(0.0, 0.0)
    top = max(noised)  # relative to it, so that the fourth power of a tiny sigma does not vanish
    squares = [(level / top) ** 2 for level in noised]
    total, fourth = math.fsum(squares), math.fsum(square * square for square in squares)
    return _Scheduled(
        top * math.sqrt(total / len(squares)), total * total / (len(squares) * fourth)
    )


def _noise_mismatches(
    run: Run, steps: int, measures: Sequence[NoiseMeasure], dtype: torch.dtype
) -> Iterator[str]:
    """Yield each layer whose measured noise, in a model of type `dtype`, is not what the run declares."""
    realised = {measure.layer: measure for measure in measures}
    looked_at = [step for step in range(steps) if is_audited(run, step)]
    layers = len(run.noise.multipliers) if run.noise and looked_at else 0
    for layer in range(layers):
        measure = realised.pop(layer, None)
        wanted = _scheduled(run, layer, looked_at)
        if measure is None and wanted.rms > 0:
            yield f"layer {layer} was scheduled {wanted.rms:.6g} and got none"
        elif measure is not None and not within_sampling_error(
            measure.realised, wanted.rms, int(measure.draws * wanted.weight), dtype
        ):
            yield f"layer {layer} was scheduled {wanted.rms:.6g} and got {measure.realised:.6g}"
    for layer in realised:
        yield f"layer {layer} was scheduled none and got noise"
