"""Where a run stands after a rung, in whatever pack it has been and will go on in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from aqn_tune.ledger.rows import Observation

if TYPE_CHECKING:
    from aqn_tune.training.pack import ReplicaPack


class ReplicaState(NamedTuple):
    """Where one run of a pack stands after a rung; plain tensors and numbers, whatever pack it was in."""

    step: int
    row: dict[str, Tensor]
    train_losses: list[float]
    failure: str
    """Why the run failed, empty while it lives."""
    noise_calls: int
    noise_sums: dict[int, list[float]]
    fault_calls: list[int]
    """Of each fault of the run, in declared order; so are the three below."""
    gradients_due: list[int]
    faults_unseen: list[bool]
    """Whether the fault has changed no value so far."""
    quantizer_calls: list[int]
    observations: list[str]
    """What was seen, as JSON."""


def state_of(pack: ReplicaPack, replica: int) -> ReplicaState:
    """Return everything that `restore` needs of one run; random numbers are keyed and need no state."""
    audit, layout = pack.injection.audit, pack.injection.layout
    faults = [fault.tally for fault in layout.faults if replica in fault.slot.active]
    quantizers = [placed.tally for placed in layout.quantizers if replica in placed.slot.active]
    return ReplicaState(
        step=pack.step,
        row=pack.arena.state(replica),
        train_losses=list(pack.train_losses[replica]),
        failure=pack.failures.get(replica, ""),
        noise_calls=audit.calls[replica],
        noise_sums={layer: list(sums) for layer, sums in audit.sums[replica].items()},
        fault_calls=[int(tally.calls[replica]) for tally in faults],
        gradients_due=[int(tally.due[replica]) for tally in faults],
        faults_unseen=[replica in tally.unseen for tally in faults],
        quantizer_calls=[int(tally.calls[replica]) for tally in quantizers],
        observations=[seen.model_dump_json() for seen in pack.observations[replica]],
    )


def restore(pack: ReplicaPack, states: Sequence[ReplicaState]) -> None:
    """Let `pack` continue from the states of its runs, in their order, whichever packs they come from.

    Raises ValueError where living runs stand at different steps.
    """
    living = [state.step for state in states if not state.failure]
    pack.step = max(living or [state.step for state in states])
    if len(set(living)) > 1:
        raise ValueError(f"runs at different steps cannot share a pack: {living}")
    audit, layout = pack.injection.audit, pack.injection.layout
    for replica, state in enumerate(states):
        pack.train_losses[replica] = list(state.train_losses)
        if state.failure:
            pack.failures[replica] = state.failure
        pack.observations[replica] = [
            Observation.model_validate_json(text) for text in state.observations
        ]
        pack.arena.restore(replica, state.row)
        audit.calls[replica] = state.noise_calls
        audit.sums[replica] = {layer: list(sums) for layer, sums in state.noise_sums.items()}
        faults = (fault.tally for fault in layout.faults if replica in fault.slot.active)
        counts = zip(state.fault_calls, state.gradients_due, state.faults_unseen, strict=True)
        for tally, (calls, due, unseen) in zip(faults, counts, strict=True):
            tally.calls[replica], tally.due[replica] = calls, due
            if not unseen:
                tally.unseen.discard(replica)
        placed = (own.tally for own in layout.quantizers if replica in own.slot.active)
        for quantizer, calls in zip(placed, state.quantizer_calls, strict=True):
            quantizer.calls[replica] = calls
