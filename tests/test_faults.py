"""Every kind of fault: registry, off values, replicates that do not touch, padding, types, derivatives."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import zlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

import aqn_tune.faults
from aqn_tune.faults import FAULTS, Fault, FaultSpec
from aqn_tune.faults.base import GRADIENT_SITES, TrueGradientFault

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}

SHORTEST: dict[str, dict[str, Any]] = {
    "dead_zone": {"threshold": 0.3},
    "relative_gaussian": {},
    "absolute_gaussian": {"scale": 0.1},
    "bias": {"scale": 0.1},
    "saturation": {"limit": 0.5},
    "stuck_at": {"value": 0.25, "density": 0.5},
    "spike": {"probability": 0.2},
    "bit_flip": {"bits": "exponent", "rate": 0.2},
}
"""Each kind with nothing but what it requires."""

REFERENCES = ("token_max", "tensor_max", "rms", "mean_abs", "std", "absolute")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *SHORTEST.items(),
    *(("dead_zone", {"threshold": 0.3, "reference": r}) for r in (*REFERENCES, "quantile")),
    *(("absolute_gaussian", {"scale": 0.1, "reference": r}) for r in REFERENCES),
    *(("bias", {"scale": -0.1, "reference": r}) for r in REFERENCES),
    *(("bias", {"scale": 0.1, "form": "sign", "reference": r}) for r in ("absolute", "rms")),
    ("bias", {"scale": 0.1, "form": "gain"}),
    *(("saturation", {"limit": 0.5, "reference": r}) for r in REFERENCES),
    *(("spike", {"probability": 0.2, "persistence": p}) for p in ("permanent", "transient")),
    *(("bit_flip", {"bits": "sign", "count": 7, "format": f}) for f in ("fp32", "bf16", "fp16")),
    ("bit_flip", {"bits": "0-6", "count": 7, "format": "bf16", "persistence": "permanent"}),
]
every_kind = pytest.mark.parametrize("kind", sorted(FAULTS))
every_variant = pytest.mark.parametrize(
    ("kind", "fields"), VARIANTS, ids=[f"{kind}-{list(f.values())}" for kind, f in VARIANTS]
)


class FakeDraws:
    """Draws of one call: keyed by seed and step where fresh, by the device otherwise."""

    def __init__(
        self, x: Tensor, *, seeds: Sequence[int] | None = None, step: int = 0, device: int = 0
    ) -> None:
        self.x = x
        self.seeds = range(len(x)) if seeds is None else seeds
        self.step = step
        self.device = device

    def normal(self) -> Tensor:
        generators = self.generators("normal", fresh=True)
        rows = [torch.randn(self.x.shape[1:], generator=g) for g in generators]
        return torch.stack(rows).to(self.x.dtype)

    def generators(self, stream: str, *, fresh: bool) -> list[torch.Generator]:
        keys = [
            (seed, self.step, stream) if fresh else (self.device, stream) for seed in self.seeds
        ]
        return [torch.Generator().manual_seed(zlib.crc32(repr(key).encode())) for key in keys]


def make(kind: str, **fields: Any) -> FaultSpec:
    """Return a fault of layer 0."""
    return FAULTS[kind].model_validate({"layers": [0], **fields})


def apply(
    fault: FaultSpec,
    x: Tensor,
    *,
    valid: Tensor | None = None,
    draws: FakeDraws | None = None,
    **levels: list[float],
) -> Tensor:
    """Return what `fault` makes of `x` [K, N, D]; `levels` are values per replicate."""
    valid = torch.ones(*x.shape[:2], 1, dtype=torch.bool) if valid is None else valid
    params = {
        name: torch.tensor(
            levels.get(name, [getattr(fault, name)] * len(x)), dtype=torch.float64
        ).view(-1, 1, 1)
        for name in fault.per_replica
    }
    return fault.apply(x, params, valid, draws or FakeDraws(x.detach()))


def bits(x: Tensor) -> Tensor:
    """Return the bit patterns, in which NaN equals itself and -0 differs from 0."""
    return x.detach().contiguous().view(BITS[x.dtype])


def sample(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 3, scale: float = 1.0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


# -- the registry ------------------------------------------------------------------------------------


@every_kind
def test_a_kind_is_registered_under_its_name_and_survives_a_round_trip(kind: str) -> None:
    fault = make(kind, **SHORTEST[kind])
    assert fault.kind == kind
    adapter: TypeAdapter[Any] = TypeAdapter(Fault)
    assert adapter.validate_json(fault.model_dump_json()) == fault
    assert fault.model_copy(update={"mask_seed": 1}) != fault


@every_kind
def test_every_field_has_a_sentence_and_per_replica_names_numbers(kind: str) -> None:
    fields = FAULTS[kind].model_fields
    undescribed = [name for name, field in fields.items() if not field.description]
    assert set(undescribed) <= {"kind"}
    assert all(fields[name].annotation is float for name in FAULTS[kind].per_replica)
    static = make(kind, **SHORTEST[kind]).static()
    assert not set(static) & set(FAULTS[kind].per_replica)


@every_kind
def test_a_key_that_nobody_reads_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        make(kind, **SHORTEST[kind], severity=1)


def test_every_file_imports_and_every_spec_validates_without_torch() -> None:
    names = [f"aqn_tune.faults.{m.name}" for m in pkgutil.iter_modules(aqn_tune.faults.__path__)]
    assert len(names) >= len(FAULTS)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        + "".join(f"import {name}\n" for name in names)
        + "from aqn_tune.faults import FAULTS\n"
        + f"for kind, fields in {SHORTEST!r}.items():\n"
        + "    FAULTS[kind].model_validate({'layers': [0], **fields}).static()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("kind", "fields", "off"),
    [
        ("dead_zone", {"threshold": 0.0}, True),
        ("dead_zone", {"threshold": 0.1}, False),
        ("relative_gaussian", {"scale": 0.0}, True),
        ("relative_gaussian", {}, False),
        ("absolute_gaussian", {"scale": 0.0}, True),
        ("absolute_gaussian", {"scale": 0.1}, False),
        ("bias", {"scale": 0.0}, True),
        ("bias", {"scale": -0.1}, False),
        ("saturation", {"limit": 1.0}, True),
        ("saturation", {"limit": 1.0, "reference": "rms"}, False),
        ("saturation", {"limit": 0.5}, False),
        ("stuck_at", {"value": 0.0, "density": 0.1}, False),
        ("spike", {"probability": 0.0}, True),
        ("spike", {"probability": 0.1}, False),
        ("bit_flip", {"bits": [30], "rate": 0.0}, True),
        ("bit_flip", {"bits": [30], "count": 0}, True),
        ("bit_flip", {"bits": [30], "rate": 1e-12}, False),
        ("bit_flip", {"bits": [30], "count": 1}, False),
    ],
)
def test_the_level_at_which_a_fault_is_the_identity(
    kind: str, fields: dict[str, Any], off: bool
) -> None:
    fault = make(kind, **fields)
    assert fault.is_off() is off
    if off:
        x = sample(2, 5, 8)
        assert torch.equal(bits(apply(fault, x)), bits(x))


@pytest.mark.parametrize(
    ("kind", "fields", "stochastic"),
    [
        ("dead_zone", {}, False),
        ("saturation", {}, False),
        ("stuck_at", {}, False),
        ("stuck_at", {"persistence": "transient"}, True),
        ("bias", {}, False),
        ("bias", {"persistence": "intermittent", "activation_rate": 0.5}, True),
        ("relative_gaussian", {}, True),
        ("absolute_gaussian", {}, True),
        ("spike", {"persistence": "permanent"}, True),
        ("bit_flip", {}, True),
        ("bit_flip", {"persistence": "permanent"}, False),
    ],
)
def test_which_faults_differ_from_call_to_call(
    kind: str, fields: dict[str, Any], stochastic: bool
) -> None:
    fault = make(kind, **{**SHORTEST[kind], **fields})
    assert fault.is_stochastic() is stochastic
    x = sample(1, 20, 16)
    first, second = (apply(fault, x, draws=FakeDraws(x, step=step)) for step in (0, 1))
    if not stochastic:
        assert torch.equal(bits(first), bits(second))
    elif kind in ("relative_gaussian", "absolute_gaussian", "spike", "bit_flip"):
        assert not torch.equal(bits(first), bits(second))


# -- what no kind may do -----------------------------------------------------------------------------


@every_variant
def test_replicas_do_not_touch(kind: str, fields: dict[str, Any]) -> None:
    """Replica 0 beside one a thousand times larger and one of NaN is bit for bit replica 0 alone."""
    fault = make(kind, **fields)
    x = sample(3, 6, 16)
    x[1] *= 1000
    x[2] = float("nan")
    together, alone = apply(fault, x), apply(fault, x[:1])
    assert torch.equal(bits(together[:1]), bits(alone))
    assert not torch.equal(bits(alone), bits(x[:1]))


@every_kind
def test_replicas_have_levels_of_their_own(kind: str) -> None:
    """Every `per_replica` field: the pack gives what each replicate gets alone."""
    fault = make(kind, **SHORTEST[kind])
    x = sample(2, 6, 16)
    for name in fault.per_replica:
        levels = [getattr(fault, name), getattr(fault, name) / 2]
        together = apply(fault, x, **{name: levels})
        for k, level in enumerate(levels):
            alone = apply(fault, x[k : k + 1], draws=FakeDraws(x[:1], seeds=[k]), **{name: [level]})
            assert torch.equal(bits(together[k : k + 1]), bits(alone))
        same = apply(fault, x, **{name: levels[:1] * 2})
        assert not torch.equal(bits(together[1]), bits(same[1])), name


@every_variant
def test_padding_enters_no_reference(kind: str, fields: dict[str, Any]) -> None:
    fault = make(kind, **fields)
    valid = torch.ones(2, 6, 1, dtype=torch.bool)
    valid[0, 4:] = False
    valid[1, :1] = False
    keep = valid.expand(2, 6, 16)
    x = sample(2, 6, 16)
    expected = bits(apply(fault, x, valid=valid))[keep]
    for padding in (1e6, float("nan"), float("-inf")):
        padded = torch.where(valid, x, torch.tensor(padding))
        assert torch.equal(bits(apply(fault, padded, valid=valid))[keep], expected)


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_type_shape_and_input_are_kept(
    kind: str, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    x = sample(2, 6, 16, dtype=dtype)
    before = x.clone()
    turned = x.transpose(1, 2)
    result = apply(make(kind, **fields), x)
    assert (result.dtype, result.shape) == (x.dtype, x.shape)
    assert torch.equal(bits(x), bits(before))
    assert apply(make(kind, **fields), turned).shape == turned.shape


@pytest.mark.parametrize("kind", ["dead_zone", "saturation", "spike", "bit_flip"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_values_that_are_not_affected_keep_their_bits(kind: str, dtype: torch.dtype) -> None:
    fields = {"format": "bf16"} if kind == "bit_flip" else {}
    fault = make(kind, **SHORTEST[kind], **fields)
    x = sample(1, 40, 16, dtype=dtype)
    result = apply(fault, x)
    same = result == x
    assert 0 < int(same.sum()) < x.numel()
    assert torch.equal(bits(result)[same], bits(x)[same])


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("saturation", {"limit": 2.0, "reference": "absolute"}),
        ("spike", {"probability": 0.5}),
        ("bit_flip", {"bits": "mantissa", "format": "fp16", "rate": 0.5}),
    ],
)
def test_zeros_keep_their_sign_and_nan_its_bits(kind: str, fields: dict[str, Any]) -> None:
    """Nothing goes through arithmetic that the fault did not hit: -0 + 0 is 0, NaN + 0 another NaN."""
    x = torch.tensor([-0.0, 0.0, 1e-40, -1.0]).repeat(1, 25, 1)
    odd = torch.tensor(0x7FA12345, dtype=torch.int32).view(torch.float32)
    valid = torch.ones(1, 25, 1, dtype=torch.bool)
    valid[0, 24] = False
    x[0, 24] = odd
    result = apply(make(kind, **fields), x, valid=valid)
    kept = bits(result) == bits(x)
    assert bool(kept[0, 24].all())
    assert bool(kept[..., 0].any())
    assert bool(((bits(result) != bits(x)) <= (result != x)).logical_or(x == 0).all())


# -- derivatives -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("dead_zone", {"threshold": 0.5, "reference": "absolute"}),
        ("absolute_gaussian", {"scale": 0.3, "reference": "absolute"}),
        ("bias", {"scale": 0.3, "reference": "absolute"}),
        ("bias", {"scale": 0.3, "form": "sign"}),
        ("bias", {"scale": -0.3, "form": "gain"}),
        ("saturation", {"limit": 0.7, "reference": "absolute"}),
        ("stuck_at", {"value": 2.0, "density": 0.5}),
    ],
)
def test_the_derivative_is_that_of_the_values(kind: str, fields: dict[str, Any]) -> None:
    """Against finite differences in float64, at points away from the kinks."""
    x = sample(2, 3, 4, dtype=torch.float64)
    kinks = torch.tensor([0.0, 0.5, 0.7, -0.5, -0.7], dtype=torch.float64)
    assert float((x.unsqueeze(-1) - kinks).abs().min()) > 1e-3
    x.requires_grad_()
    fault = make(kind, **fields)
    assert torch.autograd.gradcheck(lambda x: apply(fault, x), (x,))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("relative_gaussian", {}),
        *(("absolute_gaussian", {"scale": 0.3, "reference": r}) for r in REFERENCES),
        *(("bias", {"scale": 0.3, "reference": r}) for r in REFERENCES),
        ("bias", {"scale": 0.3, "form": "sign", "reference": "rms"}),
        ("bit_flip", {"bits": "exponent", "count": 20}),
        ("bit_flip", {"bits": [30], "count": 24}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_derivative_is_the_identity(
    kind: str, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    """The references and errors are constants, whatever they are computed from; non-finite values too."""
    x = sample(2, 6, 4, dtype=dtype).requires_grad_()
    handed_back = sample(2, 6, 4, dtype=dtype, seed=8)
    apply(make(kind, **fields), x).backward(handed_back)
    assert x.grad is not None
    assert torch.equal(bits(x.grad), bits(handed_back))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *(("dead_zone", {"threshold": 0.4, "reference": r}) for r in (*REFERENCES, "quantile")),
        *(("saturation", {"limit": 0.4, "reference": r}) for r in REFERENCES),
        ("stuck_at", {"value": 1.0, "density": 1.0}),
        ("spike", {"probability": 0.4}),
    ],
)
def test_a_value_that_was_replaced_passes_no_gradient(kind: str, fields: dict[str, Any]) -> None:
    fault = make(kind, **fields)
    assert isinstance(fault, TrueGradientFault)
    x = sample(2, 6, 4).requires_grad_()
    values = apply(fault, x)
    handed_back = sample(2, 6, 4, seed=8)
    values.backward(handed_back)
    assert x.grad is not None
    replaced = values != x
    assert bool(replaced.any())
    assert torch.equal(x.grad, handed_back.masked_fill(replaced, 0.0))


def test_a_gain_passes_its_own_gradient() -> None:
    x = torch.tensor([[[1.0, -2.0]]], requires_grad=True)
    apply(make("bias", scale=0.25, form="gain"), x).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [1.25, 1.25]


# -- what every kind declares ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("bias", {"persistence": "intermittent"}, "an intermittent fault has an activation_rate"),
        ("bias", {"activation_rate": 0.5}, "persistence permanent with activation_rate 0.5"),
        ("bias", {"density": 0.0}, "greater than 0"),
        ("bias", {"density": 1.5}, "less than or equal to 1"),
        ("bias", {"scale": float("inf")}, "finite number"),
        ("bias", {"form": "gain", "reference": "rms"}, "form gain with reference rms"),
        ("bias", {"form": "skew"}, "'offset', 'sign' or 'gain'"),
        ("absolute_gaussian", {"scale": -0.1}, "greater than or equal to 0"),
        ("absolute_gaussian", {"reference": "quantile"}, "'token_max', 'tensor_max'"),
        ("dead_zone", {"threshold": 1.5}, "flushes every value"),
        ("saturation", {"limit": 0.0}, "greater than 0"),
        ("saturation", {"limit": 1.5}, "limit 1.5 with reference token_max clips nothing"),
        (
            "saturation",
            {"limit": 2, "reference": "tensor_max"},
            "reference tensor_max clips nothing",
        ),
        ("stuck_at", {"density": None}, "density"),
        ("spike", {"probability": 1.5}, "less than or equal to 1"),
        ("spike", {"factor": 0.0}, "greater than 0"),
        ("relative_gaussian", {"site": "grad_input", "backward_scale": 0.1}, "gradient already"),
        ("bit_flip", {"count": 3}, "rate 0.2 with count 3: give exactly one"),
        ("bit_flip", {"rate": None}, "rate None with count None: give exactly one"),
        ("bit_flip", {"bits": []}, "are none, or name one twice"),
        ("bit_flip", {"bits": [3, 3]}, "are none, or name one twice"),
        ("bit_flip", {"bits": "9-3"}, "are none"),
        ("bit_flip", {"bits": "sine"}, "a range like '0-22', 'sign', 'exponent' or 'mantissa'"),
        ("bit_flip", {"bits": [-1]}, "its bits are 0 to 31"),
        ("bit_flip", {"bits": [32]}, r"mantissa 0-22, exponent 23-30, sign 31"),
        ("bit_flip", {"bits": "0-22", "format": "bf16"}, "mantissa 0-6, exponent 7-14, sign 15"),
        ("bit_flip", {"bits": [16], "format": "fp16"}, "mantissa 0-9, exponent 10-14, sign 15"),
        ("bit_flip", {"format": "fp8"}, "'fp32', 'bf16' or 'fp16'"),
    ],
)
def test_what_cannot_be_meant_is_refused(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind, **{**SHORTEST[kind], **fields})


def test_a_bias_has_one_name_for_one_reference() -> None:
    """A default and the same reference written out are the same fault, so they get the same key."""
    written = make("bias", scale=0.1, reference="rms")
    assert make("bias", scale=0.1).static() == written.static()
    signs = [make("bias", scale=0.1, form="sign", reference=r) for r in (None, "absolute")]
    assert signs[0].static() == signs[1].static() != written.static()
    assert make("bias", scale=0.1, form="gain").static()["reference"] is None


def test_noisy_operations_stand_for_errors_of_both_backward_products() -> None:
    fault = make("relative_gaussian", scale=0.05, backward_scale=0.1)
    assert make("relative_gaussian", scale=0.05).companions(weights_trained=True) == ()
    for trained, sites in ((True, ["grad_input", "grad_weight"]), (False, ["grad_input"])):
        companions = fault.companions(weights_trained=trained)
        assert [c.site for c in companions] == sites
        assert set(sites) <= set(GRADIENT_SITES)
        for companion in companions:
            assert companion.model_dump(exclude={"site"}) == {
                **fault.model_dump(exclude={"site"}),
                "scale": 0.1,
                "backward_scale": 0.0,
            }
