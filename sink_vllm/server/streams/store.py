"""The stored streams: what a server remembers of each, bounded in number, tokens and time.

Kept is what the engine needs to find a stream's pages again, which does not grow with the stream
(``sink_vllm.server.streams.held``), its options, and the messages that wait for the first append.
The pages themselves belong to the prefix cache, so that a stream nobody appends to holds no memory
of the accelerator. Which stream is forgotten for another one is decided by
``sink_vllm.server.streams.shares``. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import secrets
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sink_vllm.policy.schedule import Schedule
from sink_vllm.server.streams.held import Held
from sink_vllm.server.streams.shares import Resource, Shares

TOKEN_BYTES = 4
MESSAGE_TOKENS = 64
"""What a waiting message counts as beside its text: the objects it is kept in."""


class UnknownStream(LookupError):
    """There is no such stream, or no longer."""


class BusyStream(RuntimeError):
    """Somebody is appending to the stream."""


class NoRoom(RuntimeError):
    """The client has more than its share, and nothing of what is too much can be forgotten."""

    def __init__(self, resource: Resource) -> None:
        super().__init__(resource)
        self.resource: Resource = resource


class TooLarge(ValueError):
    """The stream alone takes more tokens than are remembered of all."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens


class Waiting(NamedTuple):
    """A chat message that the first append will compute, kept as UTF-8."""

    role: str
    content: bytes

    @property
    def size(self) -> int:
        """In tokens of the same memory, whatever its text will be tokenized to."""
        return -(-len(self.content) // TOKEN_BYTES) + MESSAGE_TOKENS

    def message(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content.decode()}


@dataclass(slots=True)
class StoredStream:
    """One stream; all counts in tokens."""

    id: str
    client: str
    """Whose share it is taken from: of who created it."""
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
    held: Held = field(default_factory=Held)
    pending: tuple[Waiting, ...] = ()
    """Messages that the next ones are rendered together with."""
    tail: str | None = None
    """Role of the message the stream ends with; ``None`` while there are no tokens."""
    open: bool = False
    """The last message is a reply, which the template has not closed."""
    sampled: bool = False
    """The last token was generated, and is computed with what follows it."""
    turns: int = 0
    busy: bool = False
    counted: int = 0
    """What the store has counted it as."""

    @property
    def tokens(self) -> array[int]:
        """Those that are held: all of them until the stream has evicted, then its last ones."""
        return self.held.tokens

    @property
    def position(self) -> int:
        """Length of the stream, and of nothing the server holds."""
        return self.held.position

    @property
    def size(self) -> int:
        """Tokens that are held, and what waits to become tokens."""
        return len(self.tokens) + sum(message.size for message in self.pending)

    @property
    def computed(self) -> int:
        return self.position - self.sampled

    @property
    def evicted(self) -> int:
        return 0 if self.schedule is None else self.schedule.evicted(self.computed)

    @property
    def evictions(self) -> int:
        return 0 if self.schedule is None else self.schedule.evictions(self.computed)


class StreamStore:
    """Streams by id.

    A stream in use is never forgotten. While streams are in use the limits can therefore be
    exceeded: by what they held when their turns began and by the turn that ended last.
    """

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
        self._streams: dict[str, StoredStream] = {}
        self._idle: OrderedDict[str, StoredStream] = OrderedDict()  # least recently used first
        self._shares = Shares({"streams": most_streams, "tokens": most_tokens})

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def tokens(self) -> int:
        """Of all streams together, waiting messages and all; of a stream in use, as it was."""
        return self._shares.total("tokens")

    @property
    def in_use(self) -> int:
        """Streams somebody is appending to."""
        return len(self._streams) - len(self._idle)

    def create(
        self,
        client: str,
        model: str,
        schedule: Schedule | None,
        options: dict[str, Any],
        *,
        cache_salt: str | None = None,
        tokens: Sequence[int] = (),
        pending: Iterable[Waiting] = (),
    ) -> StoredStream:
        """A new stream, at the cost of others when there is no room.

        Raises:
            TooLarge: nothing could ever be appended to it.
            NoRoom: see there.
        """
        stream = StoredStream(
            id=f"stream-{secrets.token_hex(16)}",
            client=client,
            model=model,
            schedule=schedule,
            options=options,
            created=time.time(),
            used=self.clock(),
            cache_salt=cache_salt,
            held=Held(array("i", tokens)),
            pending=tuple(pending),
        )
        if stream.size >= self.most_tokens:
            raise TooLarge(stream.size)
        self.forget_idle()
        self._streams[stream.id] = stream
        self._shares.add(client, streams=1, tokens=0)
        self._settle(stream, asks=True)
        if resource := self._shares.refused(client):
            self._drop(stream)
            raise NoRoom(resource)
        return stream

    def get(self, stream_id: str) -> StoredStream:
        """Look at a stream; that is no use of it.

        Raises:
            UnknownStream: see there.
        """
        self.forget_idle()
        if stream_id not in self._streams:
            raise UnknownStream(stream_id)
        return self._streams[stream_id]

    def acquire(self, stream_id: str) -> StoredStream:
        """Take a stream to append to; :meth:`release` gives it back.

        Raises:
            UnknownStream: see there.
            BusyStream: see there.
            NoRoom: see there; the stream stays.
        """
        stream = self.get(stream_id)
        if stream.busy:
            raise BusyStream(stream_id)
        self._make_room(stream, asks=True)
        if resource := self._shares.refused(stream.client):
            raise NoRoom(resource)
        stream.busy = True
        del self._idle[stream.id]
        self._shares.in_use(stream.client, stream.id)
        return stream

    def release(self, stream: StoredStream) -> None:
        """The most recently used stream from now on; others go if there are too many tokens."""
        stream.busy = False
        stream.used = self.clock()
        self._settle(stream, asks=False)

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

    def forget_idle(self) -> None:
        """Forget what nobody has used for too long; every method does that first."""
        while self._idle:
            stream = next(iter(self._idle.values()))
            if self.expires_in(stream) > 0:
                return  # the others were used later
            self._drop(stream)

    def _settle(self, stream: StoredStream, *, asks: bool) -> None:
        """``stream`` is as long as it is, and not in use; others go if that is too much."""
        size = stream.size
        self._shares.add(stream.client, streams=0, tokens=size - stream.counted)
        stream.counted = size
        self._idle[stream.id] = stream
        self._shares.used(stream.client, stream.id)
        self._make_room(stream, asks=asks)

    def _make_room(self, spare: StoredStream, *, asks: bool) -> None:
        while other := self._shares.giving_way(spare.client, spare.id, asks=asks):
            self._drop(self._streams[other])

    def _drop(self, stream: StoredStream) -> None:
        del self._streams[stream.id]
        del self._idle[stream.id]
        self._shares.in_use(stream.client, stream.id)
        self._shares.add(stream.client, streams=-1, tokens=-stream.counted)
