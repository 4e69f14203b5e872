"""What an API server asks of the stored streams, wherever they are remembered. No torch, no vLLM.

In its own memory (``store``) if it is the only one; with several, in the process that has started
them (``owner``), which each of them asks (``remote``). The rules are those of ``store`` either way.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from sink_vllm.policy.schedule import Schedule
from sink_vllm.server.streams.stored import Progress, StoredStream, Waiting


class Numbers(NamedTuple):
    """Of all streams that are remembered."""

    streams: int
    in_use: int
    tokens: int


class Limits(NamedTuple):
    """What a store was made with."""

    most_streams: int
    most_tokens: int
    idle_seconds: float
    is_archived: bool
    """Whether streams outlive the server."""


class Streams(Protocol):
    """Streams by id. ``store.StreamStore`` says what the methods do and raise.

    Where they are remembered elsewhere, ``get`` and ``of_client`` return streams without their
    tokens, and every method raises ``Unreachable`` when nobody answers, except for
    ``report``, ``release``, ``save`` and ``save_later``.
    """

    clock: Callable[[], float]
    limits: Limits

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
    ) -> StoredStream: ...

    def get(self, stream_id: str) -> StoredStream: ...

    def acquire(self, stream_id: str) -> StoredStream: ...

    def report(self, stream_id: str, progress: Progress) -> None: ...

    def release(self, stream: StoredStream) -> None: ...

    def remove(self, stream_id: str) -> None: ...

    def of_client(
        self, client: str, after: str | None, limit: int
    ) -> tuple[list[StoredStream], bool]: ...

    def save(self, stream: StoredStream) -> Future[None]: ...

    def save_later(self, stream: StoredStream) -> None: ...
