"""Fault kernels: known answers, off values, references, and that no reduction crosses a replica."""

from __future__ import annotations

import pytest
import torch

from aqn_tune.faults import FAULTS, DeadZone, RelativeGaussian
from aqn_tune.faults.base import Faulted, FaultSpec

X = torch.tensor([[[1.0, -2.0, 0.5, 4.0], [0.1, -0.2, 0.3, 10.0]]])  # [1, 2, 4]
ALL = torch.ones(1, 2, 1, dtype=torch.bool)


def apply(
    fault: FaultSpec, x: torch.Tensor, valid: torch.Tensor | None = None, **params: list[float]
) -> Faulted:
    valid = torch.ones(*x.shape[:2], 1, dtype=torch.bool) if valid is None else valid
    values = {
        name: torch.tensor(
            params.get(name, [getattr(fault, name)] * x.shape[0]), dtype=torch.float64
        )
        for name in fault.per_replica
    }
    shaped = {name: value.view(-1, 1, 1) for name, value in values.items()}
    generator = torch.Generator().manual_seed(1)
    return fault.apply(
        x, shaped, valid, lambda: torch.randn(x.shape, generator=generator).to(x.dtype)
    )


@pytest.mark.parametrize(
    ("reference", "threshold", "expected"),
    [
        ("token_max", 0.3, [[0.0, -2.0, 0.0, 4.0], [0.0, 0.0, 0.0, 10.0]]),
        ("tensor_max", 0.15, [[0.0, -2.0, 0.0, 4.0], [0.0, 0.0, 0.0, 10.0]]),
        ("tensor_max", 0.05, [[1.0, -2.0, 0.5, 4.0], [0.0, 0.0, 0.0, 10.0]]),
        ("absolute", 0.4, [[1.0, -2.0, 0.5, 4.0], [0.0, 0.0, 0.0, 10.0]]),
        ("rms", 0.5, [[0.0, -2.0, 0.0, 4.0], [0.0, 0.0, 0.0, 10.0]]),  # rms 2.3 and 5.0
        ("quantile", 0.5, [[0.0, -2.0, 0.0, 4.0], [0.0, 0.0, 0.3, 10.0]]),
        ("quantile", 1.0, [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]),
        ("token_max", 0.0, X[0].tolist()),
        ("quantile", 0.0, X[0].tolist()),
    ],
)
def test_dead_zone_known_answers(
    reference: str, threshold: float, expected: list[list[float]]
) -> None:
    fault = DeadZone(layers=(0,), threshold=threshold, reference=reference)
    assert torch.equal(apply(fault, X).values[0], torch.tensor(expected))


def test_a_value_at_the_threshold_survives() -> None:
    fault = DeadZone(layers=(0,), threshold=0.5, reference="token_max")
    assert apply(fault, torch.tensor([[[2.0, 4.0]]])).values.flatten().tolist() == [2.0, 4.0]


def test_padding_enters_neither_the_reference_nor_the_count() -> None:
    fault = DeadZone(layers=(0,), threshold=0.5, reference="tensor_max")
    x = torch.tensor([[[1.0, 2.0], [100.0, 0.0]]])
    valid = torch.tensor([[[True], [False]]])
    result = apply(fault, x, valid)
    assert result.values[0, 0].tolist() == [1.0, 2.0]
    assert int(result.affected.sum()) == 0
    # The original bug: the maximum over the whole tensor, padding included, silences every real value.
    assert apply(fault, x).values[0, 0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("ste", "expected"), [(False, [0.0, 1.0]), (True, [1.0, 1.0])])
def test_dead_zone_gradient(ste: bool, expected: list[float]) -> None:
    x = torch.tensor([[[1.0, 4.0]]], requires_grad=True)
    fault = DeadZone(layers=(0,), threshold=0.5, ste=ste)
    values = apply(fault, x).values
    assert values.flatten().tolist() == [0.0, 4.0]
    values.sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == expected


def test_relative_gaussian_has_the_declared_relative_error_and_identity_gradient() -> None:
    x = torch.full((1, 400, 50), -3.0, requires_grad=True)
    result = apply(RelativeGaussian(layers=(0,), scale=0.05), x)
    error = (result.values - x) / 3.0
    assert float(error.detach().std()) == pytest.approx(0.05, rel=0.02)
    result.values.sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 1).all())


@pytest.mark.parametrize("kind", sorted(FAULTS))
def test_the_off_value_changes_no_bit_and_replicas_do_not_touch(kind: str) -> None:
    """A pack may hold a replica without the fault, and a neighbour with values a thousand times larger."""
    required = {"dead_zone": {"threshold": 0.3}}.get(kind, {})
    references = ["token_max", "tensor_max", "rms", "quantile"] if kind == "dead_zone" else [None]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 5, 8, generator=generator)
    x[2] *= 1000
    for reference in references:
        extra = {"reference": reference} if reference else {}
        fault = FAULTS[kind].model_validate({"layers": [0], **required, **extra})
        ((name, off),) = fault.per_replica.items()
        on = getattr(fault, name)
        together = apply(fault, x, **{name: [off, on, on]})
        assert torch.equal(together.values[0], x[0])
        assert int(together.affected[0].sum()) == 0
        calm = x.clone()
        calm[2] /= 1000
        assert torch.equal(
            apply(fault, calm, **{name: [off, on, on]}).values[1], together.values[1]
        )
        assert not torch.equal(together.values[1], x[1])
