"""Token ids of new chat messages behind a stored stream (no torch, no vLLM).

A chat template renders whole conversations. What it writes for new messages is found by rendering
them behind a short conversation that ends with the same kind of message as the stream: twice, with
different last words, so that what both have in common at the end is what stands behind any such
message. That is the end of its turn, the new messages, and the header of the answer. Of the end of
the turn, what the stream has already (a model generates its end-of-turn token itself) is left out.

The cost depends on the new messages only, and replies stay the tokens that were generated: the
history is never tokenized again.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from sink_vllm.policy.pinning import common_prefix

Render = Callable[[list[dict[str, str]], bool], Awaitable[list[int]]]
"""Token ids of messages, with or without the header of the answer; raises the caller's error."""

_MOST_OVERLAP = 16  # tokens; an end of turn is shorter in every known template
_LAST_WORDS = ("§", "¶")  # nothing that tokenizers merge with what may follow


async def behind(
    stream: Sequence[int],
    tail: str,
    messages: list[dict[str, str]],
    answer: bool,
    render: Render,
) -> list[int]:
    """Token ids to append to ``stream``.

    Args:
        stream: token ids so far.
        tail: role of the message the stream ends with; raw text counts as ``assistant``.
        messages: what is new.
        answer: whether the header of the answer is wanted.
        render: the template.
    """
    one, other = [
        await render([*_conversation(tail, words), *messages], answer) for words in _LAST_WORDS
    ]
    common = common_prefix(one[::-1], other[::-1])
    rest = one[len(one) - common :]
    return rest[overlap(stream, rest) :]


def overlap(stream: Sequence[int], rest: Sequence[int]) -> int:
    """Most tokens at the end of ``stream`` that ``rest`` begins with."""
    for length in range(min(len(stream), len(rest), _MOST_OVERLAP), 0, -1):
        if list(stream[-length:]) == list(rest[:length]):
            return length
    return 0


def _conversation(tail: str, words: str) -> list[dict[str, Any]]:
    """A short conversation that ends with ``words`` of ``tail``."""
    last = {"role": tail, "content": words}
    return [{"role": "user", "content": "a"}, last] if tail == "assistant" else [last]
