"""The splits of a task as tokens: encoded once, for all packs that train on them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from aqn_tune.errors import UserError
from aqn_tune.models.load import load_tokenizer
from aqn_tune.study.engine import SplitArrays, SplitsByName
from aqn_tune.study.runs import Setting
from aqn_tune.tasks.splitting import SplitName
from aqn_tune.training.data import encode_split


def load_splits(setting: Setting, names: Sequence[SplitName], max_length: int) -> SplitsByName:
    """Return the named splits of the task, in read-only arrays; see `Engine.load_splits`.

    A split that this process has encoded before is not encoded again.
    """
    return {name: _encoded(setting, name, max_length) for name in names}


@functools.lru_cache(maxsize=8)
def _encoded(setting: Setting, name: SplitName, max_length: int) -> SplitArrays:
    """Encode a split, from the very rows that the study was keyed with."""
    rows = setting.task.splits()
    if setting.task_fingerprint and rows.fingerprint() != setting.task_fingerprint:
        raise UserError(
            "task: the rows are not those that the study started with; start anew (--fresh)"
        )
    try:
        return encode_split(load_tokenizer(setting.model), getattr(rows, name), max_length)
    except UserError as error:
        raise UserError(f"task, {name} split: {error}") from None
