"""What is remembered of one stored stream. Imports neither torch nor vLLM."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from sink_vllm.policy.schedule import Schedule, cdiv
from sink_vllm.server.streams.held import Held

TOKEN_BYTES = 4
ID_PREFIX = "stream-"
MESSAGE_TOKENS = 64
"""What a waiting message counts as beside its text: the objects it is kept in."""


class Waiting(NamedTuple):
    """A chat message that the first append will compute, kept as UTF-8."""

    role: str
    content: bytes

    @property
    def size(self) -> int:
        """In tokens of the same memory, whatever its text will be tokenized to."""
        return cdiv(len(self.content), TOKEN_BYTES) + MESSAGE_TOKENS

    def message(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content.decode()}


class Answered(NamedTuple):
    """What a turn was answered with."""

    key: str
    """Of the request, as its client chose it."""
    asked: str
    """Digest of what was asked for under this key."""
    answer: str
    """JSON of an account, without the stream as it was."""


class Progress(NamedTuple):
    """How far the turn in progress has come, in tokens; no part of the stream until it ends."""

    position: int
    """Length of the stream with what was appended and generated up to now."""
    generated: int
    seconds: float
    """Of the store's clock, from the turn's first output to this one."""


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
    metadata: dict[str, str] = field(default_factory=dict)
    expires_after: float | None = None
    """Seconds without use; ``None`` for those of the store."""
    priority: int = 0
    """Of its turns, as vLLM's scheduler takes it."""
    answered: Answered | None = None
    """The last turn whose client may ask for its answer again."""
    busy: bool = False
    progress: Progress | None = None
    """Of the turn in progress, once the engine has answered."""
    counted: int = 0
    """What the store has counted it as."""

    def expires(self, most: float) -> float:
        """When it is forgotten if nobody uses it, after ``most`` seconds at the latest."""
        own = self.expires_after
        return self.used + (most if own is None else min(own, most))

    def without_tokens(self) -> StoredStream:
        """All that can be said of it, without what makes it large."""
        held = Held(array("i"), self.position)
        pending = tuple(waiting._replace(content=b"") for waiting in self.pending)
        return replace(self, held=held, pending=pending)

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
        answered = 0 if self.answered is None else cdiv(len(self.answered.answer), TOKEN_BYTES)
        return len(self.tokens) + answered + sum(message.size for message in self.pending)

    @property
    def computed(self) -> int:
        return self.position - self.sampled

    @property
    def evicted(self) -> int:
        return 0 if self.schedule is None else self.schedule.evicted(self.computed)

    @property
    def evictions(self) -> int:
        return 0 if self.schedule is None else self.schedule.evictions(self.computed)
