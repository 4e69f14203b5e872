"""The stored streams: what a server remembers of each, bounded in number, tokens and time.

Kept is what the engine needs to find a stream's pages again, which does not grow with the stream
(``sink_vllm.server.streams.held``), its options, and the messages that wait for the first append.
The pages themselves belong to the prefix cache, so that a stream nobody appends to holds no memory
of the accelerator. Which stream is forgotten for another one is decided by
``sink_vllm.server.streams.shares``. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import heapq
import logging
import secrets
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from sink_vllm.policy.schedule import Schedule
from sink_vllm.server.streams.archive import Archive
from sink_vllm.server.streams.errors import (
    BusyStream,
    NoRoom,
    TooLarge,
    UnknownStream,
    UnusableStream,
)
from sink_vllm.server.streams.held import Held
from sink_vllm.server.streams.interface import Limits, Numbers
from sink_vllm.server.streams.shares import Shares
from sink_vllm.server.streams.stored import ID_PREFIX, Progress, StoredStream, Waiting

# Below vLLM's own logger, whose handlers print it.
logger = logging.getLogger(f"vllm.{__name__}")

_MORE_EXPIRING = 1000  # times of expiry that are known and no longer go


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
        archive: Archive | None = None,
    ) -> None:
        """``archive`` has the streams of an earlier server, and gets those of this one."""
        self.limits = Limits(most_streams, most_tokens, idle_seconds, archive is not None)
        self.clock = clock
        self._streams: dict[str, StoredStream] = {}
        self._idle: dict[str, StoredStream] = {}
        self._expiring: list[tuple[float, str]] = []  # a heap; used streams are in it again
        self._shares = Shares({"streams": most_streams, "tokens": most_tokens})
        self._archive = archive
        self._refused: dict[str, str] = {}
        if archive is not None:
            self._load(archive)

    def _load(self, archive: Archive) -> None:
        streams, self._refused = archive.load(time.time())
        for stream, idle in streams:
            stream.used = self.clock() - idle
            self._streams[stream.id] = stream
            self._shares.add(stream.client, streams=1, tokens=0)
            self._settle(stream, asks=False)
        self.forget_idle()
        logger.info(
            "/v1/streams goes on with %d streams of %s; %d others cannot be gone on with here.",
            len(self),
            archive.path,
            len(self._refused),
        )

    def save(self, stream: StoredStream) -> Future[None]:
        """Write ``stream``, as it is now, into the archive; see there."""
        assert self._archive is not None
        return self._archive.save(stream, time.time())

    def save_later(self, stream: StoredStream) -> None:
        """The same, for nobody who waits."""
        if self._archive is not None:
            self.save(stream).add_done_callback(log_failure)

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

    @property
    def numbers(self) -> Numbers:
        """All three."""
        return Numbers(len(self), self.in_use, self.tokens)

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
        metadata: dict[str, str] | None = None,
        expires_after: float | None = None,
        priority: int = 0,
    ) -> StoredStream:
        """A new stream, at the cost of others when there is no room.

        Raises:
            TooLarge: nothing could ever be appended to it.
            NoRoom: see there.
        """
        stream = StoredStream(
            id=f"{ID_PREFIX}{secrets.token_hex(16)}",
            client=client,
            model=model,
            schedule=schedule,
            options=options,
            created=time.time(),
            used=self.clock(),
            cache_salt=cache_salt,
            held=Held(array("i", tokens)),
            tail="assistant" if tokens else None,
            open=bool(tokens),
            pending=tuple(pending),
            metadata=metadata or {},
            expires_after=expires_after,
            priority=priority,
        )
        if stream.size >= self.limits.most_tokens:
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
            UnusableStream: see there.
        """
        self.forget_idle()
        if stream_id in self._refused:
            raise UnusableStream(self._refused[stream_id])
        if stream_id not in self._streams:
            raise UnknownStream(stream_id)
        return self._streams[stream_id]

    def acquire(self, stream_id: str) -> StoredStream:
        """Take a stream to append to; :meth:`release` gives it back.

        Raises:
            UnknownStream: see there.
            UnusableStream: see there.
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

    def report(self, stream_id: str, progress: Progress) -> None:
        """How far the turn of a stream has come that has been taken; for who looks at it."""
        self._streams[stream_id].progress = progress

    def release(self, stream: StoredStream) -> None:
        """The most recently used stream from now on; others go if there are too many tokens.

        Args:
            stream: that has been taken, or what has become of a copy of it.
        """
        self._streams[stream.id] = stream
        stream.busy, stream.progress = False, None
        stream.used = self.clock()
        self._settle(stream, asks=False)

    def give_back(self, stream_id: str) -> None:
        """Release a stream as it was: a copy of it has been taken, and is lost."""
        self.release(self._streams[stream_id])

    def remove(self, stream_id: str) -> None:
        """Forget a stream, also one that cannot be gone on with.

        Raises:
            UnknownStream: see there.
            BusyStream: see there.
        """
        if self._archive is not None and self._refused.pop(stream_id, None) is not None:
            self._archive.remove(stream_id).add_done_callback(log_failure)
            return
        stream = self.get(stream_id)
        if stream.busy:
            raise BusyStream(stream_id)
        self._drop(stream)

    def _expires(self, stream: StoredStream) -> float:
        return stream.expires(self.limits.idle_seconds)

    def forget_idle(self) -> None:
        """Forget what nobody has used for too long; every method does that first."""
        now = self.clock()
        while self._expiring and self._expiring[0][0] <= now:
            _, stream_id = heapq.heappop(self._expiring)
            stream = self._idle.get(stream_id)
            if stream is not None and self._expires(stream) <= now:  # not used since
                self._drop(stream)

    def of_client(
        self, client: str, after: str | None, limit: int
    ) -> tuple[list[StoredStream], bool]:
        """A page of the streams of a client, those in use and the most recently used ones first.

        Args:
            client: whose.
            after: begin behind this stream; from the first one by default.
            limit: streams of a page.

        Returns:
            The streams, and whether there are more.

        Raises:
            UnknownStream: the client has no stream ``after``.
        """
        self.forget_idle()
        own = [one for one in self._streams.values() if one.client == client]
        own.sort(key=lambda one: (one.busy, one.used, one.id), reverse=True)
        begin = 0
        if after is not None:
            places = {one.id: place for place, one in enumerate(own)}
            if after not in places:
                raise UnknownStream(after)
            begin = places[after] + 1
        return own[begin : begin + limit], begin + limit < len(own)

    def _settle(self, stream: StoredStream, *, asks: bool) -> None:
        """``stream`` is as long as it is, and not in use; others go if that is too much."""
        size = stream.size
        self._shares.add(stream.client, streams=0, tokens=size - stream.counted)
        stream.counted = size
        self._idle[stream.id] = stream
        heapq.heappush(self._expiring, (self._expires(stream), stream.id))
        if len(self._expiring) > 2 * len(self._streams) + _MORE_EXPIRING:
            self._expiring = [(self._expires(one), one.id) for one in self._idle.values()]
            heapq.heapify(self._expiring)
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
        if self._archive is not None:
            self._archive.remove(stream.id).add_done_callback(log_failure)


def log_failure(written: Future[Any]) -> None:
    """Say why something could not be done that nobody waits for."""
    if (error := written.exception()) is not None:
        logger.warning("%s", error)
