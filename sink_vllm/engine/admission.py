"""Who may hold KV pages, and how many: the one owner of admission (engine core process).

A request holds pages as one of two kinds::

    WAITING ── admitted ──► GUEST      it ends, for all we know, before its cache is full. It is
       ▲                      │        admitted with pages for the tokens it has, as by vLLM, and
       │                      │        gives way when others need their share.
       │                      ▼ full
       ├── admitted ──► RESIDENT       it evicts, or will, or gave way before. Its whole share of
       │                      │        pages is reserved, so it never loses them to others.
       └── gives way ◄────────┘

A guest that gives way has not evicted anything: it is recomputed exactly as it was, and comes
back as a resident. A stream that has evicted is never recomputed for want of pages, so its text
does not depend on who else is there; what the start-up log says fits, fits. Two rules keep it so:

1. the shares of all residents together are no more than the pool;
2. ``slack``, the free pages minus what all holders still need, is never negative: the newest guest
   gives way until it is not.

Holders may share pages. Then rule 1 is what counts: every page that is not free is held by
somebody, so pages in use are at most the sum of what all hold, and free pages at least the sum of
what residents still need.
"""

from dataclasses import dataclass
from enum import Enum

from vllm.v1.request import Request, RequestStatus

from sink_vllm.engine.ledger import PageLedger
from sink_vllm.engine.stream import Stream
from sink_vllm.engine.tables import PageTables


class Standing(Enum):
    """What a request has been promised."""

    WAITING = "waiting"
    GUEST = "guest"
    RESIDENT = "resident"


class Verdict(Enum):
    """What became of a request that asked for pages."""

    ADMITTED = "admitted"
    NO_PAGES = "no pages"
    """Guests hold them, or the step is short of them."""
    NO_SHARE = "no share"
    """All of the pool is promised to residents."""


@dataclass(slots=True)
class _Holder:
    request: Request
    stream: Stream
    number: int
    """Of its admission: guests give way newest first."""
    share: int | None
    """Pages reserved for a resident; ``None`` for a guest."""


class Admission:
    """The promises made to all requests of one engine core."""

    def __init__(
        self,
        tables: PageTables,
        *,
        by_priority: bool,
        no_limit: int,
        watermark: int = 0,
    ) -> None:
        """
        Args:
            tables: whose pages are handed out.
            by_priority: the scheduling policy; a request of higher priority makes residents of
                lower priority give way, too.
            no_limit: tokens of prompt and output of a request whose client named no limit.
            watermark: free pages vLLM wants left when it admits a request beside others.
        """
        self._tables = tables
        self._ledger: PageLedger = tables.ledger
        self._by_priority = by_priority
        self._no_limit = no_limit
        self._watermark = watermark
        self._holders: dict[str, _Holder] = {}
        self._reserved = 0
        self._num_guests = 0
        self._numbers = 0
        self._gave_way: set[str] = set()
        """Waiting requests that come back as residents."""

    # -- asking -----------------------------------------------------------------------------

    def standing(self, request_id: str) -> Standing:
        holder = self._holders.get(request_id)
        if holder is None:
            return Standing.WAITING
        return Standing.GUEST if holder.share is None else Standing.RESIDENT

    @property
    def num_guests(self) -> int:
        return self._num_guests

    @property
    def num_residents(self) -> int:
        return len(self._holders) - self._num_guests

    def residents_fit(self, request: Request, stream: Stream) -> bool:
        """Whether a waiting request may be admitted as far as residents are concerned."""
        share = self._reserved_for(request, stream)
        return share is None or self._has_room(share)

    def needs(self, request_id: str) -> int:
        """Pages a holder still needs: of a resident to hold its share, of a guest to compute the
        tokens it has."""
        return self._needs(self._holders[request_id])

    def slack(self) -> int:
        """Free pages that no holder needs, those on loan included; negative when guests have grown
        into others' share."""
        return self._ledger.num_available - sum(map(self._needs, self._holders.values()))

    def spare(self) -> int:
        """The part of the slack that nobody has on loan; negative when holders need some of it."""
        return self.slack() - len(self._ledger.ahead)

    def may_be_short(self, pages: int) -> bool:
        """Whether less than ``pages`` could be left when every resident holds its share."""
        return self._ledger.num_free < self._reserved + pages

    def _needs(self, holder: _Holder) -> int:
        held = self._ledger.held(holder.request.request_id)
        if holder.share is not None:
            return max(holder.share - held, 0)
        request = holder.request
        # With asynchronous scheduling tokens are computed before they are known.
        tokens = max(request.num_tokens, request.num_computed_tokens + 1)
        tokens = min(tokens, holder.stream.capacity)
        return max(self._tables.pages_of(holder.stream.schedule, tokens) - held, 0)

    def _must_reside(self, request: Request, stream: Stream) -> bool:
        """Whether a request is sure to fill its cache, or has given way before."""
        if stream.evictions or stream.pending or request.request_id in self._gave_way:
            return True
        if request.resumable:
            return False
        length = request.num_prompt_tokens + request.max_tokens
        # The token sampled last is never computed.
        return length - 1 > stream.capacity and length < self._no_limit

    def _share_of(self, request: Request, stream: Stream) -> int:
        """Pages a request holds at most, until its end."""
        length = None
        if not request.resumable and not stream.evictions and not stream.pending:
            length = request.num_prompt_tokens + request.max_tokens - 1
        return self._tables.pages_of(stream.schedule, length)

    def _has_room(self, share: int) -> bool:
        """Whether rule 1 allows another resident."""
        return self._reserved + share <= self._ledger.num_pages

    # -- admitting --------------------------------------------------------------------------

    def verdict(self, request: Request, stream: Stream, cached_in_use: int = 0) -> Verdict:
        """Whether a waiting request may hold pages.

        Args:
            request: holds none.
            stream: of it.
            cached_in_use: pages it starts from that others hold anyway.
        """
        return self._judge(request, stream, self._reserved_for(request, stream), cached_in_use)

    def _reserved_for(self, request: Request, stream: Stream) -> int | None:
        """The share of a waiting request as a resident; ``None`` if it would be a guest."""
        return self._share_of(request, stream) if self._must_reside(request, stream) else None

    def _judge(
        self, request: Request, stream: Stream, share: int | None, cached_in_use: int
    ) -> Verdict:
        if share is None:
            tokens = min(request.num_tokens, stream.capacity)
            needed = self._tables.pages_of(stream.schedule, tokens) - cached_in_use
        elif self._has_room(share):
            needed = share
        else:
            return Verdict.NO_SHARE
        if self._holders:
            needed += self._watermark
        return Verdict.ADMITTED if self.slack() >= needed else Verdict.NO_PAGES

    def admit(self, request: Request, stream: Stream, cached_in_use: int = 0) -> bool:
        """Let a waiting request hold pages, if :meth:`verdict` says so."""
        share = self._reserved_for(request, stream)
        if self._judge(request, stream, share, cached_in_use) is not Verdict.ADMITTED:
            return False
        self._numbers += 1
        self._holders[request.request_id] = _Holder(request, stream, self._numbers, share)
        self._reserved += share or 0
        self._num_guests += share is None
        return True

    def promote(self, request: Request) -> Verdict:
        """Make a guest whose cache is full a resident, if there is a share for it."""
        holder = self._holders[request.request_id]
        if holder.share is not None:
            return Verdict.ADMITTED
        if not self._has_room(self._share_of(request, holder.stream)):
            return Verdict.NO_SHARE
        share = self._tables.pages_of(holder.stream.schedule)
        more = share - self._ledger.held(request.request_id) - self._needs(holder)
        if self.slack() < more:
            return Verdict.NO_PAGES
        holder.share = share
        self._reserved += share
        self._num_guests -= 1
        return Verdict.ADMITTED

    def leave(self, request_id: str) -> None:
        """A request holds no pages any more."""
        holder = self._holders.pop(request_id, None)
        if holder is not None:
            self._reserved -= holder.share or 0
            self._num_guests -= holder.share is None

    def gave_way(self, request_id: str) -> None:
        """A request lost its pages to others, and waits to be admitted again."""
        self.leave(request_id)
        self._gave_way.add(request_id)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self.leave(request_id)
        self._gave_way.discard(request_id)

    # -- giving way -------------------------------------------------------------------------

    def who_gives_way(self, asking: Request, verdict: Verdict) -> Request:
        """The holder that gives its pages up next, so that another gets what it needs.

        Sessions whose client is silent come first, then the newest guest; under priorities, the
        least important one. Among equals, one with recurrent states that know of evicted tokens is
        the last: they would not come back.

        Args:
            asking: a holder, for whom it is; it may be the answer. Under priorities, residents
                that are less important give way to it, too.
            verdict: what it was answered. Guests have no share to give.
        """
        candidates = [
            holder
            for holder in self._holders.values()
            if (holder.share is None and verdict is not Verdict.NO_SHARE)
            or (self._by_priority and holder.request.priority > asking.priority)
        ]
        return max(candidates, key=self._rank).request if candidates else asking

    def newest_guest(self) -> Request | None:
        """The guest that gives way when there is no slack; see :meth:`who_gives_way`."""
        guests = [holder for holder in self._holders.values() if holder.share is None]
        return max(guests, key=self._rank).request if guests else None

    def _rank(self, holder: _Holder) -> tuple[bool, int, bool, float, int]:
        request = holder.request
        idle = request.status == RequestStatus.WAITING_FOR_STREAMING_REQ
        spared = not self.loses_state(request.request_id)
        if self._by_priority:
            return idle, request.priority, spared, request.arrival_time, holder.number
        return idle, 0, spared, 0.0, holder.number

    def loses_state(self, request_id: str) -> bool:
        """Whether a holder has recurrent states that know of tokens it would not compute again."""
        stream = self._holders[request_id].stream
        return bool(self._tables.recurrent and stream.evictions)

    def check(self) -> None:
        """Shares and counts are those of the holders.

        Raises:
            AssertionError: they are not, or rule 1 is broken.
        """
        shares = [holder.share for holder in self._holders.values()]
        assert self._num_guests == shares.count(None)
        assert self._reserved == sum(filter(None, shares)) <= self._ledger.num_pages
