"""Pages on disk behind those in host memory: written in the background, read when asked for.

The workers' slots are memory of the engine core, too (``compat.shared``), so files are written
from there and read into there, and workers know nothing of files. A page is written once its turn
has ended and the workers have copied it out; its slot is held until then. Reading waits for the
disk, in the engine's loop: the pages of a stream whose pages have left host memory, once per turn.
"""

import contextlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

from sink_vllm.engine.hibernation.files import PageFiles
from sink_vllm.policy.slots import Slots

_MOST_WAITING = 1024
"""Pages that wait to be written; what comes on top stays in host memory only."""


class Disk:
    """Files of pages, and the slots that they are written from and read into."""

    def __init__(
        self,
        folder: Path,
        most_bytes: int,
        slots: Slots,
        memories: list[memoryview],
        lock: IO[str] | None = None,
    ) -> None:
        """
        Args:
            folder: of this engine alone.
            most_bytes: that its files may take.
            slots: of host memory.
            memories: all slots of one worker each.
            lock: of the folder, held as long as this object lives.
        """
        self.files = PageFiles(folder, most_bytes)
        self._slots, self._folder_lock = slots, lock
        self._rows = [memory.cast("B") for memory in memories]
        self._due: dict[bytes, None] = {}
        self._storing: set[int] = set()
        self._written: deque[int] = deque()
        self._waiting: set[Future[None]] = set()
        self._writer = ThreadPoolExecutor(1, "sink-disk")

    def __contains__(self, key: object) -> bool:
        return key in self.files

    def will_store(self, slot: int) -> None:
        """A step that is being planned copies a page into the slot."""
        self._storing.add(slot)

    def stored(self, slot: int) -> None:
        """The page is there."""
        self._storing.discard(slot)

    def keep(self, key: bytes) -> None:
        """Write a page that has a slot, as soon as it is there."""
        if key not in self.files:
            self._due[key] = None

    def flush(self) -> None:
        """Begin to write what is there, and give back the slots of what has been written."""
        while self._written:
            self._slots.release(self._written.popleft())
        for key in list(self._due):
            slot = self._slots.slot_of.get(key)
            if slot in self._storing:
                continue
            del self._due[key]
            if slot is not None and len(self._waiting) < _MOST_WAITING:
                self._slots.hold(slot)
                generation = self.files.generation
                future = self._writer.submit(self._write, key, slot, generation)
                self._waiting.add(future)
                future.add_done_callback(self._waiting.discard)

    def _write(self, key: bytes, slot: int, generation: int) -> None:
        try:
            self.files.write(key, self._parts(slot), generation)
        finally:
            self._written.append(slot)

    def read(self, key: bytes) -> bool:
        """Give a page a slot and read it; False if it is not there, or no slot is free."""
        slot = self._slots.take(key)
        if slot is None:
            return False
        if self.files.read(key, self._parts(slot)):
            return True
        self._slots.drop(key)
        return False

    def _parts(self, slot: int) -> list[memoryview]:
        size = len(self._rows[0]) // self._slots.count
        return [rows[slot * size : (slot + 1) * size] for rows in self._rows]

    def wait(self) -> None:
        """Until everything that could be written is."""
        self.flush()
        for future in list(self._waiting):
            with contextlib.suppress(Exception):
                future.result()
        self.flush()

    def close(self) -> None:
        """Write what there is, and let go of the folder."""
        self.flush()
        self._writer.shutdown()
        if self._folder_lock is not None:
            self._folder_lock.close()

    def clear(self) -> None:
        """Forget all pages."""
        self._due.clear()
        self.files.clear()
