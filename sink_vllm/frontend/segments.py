"""Tokenize a long conversation again without tokenizing what has been seen before.

A chat client resends its history with every turn. The engine finds it in the prefix cache; what is
left to pay per turn, and grows with the conversation, is its tokenization. Special tokens of a chat
template make that unnecessary: the tokenizers library takes them out of the raw text first, from
left to right, the longest match first (``AddedVocabulary::extract_and_normalize``), and
normalises, splits and encodes what stands between two of them on its own. So a conversation is the
concatenation of its segments, and only segments that have not been seen lately are encoded.

The first prompts are encoded both ways; a tokenizer that does otherwise is found out then.
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Any

from cachetools import LRUCache
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

_REMEMBERED = 1 << 23  # tokens of segments, 4 bytes each; their texts take about as much again
_COMPARED = 16  # prompts


class SegmentTokenizer:
    """Token ids of texts with special tokens, by segment; safe to use from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        """
        Args:
            tokenizer: of transformers, with a fast backend.

        Raises:
            ValueError: its special tokens do not separate what stands around them.
        """
        if not getattr(tokenizer, "is_fast", False) or getattr(
            tokenizer, "split_special_tokens", False
        ):
            raise ValueError("not a fast tokenizer that takes special tokens out first")
        found = {
            token.content: (index, token)
            for index, token in tokenizer.added_tokens_decoder.items()
            if not token.normalized and token.content
        }
        if any(token.single_word for _, token in found.values()):
            raise ValueError("some of its special tokens depend on the words around them")
        self._ids = {
            content: index
            for content, (index, token) in found.items()
            if not (token.lstrip or token.rstrip)
        }
        if not self._ids:
            raise ValueError("it has no special tokens")
        longest_first = sorted(found, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)))
        self._separator = next(iter(self._ids))
        self._tokenizer = tokenizer
        self._lock = Lock()
        # LRUCache weighs values only.
        self._remembered: LRUCache[tuple[bool, str], array[int]] = LRUCache(
            _REMEMBERED, getsizeof=len
        )
        self._to_compare = _COMPARED
        self._trusted = True

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without tokens that the tokenizer would add around it."""
        if not self._trusted:
            return self._encode([text])[0]
        ids = self._by_segment(text)
        if self._to_compare:
            self._to_compare -= 1
            expected = self._encode([text])[0]
            if ids != expected:
                self._trusted = False
                logger.warning(
                    "The tokenizer %s does not treat what stands between special tokens on its "
                    "own; conversations are tokenized as a whole.",
                    type(self._tokenizer).__name__,
                )
                return expected
        return ids

    def _by_segment(self, text: str) -> list[int]:
        segments = list(self._segments(text))
        keys = [(i > 0, segment) for i, (_, segment) in enumerate(segments)]
        with self._lock:
            known = {key: self._remembered.get(key) for key in keys if key[1]}
        missing = [key for key, ids in known.items() if ids is None]
        # Behind another token, as in the text: some tokenizers treat the start of a text specially.
        encoded = self._encode(
            [self._separator + segment if inside else segment for inside, segment in missing]
        )
        for key, ids in zip(missing, encoded, strict=True):
            known[key] = array("i", ids[1:] if key[0] else ids)
        with self._lock:
            for key in missing:
                found = known[key]
                if found and len(found) <= _REMEMBERED // 8:
                    self._remembered[key] = found
        result: list[int] = []
        for (special, _), key in zip(segments, keys, strict=True):
            if special is not None:
                result.append(special)
            result.extend(known.get(key) or ())
        return result

    def _segments(self, text: str) -> Iterator[tuple[int | None, str]]:
        """The special token before each segment (``None`` at the start), and the segment."""
        special, begin = None, 0
        for match in self._any.finditer(text):
            index = self._ids.get(match[0])
            if index is not None:
                yield special, text[begin : match.start()]
                special, begin = index, match.end()
        yield special, text[begin:]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return found
