"""Stored streams on disk: what outlives the server (``--sink-streams-db``).

One row of an SQLite database is one stream as its last turn left it. A turn is written as a whole
before its answer ends, so a server that is killed in the middle of one finds the stream as it was
before. Pages are not in here: a stream that comes back goes on from its survivors, exactly if it
had not evicted anything yet.

Everything runs on one thread of its own, in order. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sink_vllm.policy.parked import Chain
from sink_vllm.policy.schedule import Schedule
from sink_vllm.server.streams.held import Held
from sink_vllm.server.streams.stored import Answered, StoredStream, Waiting

_FORMAT = 1
_TABLE = """
CREATE TABLE IF NOT EXISTS streams (
    id TEXT PRIMARY KEY, made_by TEXT NOT NULL, used REAL NOT NULL,
    fields TEXT NOT NULL, tokens BLOB NOT NULL, digest BLOB NOT NULL
) WITHOUT ROWID
"""
_T = TypeVar("_T")


class ArchiveError(RuntimeError):
    """The database cannot be used, or a stream could not be written; one sentence."""


class Archive:
    """The database of one server."""

    def __init__(self, path: str, made_by: dict[str, Any]) -> None:
        """
        Args:
            path: of the database; made if there is none.
            made_by: model, policy and version of this server, as its streams are marked.

        Raises:
            ArchiveError: the path cannot be written, is no database or a damaged one, is of another
                format, or another server has it open.
        """
        self.path = path
        self.made_by = made_by
        self._thread = ThreadPoolExecutor(1, "sink_vllm-streams")
        try:
            self._thread.submit(self._open).result()
        except BaseException:
            self._thread.shutdown()
            raise

    def _open(self) -> None:
        with self._explained("cannot be used"):
            if not Path(self.path).parent.is_dir():
                raise sqlite3.OperationalError("its directory does not exist")
            self._db = sqlite3.connect(self.path, timeout=0, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def _prepare(self) -> None:
        execute = self._db.execute
        # Held until this process ends, however that is.
        execute("PRAGMA locking_mode=EXCLUSIVE")
        execute("PRAGMA journal_mode=WAL")
        execute("PRAGMA synchronous=NORMAL")
        execute("BEGIN EXCLUSIVE")
        ((version,),) = execute("PRAGMA user_version")
        if version not in (0, _FORMAT):
            raise sqlite3.DatabaseError(f"its format is {version}, and this version's is {_FORMAT}")
        ((health,),) = execute("PRAGMA quick_check(1)")
        if health != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {health}")
        execute(_TABLE)
        execute(f"PRAGMA user_version={_FORMAT}")
        execute("COMMIT")

    def load(self, now: float) -> tuple[list[tuple[StoredStream, float]], dict[str, str]]:
        """All streams, the least recently used first.

        Args:
            now: Unix time.

        Returns:
            The streams, each with the seconds since it was used; and why others cannot be gone on
            with here, by their ids.
        """
        return self._thread.submit(self._load, now).result()

    def _load(self, now: float) -> tuple[list[tuple[StoredStream, float]], dict[str, str]]:
        streams: list[tuple[StoredStream, float]] = []
        refused: dict[str, str] = {}
        with self._explained("cannot be read"):
            rows = self._db.execute("SELECT * FROM streams ORDER BY used").fetchall()
        for stream_id, made_by, used, fields, tokens, digest in rows:
            if digest != _digest(stream_id, made_by, used, fields, tokens):
                refused[stream_id] = (
                    f"The record of stream {stream_id!r} in {self.path} is damaged; delete the "
                    "stream, and create it again."
                )
            elif other := self._differences(json.loads(made_by)):
                refused[stream_id] = (
                    f"Stream {stream_id!r} was stored by a server with {other}; start the server "
                    "like that to go on with it, or delete the stream."
                )
            else:
                streams.append((_stream(stream_id, json.loads(fields), tokens), max(now - used, 0)))
        return streams, refused

    def _differences(self, made_by: dict[str, Any]) -> str:
        names = {**self.made_by, **made_by}
        return " and ".join(
            f"{name} {made_by.get(name)!r} (here {self.made_by.get(name)!r})"
            for name in names
            if made_by.get(name) != self.made_by.get(name)
        )

    def save(self, stream: StoredStream, used: float) -> Future[None]:
        """Write a stream as it is now.

        Args:
            stream: read before this returns.
            used: Unix time.

        Returns:
            What ends when it is written; raises ``ArchiveError`` if it cannot be, and then the row
            is as it was.
        """
        made_by, fields = json.dumps(self.made_by), json.dumps(_fields(stream))
        tokens = stream.held.tokens.tobytes()
        digest = _digest(stream.id, made_by, used, fields, tokens)
        row = (stream.id, made_by, used, fields, tokens, digest)
        return self._write("INSERT OR REPLACE INTO streams VALUES (?, ?, ?, ?, ?, ?)", row)

    def remove(self, stream_id: str) -> Future[None]:
        """Forget a stream; see :meth:`save`."""
        return self._write("DELETE FROM streams WHERE id = ?", (stream_id,))

    def _write(self, statement: str, values: tuple[Any, ...]) -> Future[None]:
        def write() -> None:
            with self._explained("cannot be written"):
                self._db.execute(statement, values)

        return self._thread.submit(write)

    def close(self) -> None:
        """Write what is still to be written, and let another server have the database."""
        closing: Callable[[], None] = self._db.close
        self._thread.submit(closing).result()
        self._thread.shutdown()

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            reason = str(error)
            if "locked" in reason:
                reason = "another server has it open"
            raise ArchiveError(
                f"--sink-streams-db={self.path!r} {what}: {reason}; use another path, or make room "
                "and permissions for this one."
            ) from error


def _digest(stream_id: str, made_by: str, used: float, fields: str, tokens: bytes) -> bytes:
    text = "\0".join((stream_id, made_by, repr(used), fields))
    return hashlib.sha256(text.encode() + b"\0" + tokens).digest()


def _fields(stream: StoredStream) -> dict[str, Any]:
    schedule, chain = stream.schedule, stream.held.chain
    return {
        "client": stream.client,
        "model": stream.model,
        "schedule": None
        if schedule is None
        else [schedule.sink_tokens, schedule.window, schedule.stride],
        "options": stream.options,
        "created": stream.created,
        "cache_salt": stream.cache_salt,
        "missing": stream.held.missing,
        "base": chain.base,
        "anchors": [[position, block_hash.hex()] for position, block_hash in chain.anchors],
        "sinks": [block_hash.hex() for block_hash in chain.sinks],
        "pending": [[one.role, one.content.decode()] for one in stream.pending],
        "tail": stream.tail,
        "open": stream.open,
        "sampled": stream.sampled,
        "turns": stream.turns,
        "metadata": stream.metadata,
        "expires_after": stream.expires_after,
        "priority": stream.priority,
        "answered": stream.answered,
    }


def _stream(stream_id: str, fields: dict[str, Any], tokens: bytes) -> StoredStream:
    schedule = fields["schedule"]
    ids = array("i")
    ids.frombytes(tokens)
    return StoredStream(
        id=stream_id,
        client=fields["client"],
        model=fields["model"],
        schedule=None
        if schedule is None
        else Schedule(sink_tokens=schedule[0], window=schedule[1], stride=schedule[2]),
        options=fields["options"],
        created=fields["created"],
        used=0.0,
        cache_salt=fields["cache_salt"],
        held=Held(
            ids,
            fields["missing"],
            Chain(
                base=fields["base"],
                anchors=tuple((at, bytes.fromhex(one)) for at, one in fields["anchors"]),
                sinks=tuple(map(bytes.fromhex, fields["sinks"])),
            ),
        ),
        pending=tuple(Waiting(role, content.encode()) for role, content in fields["pending"]),
        tail=fields["tail"],
        open=fields["open"],
        sampled=fields["sampled"],
        turns=fields["turns"],
        metadata=fields["metadata"],
        expires_after=fields["expires_after"],
        priority=fields.get("priority", 0),  # not in those of earlier versions
        answered=Answered(*fields["answered"]) if fields["answered"] else None,
    )
