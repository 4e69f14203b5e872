"""Several API servers ask one process for their streams, and find the rules of one."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError, get_context
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import pytest

from sink_vllm.policy.schedule import Schedule
from sink_vllm.server.streams.archive import Archive, ArchiveError
from sink_vllm.server.streams.errors import (
    BusyStream,
    NoRoom,
    TooLarge,
    UnknownStream,
    Unreachable,
)
from sink_vllm.server.streams.interface import Numbers
from sink_vllm.server.streams.owner import Owner
from sink_vllm.server.streams.remote import RemoteStore
from sink_vllm.server.streams.store import StreamStore
from sink_vllm.server.streams.stored import Answered, Progress, StoredStream, Waiting

SCHEDULE = Schedule(sink_tokens=4, window=92, stride=32)


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def store(clock: _Clock) -> StreamStore:
    return StreamStore(most_streams=3, most_tokens=1000, idle_seconds=60, clock=clock)


@pytest.fixture
def owner(store: StreamStore) -> Iterator[Owner]:
    owner = Owner(store)
    yield owner
    owner.close()


@pytest.fixture
def servers(owner: Owner) -> Iterator[list[RemoteStore]]:
    servers = [RemoteStore(owner.address) for _ in range(2)]
    yield servers
    for server in servers:
        server.close()


def _create(server: RemoteStore, tokens: int = 0, client: str = "a") -> StoredStream:
    return server.create(client, "m", SCHEDULE, {}, tokens=[1] * tokens)


def _eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_stream_goes_on_at_another_server(servers: list[RemoteStore], store: StreamStore) -> None:
    one, other = servers
    made = one.create(
        "a",
        "lora",
        SCHEDULE,
        {"sink_tokens": 4},
        cache_salt="salt",
        pending=iter([Waiting("user", b"Hello")]),
        metadata={"k": "v"},
        expires_after=50,
        priority=-3,
    )

    taken = other.acquire(made.id)
    assert (taken.options, taken.cache_salt, taken.priority) == ({"sink_tokens": 4}, "salt", -3)
    assert taken.pending == (Waiting("user", b"Hello"),)
    taken.held.extend([1, 2, 3])
    taken.pending, taken.turns, taken.sampled = (), 1, True
    taken.answered = Answered("key", "asked", "{}")
    assert one.get(made.id).busy
    other.release(taken)

    seen = other.get(made.id)
    assert (seen.position, seen.turns, seen.busy, seen.answered) == (3, 1, False, taken.answered)
    again = one.acquire(made.id)
    assert list(again.tokens) == [1, 2, 3]
    assert again.sampled
    assert store.tokens == 3 + 1


def test_one_turn_at_a_time_over_all_servers(servers: list[RemoteStore]) -> None:
    one, other = servers
    stream = _create(one)
    taken = one.acquire(stream.id)

    for server in servers:
        with pytest.raises(BusyStream):
            server.acquire(stream.id)
        with pytest.raises(BusyStream):
            server.remove(stream.id)
    one.release(taken)
    other.release(other.acquire(stream.id))
    other.remove(stream.id)
    for server in servers:
        with pytest.raises(UnknownStream):
            server.get(stream.id)


class _Lost:
    """Gives its stream back when it is collected, as a turn does."""

    def __init__(self, server: RemoteStore, stream: StoredStream) -> None:
        self.release = lambda: server.release(stream)

    def __del__(self) -> None:
        self.release()


def test_a_turn_in_progress_is_seen_at_every_server(servers: list[RemoteStore]) -> None:
    one, other = servers
    stream = one.acquire(_create(one, tokens=3).id)

    one.report(stream.id, Progress(9, 6, 0.5))
    other.report(stream.id, Progress(1, 1, 0.1))  # it has not taken the stream

    _eventually(lambda: other.get(stream.id).progress is not None)
    assert other.get(stream.id).progress == Progress(9, 6, 0.5)
    one.release(stream)
    assert other.get(stream.id).progress is stream.progress is None


def test_a_lost_turn_may_be_collected_anywhere(
    servers: list[RemoteStore], store: StreamStore
) -> None:
    """In the thread that reads the answers, which must not wait for one."""
    lost = [_Lost(servers[0], servers[0].acquire(_create(servers[0]).id))]
    assert store.in_use == 1

    servers[0].watch(lambda _numbers: lost.clear())

    _eventually(lambda: store.in_use == 0)
    assert servers[0].of_client("a", None, 9)[0]


def test_limits_and_shares_are_of_all_servers(servers: list[RemoteStore]) -> None:
    one, other = servers
    streams = [_create(server) for server in (one, other, one)]
    newest = _create(other)
    with pytest.raises(UnknownStream):
        one.get(streams[0].id)

    for server, stream in zip((one, other, one), (*streams[1:], newest), strict=True):
        server.acquire(stream.id)
    with pytest.raises(NoRoom) as refused:
        _create(one)
    assert refused.value.resource == "streams"
    with pytest.raises(TooLarge) as large:
        _create(one, 1000)
    assert large.value.tokens == 1000


def test_expiry_and_listing(servers: list[RemoteStore], clock: _Clock) -> None:
    one, other = servers
    streams = [_create(server, 5) for server in (one, other, one)]
    clock.now += 40
    other.release(other.acquire(streams[0].id))

    page, more = one.of_client("a", None, 2)
    assert ([each.id for each in page], more) == ([streams[0].id, streams[2].id], True)
    assert [(each.position, len(each.tokens)) for each in page] == [(5, 0)] * 2
    clock.now += 30
    page, more = other.of_client("a", None, 2)
    assert ([each.id for each in page], more) == ([streams[0].id], False)


def test_numbers_come_with_every_answer_and_without_one(
    servers: list[RemoteStore], clock: _Clock
) -> None:
    seen: list[Numbers] = []
    servers[1].watch(seen.append)
    stream = _create(servers[0], 7)  # by another server: nothing is asked here
    _eventually(lambda: seen[-1:] == [Numbers(1, 0, 7)])
    servers[1].acquire(stream.id)
    assert seen[-1] == Numbers(1, 1, 7)
    servers[1].release(stream)
    clock.now += 100
    _eventually(lambda: seen[-1] == Numbers(0, 0, 0))


def _take_and_hang(address: str, stream_id: str, taken: Any) -> None:
    server = RemoteStore(address)
    stream = server.acquire(stream_id)
    stream.held.extend([9] * 50)
    taken.set()
    time.sleep(600)


def test_the_turn_of_a_killed_server_is_undone(
    servers: list[RemoteStore], owner: Owner, store: StreamStore
) -> None:
    stream = _create(servers[0], 5)
    context = get_context("fork")
    taken = context.Event()
    process = context.Process(target=_take_and_hang, args=(owner.address, stream.id, taken))
    process.start()
    assert taken.wait(60)
    with pytest.raises(BusyStream):
        servers[0].acquire(stream.id)

    process.kill()
    process.join()

    _eventually(lambda: store.in_use == 0)
    assert list(servers[0].acquire(stream.id).tokens) == [1] * 5


def test_without_an_owner_there_is_a_sentence(tmp_path: Path) -> None:
    script = (
        "import multiprocessing, sys, time\n"
        "from sink_vllm.server.streams.owner import Owner\n"
        "from sink_vllm.server.streams.store import StreamStore\n"
        "multiprocessing.current_process().authkey = b'k'\n"
        "store = StreamStore(most_streams=3, most_tokens=100, idle_seconds=60)\n"
        "print(Owner(store).address, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    with pytest.raises(AuthenticationError):
        RemoteStore(address)  # with this process' key
    from multiprocessing import current_process

    own, current_process().authkey = current_process().authkey, b"k"
    try:
        server = RemoteStore(address)
    finally:
        current_process().authkey = own
    stream = _create(server)
    process.kill()
    process.wait()

    for call in (server.get, server.acquire, server.remove):
        with pytest.raises(Unreachable, match="has ended"):
            call(stream.id)
    server.release(stream)  # a turn that ends has nobody to tell
    process.stdout.close()


def test_who_knows_no_key_is_not_answered(owner: Owner, servers: list[RemoteStore]) -> None:
    with pytest.raises((AuthenticationError, EOFError, ConnectionError)):
        Client(owner.address, "AF_UNIX", authkey=b"guessed").recv()
    assert os.stat(Path(owner.address).parent).st_mode & 0o077 == 0

    _create(servers[0])  # and the others are answered as before


def test_the_archive_is_written_before_a_turn_ends(tmp_path: Path) -> None:
    archive = Archive(str(tmp_path / "streams.db"), {})
    owner = Owner(StreamStore(most_streams=3, most_tokens=10**6, idle_seconds=60, archive=archive))
    server = RemoteStore(owner.address)
    assert server.limits.is_archived
    stream = server.acquire(_create(server).id)
    stream.held.extend([1, 2, 3])
    server.save(stream).result()

    ((kept, _),), _ = archive.load(time.time())
    assert list(kept.tokens) == [1, 2, 3]
    archive._thread.submit(lambda: archive._db.execute("PRAGMA query_only=1")).result()
    with pytest.raises(ArchiveError, match="cannot be written"):
        server.save(stream).result()
    server.close()
    owner.close()
    archive.close()
