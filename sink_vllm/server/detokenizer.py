"""Detokenizers whose memory and time per token do not grow with the output.

Subclasses of vLLM's own, for streamed (DELTA) responses only: what has left the server is
forgotten, apart from what stop strings and incomplete characters still need. All of vLLM's code
runs unchanged on shorter lists, and the text is the same. One difference in *when* text leaves: a
run of more than ``withheld.RELEASE_AFTER`` tokens that form no character leaves in pieces, where
vLLM sends it in one piece when the first proper character follows.
"""

from collections.abc import Sequence
from typing import Any, SupportsIndex, overload

import tokenizers.decoders
from vllm.tokenizers.detokenizer_utils import _convert_tokens_to_string_with_added_encoders
from vllm.v1.engine.detokenizer import (
    BaseIncrementalDetokenizer,
    FastIncrementalDetokenizer,
    IncrementalDetokenizer,
    SlowIncrementalDetokenizer,
)

from sink_vllm.server.withheld import RELEASE_AFTER, release

_FORGET_AFTER = 256  # list entries; forgetting in batches keeps its cost per token constant
_FORGET_TEXT_AFTER = 1024  # characters
_CONTEXT = 16  # tokens before held-back ones; decoders look at the neighbour only


class Tail(list[int]):
    """The end of a longer list, for readers that slice the longer one."""

    def __init__(self, items: Sequence[int], dropped: int) -> None:
        super().__init__(items)
        self._dropped = dropped

    @overload
    def __getitem__(self, index: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> int | list[int]:
        if not isinstance(index, slice) or index.stop is not None or index.step is not None:
            raise IndexError(f"only [start:] of a shortened list of tokens is known, not {index}")
        if index.start is None or index.start < self._dropped:
            raise IndexError(
                f"tokens from {index.start} were asked for, but {self._dropped} are forgotten"
            )
        return list(self)[index.start - self._dropped :]


class _Forgetful(IncrementalDetokenizer):
    """Keeps count of the tokens that are no longer in ``token_ids``."""

    dropped: int
    """Output tokens forgotten, minus prompt tokens still listed."""

    @property
    def output_token_ids(self) -> list[int]:
        return Tail(self.token_ids, self.dropped)

    def num_output_tokens(self) -> int:
        return len(self.token_ids) + self.dropped

    def begin(self) -> None:
        self.dropped = 0

    def forget(self) -> None:
        """Drop what has been sent; called right after an output was made."""
        if len(self.token_ids) > _FORGET_AFTER:
            self.dropped += len(self.token_ids)
            self.token_ids.clear()


class _ForgetfulText(_Forgetful, BaseIncrementalDetokenizer):
    def begin(self) -> None:
        super().begin()
        self._longest_stop = max(map(len, self.stop), default=0)
        self._release_at = RELEASE_AFTER

    def forget(self) -> None:
        super().forget()
        # A stop string may have begun in text that has left already.
        cut = min(self._last_output_text_offset, len(self.output_text) - self._longest_stop)
        if cut > _FORGET_TEXT_AFTER:
            self.output_text = self.output_text[cut:]
            self._last_output_text_offset -= cut


class EndlessPlainDetokenizer(_Forgetful):
    """For requests without detokenization."""


class EndlessFastDetokenizer(_ForgetfulText, FastIncrementalDetokenizer):
    """Also bounds what the ``DecodeStream`` of the tokenizers library holds back."""

    def begin(self) -> None:
        super().begin()
        self._context: Sequence[int] = ()
        self._held: list[int] = []

    def begin_after(self, prompt_token_ids: Sequence[int]) -> None:
        """``prompt_token_ids``: what the ``DecodeStream`` was primed with.

        It decodes all of it with its first step, which would make the first token of an
        answer wait for the whole conversation; the end is enough.
        """
        self._context = self._end_of(prompt_token_ids)
        if len(self._context) < len(prompt_token_ids):
            self.stream = tokenizers.decoders.DecodeStream(
                ids=self._context, skip_special_tokens=self.skip_special_tokens
            )

    def _end_of(self, token_ids: Sequence[int]) -> Sequence[int]:
        """The last tokens that have a text, as the first text of all may lose a space; all of them
        if they end within a character."""
        length = 2 * _CONTEXT
        while length < len(token_ids):
            text = self._decode(token_ids[-length:])
            if text.endswith("\N{REPLACEMENT CHARACTER}"):
                break
            if text.strip():
                return list(token_ids[-length:])
            length *= 2
        return token_ids

    def _protected_step(self, next_token_id: int) -> str | None:
        decoder = self.stream
        text = super()._protected_step(next_token_id)
        if self.stream is not decoder:  # vLLM has started a new one with this token
            self._context, self._held = (), []
        if text is not None:
            if not self._held:  # nearly always
                self._context, self._release_at = (next_token_id,), RELEASE_AFTER
                return text
            self._context = (*self._held[1 - _CONTEXT :], next_token_id)
            self._held, self._release_at = [], RELEASE_AFTER
        elif 0 <= next_token_id < 2**32:  # others vLLM has logged and left out
            self._held.append(next_token_id)
            if len(self._held) >= self._release_at:
                return self._release()
        return text

    def _release(self) -> str | None:
        released = release(self._decode, self._context, self._held)
        if released is None:
            self._release_at += RELEASE_AFTER
            return None
        if released.text:
            self._context, self._held = (), self._held[len(self._held) - released.kept :]
        else:
            self._context, self._held = self._context[-_CONTEXT:], []
        self._release_at = RELEASE_AFTER
        self.stream = tokenizers.decoders.DecodeStream(
            ids=[*self._context, *self._held], skip_special_tokens=self.skip_special_tokens
        )
        return released.text or None

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=self.skip_special_tokens
        )
        return text


class EndlessSlowDetokenizer(_ForgetfulText, SlowIncrementalDetokenizer):
    """Also bounds the list of token strings."""

    def begin(self) -> None:
        super().begin()
        self.dropped = -self.prompt_len

    def decode_next(self, next_token_id: int) -> str:
        text = super().decode_next(next_token_id)
        if text:
            self._release_at = RELEASE_AFTER
        elif len(self.tokens) - self.read_offset >= self._release_at:
            text = self._release()
        if self.prefix_offset > _FORGET_AFTER:
            del self.tokens[: self.prefix_offset]
            self.read_offset -= self.prefix_offset
            self.prefix_offset = 0
        return text

    def _release(self) -> str:
        context = self.tokens[self.prefix_offset : self.read_offset]
        held = self.tokens[self.read_offset :]
        released = release(self._decode, context, held)
        if released is None:
            self._release_at += RELEASE_AFTER
            return ""
        self._release_at = RELEASE_AFTER
        if released.text:
            self.tokens = held[len(held) - released.kept :]
            self.prefix_offset = self.read_offset = 0
        else:
            del self.tokens[self.read_offset :]
        return released.text

    def _decode(self, tokens: Sequence[str]) -> str:
        text: str
        if self.tokenizer.is_fast or not self.tokenizer.get_added_vocab():
            text = self.tokenizer.convert_tokens_to_string(list(tokens))
            return text
        return _convert_tokens_to_string_with_added_encoders(
            self.tokenizer,
            list(tokens),
            skip_special_tokens=self.skip_special_tokens,
            spaces_between_special_tokens=self.spaces_between_special_tokens,
        )


_ENDLESS: dict[type[IncrementalDetokenizer], type[_Forgetful]] = {
    IncrementalDetokenizer: EndlessPlainDetokenizer,
    FastIncrementalDetokenizer: EndlessFastDetokenizer,
    SlowIncrementalDetokenizer: EndlessSlowDetokenizer,
}


def make_endless(detokenizer: Any, prompt_token_ids: Sequence[int] | None) -> _Forgetful:
    """Turn a new detokenizer of vLLM's into the one that forgets; returns the same object.

    Raises:
        TypeError: a class this module does not know.
    """
    try:
        detokenizer.__class__ = _ENDLESS[type(detokenizer)]
    except KeyError:
        raise TypeError(
            f"sink_vllm does not know the detokenizer {type(detokenizer).__name__}; install a "
            "vLLM version it supports."
        ) from None
    assert isinstance(detokenizer, _Forgetful)
    detokenizer.begin()
    if isinstance(detokenizer, EndlessFastDetokenizer):
        detokenizer.begin_after(prompt_token_ids or ())
    return detokenizer
