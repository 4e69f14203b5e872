"""Prompt tokens that the engine has not seen yet (pure Python)."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence

_TRIM = 1 << 16  # tokens that were taken and are still held, at most (or half of all)
_PIECE = 1 << 14  # tokens; a third of a millisecond
BREATH = 1e-4
"""Seconds to sleep between pieces of long work beside the engine's loop: it wants the interpreter,
too, and would wait for a time slice of the thread that works, which is longer than a piece."""


def as_array(tokens: Sequence[int]) -> array[int]:
    """``tokens`` at 4 bytes each; in pieces, because one call would keep other threads waiting."""
    made = array("i")
    for begin in range(0, len(tokens), _PIECE):
        made.extend(tokens[begin : begin + _PIECE])
        if begin:
            time.sleep(BREATH)
    return made


class PendingTokens:
    """The rest of a prompt, taken from its start; 4 bytes a token.

    Several may share one array, which none of them changes: a prompt that is looked at again from
    another position costs nothing.
    """

    __slots__ = ("_at", "_tokens")

    def __init__(self, tokens: array[int] | None = None, at: int = 0) -> None:
        """``tokens[at:]``; nothing by default."""
        self._tokens = array("i") if tokens is None else tokens
        self._at = min(at, len(self._tokens))

    @classmethod
    def of(cls, tokens: Sequence[int]) -> PendingTokens:
        return cls(array("i", tokens))

    def __len__(self) -> int:
        return len(self._tokens) - self._at

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens[self._at :])

    def take(self, count: int) -> list[int]:
        """The next ``count`` tokens, or what is left."""
        taken = self._tokens[self._at : self._at + count].tolist()
        self._at += len(taken)
        if self._at > _TRIM and 2 * self._at > len(self._tokens):
            self._tokens, self._at = self._tokens[self._at :], 0
        elif self._at == len(self._tokens):
            self._tokens, self._at = array("i"), 0
        return taken
