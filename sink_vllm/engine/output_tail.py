"""Evicted output tokens that vLLM's stop check must still see.

vLLM looks for repeated patterns in ``Request.output_token_ids``, a read-only view of the output
tokens it has; an eviction shortens them. For a request that asks for that search the view is
replaced by one that goes on behind the cached tokens, as far back as the search can look. Nothing
else in the engine core reads the view (``tests/engine/test_output_tail.py`` guards that), and
requests that do not ask keep vLLM's own.
"""

from collections.abc import Sequence
from typing import Any, overload

from vllm.v1.request import Request
from vllm.v1.utils import ConstantList

from sink_vllm.policy.look_back import RepetitionParams, repetition_look_back


class OutputTail(Sequence[int]):
    """The end of a stream's output: its last ``length`` tokens at least, or all there are.

    Holds at most ``length`` tokens beside vLLM's own list.
    """

    def __init__(self, cached: list[int], sinks: int, length: int) -> None:
        """
        Args:
            cached: vLLM's own list of output tokens, which changes in place.
            sinks: its first tokens that are sink tokens; what is evicted comes after them.
            length: last tokens of the output that must be found here.
        """
        self._cached = cached
        self._sinks = sinks
        self._length = length
        self._evicted: list[int] = []
        self._shown_sinks = sinks

    def evict(self, tokens: Sequence[int]) -> None:
        """Keep ``tokens``, which leave vLLM's list now, as long as they can be looked at."""
        self._evicted += tokens
        if len(self._evicted) > self._length:
            del self._evicted[: -self._length]
            self._shown_sinks = 0  # there is a gap behind them now

    def __len__(self) -> int:
        return self._shown_sinks + len(self._evicted) + len(self._cached) - self._sinks

    @overload
    def __getitem__(self, item: int) -> int: ...

    @overload
    def __getitem__(self, item: slice) -> list[int]: ...

    def __getitem__(self, item: int | slice) -> int | list[int]:
        if isinstance(item, slice):
            return [self[index] for index in range(*item.indices(len(self)))]
        back = -item if item < 0 else len(self) - item  # 1: the last token
        if not 0 < back <= len(self):
            raise IndexError(item)
        window = len(self._cached) - self._sinks
        if back <= window:
            return self._cached[-back]
        if back <= window + len(self._evicted):
            return self._evicted[window - back]
        return self._cached[len(self) - back]


def keep_evicted(request: Request, asked: RepetitionParams, first: int, count: int) -> None:
    """``count`` output tokens of ``request``, from number ``first`` on, are about to be dropped.

    Args:
        request: whose output is looked at.
        asked: how far back.
        first: index in vLLM's list of output tokens.
        count: of tokens.
    """
    view: Any = request.output_token_ids
    if not isinstance(view, OutputTail):
        length = repetition_look_back(asked, request.max_tokens)
        if not length:
            return
        view = OutputTail(request._output_token_ids, first, length)
        request.output_token_ids = view
    view.evict(request._output_token_ids[first : first + count])


def forget_evicted(request: Request) -> None:
    """The output of ``request`` has become prompt: a new answer begins."""
    request.output_token_ids = ConstantList(request._output_token_ids)
