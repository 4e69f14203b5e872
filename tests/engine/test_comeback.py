"""Streams that lost their pages after evictions find them again, on the real scheduler without a
model: as long as the prefix cache has them, nothing is computed from survivors."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from sink_vllm.policy.report import KEY
from sink_vllm.policy.schedule import Schedule, cdiv
from tests.support.scheduler_only import Core, Settings, check_integrity

pytestmark = pytest.mark.engine

SIZE = 4
BETWEEN = Schedule(sink_tokens=3, window=10, stride=4)
"""Evictions in the middle of a page: a stream cannot go on at one."""
SCHEDULES = [
    Schedule(sink_tokens=3, window=9, stride=4),
    Schedule(sink_tokens=4, window=8, stride=8),
    Schedule(sink_tokens=0, window=12, stride=4),
    Schedule(sink_tokens=6, window=10, stride=8),
]


class Talk:
    """A session, and its account as its client has it."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.report: dict[str, int] = {}
        self._turns = 0

    def turn(self, tokens: Sequence[int], answer: int) -> None:
        """The next input, and all of the answer to it."""
        self.core.send("talk", tokens, answer, resumable=True)
        self._turns += 1
        made = 0
        while made < answer:
            for output in self.core.outputs():
                check_integrity(self.core)
                self.report = (output.kv_transfer_params or {}).get(KEY, self.report)
                made += len(output.new_token_ids) * (output.request_id == "talk")
        while self.core.in_flight:
            self.core.outputs()

    @property
    def holds_pages(self) -> bool:
        return self.core.scheduler.ledger.held("talk") > 0

    def end(self) -> None:
        self.core.send("talk", [0], 1)
        while self.core.scheduler.requests:
            self.core.outputs()
        assert self.core.pool.get_num_free_blocks() == self.core.num_pages


def started(schedule: Schedule, recurrent: int, evictions: int = 2, **settings: Any) -> Talk:
    """A session that has evicted and waits, in a pool a page too small for two streams."""
    fixed = Settings(schedule=schedule, block_size=SIZE, recurrent=recurrent, **settings)
    share = cdiv(schedule.capacity, SIZE) + cdiv(schedule.sink_tokens, SIZE) + recurrent
    fewest = Core(fixed).num_pages
    core = Core(replace(fixed, spare_pages=max(2 * share - 1 - fewest, 0)))
    assert core.num_pages < 2 * share
    talk = Talk(core)
    talk.turn(range(schedule.capacity), evictions * schedule.stride)
    assert talk.report["evictions"] == evictions
    assert talk.holds_pages
    return talk


def take_pages(talk: Talk, tokens: int) -> None:
    """Somebody comes who may become long, waits for the pages of the session, and hangs up when
    he has got so many tokens."""
    core = talk.core
    core.send("other", [7, 7], 1000)
    made = 0
    while made < tokens:
        made += sum(len(one.new_token_ids) for one in core.outputs())
        check_integrity(core)
    assert not talk.holds_pages
    core.scheduler.finish_requests(["other"], RequestStatus.FINISHED_ABORTED)
    while core.in_flight:
        core.outputs()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("recurrent", [0, 2])
@pytest.mark.parametrize("evictions", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_session_that_gave_its_pages_up_finds_them(
    schedule: Schedule, evictions: int, recurrent: int, v2: bool, asynchronous: bool
) -> None:
    """Again and again; ``tests.support.page_content`` compares pages and states at every step."""
    talk = started(schedule, recurrent, evictions, v2=v2, asynchronous=asynchronous)
    for turn in range(3):
        before = talk.report["evictions"]
        take_pages(talk, 1)
        talk.turn(range(turn, turn + schedule.stride), schedule.stride)

        assert talk.report["evictions"] > before
        assert "rebuilds" not in talk.report
    talk.end()


def test_pages_that_others_have_taken_are_missed() -> None:
    """And the account says so."""
    talk = started(SCHEDULES[0], 2)
    take_pages(talk, 3 * SCHEDULES[0].capacity)
    talk.turn(range(4), 4)

    assert talk.report["rebuilds"] == 1
    talk.end()


@pytest.mark.parametrize("recurrent", [0, 2])
def test_without_a_prefix_cache_nothing_is_found(recurrent: int) -> None:
    talk = started(SCHEDULES[0], recurrent, caching=False)
    take_pages(talk, 1)
    talk.turn(range(4), 4)

    assert talk.report["rebuilds"] == 1
    talk.end()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("new", range(1, 5))
@pytest.mark.parametrize("then", [2, 30])
def test_a_session_makes_its_last_eviction_again(
    new: int, then: int, v2: bool, asynchronous: bool
) -> None:
    """Before the end of the first page after it there is no boundary that has seen it, where pages
    do not end at evictions."""
    capacity = BETWEEN.capacity
    talk = started(BETWEEN, 2, v2=v2, asynchronous=asynchronous)
    core = talk.core
    request = core.scheduler.requests["talk"]
    # Up to an eviction, and `new` tokens more that are computed.
    talk.turn([1], capacity - request.num_computed_tokens + new)
    assert request.num_computed_tokens == capacity - BETWEEN.stride + new
    counted, stream = core.scheduler.recycler.account.stats, core.scheduler.recycler.streams["talk"]
    copied, position = core.model.content.copied, stream.evicted + request.num_computed_tokens
    evictions = stream.evictions
    before = counted.evictions
    take_pages(talk, 1)
    talk.turn(range(then), 9)

    assert core.model.content.copied == copied + 1
    assert not stream.rebuilds
    assert stream.evicted + request.num_computed_tokens == position + then + 8
    assert stream.evictions == BETWEEN.evictions(position + then + 8) > evictions
    assert counted.evictions - before == stream.evictions - evictions
    talk.end()
