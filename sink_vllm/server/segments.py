"""Tokenize a long conversation again without tokenizing what has been seen before.

A chat client resends its history with every turn. The engine finds it in the prefix cache; what is
left to pay per turn, and grows with the conversation, is its tokenization. Special tokens of a chat
template make that unnecessary: the tokenizers library takes them out of the raw text first, from
left to right, the longest match first (``AddedVocabulary::extract_and_normalize``), and
normalises, splits and encodes what stands between two of them on its own. So a conversation is the
concatenation of its segments, and only segments that have not been seen lately are encoded.

Templates without special tokens between the messages, and long messages, are cut between lines too,
where the vocabulary rules out that anything reaches across: behind a single line feed with no white
space around it, if no token contains such a place.

The first prompts are encoded both ways; a tokenizer that does otherwise is found out then.
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from enum import Enum
from threading import Lock
from typing import Any

from cachetools import LRUCache
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

_REMEMBERED = 1 << 23  # tokens of segments, 4 bytes each; their texts take about as much again
_COMPARED = 16  # prompts
_LONG = 1024  # characters; what is longer is cut at the next line
_LINE = re.compile(r"(?<=\S)\n(?=\S)")  # runs of white space are split by what follows them
# Byte-level vocabularies write the line feed as Ċ, the space as Ġ, the tab as ĉ, the return as č.
_ACROSS = re.compile(r"[\nĊ][^\sĊĠĉč]")


class _Lead(Enum):
    """What stands before a segment."""

    NOTHING = 0
    TOKEN = 1
    LINE_FEED = 2


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
        self._before = {
            _Lead.NOTHING: "",
            _Lead.TOKEN: self._separator,
            _Lead.LINE_FEED: self._separator + "\n",
        }
        self._ids_before = {
            lead: self._encode([text])[0] if text else [] for lead, text in self._before.items()
        }
        self._by_line = _lines_stand_alone(tokenizer)
        self._lock = Lock()
        # LRUCache weighs values only.
        self._remembered: LRUCache[tuple[_Lead, str], array[int]] = LRUCache(
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
        keys = [(lead, segment) for _, lead, segment in segments]
        with self._lock:
            known = {key: self._remembered.get(key) for key in keys if key[1]}
        missing = [key for key, ids in known.items() if ids is None]
        # Behind what it stands behind: some tokenizers treat the start of a text specially.
        encoded = self._encode([self._before[lead] + segment for lead, segment in missing])
        for key, ids in zip(missing, encoded, strict=True):
            known[key] = array("i", ids[len(self._ids_before[key[0]]) :])
        with self._lock:
            for key in missing:
                found = known[key]
                if found and len(found) <= _REMEMBERED // 8:
                    self._remembered[key] = found
        result: list[int] = []
        for (special, _, _), key in zip(segments, keys, strict=True):
            if special is not None:
                result.append(special)
            result.extend(known.get(key) or ())
        return result

    def _segments(self, text: str) -> Iterator[tuple[int | None, _Lead, str]]:
        """The special token before each segment (``None``: there is none), what it is to the
        tokenizer, and the segment."""
        special, lead, begin = None, _Lead.NOTHING, 0
        for match in self._any.finditer(text):
            index = self._ids.get(match[0])
            if index is not None:
                yield from self._pieces(special, lead, text, begin, match.start())
                special, lead, begin = index, _Lead.TOKEN, match.end()
        yield from self._pieces(special, lead, text, begin, len(text))

    def _pieces(
        self, special: int | None, lead: _Lead, text: str, begin: int, end: int
    ) -> Iterator[tuple[int | None, _Lead, str]]:
        """A segment in pieces of lines, cut from its beginning on: what follows moves no cut."""
        while self._by_line and (match := _LINE.search(text, begin + _LONG, end)):
            yield special, lead, text[begin : match.end()]
            special, lead, begin = None, _Lead.LINE_FEED, match.end()
        yield special, lead, text[begin:end]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return found


def _lines_stand_alone(tokenizer: Any) -> bool:
    """Whether no token and no normalisation of ``tokenizer`` reaches from a line into the next."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or any(map(_ACROSS.search, tokenizer.get_vocab())):
        return False
    added = tokenizer.added_tokens_decoder.values()
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return False
    line_feed = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id in line_feed:  # neighbours may become one unknown token
        return False
    normalizer = backend.normalizer
    return normalizer is None or normalizer.normalize_str("\nx\nx\n").endswith("\nx\nx\n")
