"""Text a detokenizer holds back, and when it may let go of it.

Incremental detokenization holds text back while it ends in an incomplete character (U+FFFD), and
decodes everything it holds back again with every token. Bytes that never form a character make
that grow for ever. The functions here cut the held-back tokens in two where the text of the first
part is final: it is released, and only the second part is still held back.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

RELEASE_AFTER = 64
"""Tokens held back before looking for a cut; ordinary text holds back a handful."""
GIVE_UP_AFTER = 4096
"""Tokens held back before letting go of all of them, whatever follows."""

_INCOMPLETE = "\ufffd"
_SHORTEST_TAIL = 8  # tokens still held back; an incomplete character has at most 3 bytes
_LONGEST_TAIL = 16

T = TypeVar("T")


class Release(NamedTuple):
    text: str
    """Text that may leave."""
    kept: int
    """Tokens at the end of those held back that are held back still."""


def release(
    decode: Callable[[Sequence[T]], str], context: Sequence[T], held: Sequence[T]
) -> Release | None:
    """Cut ``held`` where the text before the cut cannot change any more.

    Args:
        decode: text of a sequence of tokens.
        context: tokens before ``held`` whose text has left already.
        held: tokens held back.

    Returns:
        ``None`` if there is no such cut; text is ``""`` if all of ``held`` decodes to nothing
        (skipped special tokens).
    """
    told = decode(context)
    if told.endswith(_INCOMPLETE):
        told = ""  # like tokenizers' DecodeStream: a prompt that ends so is told with the output
    whole = decode([*context, *held])
    if len(whole) <= len(told):
        if any(decode([token]) for token in set(held)):
            return None
        return Release("", 0)
    # Bytes may undo a character told already; vLLM's ``DecodeStream`` then starts anew, as it is.
    tails = range(_SHORTEST_TAIL, _LONGEST_TAIL + 1) if whole.startswith(told) else ()
    for kept in tails:
        head, tail = held[:-kept], held[-kept:]
        text = decode([*context, *head])
        if len(text) > len(told) and text + decode(tail) == whole and _stays_broken(decode, tail):
            return Release(text[len(told) :], kept)
    if len(held) >= GIVE_UP_AFTER:
        return Release(whole[len(told) :], 0)
    return None


def _stays_broken(decode: Callable[[Sequence[T]], str], tail: Sequence[T]) -> bool:
    """Whether no continuation can make a proper character of all of ``tail``.

    Byte-fallback decoders turn a whole run of bytes into U+FFFD if any of it is invalid, so the
    tail must be invalid by itself: not merely cut short by up to 3 bytes.
    """
    return all(decode(tail[: len(tail) - missing]).endswith(_INCOMPLETE) for missing in range(4))
