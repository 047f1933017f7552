"""What passes of one run have in common: the layers up to the first place at which their devices differ.

The decoder is cut at depths, see `Layout.depth`: what goes over a cut at depth l is what layer l - 1
returns, before anything is done to its output. Passes that meet the same up to there have the same
values up to there, and one of them is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from aqn_tune.injection.fold import FaultSlot
from aqn_tune.injection.layout import Faults, Layout
from aqn_tune.injection.swap import ForwardSwap
from aqn_tune.training.data import TokenSet, answer_logits


class Route(NamedTuple):
    """What one pass meets on its way through a decoder of L layers."""

    depths: tuple[Hashable, ...]
    """What is injected at each depth, 0 to L: values are equal as long as these are."""
    uncut: frozenset[int]
    """Depths at which this pass cannot be taken up again."""
    drawn: frozenset[str]
    """Weights that are drawn anew in every batch. In a fold a weight is measured as often for all, and
    the last bits of a mean show how often: only passes in which these are the same share a fold."""


def route(layout: Layout, draw: int) -> Route:
    """Return the route of the only replica of `layout`, whose random faults draw under number `draw`."""
    met: list[set[Hashable]] = [set() for _ in range(layout.layer_count + 1)]
    uncut: set[int] = set()
    drawn: set[str] = set()

    def identities(faults: Faults) -> tuple[Hashable, ...]:
        return tuple(_identity(slot, draw) for slot, _ in faults)

    for (name, outer), site in layout.sites.items():
        formats = tuple((slot.spec, slot.outer) for slot, _ in site.quantizers)
        entering = (formats, identities(site.input), identities(site.grad_input))
        leaving = (identities(site.output), identities(site.grad_output), bool(site.skips))
        if any(entering):
            depth = layout.depth(site.address, "input")
            met[depth].add((name, outer, "input", *entering))
        if any(leaving):
            depth = layout.depth(site.address, "output")
            met[depth].add((name, outer, "output", *leaving))
        if (
            site.skips
        ):  # what comes out of the layer is what went in, and that does not go over the cut
            uncut.add(site.address.layer + 1)
    for name, weight in layout.weights.items():
        if any(slot.spec.is_stochastic() for slot, _ in weight.faults):
            drawn.add(name)
        met[weight.address.layer].add(
            (
                name,
                weight.host is None,
                identities(weight.faults),
                tuple(slot.spec for slot, _ in weight.quantizers),
                identities(weight.gradients),
            )
        )
    for slot, addresses, _ in layout.faults:
        # The measure of a fault is a sum over its places, to be added up in one go.
        depths = [layout.depth(address, slot.spec.site) for address in addresses]
        uncut.update(range(min(depths) + 1, max(depths) + 1))
    if layout.noise:  # there is none in a sound evaluation
        met[0].add(object())
    return Route(tuple(frozenset(at) for at in met), frozenset(uncut), frozenset(drawn))


def _identity(slot: FaultSlot, draw: int) -> Hashable:
    return slot.identity(0), draw if slot.spec.is_stochastic() else None


def difference(routes: Sequence[Route]) -> int:
    """Return the first depth at which the routes differ; the depth behind the last if they do not."""
    first, *others = routes
    for depth, met in enumerate(first.depths):
        if any(other.depths[depth] != met for other in others):
            return depth
    return len(first.depths)


def last_cut(routes: Sequence[Route]) -> int:
    """Return the deepest depth up to which one pass may stand for all of them, 0 for nowhere."""
    depth = difference(routes)
    if depth == len(routes[0].depths):
        return depth
    while depth and any(depth in route.uncut for route in routes):
        depth -= 1
    return depth


class Stretch:
    """Runs a part of the decoder while used as a context: the other layers are there in name only.

    What the model does outside its layers it does for the rows of the pass at hand, so that masks and
    positions fit.

    Args:
        layers: The decoder's layers, L of them.
        part: The depths of the part. It ends in front of the layer `part.stop`, or for L + 1 with the
            model's own end.
    """

    def __init__(self, layers: Sequence[nn.Module], part: range) -> None:
        self.entered: Any = None
        """What goes into the part: what the layer before it returns, for the rows of the pass."""
        self.left: Any = None
        """What comes out of the part: what its last layer returned, hidden states and nothing beside
        them. None for a part that goes on to the end."""
        self._layers = layers
        self._part = part
        self._forwards = ForwardSwap()

    def __enter__(self) -> Self:
        for number, layer in enumerate(self._layers):
            stand_in: Callable[..., Any]
            if number < self._part.start:
                stand_in = self._enter
            elif number == self._part.stop - 1:
                stand_in = partial(self._last, layer.forward)
            elif number >= self._part.stop:
                stand_in = self._leave
            else:
                continue
            self._forwards.put(layer, stand_in)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._forwards.restore()
        self.entered = self.left = None

    def _enter(self, *args: Any, **kwargs: Any) -> Any:
        return self.entered

    def _last(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        # A layer may return more beside the hidden states, as attention weights: nobody asked for them.
        self.left = (out[0], *(None for _ in out[1:])) if isinstance(out, tuple) else out
        return self.left

    def _leave(self, *args: Any, **kwargs: Any) -> Any:
        return self.left


def run_without_end(model: nn.Module, batch: TokenSet) -> None:
    """Run a model whose logits nobody wants."""
    model(input_ids=batch.tokens, use_cache=False, logits_to_keep=1)


def taken(left: Any, rows: Tensor) -> Any:
    """Return what a layer returned for the rows with the numbers `rows`, each as often as named."""
    if isinstance(left, tuple):
        return (left[0][rows], *left[1:])
    return left[rows]


def can_be_cut(model: nn.Module, layers: Sequence[nn.Module], batch: TokenSet, depth: int) -> bool:
    """Return whether a model comes to the same logits, bit for bit, when cut at `depth`, tried on a batch.

    It does unless its layers hand on more than hidden states: keys and values that later layers share,
    or something that a module keeps from one call to the next.
    """
    handed: list[Any] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: handed.extend([*args, *kwargs.values()]), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        whole = answer_logits(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not all(_is_plain(value) for value in handed) or not whole.isfinite().all():
        return False
    with Stretch(layers, range(depth)) as first:
        run_without_end(model, batch)
        left = first.left
    hidden = left[0] if isinstance(left, tuple) else left
    if hidden.dim() != 3 or len(hidden) != len(batch.tokens):
        return False
    # Between the parts other tokens go through the model, as they do in an evaluation.
    run_without_end(model, batch._replace(tokens=batch.tokens.flip(1)))
    with Stretch(layers, range(depth, len(layers) + 1)) as second:
        second.entered = left
        parts = answer_logits(model, batch)
    return torch.equal(parts, whole)


def _is_plain(value: Any) -> bool:
    """Return whether a layer that is handed `value` cannot leave anything in it for the next."""
    if isinstance(value, tuple):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, Tensor | bool | int | float | str)
