"""The tokens a server holds of one stored stream: those that its next request may need.

A stream that has evicted needs its sinks and what follows the beginning of a window of not long
ago (``policy.parked``). What was before is forgotten when a turn ends, and while it generates, so
a stream takes the same memory at any age::

    stream   [0, S)    [S, S + missing)    [S + missing, position)
             held      forgotten           held, at most W + (2 + KEPT) g and part of a page

Imports neither torch nor vLLM.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from sink_vllm.policy.parked import Chain, Parked
from sink_vllm.policy.schedule import Schedule, cdiv

KEPT = 2
"""Evictions that can be taken back: the prefix cache may know the stream up to there only."""
_ANCHORS = 8
"""Beginnings of windows to remember; the engine tells of the last three, with every eviction."""


@dataclass(slots=True)
class Held:
    """Token ids of one stream, 4 bytes each, and what the engine has told of its pages."""

    tokens: array[int] = field(default_factory=lambda: array("i"))
    """The sinks, and then the rest."""
    missing: int = 0
    """Tokens between the two."""
    chain: Chain = field(default_factory=Chain)

    @property
    def position(self) -> int:
        """Length of the stream."""
        return len(self.tokens) + self.missing

    def copy(self) -> Held:
        """One that changes by itself: a turn may fail."""
        return Held(self.tokens[:], self.missing, self.chain)

    def extend(self, tokens: Iterable[int]) -> None:
        self.tokens.extend(tokens)

    def told(self, chain: Chain) -> None:
        """Take in what an output of the engine says; it goes for the tokens up to there."""
        anchors = dict(self.chain.anchors) if chain.base == self.chain.base else {}
        anchors.update(chain.anchors)
        self.chain = Chain(
            base=chain.base,
            anchors=tuple(sorted(anchors.items())[-_ANCHORS:]),
            sinks=chain.sinks or (self.chain.sinks if chain.base == self.chain.base else ()),
            resumed_from=chain.resumed_from,
        )

    def trim(self, schedule: Schedule, *, sampled: bool) -> None:
        """Forget what no request needs any more.

        Args:
            schedule: of the stream.
            sampled: the last token was generated, and is not computed yet.
        """
        base, sinks = self.chain.base, schedule.sink_tokens
        evictions = schedule.evictions(self.position - sampled - base)
        missing = base + self._forgettable(schedule, evictions)
        if missing > self.missing:
            del self.tokens[sinks : sinks + missing - self.missing]
            self.missing = missing

    def _forgettable(self, schedule: Schedule, evictions: int) -> int:
        """Tokens of the chain behind the sinks that may be missing after so many evictions."""
        if evictions <= KEPT:
            return 0
        sinks, stride = schedule.sink_tokens, schedule.stride
        gaps = [at - sinks for at, _ in self.chain.anchors]
        usable = [
            gap
            for gap in gaps
            if gap + self.chain.base >= self.missing and cdiv(gap, stride) <= evictions
        ]
        if not usable:
            return evictions * stride  # no page will be found; these are the survivors
        older = [gap for gap in usable if cdiv(gap, stride) <= evictions - KEPT]
        return max(older) if older else min(usable)

    def parked(self, schedule: Schedule) -> Parked:
        """What the next request says beside the tokens, which is all of them and what is new."""
        base, missing = self.chain.base, self.missing - self.chain.base
        parent = dict(self.chain.anchors).get(schedule.sink_tokens + missing) if missing else None
        return Parked(
            known=len(self.tokens),
            missing=missing,
            base=base,
            sinks=self.chain.sinks if parent else (),
            parent=parent,
        )
