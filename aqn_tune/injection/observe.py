"""What activations look like on their way through the model, and what each injection makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aqn_tune.injection.address import Address, AddressBook
from aqn_tune.ledger.rows import Activation, Injected, SiteActivation

if TYPE_CHECKING:
    from aqn_tune.injection.injection import Injection

DIGITS = 6
"""Significant digits that are kept: values are float32, and a row per step has hundreds of them."""


def compact(value: float) -> float | None:
    """Return `value` with `DIGITS` significant digits, None when it is not finite."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def activation(x: Tensor, valid: Tensor) -> Activation | None:
    """Return the statistics of one replica's values `x` [N, D] at its `valid` [N] tokens.

    In float64; None without a valid token. Depends on nothing but the valid values, in their order.
    """
    values = x.detach()[valid].double()
    if not values.numel():
        return None
    deviation = values - values.mean()
    variance = float(deviation.square().mean())
    fourth = float(deviation.square().square().mean())
    return Activation(
        rms=compact(math.sqrt(float(values.square().mean()))),
        max_abs=compact(float(values.abs().max())),
        kurtosis=compact(fourth / variance / variance - 3.0) if variance > 0 else None,
        zero_fraction=float(f"{float((values == 0).double().mean()):.{DIGITS}g}"),
    )


class ActivationWatch:
    """Records the activations of one forward pass while used as a context.

    Enter it inside the injection's own context, whose hooks come first, and leave it before the
    backward pass: a module that is run again there would be seen twice. Values are read and never
    changed.

    Args:
        injection: Injects into the pass, and tells the watch of everything that it does.
        book: Addresses of the model.
        valid: Boolean [K, N], False at padding.
        skipped: By replica that is looked at, the decoder layers that it leaves out.
    """

    def __init__(
        self,
        injection: Injection,
        book: AddressBook,
        valid: Tensor,
        skipped: dict[int, tuple[int, ...]],
    ) -> None:
        self.sites: dict[int, list[SiteActivation]] = {replica: [] for replica in skipped}
        self._injection = injection
        self._book = book
        self._valid = valid
        self._skipped = skipped
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for layer in range(self._book.layer_count):
            address = self._book.layer_output(layer)
            hook = partial(self._on_layer, address)
            self._handles.append(address.module.register_forward_hook(hook))
        self._injection.watch = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._injection.watch = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _on_layer(self, address: Address, module: nn.Module, args: Any, out: Any) -> None:
        given: Tensor = out[0] if isinstance(out, tuple) else out
        x = given.reshape(len(self._valid), -1, given.shape[-1])
        self.see(address, "output", "nothing", "", tuple(self.sites), None, x)

    def see(
        self,
        address: Address,
        site: Literal["input", "output"],
        injected: Injected,
        kind: str,
        active: Sequence[int],
        before: Tensor | None,
        after: Tensor,
    ) -> None:
        """Record `before` and `after` [K, N, D] an injection, for those of the `active` replicas that
        are looked at and do not leave the layer out."""
        for replica in self._looked_at(active, address.layer):
            valid = self._valid[replica]
            now = activation(after[replica], valid)
            if now is None:
                continue
            self.sites[replica].append(
                SiteActivation(
                    layer=address.layer,
                    module=self._place(address),
                    site=site,
                    injected=injected,
                    kind=kind,
                    before=None if before is None else activation(before[replica], valid),
                    after=now,
                )
            )

    def _looked_at(self, active: Iterable[int], layer: int) -> list[int]:
        return [
            replica
            for replica in active
            if replica in self._skipped and layer not in self._skipped[replica]
        ]

    def _place(self, address: Address) -> str:
        """Return the module's name inside its layer, as `modules` globs have it."""
        layer = self._book.layer_output(address.layer).name
        return address.name.removeprefix(layer).removeprefix(".") or "."
