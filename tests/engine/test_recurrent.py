"""Recurrent layers on the real scheduler, without a model: a stream has one page for its state, for
ever, and only its own tokens are in it (``tests.support.page_content``)."""

from dataclasses import replace

import pytest

from sink_vllm.policy.report import KEY
from sink_vllm.policy.schedule import Schedule, cdiv
from tests.support.scheduler_only import Core, Settings, check_integrity, made_up

pytestmark = pytest.mark.engine

SCHEDULE = Schedule(sink_tokens=3, window=9, stride=4)
SETTINGS = Settings(schedule=SCHEDULE, block_size=4, recurrent=3, spare_pages=20)
STREAM_PAGES = cdiv(SCHEDULE.capacity, 4) + cdiv(SCHEDULE.sink_tokens, 4)


def tables_of(core: Core, request_id: str) -> list[list[int]]:
    return [[block.block_id for block in one.req_to_blocks[request_id]] for one in core.managers]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_table_of_a_state_never_moves(asynchronous: bool) -> None:
    core = Core(replace(SETTINGS, asynchronous=asynchronous))
    tables = core.scheduler.recycler.tables
    assert tables.pages_per_stream == STREAM_PAGES + 3
    core.send("a", range(40), 60)

    seen = []
    while core.scheduler.requests:
        core.outputs()
        check_integrity(core)
        if "a" in core.scheduler.requests:
            seen.append(tables_of(core, "a")[:3])
            assert core.scheduler.ledger.held("a") <= tables.pages_per_stream

    assert len(seen) > 50
    assert all(one == seen[1] for one in seen[1:])
    assert [len(table) for table in seen[1]] == [1, 1, 1]
    assert core.pool.get_num_free_blocks() == core.num_pages


def test_as_many_streams_run_as_the_start_says_fit() -> None:
    """States are counted where pages are promised: two streams fit, and the third waits."""
    per_stream = STREAM_PAGES + 3
    fewest = Core(replace(SETTINGS, spare_pages=0)).num_pages
    assert fewest >= per_stream
    core = Core(replace(SETTINGS, spare_pages=2 * per_stream + 2 - fewest))
    for name in "abc":
        core.send(name, range(40), 20)

    most = 0
    while core.scheduler.requests:
        core.outputs()
        most = max(most, len(core.scheduler.running))
        assert not any(one.num_preemptions for one in core.scheduler.requests.values())

    assert most == 2


def test_short_requests_have_a_state_too() -> None:
    tables = Core(SETTINGS).scheduler.recycler.tables

    assert tables.pages_of(SCHEDULE, 1) == 1 + 3
    assert tables.pages_of(SCHEDULE, SCHEDULE.capacity) == cdiv(SCHEDULE.capacity, 4) + 3
    assert tables.pages_after(0, 5) == 2 + 3
    assert tables.longest_chunk(0, 0, 12, 2 + 3) == 8


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("v2", [False, True])
def test_a_turn_that_is_stopped_leaves_no_token_in_the_state(
    asynchronous: bool, caching: bool, v2: bool
) -> None:
    """With asynchronous scheduling the next token is computed before the stop token is known. Keys
    of it are overwritten; a state would keep it, so the stream goes on from one before, which the
    prefix cache has. Without, it is computed again from the survivors, and says so."""
    core = Core(replace(SETTINGS, asynchronous=asynchronous, caching=caching, v2=v2))
    stop = made_up("s", 30)
    core.send("s", range(10), 50, resumable=True, stop=[stop])
    report: dict[str, int] = {}

    for turn in range(3):
        for _ in range(80):
            for output in core.outputs():
                report = (output.kv_transfer_params or {}).get(KEY, report)
        core.send("s", range(20), 5, resumable=turn < 2, stop=[stop])
    for _ in range(40):
        core.outputs()

    assert not core.scheduler.requests
    assert report["evictions"] >= 5
    assert ("rebuilds" in report) == (asynchronous and not caching)
    assert bool(core.model.content.copied) == (asynchronous and caching)
