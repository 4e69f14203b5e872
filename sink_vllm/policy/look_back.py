"""How far back a request asks the engine to look at its output; all counts in tokens.

An eviction drops output tokens from vLLM's lists, so whatever looks further back than the cache
needs them kept, or must be refused. Imports neither torch nor vLLM.
"""

from collections.abc import Iterable, Sized
from typing import Protocol

MOST_LOOK_BACK = 65_536
"""Most evicted output tokens the engine keeps per stream; vLLM looks at all of them per token."""


class RepetitionParams(Protocol):
    """vLLM's ``RepetitionDetectionParams``."""

    max_pattern_size: int
    min_count: int


def repetition_look_back(params: RepetitionParams | None, max_tokens: int) -> int:
    """Last output tokens that vLLM's search for repeated patterns can look at.

    Args:
        params: as asked for; ``None`` when they were not.
        max_tokens: most output tokens of the request, from its first on.

    Returns:
        0 where vLLM takes the parameters for "off".
    """
    if params is None or params.max_pattern_size <= 0 or params.min_count < 2:
        return 0
    return min(params.max_pattern_size * params.min_count, max_tokens)


def longest(words: Iterable[Sized] | None) -> int:
    """Tokens of the longest word; 0 for none."""
    return max(map(len, words or ()), default=0)
