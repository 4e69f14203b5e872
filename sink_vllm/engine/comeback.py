"""How a stream that lost its pages goes on exactly: from the pages themselves (engine core).

Who loses pages after evictions can be computed again from the survivors only, which have lost what
they knew of evicted tokens. But pages that were given up stay in the prefix cache until somebody
needs them, the latest states of recurrent layers among them. So what they are found by is kept, and
they are looked up when the stream is admitted again::

    chain    [0, S)    [S, S + e * g)    [S + e * g, ...)
             sinks     evicted           survivors, whose tokens are all that is needed

A boundary should have seen the same evictions: one before the last of them would go on with tokens
that are not in the request any more. Where the capacity is a multiple of the page there is always
one, at the eviction itself; otherwise from the end of the first page after it. Until then a session
goes back behind its last eviction, and makes it once more: it keeps what it drops for that. Other
requests do not, because tokens of an answer cannot be put back into the prompt.
"""

from collections.abc import Sequence

from vllm.v1.request import Request

from sink_vllm.engine.hashing import PageHasher
from sink_vllm.engine.parked import Dropped, GappedHashes, Lost
from sink_vllm.engine.stream import Stream, as_array, show
from sink_vllm.engine.tables import FoundPages, PageTables
from sink_vllm.policy.schedule import EvictionPages, RopeAnchors, cdiv


def dropped_next(request: Request, stream: Stream, block_size: int) -> Dropped | None:
    """What the next eviction drops, of a session."""
    if not request.resumable:
        return None
    schedule, pages = stream.schedule, EvictionPages.of(stream.schedule, block_size)
    begin, first = schedule.sink_tokens, pages.sink_full
    return Dropped(
        request._all_token_ids[begin : begin + schedule.stride],
        request.block_hashes[first : first + pages.dropped],
    )


def lose(request: Request, stream: Stream, block_size: int) -> Lost | None:
    """What a request that loses its pages could be found by; ``None``: its pages have no hashes."""
    if request._block_hasher is None or request.skip_reading_prefix_cache:
        return None
    pages = EvictionPages.of(stream.schedule, block_size)
    dropped = stream.dropped if stream.chain_evictions > 1 else None
    known = dropped.hashes if dropped is not None else ()
    first = pages.sink_full + stream.chain_evictions * pages.dropped - len(known)
    return Lost(
        stream.chain_evictions,
        stream.evicted_from_chain,
        dropped,
        GappedHashes(
            stream.sinks,
            first - len(stream.sinks),
            [*known, *request.block_hashes[pages.sink_full :]],
        ),
        stream.sinks,
        tuple(stream.anchors),
    )


def find(request: Request, stream: Stream, lost: Lost, tables: PageTables) -> FoundPages | None:
    """The longest boundary that has seen all evictions, or all but one, and is cached. Changes
    nothing."""
    schedule, size = stream.schedule, tables.block_size
    next_eviction = schedule.capacity + lost.evictions * schedule.stride
    most = min(request.num_tokens + lost.evicted, next_eviction) - 1
    is_prompt = request.num_prompt_tokens == request.num_tokens
    may_repeat = lost.dropped is not None and is_prompt and stream.parked is None
    least = next_eviction - (2 if may_repeat else 1) * schedule.stride
    return tables.find_resume(schedule, lost.hashes, most // size, cdiv(least, size))


def come_back(
    request: Request,
    stream: Stream,
    lost: Lost,
    hasher: PageHasher,
    found: FoundPages,
    tables: PageTables,
) -> int:
    """Let the chain of a stream go on where it is found.

    Returns:
        Its cached tokens.
    """
    stream.chain_evictions, stream.evicted_from_chain = lost.evictions, lost.evicted
    stream.sinks = lost.sinks
    stream.anchors.extend(lost.anchors)
    if tables.evictions_at(stream.schedule, found.end) < lost.evictions:
        assert lost.dropped is not None
        _exchange(request, stream, 0, lost.dropped.tokens)
        _take_back(stream, 1, tables.anchors)
    stream.prompt_hashes = lost.hashes
    hasher.resume(request, stream, found.end)
    stream.prompt_hashes = []
    return found.end * tables.block_size - stream.evicted_from_chain


def wait_on(request: Request, stream: Stream, lost: Lost, tables: PageTables) -> None:
    """Take :func:`come_back` back."""
    if stream.chain_evictions < lost.evictions:
        _exchange(request, stream, stream.schedule.stride, ())
        _take_back(stream, -1, tables.anchors)
    stream.rebuilt()


def _exchange(request: Request, stream: Stream, count: int, tokens: Sequence[int]) -> None:
    """Put ``tokens`` in place of the ``count`` tokens after the sinks."""
    sinks, known = stream.schedule.sink_tokens, request._all_token_ids
    after = [*known[:sinks], *tokens, *known[sinks + count :], *stream.pending]
    show(request, stream, (), as_array(after), 0)


def _take_back(stream: Stream, evictions: int, anchors: RopeAnchors) -> None:
    """The stream has not made so many evictions yet; it will."""
    before = anchors.reanchorings(stream.chain_evictions)
    stream.chain_evictions -= evictions
    stream.evictions -= evictions
    stream.evicted_from_chain -= evictions * stream.schedule.stride
    stream.evicted -= evictions * stream.schedule.stride
    stream.reanchorings += anchors.reanchorings(stream.chain_evictions) - before
    stream.repeats = evictions > 0
