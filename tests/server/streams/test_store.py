"""The streams a server remembers: number, tokens and time are bounded; use decides who goes."""

import sys

import pytest

from sink_vllm.policy.schedule import Schedule
from sink_vllm.server.streams.store import BusyStream, NoRoom, StreamStore, TooLarge, UnknownStream
from sink_vllm.server.streams.stored import TOKEN_BYTES, StoredStream, Waiting

SCHEDULE = Schedule(sink_tokens=4, window=92, stride=32)


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def store(clock: _Clock) -> StreamStore:
    return StreamStore(most_streams=3, most_tokens=100, idle_seconds=60, clock=clock)


def _create(store: StreamStore, tokens: int = 0, client: str = "a") -> StoredStream:
    return store.create(client, "m", SCHEDULE, {}, tokens=[1] * tokens)


def _known(store: StreamStore, stream: StoredStream) -> bool:
    try:
        store.get(stream.id)
    except UnknownStream:
        return False
    return True


def _expires_in(store: StreamStore, stream: StoredStream) -> float:
    return stream.expires(store.limits.idle_seconds) - store.clock()


def _use(store: StreamStore, stream: StoredStream, tokens: int = 0) -> None:
    assert store.acquire(stream.id) is stream
    stream.tokens.extend([1] * tokens)
    store.release(stream)


def test_ids_cannot_be_guessed(store: StreamStore) -> None:
    ids = {_create(store).id for _ in range(3)}

    assert len(ids) == 3
    assert all(len(stream_id) == len("stream-") + 32 for stream_id in ids)


def test_least_recently_used_goes_first(store: StreamStore) -> None:
    one, two, three = (_create(store) for _ in range(3))
    _use(store, one)
    store.get(two.id)  # looking is no use

    four = _create(store)

    assert [_known(store, s) for s in (one, two, three, four)] == [True, False, True, True]


def test_streams_in_use_stay(store: StreamStore) -> None:
    streams = [_create(store) for _ in range(3)]
    for stream in streams[:2]:
        store.acquire(stream.id)

    newest = _create(store)
    assert [_known(store, s) for s in streams] == [True, True, False]
    store.acquire(newest.id)
    with pytest.raises(NoRoom):
        _create(store)
    assert (len(store), store.in_use) == (3, 3)


def test_one_at_a_time(store: StreamStore) -> None:
    stream = _create(store)
    store.acquire(stream.id)

    with pytest.raises(BusyStream):
        store.acquire(stream.id)
    with pytest.raises(BusyStream):
        store.remove(stream.id)
    store.release(stream)
    store.remove(stream.id)
    for call in (store.get, store.acquire, store.remove):
        with pytest.raises(UnknownStream):
            call(stream.id)


def test_idle_streams_are_forgotten(store: StreamStore, clock: _Clock) -> None:
    idle, used, busy = (_create(store) for _ in range(3))
    clock.now += 50
    _use(store, used)
    store.acquire(busy.id)
    clock.now += 10

    assert [_known(store, s) for s in (idle, used, busy)] == [False, True, True]
    assert _expires_in(store, used) == 50
    clock.now += 1000
    assert [_known(store, s) for s in (used, busy)] == [False, True]
    store.release(busy)
    assert _known(store, busy)


def test_tokens_of_all_streams_are_bounded(store: StreamStore) -> None:
    one, two = _create(store, 40), _create(store, 40)
    assert store.tokens == 80

    _use(store, one, 30)

    assert (_known(store, one), _known(store, two)) == (True, False)
    assert store.tokens == 70
    _use(store, one, 60)  # alone, it stays: the turn before has seen to its size
    assert _known(store, one)
    store.remove(one.id)
    assert store.tokens == len(store) == 0


def test_a_new_stream_takes_its_tokens_room_at_once(store: StreamStore) -> None:
    one, two = _create(store, 60), _create(store, 50)

    assert (_known(store, one), _known(store, two)) == (False, True)
    assert store.tokens == 50


@pytest.mark.parametrize("tokens", [100, 50_000])
def test_a_stream_that_nothing_fits_behind_is_refused(store: StreamStore, tokens: int) -> None:
    """A limit of 1,000 tokens took a stream of 50,000, and then refused every append to it."""
    one = _create(store, 99)

    with pytest.raises(TooLarge):
        _create(store, tokens)
    with pytest.raises(TooLarge):
        store.create("a", "m", None, {}, pending=[Waiting("user", b"x" * 4 * tokens)])

    assert _known(store, one)  # at nobody's cost
    assert store.tokens == 99


def test_waiting_messages_are_counted_until_they_are_tokens(store: StreamStore) -> None:
    one = _create(store, 30)
    two = store.create("a", "m", None, {}, pending=[Waiting("user", b"12345")])
    assert two.size == 2 + 64
    assert store.tokens == 30 + 66

    three = _create(store, 5)  # one token too many

    assert [_known(store, s) for s in (one, two, three)] == [False, True, True]
    store.acquire(two.id)
    assert store.tokens == 71  # as long as the turn has not ended
    two.tokens.extend([1, 2])
    two.pending = ()
    store.release(two)
    assert store.tokens == 7


@pytest.mark.parametrize("text", ["", "a" * 5_000_000, "ä" * 999, "a" * 999 + "🙂"])
def test_a_waiting_message_takes_no_more_memory_than_it_counts(text: str) -> None:
    waiting = Waiting("user", text.encode())
    held = sys.getsizeof(waiting) + sys.getsizeof(waiting.content) + 8  # in its stream's tuple

    assert held <= TOKEN_BYTES * waiting.size
    assert waiting.message() == {"role": "user", "content": text}


def test_a_release_costs_the_same_beside_any_number_of_streams() -> None:
    """Not one look at another stream: it used to add up all of them."""
    store = StreamStore(most_streams=300, most_tokens=10**6, idle_seconds=60)
    streams = [_create(store, 10) for _ in range(300)]
    for other in streams[1:]:
        other.held = None  # type: ignore[assignment]  # whoever reads it raises

    _use(store, streams[0], 5)

    assert store.tokens == 3005


def test_numbers_of_a_stream() -> None:
    store = StreamStore(most_streams=3, most_tokens=1000, idle_seconds=60)
    stream = _create(store, 200)

    assert (stream.evicted, stream.evictions) == (SCHEDULE.evicted(200), SCHEDULE.evictions(200))
    stream.sampled = True
    assert stream.evicted == SCHEDULE.evicted(199)
    stream.schedule = None
    assert (stream.evicted, stream.evictions) == (0, 0)


def test_a_stream_may_expire_earlier(store: StreamStore, clock: _Clock) -> None:
    early = store.create("a", "m", SCHEDULE, {}, expires_after=5)
    late = _create(store)
    clock.now += 4
    _use(store, early)
    clock.now += 4
    assert _expires_in(store, early) == 1
    assert (_known(store, early), _known(store, late)) == (True, True)
    clock.now += 1
    assert (_known(store, early), _known(store, late)) == (False, True)
    assert len(store._expiring) <= 3


def test_times_of_expiry_do_not_pile_up() -> None:
    store = StreamStore(most_streams=3, most_tokens=100, idle_seconds=60)
    stream = _create(store)

    for _ in range(5000):
        _use(store, stream)

    assert len(store._expiring) <= 1100


def test_a_client_sees_its_streams_page_by_page(clock: _Clock) -> None:
    store = StreamStore(most_streams=100, most_tokens=10**4, idle_seconds=60, clock=clock)
    own = []
    for _turn in range(7):
        clock.now += 1
        own.append(_create(store, client="a"))
        _create(store, client="b")
    clock.now += 1
    _use(store, own[2])
    store.acquire(own[4].id)
    order = [own[one].id for one in (4, 2, 6, 5, 3, 1, 0)]

    found, after, more = [], None, True
    while more:
        page, more = store.of_client("a", after, 3)
        found += [one.id for one in page]
        after = found[-1]

    assert found == order
    with pytest.raises(UnknownStream):
        store.of_client("b", order[0], 3)
    assert store.of_client("c", None, 3) == ([], False)
