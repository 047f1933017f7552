"""Build the tokenizer of the embedded model: byte-level BPE behind Qwen2's own rules.

``AutoTokenizer`` looks at ``model_type`` in ``config.json`` and, for ``qwen2``, puts Qwen2's
normalizer and pre-tokenizer in place of whatever was saved, without a word. So exactly those are
used here, and a test holds the saved and the loaded tokenizer to the same ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["END_OF_TEXT", "PADDING", "save_tokenizer", "train_tokenizer"]

END_OF_TEXT: Final = "<|endoftext|>"
PADDING: Final = "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a tokenizer of up to ``vocabulary`` entries: two marks, 256 bytes, the rest merges.

    It has fewer entries where every word of ``texts`` has become one token before that.
    Any text encodes and decodes back to its NFC form; digits are always single tokens. Ids of
    the marks: end of text 0, padding 1.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` so that ``AutoTokenizer`` reads them.

    The tokenizer is saved through the class ``AutoTokenizer`` will choose, Qwen2's.
    """
    import json

    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    bpe = json.loads(tokenizer.to_str())["model"]
    Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        unk_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="right",
    ).save_pretrained(folder)
