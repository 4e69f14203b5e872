"""Streams that outlive their server: as their last turn left them, or a sentence."""

import multiprocessing
import os
import signal
import sqlite3
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sink_vllm.policy.parked import Chain
from sink_vllm.policy.schedule import Schedule
from sink_vllm.server.streams.archive import Archive, ArchiveError
from sink_vllm.server.streams.held import Held
from sink_vllm.server.streams.store import StreamStore, UnknownStream, UnusableStream
from sink_vllm.server.streams.stored import StoredStream, Waiting

SCHEDULE = Schedule(sink_tokens=4, window=92, stride=32)
MADE_BY = {"model": "m", "dtype": "float32", "sink_tokens": 4, "sink_vllm": "0.1.0"}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "streams.db")


@pytest.fixture
def archive(path: str) -> Iterator[Archive]:
    archive = Archive(path, MADE_BY)
    yield archive
    archive.close()


def _store(archive: Archive, **limits: Any) -> StreamStore:
    defaults = {"most_streams": 100, "most_tokens": 10**6, "idle_seconds": 3600}
    return StreamStore(**(defaults | limits), archive=archive)


def _long(store: StreamStore, client: str = "a") -> StoredStream:
    """A stream that has evicted, with everything that can be in one."""
    stream = store.create(client, "lora", SCHEDULE, {"sink_tokens": 4}, cache_salt="salt")
    stream.held = Held(
        array("i", [1, 2, 3, 4, *range(2**31 - 200, 2**31 - 1)]),
        992,
        Chain(base=320, anchors=((676, b"\x00\xff"), (708, b"h")), sinks=(b"s", b"\x80")),
    )
    stream.pending = (Waiting("user", "ä\0".encode()),)
    stream.tail, stream.open, stream.sampled, stream.turns = "assistant", True, True, 7
    store.save(stream).result()
    return stream


def _same(one: StoredStream, other: StoredStream) -> bool:
    names = [name for name in StoredStream.__slots__ if name not in ("used", "counted", "busy")]
    return all(getattr(one, name) == getattr(other, name) for name in names)


def test_a_stream_comes_back_as_it_was(archive: Archive) -> None:
    store = _store(archive)
    long, full = _long(store), store.create("b", "m", None, {"kv_policy": "full"}, tokens=[7, 8])
    store.save(full).result()

    again = _store(archive)

    assert len(again) == 2
    assert _same(again.get(long.id), long)
    assert _same(again.get(full.id), full)
    assert again.tokens == store.tokens - store.get(long.id).counted + long.size


def test_what_is_forgotten_stays_forgotten(archive: Archive) -> None:
    store = _store(archive, most_streams=2)
    streams = [_long(store) for _ in range(3)]
    store.remove(streams[1].id)

    again = _store(archive)

    assert len(again) == 1
    assert _same(again.get(streams[2].id), streams[2])


def test_limits_hold_for_what_comes_back(archive: Archive) -> None:
    """The most recently used ones stay, and what nobody has used for too long goes."""
    store = _store(archive)
    streams = [_long(store) for _ in range(5)]
    archive.save(streams[0], time.time() - 4000).result()

    again = _store(archive, most_streams=3)

    assert len(again) == 3
    assert all(_same(again.get(one.id), one) for one in streams[2:])
    with pytest.raises(UnknownStream):
        again.get(streams[0].id)
    assert again.get(streams[2].id).expires(3600) - again.clock() > 3590


def test_a_stream_of_another_server_is_refused_by_itself(path: str) -> None:
    archive = Archive(path, MADE_BY)
    stream = _long(_store(archive))
    archive.close()
    archive = Archive(path, MADE_BY | {"dtype": "bfloat16"})
    store = _store(archive)
    own = _long(store)

    for attempt in (store.get, store.acquire):
        with pytest.raises(UnusableStream, match=r"dtype 'float32' \(here 'bfloat16'\)"):
            attempt(stream.id)
    assert _same(store.get(own.id), own)
    archive.close()

    archive = Archive(path, MADE_BY)  # nothing was lost by the attempt
    store = _store(archive)
    assert _same(store.get(stream.id), stream)
    with pytest.raises(UnusableStream):
        store.get(own.id)
    store.remove(own.id)
    with pytest.raises(UnknownStream):
        store.get(own.id)
    archive.close()


@pytest.mark.parametrize("column", ["fields", "tokens", "made_by", "used"])
def test_a_damaged_record_is_refused_by_itself(path: str, column: str) -> None:
    archive = Archive(path, MADE_BY)
    store = _store(archive)
    damaged, other = _long(store), _long(store)
    archive.close()
    with sqlite3.connect(path) as db:
        value = {"fields": "{", "tokens": b"\0" * 7, "made_by": "{}", "used": 1e9}[column]
        db.execute(f"UPDATE streams SET {column} = ? WHERE id = ?", (value, damaged.id))
    db.close()
    archive = Archive(path, MADE_BY)

    store = _store(archive)

    with pytest.raises(UnusableStream, match="damaged"):
        store.get(damaged.id)
    assert _same(store.get(other.id), other)
    archive.close()


def test_two_servers_on_one_database(path: str) -> None:
    archive = Archive(path, MADE_BY)
    with pytest.raises(ArchiveError, match="another server has it open"):
        Archive(path, MADE_BY)
    archive.close()
    Archive(path, MADE_BY).close()


@pytest.mark.parametrize("what", ["text", "truncated", "another format"])
def test_what_is_no_database_of_ours(path: str, what: str) -> None:
    if what == "text":
        Path(path).write_text("not a database, and long enough to be one " * 100)
    else:
        archive = Archive(path, MADE_BY)
        store = _store(archive)
        for _ in range(50):
            _long(store)
        archive.close()
        if what == "truncated":
            os.truncate(path, os.path.getsize(path) // 2)
        else:
            with sqlite3.connect(path) as db:
                db.execute("PRAGMA user_version=9")
            db.close()

    with pytest.raises(ArchiveError, match=r"--sink-streams-db='.*' cannot be used: .*; use"):
        Archive(path, MADE_BY)


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "streams.db", Path("/proc/streams.db")):
        with pytest.raises(ArchiveError, match="cannot be used"):
            Archive(str(path), MADE_BY)


def test_a_full_disk_leaves_the_record_as_it_was(archive: Archive) -> None:
    """By SQLite's own limit on its pages, which fails as a full disk does."""
    store = _store(archive)
    stream = _long(store)
    before = stream.held.copy()
    limit = "PRAGMA max_page_count=1"
    archive._thread.submit(lambda: archive._db.execute(limit).fetchall()).result()
    stream.held.extend([1] * 50_000)

    with pytest.raises(ArchiveError, match=r"cannot be written: .*full"):
        store.save(stream).result()

    assert _store(archive).get(stream.id).held == before


def _write_without_end(path: str, ready: Any) -> None:
    archive = Archive(path, MADE_BY)
    store = _store(archive)
    stream = store.create("a", "m", SCHEDULE, {}, tokens=[0])
    for turn in range(1, 10**9):
        stream.turns = turn
        stream.held = Held(array("i", [turn] * (turn % 500 + 1)))
        store.save(stream).result()
        if turn == 1:
            ready.set()


def test_a_kill_at_any_time_leaves_a_whole_turn(path: str) -> None:
    """Ten times at ten moments: the record is that of one turn, never a mixture, and readable."""
    context = multiprocessing.get_context("fork")
    for attempt in range(10):
        ready = context.Event()
        process = context.Process(target=_write_without_end, args=(path, ready))
        process.start()
        assert ready.wait(30)
        time.sleep(0.013 * attempt)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        archive = Archive(path, MADE_BY)
        streams, refused = archive.load(time.time())
        assert len(streams) == attempt + 1
        assert not refused
        for stream, _ in streams:
            assert stream.held.tokens == array("i", [stream.turns] * (stream.turns % 500 + 1))
        archive.close()
