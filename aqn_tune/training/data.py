"""Token tensors of a task, and the loss over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from aqn_tune.study.engine import SplitArrays
from aqn_tune.tasks.encode import encode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aqn_tune.tasks import Example

ROW_MULTIPLE = 8
"""Row lengths are rounded to this: with an even batch, matrix shapes stay multiples of 16, and only
then does a product over a pack equal the product over one replica bit for bit."""


class TokenSet(NamedTuple):
    """A split as tensors."""

    tokens: Tensor
    """int64 [n, T], right-padded."""
    answer: Tensor
    """Boolean [n, T]: the token at this position is an answer token."""
    valid: Tensor
    """Boolean [n, T]: False at padding."""
    first: int
    """First position whose prediction can be an answer token, rounded down to `ROW_MULTIPLE`."""

    @classmethod
    def of(cls, arrays: SplitArrays) -> TokenSet:
        """Return a split on the very memory of its arrays: nothing may write into the tensors."""
        # Not `torch.from_numpy`, which warns of arrays that are read-only, as these are. On a worker they
        # lie in memory that is mapped read-only: a write there ends the process.
        tokens, answer, valid = map(from_dlpack, (arrays.tokens, arrays.answer, arrays.valid))
        return cls(tokens, answer, valid, arrays.first)

    def to(self, device: torch.device) -> TokenSet:
        """Return the split on a device."""
        return TokenSet(
            self.tokens.to(device), self.answer.to(device), self.valid.to(device), self.first
        )

    def batch(self, rows: Tensor) -> TokenSet:
        """Return the rows with the numbers `rows` [B]."""
        return TokenSet(self.tokens[rows], self.answer[rows], self.valid[rows], self.first)


class TokenLoss(NamedTuple):
    """Loss and accuracy of a batch of rows."""

    total: Tensor
    """Summed answer cross-entropy of each row, [rows]."""
    tokens: Tensor
    """Answer tokens of each row, int64 [rows]."""
    exact: Tensor
    """Boolean [rows]: every answer token is the most likely one given the true tokens before it."""


def encode_split(tokenizer: Any, examples: Sequence[Example], max_length: int) -> SplitArrays:
    """Encode a split; see `aqn_tune.tasks.encode` for the rules and errors.

    Columns in which the whole split is padding are left out: they enter no loss, no fault's
    reference and no count.
    """
    encoded = encode(tokenizer, examples, max_length)
    begin = int(encoded.answer_mask.argmax(axis=1).min())
    first = max(begin - 1, 0) // ROW_MULTIPLE * ROW_MULTIPLE
    longest = int(encoded.valid.sum(axis=1).max())
    width = min(-(-longest // ROW_MULTIPLE) * ROW_MULTIPLE, max_length)
    tokens, answer, valid = (_for_good(each[:, :width]) for each in encoded)
    return SplitArrays(tokens, answer, valid, first, max_length)


def _for_good(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array in one piece that cannot be written to."""
    whole = np.ascontiguousarray(array)
    whole.setflags(write=False)
    return whole


def load_tokens(tokenizer: Any, examples: Sequence[Example], max_length: int) -> TokenSet:
    """Return a split as tensors; see `encode_split`."""
    return TokenSet.of(encode_split(tokenizer, examples, max_length))


def answer_logits(model: torch.nn.Module, batch: TokenSet) -> Tensor:
    """Return the logits [rows, T - first, V] from position `first` on.

    No attention mask is passed: padding is on the right and attention is causal, so no valid token
    ever sees it.
    """
    length = batch.tokens.shape[1]
    positions = torch.arange(batch.first, length, device=batch.tokens.device)
    logits: Tensor = model(input_ids=batch.tokens, use_cache=False, logits_to_keep=positions).logits
    return logits


def answer_loss(logits: Tensor, batch: TokenSet) -> Tensor:
    """Return the summed answer cross-entropy of each row [rows], in nats; in float32 for logits of
    fewer bits."""
    predicted = logits[:, :-1]
    if predicted.dtype not in (torch.float32, torch.float64):
        predicted = predicted.float()
    target = batch.tokens[:, batch.first + 1 :]
    mask = batch.answer[:, batch.first + 1 :]
    losses = torch.nn.functional.cross_entropy(
        predicted.flatten(0, 1), target.flatten(), reduction="none"
    ).view(target.shape)
    return torch.where(mask, losses, torch.zeros((), dtype=losses.dtype, device=losses.device)).sum(
        dim=1
    )


def token_loss(logits: Tensor, batch: TokenSet) -> TokenLoss:
    """Return loss and accuracy of each row."""
    target = batch.tokens[:, batch.first + 1 :]
    mask = batch.answer[:, batch.first + 1 :]
    exact = ((logits[:, :-1].argmax(dim=2) == target) | ~mask).all(dim=1)
    return TokenLoss(answer_loss(logits, batch), mask.sum(dim=1), exact)
