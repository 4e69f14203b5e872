"""The stored streams of several API servers, in the process that has started them.

``vllm serve --api-server-count N`` is a process that starts engines and N API servers and waits for
their end; it ends all of them when one of them ends. There the streams are remembered, in one
``StreamStore``: limits, shares, expiry and the database are those of one server. The API servers
ask over a Unix socket (``remote``), with the key that ``multiprocessing`` gives to its children.

A stream that an API server has taken is given back as it was if that server's connection ends.
Imports neither torch nor vLLM.
"""

import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from copy import copy
from functools import partial
from multiprocessing import AuthenticationError, current_process
from multiprocessing.connection import Connection, Listener
from typing import Any

from sink_vllm.server.streams.interface import Limits, Numbers
from sink_vllm.server.streams.store import StreamStore
from sink_vllm.server.streams.stored import Progress, StoredStream

logger = logging.getLogger(f"vllm.{__name__}")

_BACKLOG = 128


class Owner:
    """Answers for one store until its process ends."""

    def __init__(self, store: StreamStore) -> None:
        """``store`` is asked by threads of this object only, one at a time."""
        self._store = store
        self._lock = threading.Lock()
        # In a directory of this process, which only its user can read.
        self._listener = Listener(
            family="AF_UNIX", backlog=_BACKLOG, authkey=current_process().authkey
        )
        self.address = str(self._listener.address)
        """Of the socket: a path."""
        threading.Thread(target=self._accept, name="sink_vllm-streams-owner", daemon=True).start()

    def close(self) -> None:
        """Answer no new connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except (AuthenticationError, EOFError, ConnectionError) as error:
                logger.warning("Somebody who is no API server asked for stored streams: %s", error)
                continue
            except OSError:  # closed
                return
            threading.Thread(target=_Asked(self, connection).serve, daemon=True).start()

    def ask(self, question: Callable[[StreamStore], Any]) -> tuple[Any, Numbers]:
        """The answer to a question, and how many streams there are then."""
        with self._lock:
            found = question(self._store)
            self._store.forget_idle()
            return found, self._store.numbers


class _Asked:
    """The questions of one API server."""

    def __init__(self, owner: Owner, connection: "Connection[Any, Any]") -> None:
        self._owner, self._connection = owner, connection
        self._sending = threading.Lock()
        self._taken: set[str] = set()

    def serve(self) -> None:
        try:
            while True:
                number, name, args, kwargs = self._connection.recv()
                self._answer(number, getattr(self, name), args, kwargs)
        except (EOFError, OSError):
            pass  # the API server has ended
        finally:
            for stream_id in self._taken:
                self._owner.ask(partial(StreamStore.give_back, stream_id=stream_id))

    def _answer(
        self, number: int, question: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> None:
        try:
            found, numbers = self._owner.ask(lambda store: question(store, *args, **kwargs))
        except Exception as error:  # noqa: BLE001 - it is raised where the question was asked
            self._send(number, error, None)
            return
        if not isinstance(found, Future):
            self._send(number, found, numbers)
            return

        def written(future: Future[Any]) -> None:
            self._send(number, future.exception() or future.result(), numbers)

        found.add_done_callback(written)

    def _send(self, number: int, found: Any, numbers: Numbers | None) -> None:
        with self._sending, contextlib.suppress(OSError):
            self._connection.send((number, found, numbers))

    # -- what can be asked ------------------------------------------------------------------------

    def limits(self, store: StreamStore) -> Limits:
        return store.limits

    def numbers(self, store: StreamStore) -> None:
        """They come with every answer."""

    def create(self, store: StreamStore, *args: Any, **kwargs: Any) -> StoredStream:
        return copy(store.create(*args, **kwargs))

    def get(self, store: StreamStore, stream_id: str) -> StoredStream:
        return store.get(stream_id).without_tokens()

    def acquire(self, store: StreamStore, stream_id: str) -> StoredStream:
        stream = store.acquire(stream_id)
        self._taken.add(stream_id)
        return copy(stream)

    def report(self, store: StreamStore, stream_id: str, progress: Progress) -> None:
        if stream_id in self._taken:
            store.report(stream_id, progress)

    def release(self, store: StreamStore, stream: StoredStream) -> None:
        self._taken.remove(stream.id)
        store.release(stream)

    def remove(self, store: StreamStore, stream_id: str) -> None:
        store.remove(stream_id)

    def of_client(self, store: StreamStore, *args: Any) -> tuple[list[StoredStream], bool]:
        streams, more = store.of_client(*args)
        return [stream.without_tokens() for stream in streams], more

    def save(self, store: StreamStore, stream: StoredStream) -> Future[None]:
        return store.save(stream)
