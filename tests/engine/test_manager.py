"""The block manager against vLLM's real block pool, with the content of every page tracked.

The model of a page is a list of ``(stream position, rope position)`` per slot. Computing a token
writes one slot, a page move copies slots and adds its delta to the rope positions. What must hold
after every step is then the definition of the method: cache slot ``i`` of a stream holds the
``i``-th cached stream position, rotated to cache position plus rope offset.
"""

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.request import Request

from sink_vllm.compat.spec import StreamingLLMSpec
from sink_vllm.engine import stream
from sink_vllm.engine.ahead import composable_at
from sink_vllm.engine.ledger import IntegrityError
from sink_vllm.engine.managers.streaming import StreamingLLMManager
from sink_vllm.engine.recycler import Recycler
from sink_vllm.engine.tables import PageTables
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.plan import PageMove
from sink_vllm.policy.schedule import Schedule, cdiv, pages_per_stream

BLOCK = 4
Slot = tuple[int, int]
"""Stream position and rope position of the key in a slot."""


@pytest.fixture(autouse=True, scope="module")
def _hash_seed() -> None:
    init_none_hash(sha256)


@dataclass
class Pool:
    """A manager over a real block pool, and the content of its pages."""

    schedule: Schedule
    num_blocks: int
    caching: bool = True
    rows: int = 10_000
    spare: int = 0
    """Pages that may be spent in a step on keeping cached pages: nobody else needs them."""
    content: dict[int, list[Slot | None]] = field(default_factory=dict)
    evictions: int = 0
    reanchorings: int = 0

    def __post_init__(self) -> None:
        self.blocks = BlockPool(self.num_blocks, self.caching, BLOCK)
        s = self.schedule
        spec = StreamingLLMSpec(
            block_size=BLOCK,
            num_kv_heads=1,
            head_size=8,
            dtype=torch.float32,
            sink_tokens=s.sink_tokens,
            window=s.window,
            stride=s.stride,
            rope_rows=self.rows,
        )
        self.manager = StreamingLLMManager(
            spec,
            block_pool=self.blocks,
            enable_caching=self.caching,
            kv_cache_group_id=0,
            scheduler_block_size=BLOCK,
        )
        self.tables = PageTables([self.manager])
        self.ledger = self.tables.ledger
        self.recycler = Recycler(
            SinkConfig(schedule=s, block_size=BLOCK),
            self.tables,
            sha256 if self.caching else None,
        )

    def table(self, rid: str) -> list[int]:
        return [block.block_id for block in self.manager.req_to_blocks[rid]]

    def apply(self, moves: list[PageMove]) -> None:
        """All moves read before any of them writes; no slot is written twice."""
        read = [self.content[m.src][m.begin : m.end] for m in moves]
        written: set[tuple[int, int]] = set()
        for move, slots in zip(moves, read, strict=True):
            page = self.content.setdefault(move.dst, [None] * BLOCK)
            for slot, value in zip(range(move.begin, move.end), slots, strict=True):
                assert (move.dst, slot) not in written
                written.add((move.dst, slot))
                page[slot] = None if value is None else (value[0], value[1] + move.delta)

    def check_hashed_pages(self) -> None:
        """A page that can be found by hash is a whole page of a stream, rotated as one piece, and
        before the capacity an ordinary page of an ordinary prompt."""
        span = self.manager.anchors.span
        for block in self.blocks.blocks:
            if block.block_hash is not None:
                slots = self.content[block.block_id]
                assert slots[0] is not None
                first, rope = slots[0]
                assert first % BLOCK == 0
                assert slots == [(first + i, rope + i) for i in range(BLOCK)]
                cycle = self.manager.anchors.reanchorings(self.schedule.evictions(first + BLOCK))
                assert rope == first - cycle * span

    def pinned(self, rid: str) -> list[int]:
        return [block.block_id for block in self.ledger.pinned(0, rid) or ()]

    @property
    def num_free(self) -> int:
        return self.blocks.get_num_free_blocks()


class Run:
    """One stream driven step by step, as the scheduler does it."""

    ahead = 0
    """Evictions whose head page had been composed before."""
    rotated = 0
    """Evictions for which pages of the window had been rotated before."""

    def __init__(self, pool: Pool, rid: str, tokens: list[int], hits: bool = False) -> None:
        self.pool = pool
        self.rid = rid
        # A prompt short enough to be seen at once; what follows comes in as outputs.
        self.tokens = tokens
        self.request = Request(rid, list(tokens), SamplingParams(max_tokens=10**9), None)
        self.stream = pool.recycler.prepare(self.request)
        pool.recycler.open(self.request, self.stream)
        self.computed = 0
        if hits and self.stream.prompt is not None:
            pool.ledger.begin()
            pool.ledger.spare = pool.spare
            found = pool.recycler.look_up(self.request)
            self.resumed = found is not None
            if found is not None:
                before = pool.num_free
                takes = pool.tables.pages_to_resume(self.stream.schedule, found)
                cached = pool.recycler.show_resumed(self.request, found)
                assert pool.num_free == before
                self.request.num_computed_tokens = cached
                pool.recycler.resume(self.request, found)
                spent = pool.spare - pool.ledger.spare
                assert pool.num_free == before - takes - spent
                self.computed = cached + self.stream.evicted
                self.settle()
            pool.recycler.started(self.request, resumed=self.resumed)
        elif hits:
            (hit,), length = pool.manager.find_longest_cache_hit(
                self.request.block_hashes, len(tokens) - 1, [0], pool.blocks,
                pool.manager.spec, False, BLOCK,
            )  # fmt: skip
            length = min(length, (pool.schedule.capacity - 1) // BLOCK * BLOCK)
            pool.manager.add_local_computed_blocks(rid, hit[: length // BLOCK], length, 0)
            self.request.num_computed_tokens = self.computed = length

    @property
    def offset(self) -> int:
        return self.pool.manager.anchors.offset(self.stream.chain_evictions)

    def settle(self) -> None:
        """Run the page moves of the step; the pages they read from stay pinned until then."""
        before = self.pool.num_free
        self.pool.apply(self.pool.ledger.take_moves())
        self.pool.ledger.release()
        self.pool.ledger.check_integrity()
        assert self.pool.num_free >= before

    def evict(self) -> bool:
        pool = self.pool
        pool.ledger.spare = pool.spare
        ahead = len(pool.ledger.ahead.pages) if self.rid in pool.ledger.ahead else 0
        self.ahead += bool(ahead)
        self.rotated += ahead > 1
        if not pool.recycler.evict(self.request):
            return False
        pool.evictions, pool.reanchorings = (
            pool.evictions + 1,
            pool.reanchorings + bool(self.stream.chain_evictions and not self.offset),
        )
        self.settle()
        return True

    def compose_ahead(self, after: int, spare: int) -> None:
        """Compose pages ahead, two at a time and ``spare`` at most, when ``after`` tokens more than
        necessary are cached."""
        request, ahead = self.request, self.pool.ledger.ahead
        at = min(self.stream.composable_at + after, self.stream.capacity - 1)
        if not self.stream.composable_at <= at <= request.num_computed_tokens:
            return
        if self.rid not in ahead.done and request.num_computed_tokens < self.stream.capacity:
            self.pool.recycler.compose_ahead(request, min(spare - len(ahead), 2))
            self.settle()

    def step(self) -> bool:
        """Compute one token, evicting first if the cache is full; False without pages."""
        pool, request = self.pool, self.request
        if pool.recycler.is_full(request) and not self.evict():
            return False
        position = request.num_computed_tokens
        need = cdiv(position + 1, BLOCK) - len(pool.manager.req_to_blocks[self.rid])
        if need > pool.num_free:
            return False
        for block in pool.manager.allocate_new_blocks(self.rid, position + 1, position + 1):
            pool.content[block.block_id] = [None] * BLOCK
        page = pool.content[pool.table(self.rid)[position // BLOCK]]
        page[position % BLOCK] = (self.computed, position + self.offset)
        request.num_computed_tokens += 1
        self.computed += 1
        if request.num_tokens == request.num_computed_tokens and not self.stream.pending:
            request.append_output_token_ids(self.computed)
        if pool.caching:
            pool.manager.cache_blocks(request, request.num_computed_tokens, replay_boundaries=())
        return True

    def check(self) -> None:
        """The cache holds exactly what the schedule says, rotated to where it is seen."""
        pool = self.pool
        wanted = pool.schedule.cached_positions(self.computed)
        slots = list(itertools.chain(*(pool.content[b] for b in pool.table(self.rid))))
        assert slots[: len(wanted)] == [(p, i + self.offset) for i, p in enumerate(wanted)]

    def end(self) -> None:
        self.pool.manager.free(self.rid)


GRID = [
    (sinks, window, strides * BLOCK)
    for sinks in (0, 1, 3, 4, 5, 8, 9)
    for window in (1, 3, 4, 6, 13)
    for strides in (1, 2, 3)
]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(("sinks", "window", "stride"), GRID)
def test_cache_content_follows_the_schedule(
    sinks: int, window: int, stride: int, caching: bool
) -> None:
    """Twenty evictions and several re-anchorings in the smallest pool that fits one stream."""
    schedule = Schedule(sink_tokens=sinks, window=window, stride=stride)
    pages = pages_per_stream(schedule, BLOCK)
    pool = Pool(schedule, pages + 1, caching, rows=schedule.capacity + 3 * stride)
    run = Run(pool, "a", list(range(5)))
    for _ in range(schedule.capacity + 20 * stride):
        assert run.step()
        run.check()
        pool.check_hashed_pages()
    assert pool.evictions == 20
    assert pool.reanchorings >= 4
    held = len(pool.table("a")) + len(pool.pinned("a"))
    assert held <= pages
    assert pool.num_free + held == pages
    run.end()
    assert pool.num_free == pages
    pool.ledger.check_idle()


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(("sinks", "window", "stride"), GRID)
def test_heads_composed_ahead_are_what_evictions_compose(
    sinks: int, window: int, stride: int, caching: bool
) -> None:
    """At once, late, and taken back now and then, with some pages more than a stream needs."""
    schedule = Schedule(sink_tokens=sinks, window=window, stride=stride)
    pages = pages_per_stream(schedule, BLOCK) + 3
    pool = Pool(schedule, pages + 1, caching, rows=schedule.capacity + 3 * stride)
    run = Run(pool, "a", list(range(5)))
    for step in range(schedule.capacity + 20 * stride):
        run.compose_ahead(after=step // 7 % 5, spare=3)
        if step % 17 == 0:
            pool.recycler.give_back_ahead()
        assert run.step()
        run.check()
        pool.check_hashed_pages()
    assert pool.evictions == 20
    assert pool.reanchorings >= 4
    if 0 < sinks <= BLOCK and composable_at(schedule, BLOCK) < schedule.capacity:
        assert run.ahead >= 3
        if composable_at(schedule, BLOCK) + 3 < schedule.capacity and window == 13:
            assert run.rotated
    else:
        assert not run.ahead
    run.end()
    assert pool.num_free == pages
    pool.ledger.check_idle()


def test_a_stream_that_ends_gives_back_what_it_composed_ahead() -> None:
    schedule = Schedule(sink_tokens=3, window=13, stride=8)
    pool = Pool(schedule, 20)
    run = Run(pool, "a", list(range(5)))
    while not pool.ledger.ahead:
        run.compose_ahead(after=0, spare=1)
        assert run.step()
    assert run.request.num_computed_tokens <= schedule.capacity
    run.end()
    pool.ledger.check_idle()


def test_streams_with_the_same_start_share_their_sink_pages() -> None:
    """Two streams over one prompt: hits, copies instead of rewrites, and one pinned page."""
    schedule = Schedule(sink_tokens=5, window=9, stride=8)
    pool = Pool(schedule, 60, rows=schedule.capacity + 24, spare=20)
    prompt = list(range(18))
    first = Run(pool, "a", prompt)
    while first.computed < 18:
        assert first.step()
    second = Run(pool, "b", prompt, hits=True)
    assert second.computed == 16
    while second.computed < 200:
        for run in (first, second):
            assert run.step()
            run.check()
        pool.check_hashed_pages()
    assert pool.evictions > 40
    assert pool.reanchorings >= 2
    pinned = [pool.pinned(r) for r in "ab"]
    assert pinned[0] == pinned[1]
    assert not set(pool.table("a")) & set(pool.table("b"))
    third = Run(pool, "c", prompt, hits=True)
    assert third.computed >= 8
    assert pool.table("c")[:2] == pinned[0]
    for run in (third, first, second):
        run.end()
    assert pool.num_free == 59


def test_shared_pages_without_room_to_copy_refuse_the_eviction() -> None:
    """With nothing free, a page that somebody else sees is left alone and nothing changes."""
    schedule = Schedule(sink_tokens=4, window=8, stride=4)
    pool = Pool(schedule, 30, rows=schedule.capacity)  # every eviction re-anchors
    prompt = list(range(16))
    first = Run(pool, "a", prompt)
    for _ in range(16):
        assert first.step()
    second = Run(pool, "b", prompt, hits=True)
    for _ in range(4):
        assert second.step()
    taken = pool.blocks.get_new_blocks(pool.num_free)
    before = pool.table("a")
    assert not first.evict()
    assert pool.table("a") == before
    assert pool.num_free == 0
    assert pool.ledger.pinned(0, "a") is None
    pool.blocks.free_blocks(taken)
    assert first.step()
    first.check()
    assert pool.evictions == pool.reanchorings == 1


@pytest.mark.parametrize(("sinks", "window", "stride"), GRID)
@pytest.mark.parametrize("prompt_len", [37, 64, 90])
@pytest.mark.parametrize("spare", [0, 50])
def test_resume_is_what_streaming_leaves_behind(
    sinks: int, window: int, stride: int, prompt_len: int, spare: int
) -> None:
    """A prompt that was streamed before starts at a boundary near its end, from cached pages, with
    the very cache content that streaming it again would give, and goes on like it; with pages to
    spare on copies of the cached ones, or in the cached ones themselves."""
    schedule = Schedule(sink_tokens=sinks, window=window, stride=stride)
    pool = Pool(schedule, 120, rows=3 * schedule.capacity, spare=50)
    tokens = list(range(prompt_len))
    first = Run(pool, "a", tokens)
    while first.computed < prompt_len + 5:
        assert first.step()
    first.end()
    pool.spare = spare
    second = Run(pool, "b", tokens, hits=True)
    hasher = pool.recycler.hasher
    assert hasher is not None
    if prompt_len <= schedule.capacity + stride + BLOCK:
        return  # nothing past the capacity to resume from, or an ordinary hit
    assert second.resumed == hasher.survives_eviction(schedule)
    if second.resumed:
        assert prompt_len - second.computed <= 2 * stride + BLOCK
    while second.computed < prompt_len + 3 * stride:
        assert second.step()
        second.check()
        pool.check_hashed_pages()
    assert [
        second.tokens[p] for p in schedule.cached_positions(second.computed) if p < prompt_len
    ] == (second.request.prompt_token_ids)
    second.end()
    assert pool.num_free == 119


def test_resume_needs_the_same_tokens_salt_and_policy() -> None:
    """Pages up to the first other token are found, and none with another salt or policy."""
    schedule = Schedule(sink_tokens=5, window=11, stride=8)
    pool = Pool(schedule, 120, spare=50)
    tokens = list(range(80))
    first = Run(pool, "a", tokens)
    while first.computed < 80:
        assert first.step()
    first.end()
    hasher = pool.recycler.hasher
    assert hasher is not None

    def boundary(schedule: Schedule, tokens: list[int], salt: str | None) -> int | None:
        request = Request("x", tokens, SamplingParams(max_tokens=1), None, cache_salt=salt)
        other = Recycler(
            SinkConfig(schedule=schedule, block_size=BLOCK), pool.recycler.tables, sha256
        )
        assert other.hasher is not None
        hashes = other.hasher.hashes(request, schedule, tokens)
        pool.ledger.begin()
        least = schedule.capacity // BLOCK + 1
        found = pool.tables.find_resume(schedule, hashes, (len(tokens) - 1) // BLOCK, least)
        return None if found is None else found.end

    assert boundary(schedule, tokens, None) == 19
    assert boundary(schedule, [*tokens[:40], 999, *tokens[41:]], None) == 10
    assert boundary(schedule, [999, *tokens[1:]], None) is None
    assert boundary(schedule, tokens, "salt") is None
    assert boundary(Schedule(sink_tokens=5, window=7, stride=12), tokens, None) is None


@pytest.mark.parametrize("sinks", [4, 5])
def test_streams_in_lockstep_need_their_shares_and_no_page_more(sinks: int) -> None:
    """Streams that begin alike evict in one step, all from pages they share: the last one to ask
    changes the shared page itself, as all others have their copies planned."""
    schedule = Schedule(sink_tokens=sinks, window=8 - sinks % 4, stride=4)
    pages = pages_per_stream(schedule, BLOCK)
    pool = Pool(schedule, 4 * pages + 1, rows=schedule.capacity + 8)
    prompt = list(range(schedule.capacity))
    runs = [Run(pool, "a", prompt)]
    while runs[0].computed < len(prompt):
        assert runs[0].step()
    runs += [Run(pool, rid, prompt, hits=True) for rid in "bcd"]
    for run in runs[1:]:
        while run.computed < len(prompt):
            assert run.step()

    for _ in range(12):
        for run in runs:
            assert pool.recycler.is_full(run.request)
            assert pool.recycler.evict(run.request)
        runs[0].settle()
        for run in runs:
            while not pool.recycler.is_full(run.request):
                assert run.step()
            run.check()
    assert pool.num_free == 3 * len(pool.pinned("a"))  # the sink pages are one copy
    for run in runs:
        run.end()
    pool.ledger.check_idle()


def test_the_ledger_names_a_page_and_both_numbers() -> None:
    """Lost, owned twice, freed while owned: what the pool says and what the owners say."""
    schedule = Schedule(sink_tokens=4, window=8, stride=4)
    pool = Pool(schedule, 20)
    run = Run(pool, "a", list(range(9)))
    for _ in range(9):
        assert run.step()
    pool.ledger.check_integrity()
    (lost,) = pool.blocks.get_new_blocks(1)
    with pytest.raises(IntegrityError, match=f"page {lost.block_id}: 1 references, 0 owners"):
        pool.ledger.check_integrity()
    pool.blocks.free_blocks([lost])
    table = pool.manager.req_to_blocks["a"]
    table.append(table[0])
    with pytest.raises(IntegrityError, match=f"page {table[0].block_id}: 1 references, 2 owners"):
        pool.ledger.check_integrity()
    table.pop()
    with pytest.raises(IntegrityError, match=r"16 of 19 KV pages are free"):
        pool.ledger.check_idle()
    run.end()
    pool.ledger.check_idle()


def test_evictions_are_logged_once_in_a_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line per 1,000 evictions, however many streams make them."""
    logged: list[int] = []
    monkeypatch.setattr(stream.logger, "info", lambda _text, total, _open: logged.append(total))
    schedule = Schedule(sink_tokens=4, window=4, stride=4)
    run = Run(Pool(schedule, 20), "a", list(range(5)))

    while run.stream.evictions < 2500:
        assert run.step()

    assert logged == [1000, 2000]
