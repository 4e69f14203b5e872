"""The stored streams of an API server that is one of several: asked of their owner.

A question takes a fraction of a millisecond and is asked while everything else of the server waits;
only writing to the database is waited for. Imports neither torch nor vLLM.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing import current_process
from multiprocessing.connection import Client
from typing import Any

from sink_vllm.server.streams.errors import Unreachable
from sink_vllm.server.streams.interface import Limits, Numbers
from sink_vllm.server.streams.store import log_failure
from sink_vllm.server.streams.stored import Progress, StoredStream

logger = logging.getLogger(f"vllm.{__name__}")

_REFRESH = 1.0  # second without an answer, after which the numbers are asked for
_GONE = (
    "The process that remembers the streams of this server has ended, and with it the server; "
    "start it again."
)


class RemoteStore:
    """``interface.Streams`` of another process."""

    def __init__(self, address: str) -> None:
        """
        Args:
            address: of the owner's socket.

        Raises:
            OSError: nobody is there.
        """
        self.clock = time.monotonic  # the same in all processes of a machine
        self._connection = Client(address, "AF_UNIX", authkey=current_process().authkey)
        self._sending = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._questions = itertools.count()
        self._watch: Callable[[Numbers], None] | None = None
        self._ended = False
        self._sender: int | None = None  # the thread that is sending
        self._reader = threading.Thread(target=self._read, name="sink_vllm-streams", daemon=True)
        self._reader.start()
        self.limits: Limits = self._ask("limits").result()

    def watch(self, watch: Callable[[Numbers], None]) -> None:
        """``watch`` is told how many streams there are, by a thread, with every answer, and every
        second without one."""
        self._watch = watch

    def create(self, *args: Any, **kwargs: Any) -> StoredStream:
        kwargs["pending"] = tuple(kwargs.get("pending", ()))
        stream: StoredStream = self._ask("create", *args, **kwargs).result()
        return stream

    def get(self, stream_id: str) -> StoredStream:
        stream: StoredStream = self._ask("get", stream_id).result()
        return stream

    def acquire(self, stream_id: str) -> StoredStream:
        stream: StoredStream = self._ask("acquire", stream_id).result()
        return stream

    def report(self, stream_id: str, progress: Progress) -> None:
        self._ask("report", stream_id, progress).add_done_callback(log_failure)

    def release(self, stream: StoredStream) -> None:
        """Tell what has become of a stream; its owner has it until then as it was.

        Whoever is answered after this can go on with it at any API server.
        """
        if threading.get_ident() in (self._reader.ident, self._sender):
            # A turn that is lost gives its stream back where it happens to be collected.
            threading.Thread(target=self.release, args=(stream,), daemon=True).start()
            return
        stream.busy, stream.progress, stream.used = False, None, self.clock()
        released = self._ask("release", stream)
        released.add_done_callback(log_failure)
        released.exception()  # waits

    def remove(self, stream_id: str) -> None:
        self._ask("remove", stream_id).result()

    def of_client(
        self, client: str, after: str | None, limit: int
    ) -> tuple[list[StoredStream], bool]:
        streams: tuple[list[StoredStream], bool] = self._ask(
            "of_client", client, after, limit
        ).result()
        return streams

    def save(self, stream: StoredStream) -> Future[None]:
        return self._ask("save", stream)

    def save_later(self, stream: StoredStream) -> None:
        if self.limits.is_archived:
            self.save(stream).add_done_callback(log_failure)

    def close(self) -> None:
        """What was taken and not given back goes back as it was."""
        self._connection.close()

    def _ask(self, name: str, *args: Any, **kwargs: Any) -> Future[Any]:
        number, future = next(self._questions), Future[Any]()
        future.set_running_or_notify_cancel()  # whoever waits may leave, the answer comes anyway
        with self._sending:
            self._sender = threading.get_ident()
            self._waiting[number] = future
            try:
                if self._ended:
                    raise EOFError
                self._connection.send((number, name, args, kwargs))
            except (OSError, EOFError):
                del self._waiting[number]
                future.set_exception(Unreachable(_GONE))
            finally:
                self._sender = None
        return future

    def _read(self) -> None:
        try:
            while True:
                if not self._connection.poll(_REFRESH):
                    if self._watch is not None:
                        self._ask("numbers")
                    continue
                number, found, numbers = self._connection.recv()
                future = self._waiting.pop(number)
                if self._watch is not None and numbers is not None:
                    self._watch(numbers)
                if isinstance(found, Exception):
                    future.set_exception(found)
                else:
                    future.set_result(found)
        except (EOFError, OSError):
            with self._sending:
                self._ended = True
                left, self._waiting = list(self._waiting.values()), {}
            for future in left:
                future.set_exception(Unreachable(_GONE))
