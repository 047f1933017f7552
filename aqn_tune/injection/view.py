"""Activations as the fold sees them: one row of replicas, one of tokens, one of features."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FoldView(NamedTuple):
    """The shape of a pass, which turns what modules see into [K, N, D] and back."""

    replicas: int
    """K."""
    tokens: int
    """N, of each replica."""

    def folded(self, x: Tensor) -> Tensor:
        """Return what a module sees as [K, N, D]; the heads of a token are parts of its one vector.

        Raises RuntimeError where `x` has not one row for each token.
        """
        # No view where none is needed: adapters add to outputs in place, and through a view the
        # backward pass of that makes copies.
        if x.dim() == 3 and x.shape[:2] == (self.replicas, self.tokens):
            return x
        if self._heads_first(x):
            x = x.transpose(1, 2)
        elif x.dim() < 4 and x.numel() != self.replicas * self.tokens * x.shape[-1]:
            raise RuntimeError(
                f"a site sees values of shape {tuple(x.shape)}, and the pass was announced with "
                f"{self.replicas} replicas of {self.tokens} tokens; a site has one row for each token"
            )
        return x.reshape(self.replicas, self.tokens, -1)

    def unfolded(self, x: Tensor, given: Tensor) -> Tensor:
        """Return `x` [K, N, D] in the shape of `given`, which it was folded from."""
        if x.shape == given.shape:
            return x
        if self._heads_first(given):
            return x.view_as(given.transpose(1, 2)).transpose(1, 2)
        return x.view_as(given)

    def _heads_first(self, x: Tensor) -> bool:
        """Return whether `x` is [rows, heads, T, D] and not [rows, T, heads, D]."""
        length = self.tokens * self.replicas // x.shape[0]
        if x.dim() != 4 or x.shape[2] != length:
            return False
        # With as many heads as tokens the memory tells: a projection writes a token's heads side by side.
        return x.shape[1] != length or x.stride(1) < x.stride(2)
