"""Byte-level BPE tokenizer and the token streams made with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .corpus import SourceFile

VOCABULARY = 1024
BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
BOS_SLOT = "{{ bos_token }}"
CHAT_TEMPLATE = (
    BOS_SLOT + "{% for message in messages %}# {{ message['role'] }}:"
    "{% if message['role'] != 'assistant' or message['content'][:1] not in [' ', '\\n'] %}"
    " {% endif %}{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:{% endif %}"
)
"""Roles are Python comments, which is the only prose the model has seen.

A reply begins with the white space that the model generates after the colon; another space in front
of it would make the resent reply a different text, and no page of it would be found again.
"""

TokenArray = npt.NDArray[np.uint16]


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn the merges. All 256 bytes are in the vocabulary, so any UTF-8 text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)) != (BOS_ID, EOS_ID):
        raise RuntimeError("special tokens did not get the first two ids")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, sink_token: bool = True) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja to ``folder``."""
    if sink_token:
        # Servers encode a plain prompt with special tokens; without this rule the model would
        # run without its sink token there. Chat templates write the token themselves and are
        # encoded without special tokens, so it does not double.
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    wrapped.chat_template = CHAT_TEMPLATE if sink_token else CHAT_TEMPLATE.replace(BOS_SLOT, "")
    wrapped.save_pretrained(folder)


@dataclass(frozen=True)
class Streams:
    """Token ids of the training text, without BOS; every file ends with EOS.

    The standard library is kept apart because it is repeated more often than the rest.
    """

    library: TokenArray
    packages: TokenArray
    tokens_by_package: dict[str, int]


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[TokenArray]:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array([*encoding.ids, EOS_ID], dtype=np.uint16) for encoding in encodings]


def encode_files(tokenizer: Tokenizer, files: Iterable[tuple[SourceFile, str]]) -> Streams:
    """Tokenize the corpus in small batches, to keep the memory use low."""
    library: list[TokenArray] = []
    packages: list[TokenArray] = []
    counts: Counter[str] = Counter()
    batch: list[tuple[SourceFile, str]] = []

    def flush() -> None:
        for (file, _), ids in zip(batch, _encode(tokenizer, [t for _, t in batch]), strict=True):
            (library if file.package == "stdlib" else packages).append(ids)
            counts[file.package] += ids.size
        batch.clear()

    for item in files:
        batch.append(item)
        if len(batch) == 64:
            flush()
    flush()
    empty = np.zeros(0, dtype=np.uint16)
    return Streams(
        library=np.concatenate([*library, empty]),
        packages=np.concatenate([*packages, empty]),
        tokens_by_package=dict(counts.most_common()),
    )


def windows(stream: TokenArray, length: int, offset: int = 0) -> TokenArray:
    """Cut ``stream`` into ``[n, length]`` consecutive windows, starting at ``offset`` tokens."""
    count = (stream.size - offset) // length
    return stream[offset : offset + count * length].reshape(count, length)


def held_out_windows(tokenizer: Tokenizer, paths: Iterable[Path], length: int) -> TokenArray:
    """Windows ``[n, length]`` of held-out text; the files are joined with EOS between them."""
    parts = _encode(tokenizer, [path.read_text(encoding="utf-8") for path in paths])
    return windows(np.concatenate(parts), length)
