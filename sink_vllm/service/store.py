"""The streams a server remembers: token ids and options, bounded in number, tokens and time.

What is kept is what the engine needs to find a stream's pages again: its token ids, four bytes
each. The pages themselves belong to the prefix cache, so that a stream nobody appends to holds no
memory of the accelerator. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import secrets
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sink_vllm.schedule import Schedule


class UnknownStream(LookupError):
    """There is no such stream, or no longer."""


class BusyStream(RuntimeError):
    """Somebody is appending to the stream."""


class NoRoom(RuntimeError):
    """Every remembered stream is in use."""


@dataclass(slots=True)
class StoredStream:
    """One stream; all counts in tokens."""

    id: str
    model: str
    schedule: Schedule | None
    """``None`` for a stream with ``kv_policy="full"``."""
    options: dict[str, Any]
    """For the ``extra_args`` of its requests."""
    created: float
    """Unix time."""
    used: float
    """Of the store's clock, in seconds."""
    cache_salt: str | None = None
    tokens: array[int] = field(default_factory=lambda: array("i"))
    pending: list[dict[str, str]] = field(default_factory=list)
    """Messages that the next ones are rendered together with."""
    tail: str | None = None
    """Role of the message the stream ends with; ``None`` while there are no tokens."""
    open: bool = False
    """The last message is a reply, which the template has not closed."""
    sampled: bool = False
    """The last token was generated, and is computed with what follows it."""
    turns: int = 0
    busy: bool = False

    @property
    def computed(self) -> int:
        return len(self.tokens) - self.sampled

    @property
    def evicted(self) -> int:
        return 0 if self.schedule is None else self.schedule.evicted(self.computed)

    @property
    def evictions(self) -> int:
        return 0 if self.schedule is None else self.schedule.evictions(self.computed)


class StreamStore:
    """Streams by id, the least recently used one first."""

    def __init__(
        self,
        *,
        most_streams: int,
        most_tokens: int,
        idle_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most_streams = most_streams
        self.most_tokens = most_tokens
        self.idle_seconds = idle_seconds
        self.clock = clock
        self._streams: OrderedDict[str, StoredStream] = OrderedDict()
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def tokens(self) -> int:
        """Tokens of all streams together."""
        return self._tokens

    def create(
        self,
        model: str,
        schedule: Schedule | None,
        options: dict[str, Any],
        cache_salt: str | None = None,
    ) -> StoredStream:
        """A new stream, at the cost of the least recently used one when there is no room.

        Raises:
            NoRoom: as many streams as may be remembered, and all in use.
        """
        self._forget_idle()
        while len(self._streams) >= self.most_streams:
            if not self._forget_one():
                raise NoRoom
        stream = StoredStream(
            id=f"stream-{secrets.token_hex(16)}",
            model=model,
            schedule=schedule,
            options=options,
            created=time.time(),
            used=self.clock(),
            cache_salt=cache_salt,
        )
        self._streams[stream.id] = stream
        return stream

    def get(self, stream_id: str) -> StoredStream:
        """Look at a stream; that is no use of it.

        Raises:
            UnknownStream: see there.
        """
        self._forget_idle()
        if stream_id not in self._streams:
            raise UnknownStream(stream_id)
        return self._streams[stream_id]

    def acquire(self, stream_id: str) -> StoredStream:
        """Take a stream to append to; :meth:`release` gives it back.

        Raises:
            UnknownStream: see there.
            BusyStream: see there.
        """
        stream = self.get(stream_id)
        if stream.busy:
            raise BusyStream(stream_id)
        stream.busy = True
        return stream

    def release(self, stream: StoredStream) -> None:
        """The most recently used stream from now on; others go if there are too many tokens."""
        stream.busy = False
        stream.used = self.clock()
        self._streams.move_to_end(stream.id)
        self._tokens = sum(len(each.tokens) for each in self._streams.values())
        while self._tokens > self.most_tokens and self._forget_one(spare=stream):
            pass

    def remove(self, stream_id: str) -> None:
        """Forget a stream.

        Raises:
            UnknownStream: see there.
            BusyStream: see there.
        """
        stream = self.get(stream_id)
        if stream.busy:
            raise BusyStream(stream_id)
        self._drop(stream)

    def expires_in(self, stream: StoredStream) -> float:
        """Seconds until an unused stream is forgotten."""
        return stream.used + self.idle_seconds - self.clock()

    def _forget_idle(self) -> None:
        for stream in list(self._streams.values()):
            if self.expires_in(stream) > 0:
                return  # the others were used later
            if not stream.busy:
                self._drop(stream)

    def _forget_one(self, spare: StoredStream | None = None) -> bool:
        for stream in self._streams.values():
            if not stream.busy and stream is not spare:
                self._drop(stream)
                return True
        return False

    def _drop(self, stream: StoredStream) -> None:
        del self._streams[stream.id]
        self._tokens -= len(stream.tokens)
