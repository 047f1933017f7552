"""What a run owns of a row of the arena that is made for the larger adapters of another run."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OwnPart:
    """The elements of one padded row that are the run's own, one after another as they are alone.

    The optimiser works on these packed copies and never sees the padding. The order of a norm's sum, the
    places of elements in AdamW's loop and the shape of its state are thus those of the run alone.

    Args:
        is_own: Boolean [P]: True where an element of the row is the run's own.
        row: The run's weights with their padding, [P].
    """

    def __init__(self, is_own: Tensor, row: Tensor) -> None:
        self._places = is_own.nonzero().flatten()
        self.weights = row.new_zeros(len(self._places))
        self.gradient = torch.zeros_like(self.weights)
        self.parameter = nn.Parameter(self.weights)
        """The packed weights, as an optimiser takes them."""
        self.parameter.grad = self.gradient

    @property
    def size(self) -> int:
        """How many elements are the run's own, p."""
        return len(self._places)

    def take(self, row: Tensor) -> Tensor:
        """Return the run's own elements [p] of a row [P], a copy."""
        return row.index_select(0, self._places)

    def put(self, row: Tensor, own: Tensor) -> None:
        """Write the run's own elements [p] to their places in a row [P]; the padding stays as it is."""
        row.index_copy_(0, self._places, own)

    def load(self, weights: Tensor, gradient: Tensor) -> None:
        """Pack what two rows [P] hold into `weights` and `gradient`, which the optimiser reads."""
        torch.index_select(weights, 0, self._places, out=self.weights)
        torch.index_select(gradient, 0, self._places, out=self.gradient)
