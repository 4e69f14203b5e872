"""The streams a server remembers: number, tokens and time are bounded; use decides who goes."""

import pytest

from sink_vllm.schedule import Schedule
from sink_vllm.service.store import BusyStream, NoRoom, StoredStream, StreamStore, UnknownStream

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


def _create(store: StreamStore, tokens: int = 0) -> StoredStream:
    stream = store.create("m", SCHEDULE, {})
    stream.tokens.extend([1] * tokens)
    store.release(stream)
    return stream


def _known(store: StreamStore, stream: StoredStream) -> bool:
    try:
        store.get(stream.id)
    except UnknownStream:
        return False
    return True


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

    _create(store)
    assert [_known(store, s) for s in streams] == [True, True, False]
    store.acquire(list(store._streams)[-1])
    with pytest.raises(NoRoom):
        store.create("m", SCHEDULE, {})


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
    assert store.expires_in(used) == 50
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


def test_numbers_of_a_stream(store: StreamStore) -> None:
    stream = _create(store, 200)

    assert (stream.evicted, stream.evictions) == (SCHEDULE.evicted(200), SCHEDULE.evictions(200))
    stream.sampled = True
    assert stream.evicted == SCHEDULE.evicted(199)
    stream.schedule = None
    assert (stream.evicted, stream.evictions) == (0, 0)
