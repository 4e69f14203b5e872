"""Everybody gets on in situations that were once a hang, a livelock or a lost page.

On the real scheduler without a model; what random clients do to it is in ``test_episodes.py``.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from vllm.v1.core.sched.interface import PauseState

from sink_vllm.engine.ledger import IntegrityError
from sink_vllm.policy.schedule import Schedule, cdiv
from sink_vllm.policy.stats import GAUGES, StreamingLLMStats
from tests.support.judge import random_tokens
from tests.support.liveness import Client, Watch, run_many
from tests.support.scheduler_only import Core, Settings


def served(watch: Watch) -> None:
    """All answers are complete."""
    watch.run(lambda: watch.all_served)


def first_turn(watch: Watch, name: str, length: int, **keys: object) -> Client:
    """A conversation whose first turn is over."""
    client = watch.send(name, random_tokens(length, length), 25, **keys)  # type: ignore[arg-type]
    served(watch)
    return client


def resend(watch: Watch, client: Client, new: int = 20, **keys: object) -> Client:
    """The conversation again, with new tokens behind it."""
    tokens = client.tokens + random_tokens(new, 1)
    return watch.send(f"{client.name} again", tokens, 5, **(client.keys | keys))


ALIGNED = Settings(
    schedule=Schedule(sink_tokens=32, window=96, stride=32), block_size=32
)  # C = 160
USUAL = Settings(schedule=Schedule(sink_tokens=4, window=92, stride=32), block_size=32)  # C = 128


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_resent_turn_in_a_pool_of_one_stream(asynchronous: bool) -> None:
    """What it is resumed with must be enough for vLLM to admit it; nobody hangs behind it."""
    watch = Watch(replace(ALIGNED, asynchronous=asynchronous))
    assert watch.core.num_pages == 6
    first = first_turn(watch, "conversation", 600)

    again = resend(watch, first)
    watch.step()
    watch.send("fresh", random_tokens(10, 9), 5)
    served(watch)

    assert again.cached > again.schedule.capacity
    watch.finish()


def test_sink_tokens_of_ones_own_in_a_pool_of_that_stream() -> None:
    """One client's options must not stop everybody."""
    watch = Watch(replace(ALIGNED, spare_pages=2))
    assert watch.core.num_pages == 8
    first = first_turn(watch, "pinned", 600, options={"sink_tokens": 96})

    resend(watch, first, 40)
    watch.step()
    watch.send("fresh", random_tokens(10, 9), 5)

    watch.finish()


@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("who", ["session", "other", "everybody"])
def test_two_full_idle_sessions_with_a_common_beginning(who: str, spare: int) -> None:
    """Neither can evict, because it would write a page of the other."""
    watch = Watch(replace(USUAL, spare_pages=spare))
    common = random_tokens(96, 1)
    sessions = []
    for index in range(2):
        tokens = common + random_tokens(32, 2 + index)
        sessions.append(watch.send(f"session {index}", tokens, 1, session=True))
        served(watch)

    if who != "other":
        for session in sessions:
            watch.extend(session, random_tokens(10, 5), 3)
    if who != "session":
        watch.send("fresh", random_tokens(40, 9), 5)

    watch.finish()


def test_a_page_shared_with_an_idle_session() -> None:
    """A stream that cannot evict must not preempt itself and come back to the same page."""
    # C = 96: three pages, of which two are common and one of those is written at the eviction.
    settings = replace(USUAL, schedule=Schedule(sink_tokens=4, window=60, stride=32))
    watch = Watch(settings)
    tokens = random_tokens(96, 1)
    watch.send("session", tokens, 1, session=True)
    served(watch)

    watch.send("stream", tokens[:70] + random_tokens(20, 2), 200)
    watch.finish()

    assert watch.reach["preemptions"] <= 3


LOCKSTEP = [
    pytest.param(Schedule(sink_tokens=4, window=92, stride=32), None, id="four sinks"),
    pytest.param(Schedule(sink_tokens=32, window=64, stride=32), None, id="aligned"),
    pytest.param(Schedule(sink_tokens=40, window=56, stride=64), None, id="forty sinks"),
    pytest.param(Schedule(sink_tokens=4, window=92, stride=32), 160, id="anchored"),
]


@pytest.mark.parametrize("streams", [4, 8])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(("schedule", "rows"), LOCKSTEP)
def test_what_fits_fits_in_lockstep(
    schedule: Schedule, rows: int | None, asynchronous: bool, streams: int
) -> None:
    """Four streams fit, by the log: four evict in one step, or four of eight wait."""
    per_stream = cdiv(schedule.capacity, 32) + cdiv(schedule.sink_tokens, 32)
    settings = replace(
        USUAL,
        schedule=schedule,
        spare_pages=3 * per_stream,
        asynchronous=asynchronous,
        rope_rows=rows,
    )
    watch = Watch(settings)
    for index in range(streams):
        watch.send(f"stream {index}", random_tokens(20, index), 300)

    watch.finish()

    assert watch.reach["evictions"] >= 3 * streams
    assert watch.reach["preemptions"] == 0
    assert watch.scheduled <= watch.needed


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_reset_while_resumed_requests_wait(asynchronous: bool) -> None:
    """They hold pages, but run not yet: the reset is promised to succeed."""
    watch = Watch(replace(USUAL, spare_pages=40, budget=32, asynchronous=asynchronous))
    first = [first_turn(watch, f"conversation {i}", 600 + i) for i in range(3)]
    watch.send("hog", random_tokens(900, 7), 5)
    for _ in range(3):
        watch.step()
    again = [resend(watch, one) for one in first]
    watch.step()
    assert watch.core.scheduler.get_request_counts() == (1, 3)

    watch.reset(running=True)
    watch.finish()

    assert all(one.received == 5 for one in again)


@pytest.mark.parametrize("steps", [0, 3])
def test_structured_outputs_are_resumed(steps: int) -> None:
    """A grammar changes nothing in what is computed."""
    cached = []
    for grammar in (None, steps):
        watch = Watch(replace(USUAL, spare_pages=60))
        first = first_turn(watch, "conversation", 980)
        again = resend(watch, first, grammar=grammar)
        watch.finish()
        assert len(again.tokens) == 1030
        cached.append(again.cached)
    assert cached[0] == 992
    assert cached[1] == cached[0]


def test_a_resend_waits_for_pages_and_looks_again() -> None:
    """What is cached is not computed again because pages were short for a moment.

    Neighbours of one page each take the pages that were freed first, and end soon. What is found
    when they have gone must be found, too, by who came while they were there.
    """
    short = []
    for neighbours in range(13):
        later, earlier = (_resent_beside(neighbours, wait=wait) for wait in (True, False))
        if later > USUAL.schedule.capacity:
            short.append((neighbours, earlier))
    assert len(short) >= 8
    assert [one for one in short if one[1] <= USUAL.schedule.capacity] == []


def _resent_beside(neighbours: int, *, wait: bool) -> int:
    """Cached tokens of a conversation that is resent beside neighbours, or after them."""
    watch = Watch(replace(USUAL, spare_pages=8, max_seqs=32))
    first = first_turn(watch, "conversation", 300)
    for index in range(neighbours):
        watch.send(f"neighbour {index}", random_tokens(20, index), 8)
    watch.step()
    if wait:
        served(watch)
    again = resend(watch, first, 2)
    watch.finish()
    return again.cached


@pytest.mark.parametrize("blocked", ["LoRA", "grammar"])
def test_a_resend_behind_blocked_requests_is_looked_up(blocked: str) -> None:
    """vLLM passes over requests it cannot start, and admits deeper ones."""
    watch = Watch(replace(USUAL, spare_pages=60, max_seqs=3, max_loras=1))
    first = first_turn(watch, "conversation", 600)
    watch.send("running", random_tokens(20, 2), 100, lora=1)
    watch.step()
    for index in range(3):
        lora, grammar = (2, None) if blocked == "LoRA" else (0, 60)
        tokens = random_tokens(20, 3 + index)
        watch.send(f"blocked {index}", tokens, 5, lora=lora, grammar=grammar)

    again = resend(watch, first)
    watch.run(lambda: again.ended)

    assert again.cached > again.schedule.capacity
    watch.finish()


@pytest.mark.parametrize("pool", ["one stream", "two streams"])
def test_sessions_that_hold_still_do_not_stop_others(pool: str) -> None:
    """Idle sessions hold all pages of the pool; a fresh request comes."""
    watch = Watch(replace(USUAL, spare_pages=0 if pool == "one stream" else 5))
    for index in range(2):
        watch.send(f"session {index}", random_tokens(100, index), 40, session=True)
        served(watch)

    fresh = watch.send("fresh", random_tokens(120, 9), 50)
    watch.run(lambda: fresh.ended)

    for name in ("session 0", "session 1"):
        watch.extend(watch.clients[name], random_tokens(30, 4), 10)
    watch.finish()


def test_a_session_is_told_where_it_is_after_a_preemption() -> None:
    """Runner V2 samples at stream positions: the next input must bring them along."""
    watch = Watch(replace(USUAL, spare_pages=20, v2=True))
    session = watch.send("session", random_tokens(300, 1), 20, session=True)
    while session.received < 10:
        watch.step()
    watch.reset(running=True)
    served(watch)

    watch.extend(session, random_tokens(10, 2), 5)

    watch.finish()


def test_adapters_while_full_streams_drain() -> None:
    """A full stream skips a step before it evicts; its adapter still counts."""
    watch = Watch(replace(USUAL, spare_pages=60, asynchronous=True, max_loras=1))
    watch.send("one", random_tokens(120, 1), 60, lora=1)
    watch.step()
    watch.send("two", random_tokens(30, 2), 20, lora=2)
    watch.finish()


def test_equal_seeds_are_equal_episodes() -> None:
    """A failure can be repeated."""
    again: Sequence[Counter[str]] = [run_many(range(40))[0] for _ in range(2)]

    assert again[0] == again[1]


def test_a_leak_is_found() -> None:
    """The negative control: a page that nobody owns, and one that is freed under its owner."""
    for spoil in (_lose_a_page, _free_a_held_page):
        watch = Watch(USUAL)
        watch.send("stream", random_tokens(40, 1), 20)
        watch.step()
        spoil(watch.core)
        with pytest.raises(IntegrityError, match="page"):
            watch.step()


def test_a_page_with_other_tokens_is_found() -> None:
    """The negative control of the worker's check: a held page changes behind its owner's back."""
    watch = Watch(USUAL)
    watch.send("stream", random_tokens(40, 1), 20)
    watch.step()
    for page in watch.core.model.content.pages.values():
        page[3] = -1

    with pytest.raises(AssertionError, match="its cache holds"):
        watch.step()


def _lose_a_page(core: Core) -> None:
    core.pool.get_new_blocks(1)


def _free_a_held_page(core: Core) -> None:
    table = core.managers[0].req_to_blocks["stream"]
    core.pool.free_blocks(table[:1])


def counted_stats(watch: Watch) -> Counter[str]:
    """What the scheduler reports from now on: prefix-cache counters, and the last gauges."""
    seen: Counter[str] = Counter()
    make_stats = watch.core.scheduler.make_stats

    def counting(*args: Any, **kwargs: Any) -> Any:
        stats = make_stats(*args, **kwargs)
        ours = StreamingLLMStats.take(stats)
        seen["queries"] += stats.prefix_cache_stats.queries
        seen["hits"] += stats.prefix_cache_stats.hits
        seen["resumed"] += ours.resumed
        for gauge in GAUGES:
            seen[gauge] = getattr(ours, gauge)
        return stats

    watch.core.scheduler.make_stats = counting
    return seen


def test_resumed_tokens_count_in_the_prefix_cache_metrics() -> None:
    """Whole prompts, as in stock vLLM, although the engine sees a part of them at a time."""
    watch = Watch(replace(USUAL, spare_pages=60, log_stats=True))
    seen = counted_stats(watch)

    first = first_turn(watch, "conversation", 600)
    assert (seen["queries"], seen["hits"], seen["resumed"]) == (600, 0, 0)
    again = resend(watch, first)
    served(watch)

    assert again.cached > again.schedule.capacity
    assert seen["queries"] == 600 + 625 + 20
    assert (seen["hits"], seen["resumed"]) == (again.cached, 1)


def test_an_operator_sees_who_waits_for_pages() -> None:
    """A pool for one stream, and two that want it."""
    watch = Watch(replace(USUAL, log_stats=True))
    seen = counted_stats(watch)
    for index in range(2):
        watch.send(f"stream {index}", random_tokens(20, index), 200)
    for _ in range(5):
        watch.step()
    assert (seen["residents"], seen["waiting_for_pages"]) == (1, 1)
    watch.finish()
    assert not any(seen[gauge] for gauge in GAUGES)


def test_a_pause_waits_for_what_runs_beside_parked_sessions() -> None:
    """vLLM counts what is unfinished; sessions that gave up their pages must not hide others."""
    watch = Watch(replace(USUAL, spare_pages=1))
    session = watch.send("session", random_tokens(100, 1), 5, session=True)
    served(watch)
    stream = watch.send("stream", random_tokens(600, 2), 50)
    while not stream.received:
        watch.step()
    assert session.name in watch.core.scheduler._parked

    watch.core.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    assert watch.core.scheduler.get_num_unfinished_requests() == 1
    served(watch)
    assert watch.core.scheduler.get_num_unfinished_requests() == 0

    watch.core.scheduler.set_pause_state(PauseState.UNPAUSED)
    watch.extend(session, random_tokens(10, 3), 5)
    watch.finish()
