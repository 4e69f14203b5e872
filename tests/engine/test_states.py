"""Recurrent states in the prefix cache, on the real scheduler without a model: a stream that is
resumed goes on from the state after exactly its tokens, evicted ones too, which
``tests.support.page_content`` compares at every step."""

from dataclasses import replace

import pytest
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_group_id

from sink_vllm.engine.admission import Verdict
from sink_vllm.policy.schedule import Schedule, cdiv
from tests.support.scheduler_only import Core, Settings, check_integrity

pytestmark = pytest.mark.engine

SIZE = 4
SCHEDULE = Schedule(sink_tokens=3, window=9, stride=4)
SETTINGS = Settings(schedule=SCHEDULE, block_size=SIZE, recurrent=2, spare_pages=60)
STREAM_PAGES = cdiv(SCHEDULE.capacity, SIZE) + cdiv(SCHEDULE.sink_tokens, SIZE) + 2
LONG = list(range(100, 150))


def run(core: Core) -> None:
    while core.scheduler.requests:
        core.outputs()
        check_integrity(core)
    assert core.pool.get_num_free_blocks() == core.num_pages


def ask(core: Core, name: str, tokens: list[int], new: int) -> tuple[int, list[int]]:
    """Send a request, and run everything; returns how many of its tokens were cached, and the
    tokens of the conversation."""
    if tokens:  # else it has been sent
        core.send(name, tokens, new)
    answer: list[int] = []
    cached = 0
    while core.scheduler.requests:
        for output in core.outputs():
            if output.request_id == name:
                answer += output.new_token_ids
                if output.prefill_stats is not None:
                    cached = output.prefill_stats.num_cached_tokens
        check_integrity(core)
    assert len(answer) == new
    return cached, tokens + answer


def group_of(block: KVCacheBlock) -> int | None:
    """The KV cache group of a page in the prefix cache."""
    return None if block.block_hash is None else get_group_id(block.block_hash)


def cached_states(core: Core) -> int:
    """Pages of states in the prefix cache."""
    groups = core.scheduler.recycler.tables.state_groups
    return sum(group_of(block) in groups for block in core.pool.blocks)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("budget", [3, 10, 1024])
def test_a_conversation_goes_on_from_its_last_full_page(
    asynchronous: bool, v2: bool, budget: int
) -> None:
    """Whatever the chunks: the token sampled last was never computed, and the state after the one
    before it was not kept, with which nothing went on."""
    settings = replace(SETTINGS, asynchronous=asynchronous, v2=v2, budget=budget, max_seqs=2)
    core = Core(settings)
    _, tokens = ask(core, "a", LONG, 21)
    for turn in range(3):
        before = core.model.content.copied
        core.send("other", range(7), 5)  # beside it
        cached, after = ask(core, f"turn {turn}", [*tokens, 1, 2], 13)

        evicted = core.scheduler.recycler.config.schedule.evicted
        boundary = (len(tokens) - 2) // SIZE * SIZE
        assert boundary > SCHEDULE.capacity
        assert cached == boundary
        assert evicted(boundary) > 20
        assert core.model.content.copied == before + 1 + bool(turn)  # and "other" from its page
        tokens = after
    assert core.pool.get_num_free_blocks() == core.num_pages


@pytest.mark.parametrize("asynchronous", [False, True])
def test_below_the_capacity_too(asynchronous: bool) -> None:
    """The last full page of a prompt is the end of a chunk, and that of an answer of a step."""
    core = Core(replace(SETTINGS, asynchronous=asynchronous))
    first, tokens = ask(core, "first", LONG[:6], 1)
    same, _ = ask(core, "same", LONG[:6], 1)
    longer, tokens = ask(core, "longer", LONG[:6], 6)
    after, _ = ask(core, "after", tokens, 1)

    assert [first, same, longer, after] == [0, 4, 4, 8]
    assert core.model.content.copied == 3


def test_many_go_on_from_one_state() -> None:
    """Each from a copy of its own, in one step."""
    core = Core(SETTINGS)
    _, tokens = ask(core, "a", LONG, 9)
    for name in "bcd":
        core.send(name, [*tokens, ord(name)], 20)
    core.outputs()
    tables = core.scheduler.recycler.tables
    pages = {state.page_of(name).block_id for state in tables.recurrent for name in "bcd"}
    run(core)

    assert len(pages) == 6
    assert core.model.content.copied == 3


def test_a_stream_that_needs_the_pool_gives_up_what_it_goes_on_from() -> None:
    """No page is left for a copy: it writes to the cached state, which is none any more."""
    fewest = Core(replace(SETTINGS, spare_pages=0)).num_pages
    core = Core(replace(SETTINGS, spare_pages=STREAM_PAGES - fewest))
    assert core.num_pages == STREAM_PAGES
    _, tokens = ask(core, "a", LONG[:6], 4)
    tables = core.scheduler.recycler.tables
    copies = {block.block_id for block in core.pool.blocks if group_of(block) in (0, 1)}
    core.send("b", tokens, 30)
    (first,) = core.outputs()
    own = {state.page_of("b").block_id for state in tables.recurrent}
    run(core)

    assert first.prefill_stats is not None
    assert first.prefill_stats.num_cached_tokens == 8
    assert own <= copies
    assert core.model.content.copied == 1


def test_states_of_an_endless_stream_are_a_part_of_the_cache() -> None:
    """Its latest states stay, older ones count as dropped: other conversations keep theirs."""
    core = Core(replace(SETTINGS, spare_pages=40))
    _, tokens = ask(core, "a conversation", LONG, 9)
    core.send("endless", range(5), 600)
    run(core)

    again, _ = ask(core, "again", tokens, 1)
    assert again == (len(tokens) - 1) // SIZE * SIZE
    assert 10 < cached_states(core) <= core.pool.num_gpu_blocks // 2 + 10


def test_without_prefix_caching_nothing_is_copied() -> None:
    core = Core(replace(SETTINGS, caching=False))
    _, tokens = ask(core, "a", LONG, 9)
    again, _ = ask(core, "again", tokens, 1)

    assert again == 0
    assert not core.model.content.copied
    assert not cached_states(core)


@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_boundary_needs_states_of_all_groups_and_pages(group: int) -> None:
    """Who has lost one of them goes on from an earlier boundary that has them all."""
    core = Core(SETTINGS)
    _, tokens = ask(core, "a", LONG, 9)
    before, _ = ask(core, "before", tokens, 1)
    core.send("looked up", tokens, 1)
    hashes = core.scheduler.recycler.streams["looked up"].prompt_hashes
    (lost,) = core.pool.get_cached_block(hashes[before // SIZE - 1], [group])
    core.pool.evict_blocks({lost.block_id})
    after, _ = ask(core, "looked up", [], 1)

    assert SCHEDULE.capacity < after < before


def test_who_gives_way_loses_no_state_where_there_is_a_choice() -> None:
    """Under priorities a full stream takes the pages of a less important holder. Of two, it is not
    the one whose states know of evicted tokens, though it came last."""
    settings = replace(SETTINGS, policy="priority", spare_pages=STREAM_PAGES + 6)
    core = Core(settings)
    core.send("young", range(3), 60, priority=5, resumable=True)
    core.outputs()
    core.send("old", LONG, 200, priority=5)
    streams = core.scheduler.recycler.streams
    while not streams["old"].evictions:
        core.outputs()
    assert not streams["young"].evictions
    admission = core.scheduler.admission
    assert admission.loses_state("old")

    request = core.scheduler.requests["old"]
    asking = core.send("asking", LONG, 200, priority=0)
    gives_way = admission.who_gives_way(asking, Verdict.NO_PAGES)

    assert gives_way.request_id == "young"
    assert request.request_id != gives_way.request_id
