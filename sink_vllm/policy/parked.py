"""What a stored stream's next request says of the part of it that is not sent (no torch, no vLLM).

The cache of a stream is a function of its last tokens and of what its pages were computed behind.
So is all that going on takes: the sinks, the tokens from a page boundary in front of the window on
(the *rest*), and two kinds of page hashes, of the sinks and of the page before the rest, which
stand for everything in between. Nothing of it grows with the stream::

    chain    [0, S)    [S, S + missing)    [S + missing, ...)
             sinks     not sent            the rest, and what is new

Positions here count from where the cache was last built (*chain*): from the start of the stream,
unless it has gone on from its survivors since. ``base`` tokens had been evicted before that.

Requests carry it in ``extra_args`` as an object of this class, which no client can send: what
comes in a request is JSON. ``server.requests`` makes a dictionary of it on the way to the engine.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

KEY = "streaming_llm_parked"
"""In the ``extra_args`` of a request."""
CHAIN = "chain"
"""In the account of a response (``policy.report``)."""
ResumedFrom = Literal["cache", "host", "disk", "survivors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked:
    """What goes to the engine beside the tokens; all counts in tokens."""

    known: int
    """Of the prompt that is sent, those that were in the stream before."""
    missing: int = 0
    base: int = 0
    sinks: tuple[bytes, ...] = ()
    """Hashes of the pages with the sinks."""
    parent: bytes | None = None
    """Hash of the page before the rest; ``None`` if no page can be found again."""

    @property
    def not_sent(self) -> int:
        """Tokens of the stream that are not in the prompt."""
        return self.base + self.missing

    def wire(self) -> dict[str, Any]:
        """As vLLM's messages take it."""
        return asdict(self)

    @classmethod
    def read(cls, wire: Mapping[str, Any]) -> "Parked":
        return cls(**{**wire, "sinks": tuple(wire["sinks"])})


def parked_of(extra_args: Mapping[str, Any] | None) -> Parked | None:
    """What a request of this front end carries.

    Raises:
        ValueError: a client has sent something under that name.
    """
    given = (extra_args or {}).get(KEY)
    if given is not None and not isinstance(given, Parked):
        raise ValueError(
            f"{KEY} is not an option of a request: what is cached of a stream cannot be named; "
            "leave it out, and use /v1/streams to go on with a stream."
        )
    return given


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """What the engine tells of a stored stream, for the requests to come."""

    base: int = 0
    anchors: tuple[tuple[int, bytes], ...] = ()
    """Where the last few windows began: chain position of the page, and hash of the one before."""
    sinks: tuple[bytes, ...] = ()
    resumed_from: ResumedFrom | None = None
    """``"cache"``; ``"host"`` or ``"disk"`` if pages had to be brought back from there;
    ``"survivors"`` if they were gone; ``None``: computed from its start."""

    def wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, wire: Mapping[str, Any]) -> "Chain":
        """What stands in the account of a response under ``CHAIN``."""
        anchors = tuple((position, block_hash) for position, block_hash in wire["anchors"])
        return cls(**{**wire, "anchors": anchors, "sinks": tuple(wire["sinks"])})
