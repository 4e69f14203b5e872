"""How many stored streams and tokens each client holds, and who gives way when there are too many.

There are two limits, of streams and of tokens, and the same rule for both. A client's *share* is
the limit divided by the number of clients that hold streams; one client alone may hold everything.
Whoever holds no more than the share never gives way to others, and is not refused because others
hold more. So the client that holds the most loses its least recently used stream, and the client
that asks for more than its share while everything is in use is the one to wait.

With more clients than streams there is no share left: the least recently used stream of those who
hold the most goes, as if all were one client. Imports neither torch nor vLLM.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Resource = Literal["streams", "tokens"]

_EXCESS = 2
"""A limit is never exceeded by clients inside their shares to more than this many times."""


@dataclass(slots=True)
class _Held:
    """By one client."""

    amount: dict[Resource, int] = field(default_factory=lambda: {"streams": 0, "tokens": 0})
    idle: OrderedDict[str, int] = field(default_factory=OrderedDict)
    """Streams nobody appends to, the least recently used one first, with their times of use."""

    def oldest(self, spare: str | None) -> tuple[int, str] | None:
        """Time of use and id of the least recently used stream that is not ``spare``."""
        return next(((use, name) for name, use in self.idle.items() if name != spare), None)


class Shares:
    """Bookkeeping for clients and streams, both known by name; every count is O(1)."""

    def __init__(self, limits: Mapping[Resource, int]) -> None:
        self._limits = dict(limits)
        self._total: dict[Resource, int] = dict.fromkeys(self._limits, 0)
        self._clients: dict[str, _Held] = {}
        self._uses = 0

    def total(self, resource: Resource) -> int:
        """Held by all clients together."""
        return self._total[resource]

    def add(self, client: str, *, streams: int, tokens: int) -> None:
        """``client`` holds so many more (fewer, if negative) from now on."""
        held = self._clients.setdefault(client, _Held())
        changes: dict[Resource, int] = {"streams": streams, "tokens": tokens}
        for resource, change in changes.items():
            held.amount[resource] += change
            self._total[resource] += change
        if not held.amount["streams"]:
            del self._clients[client]

    def used(self, client: str, stream: str) -> None:
        """``stream`` may give way from now on, as the most recently used one."""
        self._uses += 1
        self._clients[client].idle[stream] = self._uses

    def in_use(self, client: str, stream: str) -> None:
        """``stream`` does not give way from now on; nor does one that is no longer there."""
        self._clients[client].idle.pop(stream, None)

    def giving_way(self, client: str, spare: str, *, asks: bool) -> str | None:
        """The stream to forget next; ``None`` if the limits hold or nobody has to give way.

        Takes a look at every client, so O(clients), each time something is to be forgotten.

        Args:
            client: for whom room is made; the first to give way among equals.
            spare: a stream of ``client`` that stays.
            asks: ``client`` can be refused instead, so that nobody who holds less gives way to
                a client that is over its share.
        """
        for resource, limit in self._limits.items():
            if self._total[resource] <= limit:
                continue
            share = limit // len(self._clients)
            own = self._clients[client]
            least = own.amount[resource] if asks else 0
            least = least if least > max(share, 1) else 0
            candidates = [
                (held.amount[resource], held is own, -oldest[0], oldest[1])
                for held in self._clients.values()
                if held.amount[resource] > share
                and (held is own or held.amount[resource] > least)
                and (oldest := held.oldest(spare)) is not None
            ]
            if candidates:
                return max(candidates)[-1]
        return None

    def refused(self, client: str) -> Resource | None:
        """What ``client`` has too much of while there is too much in all.

        A client inside its share is refused only if the limit is exceeded far, which takes many
        clients that have all their streams in use.
        """
        for resource, limit in self._limits.items():
            share = max(limit // len(self._clients), 1)
            inside = self._clients[client].amount[resource] <= share
            if self._total[resource] > (_EXCESS * limit if inside else limit):
                return resource
        return None
