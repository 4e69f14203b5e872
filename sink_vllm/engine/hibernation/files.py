"""Pages in a folder: one file each, found by the hash of the page.

A file is whole or it is not there: it is written under another name first, and begins with its
length and a checksum of page and hash, which are compared before its page may be used. What is
damaged, short or gone is forgotten; nothing is ever repaired or guessed. Beyond so many bytes the
files that were not used for longest are deleted.
"""

import contextlib
import hashlib
import io
import os
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from vllm.logger import init_logger

# Below vLLM's own logger, whose handlers print it.
logger = init_logger(f"vllm.{__name__}")

_HEADER = struct.Struct("<8sQ16s")
_MAGIC = b"sinkpage"
_SUFFIX = ".page"
_QUIET = 60.0
"""Seconds between two lines of the log about files that cannot be written."""


class PageFiles:
    """Used by two threads: one writes, the other reads and forgets."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """Find the files that are there; their pages are read when they are needed.

        Args:
            folder: exists.
            most_bytes: of all files together.
        """
        self._folder, self._most = folder, most_bytes
        self._lock = threading.Lock()
        self._generation = 0
        self._sizes: OrderedDict[bytes, int] = OrderedDict()
        self.nbytes = 0
        self._told = -_QUIET
        found = []
        for path in folder.glob(f"*/*{_SUFFIX}"):
            with contextlib.suppress(OSError, ValueError):
                status = path.stat()
                found.append((status.st_mtime_ns, bytes.fromhex(path.stem), status.st_size))
        for _, key, size in sorted(found):
            self._add(key, size)
        self._make_room()

    def __contains__(self, key: object) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def write(self, key: bytes, parts: Sequence[memoryview], generation: int) -> bool:
        """Write a page, unless all were forgotten since ``generation``; False if it cannot be."""
        size = sum(len(part) for part in parts)
        header = _HEADER.pack(_MAGIC, size, _checksum(key, parts))
        path = self._path(key)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            with open(unfinished, "wb", buffering=0) as file:
                for piece in (memoryview(header), *parts):
                    _write_all(file.fileno(), piece)
            with self._lock:
                if generation != self._generation:
                    unfinished.unlink()
                    return False
                os.replace(unfinished, path)
                self._add(key, size + _HEADER.size)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            self._complain(error)
            return False
        self._make_room()
        return True

    def read(self, key: bytes, parts: Sequence[memoryview]) -> bool:
        """Read a page into ``parts``; if False they hold anything, and the file is forgotten."""
        path = self._path(key)
        try:
            with open(path, "rb", buffering=0) as file:
                magic, size, checksum = _HEADER.unpack(file.read(_HEADER.size))
                whole = magic == _MAGIC and size == sum(len(part) for part in parts)
                whole = whole and all(_read_all(file, part) for part in parts)
                if whole and checksum == _checksum(key, parts):
                    with self._lock:
                        if key in self._sizes:
                            self._sizes.move_to_end(key)
                    os.utime(path)  # so that a start after this one knows
                    return True
            logger.warning("StreamingLLM: %s is damaged and not used.", path)
        except (OSError, struct.error) as error:
            logger.warning("StreamingLLM: %s cannot be read and is not used: %s.", path, error)
        self.forget(key)
        return False

    def forget(self, key: bytes) -> None:
        """Delete a page."""
        with self._lock:
            self.nbytes -= self._sizes.pop(key, 0)
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def clear(self) -> None:
        """Delete all pages, those that are being written included."""
        with self._lock:
            self._generation += 1
            keys = list(self._sizes)
        for key in keys:
            self.forget(key)

    @property
    def generation(self) -> int:
        """Changes when all pages are forgotten."""
        return self._generation

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self._folder / name[:2] / f"{name}{_SUFFIX}"

    def _add(self, key: bytes, size: int) -> None:
        self.nbytes += size - self._sizes.pop(key, 0)
        self._sizes[key] = size

    def _make_room(self) -> None:
        while self.nbytes > self._most and self._sizes:
            self.forget(next(iter(self._sizes)))

    def _complain(self, error: OSError) -> None:
        if time.monotonic() - self._told >= _QUIET:
            self._told = time.monotonic()
            logger.warning(
                "StreamingLLM: pages cannot be written to %s and are kept in host memory only: %s.",
                self._folder,
                error,
            )


def _checksum(key: bytes, parts: Sequence[memoryview]) -> bytes:
    digest = hashlib.blake2b(key, digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _write_all(descriptor: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(descriptor, piece) :]


def _read_all(file: io.FileIO, part: memoryview) -> bool:
    """Whether the file had that many bytes more."""
    while part:
        count = file.readinto(part)
        if not count:
            return False
        part = part[count:]
    return True
