"""Why a stream cannot be had: what the store of ``/v1/streams`` raises. No torch, no vLLM."""

from sink_vllm.server.streams.shares import Resource


class UnknownStream(LookupError):
    """There is no such stream, or no longer."""


class BusyStream(RuntimeError):
    """Somebody is appending to the stream."""


class UnusableStream(RuntimeError):
    """The stream is in the archive, and cannot be gone on with here; one sentence."""


class Unreachable(RuntimeError):
    """The process that remembers the streams of this server does not answer; one sentence."""


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
